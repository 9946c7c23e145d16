// What each dialect of adapters writes of a module, and beside all of them: converted_adapter() puts them together.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/overflow.hpp>
#include <taskvec/formats/adapter_file.hpp>
#include <taskvec/formats/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
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

/// Adds tensors to a written adapter.
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

/// A dialect being written: add() for each module in the order of their names, then finish(). What it has no place for
/// was refused before.
template <arithmetic_element T>
class dialect_writer {
public:
    dialect_writer(written_adapter& out, const adapter_contents<T>& adapter, const adapter_write_options& options)
        : out_(out)
        , adapter_(adapter)
        , options_(options)
        , writer_(out, options.on_overflow)
    { }
    dialect_writer(const dialect_writer&) = delete;
    dialect_writer& operator=(const dialect_writer&) = delete;
    virtual ~dialect_writer() = default;

    /// Adds the tensors of a module.
    virtual void add(const std::string& module, const adapted_module<T>& made) = 0;
    /// Adds what stands beside the modules: whole tensors, a configuration, a header.
    virtual void finish() = 0;

protected:
    /// A module's update as tensors.
    struct factors {
        const lora_update<T>& update;
        dtype type;
        extents a_shape, b_shape; ///< as PEFT has them
        double left = 1; ///< of the scaling, in the up factor

        [[nodiscard]] double down(std::size_t k, std::size_t i) const { return static_cast<double>(update.a(k, i)); }
        [[nodiscard]] double up(std::size_t o, std::size_t k) const
        {
            return left * static_cast<double>(update.b(o, k));
        }
        [[nodiscard]] std::int64_t out() const { return static_cast<std::int64_t>(update.out()); }
    };
    [[nodiscard]] factors factors_of(const std::string& module, const adapted_module<T>& made, double left = 1) const
    {
        auto [a_shape, b_shape] = factor_shapes(made.update, made.kernel, module);
        return {made.update, options_.output.value_or(made.stored), std::move(a_shape), std::move(b_shape), left};
    }
    void add_pair(const std::string& a_name, const std::string& b_name, const factors& x)
    {
        writer_.add(a_name, x.type, x.a_shape, x.update.rank(), x.update.in(),
            [&](std::size_t k, std::size_t i) { return x.down(k, i); });
        writer_.add(b_name, x.type, x.b_shape, x.update.out(), x.update.rank(),
            [&](std::size_t o, std::size_t k) { return x.up(o, k); });
    }
    /// DoRA's, where the module has some.
    void add_magnitude(const std::string& name, extents shape, const adapted_module<T>& made, const factors& x)
    {
        if (made.magnitude.empty()) { return; }
        writer_.add(name, x.type, std::move(shape), 1, x.update.out(),
            [&](std::size_t, std::size_t o) { return made.magnitude[o]; });
        rescaled_ = true;
    }
    /// The shape of PEFT's magnitudes: 1×out×1×1 for a convolution.
    [[nodiscard]] static extents magnitude_shape(const adapted_module<T>& made)
    {
        const auto out = static_cast<std::int64_t>(made.update.out());
        if (made.kernel.empty()) { return {out}; }
        extents shape(2 + made.kernel.size(), 1);
        shape[1] = out;
        return shape;
    }
    [[nodiscard]] std::string base_name() const
    {
        if (!options_.base_name.empty()) { return options_.base_name; }
        const bool from_mlx = adapter_.dialect == adapter_dialect::mlx;
        return text_under(adapter_.config, from_mlx ? "model" : "base_model_name_or_path");
    }

    written_adapter& out_;
    const adapter_contents<T>& adapter_;
    const adapter_write_options& options_;
    adapter_writer writer_;
    bool rescaled_ = false; ///< some module has magnitudes
};

template <arithmetic_element T>
class peft_dialect_writer final : public dialect_writer<T> {
public:
    using dialect_writer<T>::dialect_writer;

