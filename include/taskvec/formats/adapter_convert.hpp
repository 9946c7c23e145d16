// Adapters written in any dialect, so that what reads that dialect gets the same update.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/overflow.hpp>
#include <taskvec/formats/adapter_file.hpp>
#include <taskvec/formats/json.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How write_adapter() and its parts store factors and write files.
struct adapter_write_options {
    std::optional<dtype> output{}; ///< dtype of all factors; empty: each module's as it was stored
    durability mode = durability::synchronised; ///< how hard the file is forced to disk
    overflow on_overflow = overflow::error; ///< a factor that its dtype cannot hold
    gguf_target target{}; ///< of GGUF: the model, as gguf_target_of() its config.json; empty: what the adapter says
    std::string base_name{}; ///< of PEFT and MLX: base_model_name_or_path, model; empty: what the adapter says
    std::string task_type{}; ///< of PEFT: "CAUSAL_LM", …; empty: what the adapter says
};

/// Something of an adapter that a dialect has no place for.
struct adapter_loss {
    std::string what{}, why{}; ///< "module 'x'" and "it is an embedding", say
};

/// An adapter in a dialect: the tensors of its file, and what stands in adapter_config.json (empty: the dialect has
/// none).
struct written_adapter {
    std::vector<tensor_spec> specs{}; ///< of the file
    std::vector<std::vector<std::byte>> bytes{}; ///< of each tensor
    metadata_map metadata{}; ///< of its header, beside the format
    std::string config{}; ///< text of adapter_config.json
    std::string file_name{}; ///< in a directory; empty: the dialect is a file
    std::vector<std::byte> whole{}; ///< the file, where it is no safetensors file (GGUF)
    std::uint64_t saturated = 0; ///< entries that became the largest number of their dtype (overflow::saturate)
};

namespace detail {

class adapter_writer {
public:
    adapter_writer(written_adapter& out, overflow how)
        : out_(out)
        , how_(how)
    { }

