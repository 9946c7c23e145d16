// Adapters as llama.cpp loads them: GGUF files with a pair lora_a, lora_b for each weight, in its names and its order
// of rows.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/matrix.hpp>
#include <taskvec/formats/adapter_contents.hpp>

#include <cmath>
#include <cstddef>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// Whether a file is for parse_gguf(): it begins as GGUF does, or is called .gguf, so that one with another magic is
/// refused for that. Throws io_error.
[[nodiscard]] inline bool is_gguf_file(const std::filesystem::path& path)
{
    const mapped_file map(path);
    return is_gguf(map.bytes()) || path.extension() == ".gguf";
}

/// A GGUF file as one of tensors, for what reads those.
[[nodiscard]] inline safetensors_file open_gguf(const std::filesystem::path& path)
{
    mapped_file map(path);
    auto header = parse_gguf(map.bytes(), path.string());
    return {std::move(map), std::move(header.tensors)};
}

/// Puts the rows of q and k back into the model's order, from the pairs in which llama.cpp keeps them
/// (gguf_target::pairs_rows()); exact. Does nothing where there are none. Throws format_error for numbers of heads that
/// are not known (0) or do not divide the rows.
template <arithmetic_element T>
void unpair_rows(adapter_contents<T>& adapter, std::size_t heads, std::size_t kv_heads)
{
    for (auto& [module, made] : adapter.modules) {
        if (!made.paired_rows) { continue; }
        const std::size_t count = module.ends_with("k_proj") ? kv_heads : heads, rows = made.update.out();
        if (count == 0 || rows % (2 * count) != 0) {
            raise<format_error>(error_code::adapter_unsupported,
                message("module '", module, "' has its rows in the order of llama.cpp, in pairs within each head, and ",
                    count == 0 ? std::string("nothing says how many heads there are")
                               : message(rows, " rows are no ", count, " heads of an even size"),
                    ": the config.json of the base does (num_attention_heads, num_key_value_heads)"),
                adapter.file.string());
        }
        matrix<T> b(rows, made.update.b.cols(), matrix_order::row_major);
        for (std::size_t i = 0; i < rows; ++i) {
            for (std::size_t k = 0; k < b.cols(); ++k) { b(paired_row(i, rows, count), k) = made.update.b(i, k); }
        }
        made.update.b = std::move(b);
        made.paired_rows = false;
    }
}