    void add(const std::string& module, const adapted_module<T>& made) override
    {
        const auto x = this->factors_of(module, made);
        const std::string stem = std::string(peft_prefix) + module;
        if (made.embedding) { this->add_pair(stem + ".lora_embedding_A", stem + ".lora_embedding_B", x); }
        else {
            this->add_pair(stem + ".lora_A.weight", stem + ".lora_B.weight", x);
        }
        this->add_magnitude(stem + ".lora_magnitude_vector", this->magnitude_shape(made), made, x);
        if (made.bias.rank() > 0) {
            this->writer_.add(stem + ".lora_B.bias", x.type, {x.out()}, 1, x.update.out(),
                [&](std::size_t, std::size_t o) { return static_cast<double>(made.bias.a(0, o)); });
            biased_ = true;
        }
        for_config_.updates.emplace(module, made.update);
    }
    void finish() override
    {
        const auto& adapter = this->adapter_;
        for (const auto& [name, tensor] : adapter.wholes) {
            // The bias of an adapted layer is that of the layer that PEFT has put within it.
            const auto module = name.substr(0, std::min(name.rfind('.'), name.size()));
            const bool within = name.ends_with(".bias") && adapter.modules.contains(module);
            this->writer_.add(
                std::string(peft_prefix) + (within ? module + std::string(peft_base_bias) : name), tensor);
        }
        if (adapter.dialect == adapter_dialect::peft && peft_type_of(adapter.config) == "LORA") {
            for_config_.config = adapter.config;
        }
        else if (adapter.dialect == adapter_dialect::peft) { // of another kind: what both have
            for (const char* field : {"auto_mapping", "modules_to_save", "revision", "task_type"}) {
                if (adapter.config.contains(field)) { for_config_.config[field] = adapter.config[field]; }
            }
        }
        if (const auto name = this->base_name(); !name.empty()) {
            for_config_.config["base_model_name_or_path"] = name;
        }
        if (!this->options_.task_type.empty()) { for_config_.config["task_type"] = this->options_.task_type; }
        auto config = peft_config(for_config_);
        config["fan_in_fan_out"] = adapter.fan_in_fan_out;
        if (adapter.tied) { config["ensure_weight_tying"] = true; }
        config["use_dora"] = this->rescaled_;
        config["lora_bias"] = biased_;
        this->out_.config = config.dump(2) + "\n";
        this->out_.file_name = std::string(peft_model_name);
    }

private:
    peft_adapter<T> for_config_;
    bool biased_ = false;
};

template <arithmetic_element T>
class kohya_dialect_writer final : public dialect_writer<T> {
public:
    kohya_dialect_writer(written_adapter& out, const adapter_contents<T>& adapter, const adapter_write_options& options)
        : dialect_writer<T>(out, adapter, options)
        , several_encoders_(std::any_of(adapter.modules.begin(), adapter.modules.end(), [](const auto& one) {
            return one.first.starts_with("text_encoder_2.") || one.first.starts_with("text_encoder_3.");
        }))
    { }

    void add(const std::string& module, const adapted_module<T>& made) override
    {
        const auto x = this->factors_of(module, made);
        const std::string stem = kohya_name(module, several_encoders_);
        this->add_pair(stem + ".lora_down.weight", stem + ".lora_up.weight", x);
        this->writer_.add(stem + ".alpha", dtype::f32, {}, 1, 1,
            [&](std::size_t, std::size_t) { return x.update.scaling * static_cast<double>(x.update.rank()); });
        extents shape(2 + made.kernel.size(), 1);
        shape[0] = x.out();
        this->add_magnitude(stem + ".dora_scale", shape, made, x);
    }
    void finish() override { }

private:
    bool several_encoders_;
};

template <arithmetic_element T>
class diffusers_dialect_writer final : public dialect_writer<T> {
public:
    using dialect_writer<T>::dialect_writer;