    /// rows×cols entries by value(i, j), as a tensor of `shape`.
    template <class Value>
    void add(const std::string& name, dtype type, extents shape, std::size_t rows, std::size_t cols, const Value& value)
    {
        auto& bytes = out_.bytes.emplace_back();
        visit_storage(type, name, [&]<class S>(std::type_identity<S>) {
            bytes.resize(rows * cols * sizeof(S));
            for (std::size_t i = 0; i < rows; ++i) {
                for (std::size_t j = 0; j < cols; ++j) {
                    const double exact = value(i, j);
                    const auto refuse = [&] {
                        raise<nonfinite_error>(error_code::result_overflow,
                            message("factor '", name, "' would hold ", exact, " at index ", i * cols + j, ", which ",
                                to_string(type), " cannot; ", if_narrow<S>("choose a wider dtype for the adapter, or "),
                                "let it saturate or propagate (overflow)"));
                    };
                    auto rounded = static_cast<arithmetic_type<S>>(exact);
                    if (how_ == overflow::saturate && std::isfinite(exact) && !std::isfinite(rounded)) {
                        rounded = std::numeric_limits<arithmetic_type<S>>::max() * (exact < 0 ? -1 : 1);
                        ++out_.saturated;
                    }
                    const S stored = narrow_within<S>(rounded, how_, out_.saturated, refuse);
                    std::memcpy(bytes.data() + (i * cols + j) * sizeof(S), &stored, sizeof(S));
                }
            }
        });
        out_.specs.push_back({name, type, std::move(shape)});
    }
    void add(const std::string& name, const peft_tensor& tensor)
    {
        out_.bytes.push_back(tensor.bytes);
        out_.specs.push_back({name, tensor.dtype, tensor.shape});
    }

private:
    written_adapter& out_;
    overflow how_;
};

/// Throws nonfinite_error, by the names that the adapter's own file has where it is PEFT's, for a factor with NaN or
/// infinity.
template <arithmetic_element T>
void check_finite_factors(const adapter_contents<T>& adapter)
{
    for (const auto& one : adapter.modules) {
        const auto& module = one.first;
        const auto& made = one.second;
        const auto check = [&](std::size_t rows, std::size_t cols, std::string_view what, std::string_view in_peft,
                               const auto& value) {
            for (std::size_t i = 0; i < rows * cols; ++i) {
                const auto found = static_cast<double>(value(i / cols, i % cols));
                if (std::isfinite(found)) { continue; }
                const bool own = adapter.dialect == adapter_dialect::peft && made.kind != "LoHa" && made.kind != "LoKr";
                raise<nonfinite_error>(error_code::not_finite,
                    message(own ? message("tensor '", peft_prefix, module, in_peft, "'")
                                : message("module '", module, "': ", what),
                        " of ", adapter.label, " holds ", std::isnan(found) ? "NaN" : "infinity", " at index ", i,
                        ": repair the adapter, or let it propagate (overflow)"));
            }
        };
        const auto entry_of = [](const auto& factor) {
            return [&factor](std::size_t i, std::size_t j) { return factor(i, j); };
        };
        const auto &a = made.update.a, &b = made.update.b;
        check(a.rows(), a.cols(), "its factor A", made.embedding ? ".lora_embedding_A" : ".lora_A.weight", entry_of(a));
        check(b.rows(), b.cols(), "its factor B", made.embedding ? ".lora_embedding_B" : ".lora_B.weight", entry_of(b));
        check(1, made.magnitude.size(), "its magnitude", ".lora_magnitude_vector",
            [&](std::size_t, std::size_t o) { return made.magnitude[o]; });
        if (made.bias.rank() > 0) {
            check(made.bias.a.rows(), made.bias.a.cols(), "its bias", ".lora_B.bias", entry_of(made.bias.a));
        }
    }
}

/// Whether a module is called as kohya calls them, dots being underscores.
[[nodiscard]] inline bool is_kohya_name(std::string_view module) noexcept
{
    return !kohya_component_of(module).prefix.empty();
}
/// The component of diffusers' that a module without one is of, by the parts that models there are made of; empty:
/// nothing tells.
[[nodiscard]] inline std::string_view component_by_parts(std::string_view module) noexcept
{
    const auto first = module.substr(0, module.find('.'));
    if (first == "text_model") { return "text_encoder"; }
    for (const std::string_view part : {"down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out",
             "time_embedding", "add_embedding", "class_embedding", "encoder_hid_proj"}) {
        if (first == part) { return "unet"; }
    }
    for (const std::string_view part : {"transformer_blocks", "single_transformer_blocks", "joint_transformer_blocks",
             "x_embedder", "context_embedder", "time_text_embed", "caption_projection", "adaln_single"}) {
        if (first == part) { return "transformer"; }
    }
    return {};
}
/// A module's name with its component, for diffusers: that of a UNet where nothing says another.
[[nodiscard]] inline std::string diffusers_name(const std::string& module)
{
    if (!component_of(module).empty()) { return module; }
    const auto component = component_by_parts(module);
    return std::string(component.empty() ? std::string_view("unet") : component) + "." + module;
}
/// The module's name in its component's model, without what some versions of transformers put before it.
[[nodiscard]] inline std::string name_in_component(const std::string& with_component)
{
    auto name = with_component.substr(component_of(with_component).size() + 1);
    constexpr std::string_view encoder = "text_model.";
    if (name.starts_with(encoder)) { name.erase(0, encoder.size()); }
    return name;
}
/// What kohya's names of a component of diffusers' begin with; empty: it has none. A single text encoder's have no
/// number.
[[nodiscard]] inline std::string_view kohya_prefix(std::string_view component, bool several_encoders) noexcept
{
    if (component == "text_encoder" && !several_encoders) { return "lora_te_"; }
    for (const auto& one : kohya_components) {
        if (one.diffusers == component) { return one.prefix; }
    }
    return {};
}
/// A module's name for kohya: its component, and underscores.
[[nodiscard]] inline std::string kohya_name(std::string module, bool several_encoders)
{
    if (is_kohya_name(module)) { return module; }
    std::string prefix = "lora_unet_";
    if (const auto component = component_of(module); !component.empty()) {
        prefix = kohya_prefix(component, several_encoders);
        module.erase(0, component.size() + 1);
    }
    else if (module.starts_with("text_model.")) {
        prefix = "lora_te_";
    }
    std::replace(module.begin(), module.end(), '.', '_');
    return prefix + module;
}

} // namespace detail