/// Reads a GGUF adapter. Modules are called as transformers calls them; the scaling is adapter.lora.alpha/r, and 1
/// where that is 0 or absent, as llama.cpp has it. Rows of q and k are put back where the file gives numbers of heads
/// (those that this library writes do); elsewhere they stay paired until unpair_rows(). Norms that a file carries are
/// left out with a note, since llama.cpp does not apply them. Throws what parse_gguf() throws; format_error for a file
/// that is no LoRA adapter, an architecture whose names are not known, experts, aLoRA, halves without partners, a rank
/// of 0; shape_mismatch.
template <arithmetic_element T = float>
[[nodiscard]] adapter_contents<T> read_gguf_adapter(const std::filesystem::path& path)
{
    const std::string where = path.string();
    mapped_file map(path);
    auto header = parse_gguf(map.bytes(), where);
    adapter_contents<T> adapter;
    adapter.dialect = adapter_dialect::gguf;
    adapter.label = "'" + where + "'";
    adapter.file = path;
    const detail::refusal refuse{where};
    const auto type = header.text("general.type"), kind = header.text("adapter.type");
    if (type != "adapter" || kind != "lora") {
        refuse(error_code::adapter_unsupported, "is a GGUF file whose ",
            type != "adapter" ? "general.type" : "adapter.type", " is '", type != "adapter" ? type : kind,
            "'; that of an adapter is '", type != "adapter" ? "adapter" : "lora",
            "': name an adapter as llama.cpp's convert_lora_to_gguf.py writes it");
    }
    if (header.metadata.contains("adapter.alora.invocation_tokens")) {
        refuse(error_code::adapter_unsupported,
            "adapter.alora.invocation_tokens: aLoRA switches on within the input, which no weight can say: serve it "
            "with "
            "llama.cpp as it is");
    }
    adapter.target.architecture = header.text("general.architecture");
    const auto& word = adapter.target.architecture;
    if (!detail::is_gguf_architecture(word)) {
        refuse(error_code::adapter_unsupported, "general.architecture is '", word,
            "', whose names are not known here; known are ", detail::gguf_architectures(),
            ": take the adapter that it was converted from");
    }
    const auto heads = header.number(word + ".attention.head_count"),
               kv_heads = header.number(word + ".attention.head_count_kv");
    const auto count_of = [](const std::optional<double>& value) {
        return value && *value >= 1 && *value <= 65536 ? static_cast<std::size_t>(*value) : 0;
    };
    adapter.target.heads = count_of(heads);
    adapter.target.kv_heads = kv_heads ? count_of(kv_heads) : adapter.target.heads;
    double alpha = 0;
    if (header.metadata.contains("adapter.lora.alpha")) {
        const auto given = header.number("adapter.lora.alpha");
        if (!given || !std::isfinite(*given)) {
            refuse(error_code::adapter_tensors, "adapter.lora.alpha is no finite number");
        }
        alpha = *given;
    }
    const safetensors_file file(std::move(map), std::move(header.tensors));
    struct halves {
        const safetensors_entry *a = nullptr, *b = nullptr;
    };
    std::map<std::string, halves> parts;
    std::size_t norms = 0;
    for (const auto& entry : file.entries()) {
        const std::string_view name = entry.name, a_end = ".lora_a", b_end = ".lora_b";
        if (name.ends_with("_norm.weight")) { ++norms; }
        else if (name.ends_with(a_end) || name.ends_with(b_end)) {
            auto& pair = parts[std::string(name.substr(0, name.size() - a_end.size()))];
            (name.ends_with(a_end) ? pair.a : pair.b) = &entry;
        }
        else {
            refuse(error_code::adapter_tensors, "tensor '", name,
                "' is no half of an update (….lora_a, ….lora_b): convert the adapter again");
        }
    }
    if (parts.empty()) { refuse(error_code::adapter_tensors, "holds no factors of an adapter"); }
    if (norms > 0) {
        adapter.notes.push_back(message(adapter.label, " carries ", norms, norms == 1 ? " norm" : " norms",
            " of its own, left out: llama.cpp does not apply them"));
    }
    if (alpha == 0) {
        adapter.notes.push_back(
            message(adapter.label, " gives no alpha: it is taken to be the rank, a scaling of 1, as llama.cpp does"));
    }
    for (const auto& [name, pair] : parts) {
        if (!pair.a || !pair.b) {
            refuse(error_code::adapter_tensors, "'", name, "' has ", pair.a ? "lora_a" : "lora_b", " but no ",
                pair.a ? "lora_b" : "lora_a", ": half of its update is missing");
        }
        for (const auto* half : {pair.a, pair.b}) {
            if (half->shape.size() != 2) {
                refuse(error_code::adapter_unsupported, "tensor '", half->name, "' has shape ", to_string(half->shape),
                    "; expected a matrix: updates of experts are not read, take the adapter that it was converted "
                    "from");
            }
        }
        const auto module = gguf_module_name(name, adapter.target);
        if (module.empty()) {
            refuse(error_code::adapter_unsupported, "tensor '", name, "' is none that is known of the architecture ",
                word, ": take the adapter that it was converted from");
        }
        adapted_module<T> made;
        made.embedding = name == "token_embd.weight";
        made.stored = wider(pair.a->dtype, pair.b->dtype);
        made.update.a = detail::read_factor<T>(file, *pair.a);
        made.update.b = detail::read_factor<T>(file, *pair.b);
        if (made.embedding) { made.update.a = transposed_copy(made.update.a); }
        if (made.update.a.rows() != made.update.b.cols()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", where, "': '", name, "': lora_a has shape ", to_string(pair.a->shape), " and lora_b ",
                    to_string(pair.b->shape), "; their ranks differ"));
        }
        made.update.scaling = alpha == 0 ? 1 : alpha / static_cast<double>(made.update.rank());
        made.bias.scaling = made.update.scaling;
        made.paired_rows = adapter.target.pairs_rows() && (module.ends_with(".q_proj") || module.ends_with(".k_proj"));
        adapter.modules.emplace(module, std::move(made));
    }
    if (adapter.target.heads > 0) { unpair_rows(adapter, adapter.target.heads, adapter.target.kv_heads); }
    file.map().check_unchanged();
    return adapter;
}

} // namespace taskvec::inline TASKVEC_ABI
