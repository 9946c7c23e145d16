// Adapters written in any dialect, so that what reads that dialect gets the same update.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/overflow.hpp>
#include <taskvec/formats/adapter_file.hpp>
#include <taskvec/formats/dialect_writers.hpp>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Something of an adapter that a dialect has no place for.
struct adapter_loss {
    std::string what{}, why{}; ///< "module 'x'" and "it is an embedding", say
};

namespace detail {

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
            lose(name,
                "its dots are underscores, and nothing says where they were; the base's names do (the tool: --base)");
            continue;
        }
        if (!made.slice.parameter.empty()) {
            lose(name,
                "it is one of the experts that are the parameter '" + made.slice.parameter
                    + "', which only PEFT's target_parameters name; a base with a weight for each expert gives it a "
                      "name (the tool: --base), and fuse folds it");
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
    const auto writer = detail::writer_of(out, adapter, dialect, options);
    for (const auto& [module, made] : adapter.modules) { writer->add(module, made); }
    writer->finish();
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