/// Whether a module's name says which model of a pipeline it is of: by the component before it, as diffusers or kohya
/// call that, or by its first word. Of others converted_adapter() makes the UNet's.
///
///     names_component("transformer_blocks.0.attn.to_q") // true
[[nodiscard]] inline bool names_component(std::string_view module) noexcept
{
    return !detail::component_of(module).empty() || !detail::component_by_parts(module).empty()
        || detail::is_kohya_name(module);
}

/// What of an adapter a dialect has no place for, in the order of its names; empty: it holds all. converted_adapter()
/// refuses the first.
///
///     for (const auto& loss : not_held(adapter, adapter_dialect::mlx)) { std::cout << loss.what << ": " << loss.why; }
template <arithmetic_element T>
[[nodiscard]] std::vector<adapter_loss> not_held(
    const adapter_contents<T>& adapter, adapter_dialect dialect, const adapter_write_options& options = {})
{
    std::vector<adapter_loss> losses;
    const auto lose = [&](std::string what, std::string why) { losses.push_back({std::move(what), std::move(why)}); };
    const bool is_peft = dialect == adapter_dialect::peft, to_gguf = dialect == adapter_dialect::gguf,
               to_mlx = dialect == adapter_dialect::mlx, to_diffusers = dialect == adapter_dialect::diffusers;
    if (adapter.modules.empty()) { lose("an adapter without a module", "there is nothing to write"); }
    if (!is_peft) {
        for (const auto& one : adapter.wholes) {
            lose("'" + one.first + "'", "it was trained whole, and the dialect holds factors alone");
        }
    }
    const gguf_target& target = options.target.architecture.empty() ? adapter.target : options.target;
    const bool known = to_gguf && !target.architecture.empty();
    if (to_gguf && !known) {
        lose("an adapter",
            "nothing says which architecture its model has, on which names there depend; the "
            "config.json of its base does");
    }
    // use_dora holds for all modules of a configuration, and diffusers has one for each component.
    const auto group_of = [&](const std::string& module) {
        return to_diffusers ? std::string(detail::component_of(detail::diffusers_name(module))) : std::string();
    };
    std::set<std::string> rescaled, used;
    for (const auto& one : adapter.modules) {
        if (!one.second.magnitude.empty()) { rescaled.insert(group_of(one.first)); }
    }
    for (const auto& one : adapter.modules) {
        const auto& module = one.first;
        const auto& made = one.second;
        const auto& update = made.update;
        const std::string name = "module '" + module + "'";
        const dtype type = options.output.value_or(made.stored);
        if (detail::is_kohya_name(module) && dialect != adapter_dialect::kohya) {
            lose(name, "its dots are underscores, and nothing says where they were; the base's names do (--base)");
            continue;
        }
        if (!made.slice.parameter.empty()) {
            lose(name,
                "it is one of the experts that are the parameter '" + made.slice.parameter
                    + "', which only PEFT's target_parameters name; a base with a weight for each expert gives it a "
                      "name (--base), and fuse folds it");
            continue;
        }
        if (made.paired_rows && !(to_gguf && adapter.target.architecture == target.architecture)) {
            lose(name,
                "its rows are in the order of llama.cpp, and nothing says how many heads there are; the config.json of "
                "its base does");
        }
        const auto component = detail::component_of(module);
        if (dialect == adapter_dialect::kohya && !component.empty() && detail::kohya_prefix(component, true).empty()) {
            lose(name, message("kohya's names have no word for '", component, "'"));
        }
        if ((to_diffusers || dialect == adapter_dialect::kohya) && made.embedding) { lose(name, "it is an embedding"); }
        if (!is_peft && made.bias.rank() > 0) { lose("the bias of " + name, "it has no place there"); }
        if (to_gguf && !made.magnitude.empty()) { lose(name, "it is DoRA's"); }
        const bool by_entry = detail::is_rescaled_by_entry(adapter, module, made);
        if (to_mlx ? made.embedding && !made.magnitude.empty() : by_entry && !to_gguf) {
            lose(name,
                to_mlx ? "it is DoRA's of an embedding, with a magnitude for each dimension, and MLX has one for each "
                         "entry: fold it into its base"
                       : "it is DoRA's of an embedding, with a magnitude for each entry, which MLX alone has: fold it "
                         "into its base");
        }
        if (dialect != adapter_dialect::kohya && !to_gguf && made.magnitude.empty()
            && rescaled.contains(group_of(module))) {
            lose(name,
                message("it has no magnitudes, and ", to_mlx ? "fine_tune_type dora" : "use_dora",
                    ", which others need, holds for all"));
        }
        if ((to_mlx || to_gguf) && !made.kernel.empty()) { lose(name, "it is a convolution"); }
        if (adapter.fan_in_fan_out && !is_peft && !to_gguf && !made.embedding && update.out() == update.in()) {
            lose(name,
                "it is square, and lies in×out in its base (fan_in_fan_out), which the dialect has no word for: keep "
                "PEFT's, or fold it into its base");
        }
        if (!known) { continue; }
        const std::string tensor = gguf_tensor_name(module, target);
        if (tensor.empty()) {
            lose(name, message("what llama.cpp's architecture ", target.architecture, " calls it is not known here"));
            continue;
        }
        if (tensor == "output.weight" && target.tied) {
            lose(name, "llama.cpp keeps one tensor for it and the embedding that it is tied to");
        }
        if (made.embedding != (tensor == "token_embd.weight")) {
            lose(
                name, made.embedding ? "it is factored as an embedding" : "it is an embedding and not factored as one");
        }
        if (type != dtype::f32 && type != dtype::f16 && type != dtype::bf16) {
            lose(name,
                message("its factors are ", to_string(type), ", and llama.cpp takes F32, F16 and BF16; choose one"));
        }
        if (!used.insert(tensor).second) { lose(name, message("another module is '", tensor, "' too")); }
        const bool q = module.ends_with(".q_proj"), k = module.ends_with(".k_proj");
        if (!target.pairs_rows() || made.paired_rows || !(q || k)) { continue; }
        const std::size_t heads = q ? target.heads : target.kv_heads;
        if (heads == 0 || update.out() % (2 * heads) != 0) {
            lose(name,
                heads == 0 ? std::string("llama.cpp keeps its rows in pairs within each head, and the configuration "
                                         "does not say how many heads there are (num_attention_heads)")
                           : message(update.out(), " rows are no ", heads,
                                 " heads of an even size, in which llama.cpp pairs them"));
        }
    }
    return losses;
}