    void add(const std::string& module, const adapted_module<T>& made) override
    {
        const auto x = this->factors_of(module, made, made.update.scaling);
        const std::string stem = diffusers_name(module);
        const std::string component(component_of(stem));
        const std::string word = component.starts_with("text_encoder") ? ".lora_linear_layer" : ".lora";
        this->add_pair(stem + word + ".down.weight", stem + word + ".up.weight", x);
        this->add_magnitude(stem + ".lora_magnitude_vector", this->magnitude_shape(made), made, x);
        auto& part = components_[component];
        part.config["use_dora"] = !made.magnitude.empty();
        auto plain = made.update;
        plain.scaling = 1;
        part.updates.emplace(name_in_component(stem), std::move(plain));
    }
    void finish() override
    {
        this->out_.file_name = "pytorch_lora_weights.safetensors";
        nlohmann::json kept = nlohmann::json::object();
        for (const auto& [component, part] : components_) {
            const auto config = peft_config(part);
            for (const auto& [field, value] : config.items()) { kept[component + "." + field] = value; }
        }
        this->out_.metadata[diffusers_metadata_key] = kept.dump(2);
    }

private:
    std::map<std::string, peft_adapter<T>> components_;
};

/// One rank and one scale for all modules: smaller ranks are filled up with zeros, and what is left of other scalings
/// is in the up factors.
template <arithmetic_element T>
class mlx_dialect_writer final : public dialect_writer<T> {
public:
    mlx_dialect_writer(written_adapter& out, const adapter_contents<T>& adapter, const adapter_write_options& options)
        : dialect_writer<T>(out, adapter, options)
        , scale_(adapter.modules.begin()->second.update.scaling)
    {
        if (scale_ == 0) { scale_ = 1; }
        for (const auto& [module, made] : adapter.modules) { rank_ = std::max(rank_, made.update.rank()); }
    }

    void add(const std::string& module, const adapted_module<T>& made) override
    {
        const auto& update = made.update;
        const auto x =
            this->factors_of(module, made, same_scaling(update.scaling, scale_) ? 1 : update.scaling / scale_);
        // Of an embedding `in` is its entries, and both lie as a linear layer's; `out` is where it is rescaled by
        // entry.
        const bool by_entry = is_rescaled_by_entry(this->adapter_, module, made);
        const auto rank = static_cast<std::int64_t>(rank_);
        const auto down = [&](std::size_t k, std::size_t i) { return k < update.rank() ? x.down(k, i) : 0; };
        const auto up = [&](std::size_t k, std::size_t o) { return k < update.rank() ? x.up(o, k) : 0; };
        const auto add_factors = [&](std::int64_t in, const auto& first, std::int64_t out, const auto& second) {
            this->writer_.add(module + ".lora_a", x.type, {in, rank}, static_cast<std::size_t>(in), rank_,
                [&](std::size_t i, std::size_t k) { return first(k, i); });
            this->writer_.add(module + ".lora_b", x.type, {rank, out}, rank_, static_cast<std::size_t>(out), second);
        };
        if (by_entry) { add_factors(x.out(), up, x.a_shape[1], down); }
        else {
            add_factors(x.a_shape[1], down, x.out(), up);
        }
        this->add_magnitude(module + ".m", {x.out()}, made, x);
        keys_.insert(std::string(place_in_layers(module).within));
    }
    void finish() override
    {
        nlohmann::json config{{"fine_tune_type", this->rescaled_ ? "dora" : "lora"}, {"num_layers", -1},
            {"lora_parameters", {{"rank", rank_}, {"scale", scale_}, {"dropout", 0.0}, {"keys", keys_}}}};
        if (const auto name = this->base_name(); !name.empty()) { config["model"] = name; }
        this->out_.config = config.dump(2) + "\n";
        this->out_.file_name = "adapters.safetensors";
    }

private:
    double scale_;
    std::size_t rank_ = 0;
    std::set<std::string> keys_;
};