/// An adapter as the tensors of a dialect. Factors keep their bits in the dtype that they were stored in, and scalings
/// become α = scaling·r where the dialect has an α; MLX has one scale for all modules, and readers of diffusers' files
/// do not all know of an α: there what is left of it goes into the up factors, which is exact for powers of two. LoHa
/// and LoKr are written as the LoRA that they equal. Names need dots: kohya's are resolved before (match_modules()).
/// GGUF has one α, rounded to f32, and llama.cpp's names and order of rows (options.target). MLX has one rank: smaller
/// ones are filled up with zeros. Throws format_error for what the dialect cannot say, by name (not_held()): tensors
/// that were trained whole and biases outside PEFT, embeddings in kohya's files and diffusers', DoRA in GGUF,
/// convolutions in MLX and GGUF, modules that llama.cpp has no name for; nonfinite_error where a factor overflows its
/// dtype, or holds NaN or infinity, unless these propagate (overflow::propagate).
///
///     const auto file = converted_adapter(read_adapter("style.safetensors"), adapter_dialect::diffusers);
template <arithmetic_element T>
[[nodiscard]] written_adapter converted_adapter(
    const adapter_contents<T>& adapter, adapter_dialect dialect, const adapter_write_options& options = {})
{
    if (options.on_overflow != overflow::propagate) { detail::check_finite_factors(adapter); }
    if (const auto losses = not_held(adapter, dialect, options); !losses.empty()) {
        raise<format_error>(error_code::adapter_unsupported,
            message(losses[0].what, " cannot be written as ", to_string(dialect), ": ", losses[0].why,
                losses.size() > 1 ? message(" (and ", losses.size() - 1, " more)") : std::string()),
            adapter.label);
    }
    written_adapter out;
    detail::adapter_writer writer(out, options.on_overflow);
    const bool is_peft = dialect == adapter_dialect::peft;
    const bool several = std::any_of(adapter.modules.begin(), adapter.modules.end(), [](const auto& one) {
        return one.first.starts_with("text_encoder_2.") || one.first.starts_with("text_encoder_3.");
    });
    const auto& leading = adapter.modules.begin()->second.update;
    double mlx_scale = 1;
    std::size_t mlx_rank = 0;
    if (dialect == adapter_dialect::mlx) {
        mlx_scale = leading.scaling;
        for (const auto& [module, made] : adapter.modules) { mlx_rank = std::max(mlx_rank, made.update.rank()); }
        if (mlx_scale == 0) { mlx_scale = 1; }
    }
    const gguf_target& target = options.target.architecture.empty() ? adapter.target : options.target;
    double gguf_alpha = static_cast<float>(leading.scaling * static_cast<double>(leading.rank()));
    if (gguf_alpha == 0 || !std::isfinite(gguf_alpha)) { gguf_alpha = 1; } // 0 is a scaling of 1 to llama.cpp
    peft_adapter<T> for_config;
    std::map<std::string, peft_adapter<T>> components; // of diffusers
    std::set<std::string> mlx_keys;
    bool dora = false, biased = false;
    for (const auto& one : adapter.modules) {
        const auto& module = one.first;
        const auto& made = one.second;
        const auto& update = made.update;
        const dtype type = options.output.value_or(made.stored);
        const auto rank = static_cast<std::int64_t>(update.rank()), out_size = static_cast<std::int64_t>(update.out());
        const auto shapes = factor_shapes(update, made.kernel, module);
        const extents &a_shape = shapes.first, &b_shape = shapes.second;
        double left = 1; // of the scaling, in the up factor
        if (dialect == adapter_dialect::diffusers) { left = update.scaling; }
        if (dialect == adapter_dialect::mlx) {
            left = same_scaling(update.scaling, mlx_scale) ? 1 : update.scaling / mlx_scale;
        }
        const auto down = [&](std::size_t k, std::size_t i) { return static_cast<double>(update.a(k, i)); };
        const auto up = [&](std::size_t o, std::size_t k) { return left * static_cast<double>(update.b(o, k)); };
        const auto add_pair = [&](const std::string& a_name, const std::string& b_name) {
            writer.add(a_name, type, a_shape, update.rank(), update.in(), down);
            writer.add(b_name, type, b_shape, update.out(), update.rank(), up);
        };
        const auto add_magnitude = [&](const std::string& name, extents shape) {
            if (made.magnitude.empty()) { return; }
            writer.add(name, type, std::move(shape), 1, update.out(),
                [&](std::size_t, std::size_t o) { return made.magnitude[o]; });
            dora = true;
        };
        extents as_peft{out_size}; // the shape of its magnitudes: 1×out×1×1 for a convolution
        if (!made.kernel.empty()) {
            as_peft.assign(2 + made.kernel.size(), 1);
            as_peft[1] = out_size;
        }
        switch (dialect) {
        case adapter_dialect::peft: {
            const std::string stem = std::string(peft_prefix) + module;
            if (made.embedding) { add_pair(stem + ".lora_embedding_A", stem + ".lora_embedding_B"); }
            else {
                add_pair(stem + ".lora_A.weight", stem + ".lora_B.weight");
            }
            add_magnitude(stem + ".lora_magnitude_vector", as_peft);
            if (made.bias.rank() > 0) {
                writer.add(stem + ".lora_B.bias", type, {out_size}, 1, update.out(),
                    [&](std::size_t, std::size_t o) { return static_cast<double>(made.bias.a(0, o)); });
                biased = true;
            }
            for_config.updates.emplace(module, update);
            break;
        }
        case adapter_dialect::kohya: {
            const std::string stem = detail::kohya_name(module, several);
            add_pair(stem + ".lora_down.weight", stem + ".lora_up.weight");
            writer.add(stem + ".alpha", dtype::f32, {}, 1, 1,
                [&](std::size_t, std::size_t) { return update.scaling * static_cast<double>(update.rank()); });
            extents shape(2 + made.kernel.size(), 1);
            shape[0] = out_size;
            add_magnitude(stem + ".dora_scale", shape);
            break;
        }
        case adapter_dialect::diffusers: {
            const std::string stem = detail::diffusers_name(module);
            const std::string component(detail::component_of(stem));
            const std::string word = component.starts_with("text_encoder") ? ".lora_linear_layer" : ".lora";
            add_pair(stem + word + ".down.weight", stem + word + ".up.weight");
            add_magnitude(stem + ".lora_magnitude_vector", as_peft);
            auto& part = components[component];
            part.config["use_dora"] = !made.magnitude.empty();
            auto plain = update;
            plain.scaling = 1;
            part.updates.emplace(detail::name_in_component(stem), std::move(plain));
            break;
        }
        case adapter_dialect::gguf: {
            const std::string tensor = gguf_tensor_name(module, target);
            left = update.scaling * static_cast<double>(update.rank()) / gguf_alpha;
            if (std::abs(left - 1) <= 0x1p-23) { left = 1; } // α is an f32
            std::size_t heads = 0;
            if (target.pairs_rows() && !made.paired_rows) {
                heads = module.ends_with(".q_proj") ? target.heads : module.ends_with(".k_proj") ? target.kv_heads : 0;
            }
            if (made.embedding) { // entries×rank
                writer.add(tensor + ".lora_a", type, {a_shape[1], rank}, update.in(), update.rank(),
                    [&](std::size_t i, std::size_t k) { return down(k, i); });
            }
            else {
                writer.add(tensor + ".lora_a", type, a_shape, update.rank(), update.in(), down);
            }
            writer.add(
                tensor + ".lora_b", type, b_shape, update.out(), update.rank(), [&](std::size_t o, std::size_t k) {
                    return up(heads == 0 ? o : paired_row(o, update.out(), heads), k);
                });
            break;
        }
        default: { // of an embedding `in` is its entries, and both lie as a linear layer's
            const auto all = static_cast<std::int64_t>(mlx_rank);
            if (detail::is_rescaled_by_entry(adapter, module, made)) { // which `out` is
                writer.add(module + ".lora_a", type, {out_size, all}, update.out(), mlx_rank,
                    [&](std::size_t o, std::size_t k) { return k < update.rank() ? up(o, k) : 0; });
                writer.add(module + ".lora_b", type, {all, a_shape[1]}, mlx_rank, update.in(),
                    [&](std::size_t k, std::size_t i) { return k < update.rank() ? down(k, i) : 0; });
                add_magnitude(module + ".m", {out_size});
                mlx_keys.insert(std::string(detail::place_in_layers(module).within));
                break;
            }
            writer.add(module + ".lora_a", type, {a_shape[1], all}, update.in(), mlx_rank,
                [&](std::size_t i, std::size_t k) { return k < update.rank() ? down(k, i) : 0; });
            writer.add(module + ".lora_b", type, {all, out_size}, mlx_rank, update.out(),
                [&](std::size_t k, std::size_t o) { return k < update.rank() ? up(o, k) : 0; });
            add_magnitude(module + ".m", {out_size});
            mlx_keys.insert(std::string(detail::place_in_layers(module).within));
        }
        }
    }
    const auto given = [&](const char* field) { return text_under(adapter.config, field); };
    const bool from_mlx = adapter.dialect == adapter_dialect::mlx;
    const std::string base_name =
        options.base_name.empty() ? given(from_mlx ? "model" : "base_model_name_or_path") : options.base_name;
    if (is_peft) {
        for (const auto& [name, tensor] : adapter.wholes) {
            // The bias of an adapted layer is that of the layer that PEFT has put within it.
            const auto module = name.substr(0, std::min(name.rfind('.'), name.size()));
            const bool within = name.ends_with(".bias") && adapter.modules.contains(module);
            writer.add(std::string(peft_prefix) + (within ? module + ".base_layer.bias" : name), tensor);
        }
        if (adapter.dialect == adapter_dialect::peft && detail::peft_type_of(adapter.config) == "LORA") {
            for_config.config = adapter.config;
        }
        else if (adapter.dialect == adapter_dialect::peft) { // of another kind: what both have
            for (const char* field : {"auto_mapping", "modules_to_save", "revision", "task_type"}) {
                if (adapter.config.contains(field)) { for_config.config[field] = adapter.config[field]; }
            }
        }
        if (!base_name.empty()) { for_config.config["base_model_name_or_path"] = base_name; }
        if (!options.task_type.empty()) { for_config.config["task_type"] = options.task_type; }
        auto config = peft_config(for_config);
        config["fan_in_fan_out"] = adapter.fan_in_fan_out;
        if (adapter.tied) { config["ensure_weight_tying"] = true; }
        config["use_dora"] = dora;
        config["lora_bias"] = biased;
        out.config = config.dump(2) + "\n";
        out.file_name = std::string(peft_model_name);
    }
    else if (dialect == adapter_dialect::mlx) {
        nlohmann::json config{{"fine_tune_type", dora ? "dora" : "lora"}, {"num_layers", -1},
            {"lora_parameters", {{"rank", mlx_rank}, {"scale", mlx_scale}, {"dropout", 0.0}, {"keys", mlx_keys}}}};
        if (!base_name.empty()) { config["model"] = base_name; }
        out.config = config.dump(2) + "\n";
        out.file_name = "adapters.safetensors";
    }
    else if (dialect == adapter_dialect::gguf) {
        const auto f16 = std::count_if(
                       out.specs.begin(), out.specs.end(), [](const auto& x) { return x.dtype == dtype::f16; }),
                   bf16 = std::count_if(
                       out.specs.begin(), out.specs.end(), [](const auto& x) { return x.dtype == dtype::bf16; });
        std::map<std::string, gguf_value> metadata{{"general.architecture", target.architecture},
            {"general.type", std::string("adapter")}, {"adapter.type", std::string("lora")},
            {"adapter.lora.alpha", gguf_alpha},
            {"general.file_type",
                std::uint64_t{f16 > bf16 ? 1u
                        : bf16 > 0       ? 32u
                                         : 0u}}};
        if (target.pairs_rows() && target.heads > 0) {
            metadata[target.architecture + ".attention.head_count"] = std::uint64_t{target.heads};
            metadata[target.architecture + ".attention.head_count_kv"] = std::uint64_t{target.kv_heads};
        }
        out.whole = gguf_bytes(metadata, out.specs, out.bytes);
    }
    else if (dialect == adapter_dialect::diffusers) {
        out.file_name = "pytorch_lora_weights.safetensors";
        nlohmann::json kept = nlohmann::json::object();
        for (const auto& [component, part] : components) {
            const auto config = peft_config(part);
            for (const auto& [field, value] : config.items()) { kept[component + "." + field] = value; }
        }
        out.metadata[detail::diffusers_metadata_key] = kept.dump(2);
    }
    return out;
}

/// Writes it: a directory for PEFT and MLX, a file for kohya and GGUF, and for diffusers whichever the path's ending
/// says. What is there is replaced once everything is complete, both files together (see output_directory); nothing is
/// left of what fails. Calls `before_commit()` before the files take their names: what that throws leaves all as it
/// was. Throws io_error.
template <std::invocable Call>
void write_adapter(const std::filesystem::path& path, const written_adapter& adapter,
    const adapter_write_options& options, Call&& before_commit)
{
    const auto fill = [&](safetensors_writer& file) {
        for (std::size_t i = 0; i < adapter.bytes.size(); ++i) {
            file.write(i, 0, adapter.bytes[i].data(), adapter.bytes[i].size());
        }
        file.finish();
    };
    if (!adapter.whole.empty()) {
        atomic_file file(path, adapter.whole.size(), options.mode);
        file.write(0, adapter.whole.data(), adapter.whole.size());
        file.finish();
        before_commit();
        file.commit();
        return;
    }
    metadata_map metadata{{"format", "pt"}};
    metadata.insert(adapter.metadata.begin(), adapter.metadata.end());
    if (adapter.file_name.empty() || (adapter.config.empty() && path.extension() == ".safetensors")) {
        safetensors_writer file(path, adapter.specs, metadata, options.mode);
        fill(file);
        before_commit();
        file.commit();
        return;
    }
    output_directory folder(path, options.mode, existing_directory::exchange);
    safetensors_writer file(folder.path() / adapter.file_name, adapter.specs, metadata, options.mode);
    std::optional<atomic_file> settings;
    if (!adapter.config.empty()) {
        settings.emplace(folder.path() / peft_config_name, adapter.config.size(), options.mode);
        settings->write(0, adapter.config.data(), adapter.config.size());
        settings->finish();
    }
    fill(file);
    before_commit();
    file.commit();
    if (settings) { settings->commit(); }
    folder.commit();
}

/// The same, without a call.
inline void write_adapter(
    const std::filesystem::path& path, const written_adapter& adapter, const adapter_write_options& options = {})
{
    write_adapter(path, adapter, options, [] { });
}

} // namespace taskvec::inline TASKVEC_ABI