/// llama.cpp's names and order of rows, and one α for all modules.
template <arithmetic_element T>
class gguf_dialect_writer final : public dialect_writer<T> {
public:
    gguf_dialect_writer(written_adapter& out, const adapter_contents<T>& adapter, const adapter_write_options& options)
        : dialect_writer<T>(out, adapter, options)
        , target_(options.target.architecture.empty() ? adapter.target : options.target)
    {
        const auto& leading = adapter.modules.begin()->second.update;
        alpha_ = static_cast<float>(leading.scaling * static_cast<double>(leading.rank()));
        if (alpha_ == 0 || !std::isfinite(alpha_)) { alpha_ = 1; } // 0 is a scaling of 1 to llama.cpp
    }

    void add(const std::string& module, const adapted_module<T>& made) override
    {
        const auto& update = made.update;
        double left = update.scaling * static_cast<double>(update.rank()) / alpha_;
        if (std::abs(left - 1) <= 0x1p-23) { left = 1; } // α is an f32
        const auto x = this->factors_of(module, made, left);
        const std::string tensor = gguf_tensor_name(module, target_);
        std::size_t heads = 0;
        if (target_.pairs_rows() && !made.paired_rows) {
            heads = module.ends_with(".q_proj") ? target_.heads : module.ends_with(".k_proj") ? target_.kv_heads : 0;
        }
        if (made.embedding) { // entries×rank
            this->writer_.add(tensor + ".lora_a", x.type, {x.a_shape[1], static_cast<std::int64_t>(update.rank())},
                update.in(), update.rank(), [&](std::size_t i, std::size_t k) { return x.down(k, i); });
        }
        else {
            this->writer_.add(tensor + ".lora_a", x.type, x.a_shape, update.rank(), update.in(),
                [&](std::size_t k, std::size_t i) { return x.down(k, i); });
        }
        this->writer_.add(tensor + ".lora_b", x.type, x.b_shape, update.out(), update.rank(),
            [&](std::size_t o, std::size_t k) { return x.up(heads == 0 ? o : paired_row(o, update.out(), heads), k); });
    }
    void finish() override
    {
        const auto& specs = this->out_.specs;
        const auto of_type = [&](dtype type) {
            return std::count_if(specs.begin(), specs.end(), [&](const auto& x) { return x.dtype == type; });
        };
        const auto f16 = of_type(dtype::f16), bf16 = of_type(dtype::bf16);
        std::map<std::string, gguf_value> metadata{{"general.architecture", target_.architecture},
            {"general.type", std::string("adapter")}, {"adapter.type", std::string("lora")},
            {"adapter.lora.alpha", alpha_},
            {"general.file_type",
                std::uint64_t{f16 > bf16 ? 1u
                        : bf16 > 0       ? 32u
                                         : 0u}}};
        if (target_.pairs_rows() && target_.heads > 0) {
            metadata[target_.architecture + ".attention.head_count"] = std::uint64_t{target_.heads};
            metadata[target_.architecture + ".attention.head_count_kv"] = std::uint64_t{target_.kv_heads};
        }
        this->out_.whole = gguf_bytes(metadata, specs, this->out_.bytes);
    }

private:
    const gguf_target& target_;
    double alpha_ = 1;
};

template <arithmetic_element T>
[[nodiscard]] std::unique_ptr<dialect_writer<T>> writer_of(written_adapter& out, const adapter_contents<T>& adapter,
    adapter_dialect dialect, const adapter_write_options& options)
{
    switch (dialect) {
    case adapter_dialect::peft: return std::make_unique<peft_dialect_writer<T>>(out, adapter, options);
    case adapter_dialect::kohya: return std::make_unique<kohya_dialect_writer<T>>(out, adapter, options);
    case adapter_dialect::diffusers: return std::make_unique<diffusers_dialect_writer<T>>(out, adapter, options);
    case adapter_dialect::gguf: return std::make_unique<gguf_dialect_writer<T>>(out, adapter, options);
    default: return std::make_unique<mlx_dialect_writer<T>>(out, adapter, options);
    }
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
