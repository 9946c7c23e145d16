// GGUF, the files of llama.cpp: their metadata and where their tensors lie, read strictly; whole files written from
// memory; and what the tensors of its language models are called.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/file_kind.hpp>
#include <taskvec/formats/json.hpp>
#include <taskvec/formats/safetensors.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// One value of a GGUF file's metadata. Arrays are passed over (std::monostate), their bytes checked.
using gguf_value = std::variant<std::monostate, bool, std::uint64_t, std::int64_t, double, std::string>;

/// What stands before the data of a GGUF file, checked.
struct gguf_header {
    std::uint32_t version = 3; ///< of the format
    std::uint64_t alignment = 32; ///< of every tensor's bytes
    std::map<std::string, gguf_value> metadata{}; ///< by key
    safetensors_header tensors{}; ///< extents slowest first, as everywhere here: ggml's in reverse

    /// The text of a key; empty where it is absent or no text.
    [[nodiscard]] std::string text(const std::string& key) const
    {
        const auto place = metadata.find(key);
        const auto* const value = place == metadata.end() ? nullptr : std::get_if<std::string>(&place->second);
        return value ? *value : std::string();
    }
    /// The number of a key; nothing where it is absent or no number.
    [[nodiscard]] std::optional<double> number(const std::string& key) const
    {
        const auto place = metadata.find(key);
        if (place == metadata.end()) { return std::nullopt; }
        if (const auto* const value = std::get_if<double>(&place->second)) { return *value; }
        if (const auto* const value = std::get_if<std::uint64_t>(&place->second)) {
            return static_cast<double>(*value);
        }
        if (const auto* const value = std::get_if<std::int64_t>(&place->second)) { return static_cast<double>(*value); }
        return std::nullopt;
    }
};

/// Whether bytes begin as a GGUF file does.
[[nodiscard]] inline bool is_gguf(std::span<const std::byte> bytes) noexcept
{
    return bytes.size() >= 4 && std::memcmp(bytes.data(), "GGUF", 4) == 0;
}

namespace detail {

/// ggml's types by number: what a file calls them, and the dtype of those that are numbers as they are.
struct ggml_type {
    std::uint32_t number;
    std::string_view name;
    std::optional<taskvec::dtype> stored{};
};
inline constexpr std::array<ggml_type, 22> ggml_types{
    {{0, "F32", dtype::f32}, {1, "F16", dtype::f16}, {2, "Q4_0"}, {3, "Q4_1"}, {6, "Q5_0"}, {7, "Q5_1"}, {8, "Q8_0"},
        {9, "Q8_1"}, {10, "Q2_K"}, {11, "Q3_K"}, {12, "Q4_K"}, {13, "Q5_K"}, {14, "Q6_K"}, {15, "Q8_K"}, {20, "IQ4_NL"},
        {23, "IQ4_XS"}, {24, "I8", dtype::i8}, {25, "I16", dtype::i16}, {26, "I32", dtype::i32},
        {27, "I64", dtype::i64}, {28, "F64", dtype::f64}, {30, "BF16", dtype::bf16}}};

/// Reads numbers and texts one after the other, none beyond the end.
class gguf_cursor {
public:
    gguf_cursor(std::span<const std::byte> bytes, const std::string& label)
        : bytes_(bytes)
        , label_(label)
    { }
    [[nodiscard]] std::uint64_t at() const noexcept { return at_; }
    [[nodiscard]] std::uint64_t left() const noexcept { return bytes_.size() - at_; }

    template <class N>
    [[nodiscard]] N number(std::string_view what)
    {
        need(sizeof(N), what);
        std::array<std::byte, sizeof(N)> raw;
        std::copy_n(bytes_.begin() + static_cast<std::ptrdiff_t>(at_), sizeof(N), raw.begin());
        if constexpr (std::endian::native == std::endian::big) { std::reverse(raw.begin(), raw.end()); }
        at_ += sizeof(N);
        return std::bit_cast<N>(raw);
    }
    [[nodiscard]] std::string text(std::string_view what)
    {
        const auto size = number<std::uint64_t>(what);
        need(size, what);
        std::string made(reinterpret_cast<const char*>(bytes_.data()) + at_, static_cast<std::size_t>(size));
        at_ += size;
        return made;
    }
    void skip(std::uint64_t size, std::string_view what)
    {
        need(size, what);
        at_ += size;
    }
    /// A count of things of at least `least` bytes each.
    [[nodiscard]] std::uint64_t count(std::string_view what, std::uint64_t least)
    {
        const auto from = at_;
        const auto many = number<std::uint64_t>(what);
        if (many > left() / least) {
            raise<format_error>(error_code::file_truncated,
                message(what, " is ", many, ", and ", left(),
                    " bytes are left, too few for so many: the file was cut, or is damaged; fetch it again"),
                label_, from);
        }
        return many;
    }
    template <class... Parts>
    [[noreturn]] void refuse(error_code code, std::uint64_t offset, const Parts&... parts) const
    {
        raise<format_error>(code, message(parts...), label_, offset);
    }

private:
    void need(std::uint64_t size, std::string_view what) const
    {
        if (size <= left()) { return; }
        raise<format_error>(error_code::file_truncated,
            message(what, " takes ", size, " bytes, and ", left(),
                " are left: the file was cut, or is damaged; fetch it again"),
            label_, at_);
    }
    std::span<const std::byte> bytes_;
    const std::string& label_;
    std::uint64_t at_ = 0;
};

/// Bytes as a text in quotes where they are printable, otherwise in hexadecimal.
[[nodiscard]] inline std::string shown_bytes(std::span<const std::byte> bytes)
{
    constexpr std::string_view digits = "0123456789abcdef";
    std::string text, numbers;
    for (const auto one : bytes) {
        const auto code = std::to_integer<unsigned>(one);
        text += static_cast<char>(code);
        numbers += std::string(numbers.empty() ? "" : " ") + digits[code / 16] + digits[code % 16];
    }
    const bool printable = std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~'; });
    return printable ? "'" + text + "'" : "the bytes " + numbers;
}

/// One value of a key's type, or one that is passed over.
[[nodiscard]] inline gguf_value read_gguf_value(
    gguf_cursor& in, std::uint32_t type, const std::string& key, bool within = false)
{
    const std::string what = "the value of '" + key + "'";
    switch (type) {
    case 0: return std::uint64_t{in.number<std::uint8_t>(what)};
    case 1: return std::int64_t{in.number<std::int8_t>(what)};
    case 2: return std::uint64_t{in.number<std::uint16_t>(what)};
    case 3: return std::int64_t{in.number<std::int16_t>(what)};
    case 4: return std::uint64_t{in.number<std::uint32_t>(what)};
    case 5: return std::int64_t{in.number<std::int32_t>(what)};
    case 6: return static_cast<double>(in.number<float>(what));
    case 7: return in.number<std::uint8_t>(what) != 0;
    case 8: return in.text(what);
    case 10: return in.number<std::uint64_t>(what);
    case 11: return in.number<std::int64_t>(what);
    case 12: return in.number<double>(what);
    case 9:
        if (!within) {
            constexpr std::array<std::uint64_t, 13> sizes{1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8};
            const auto from = in.at();
            const auto element = in.number<std::uint32_t>(what);
            if (element >= sizes.size() || element == 9) {
                in.refuse(error_code::header_field, from, what, " is an array of type ", element,
                    element == 9 ? ", of arrays: no adapter has one" : ", which GGUF does not have");
            }
            const auto many = in.count("the length of the array '" + key + "'", sizes[element]);
            if (element == 8) {
                for (std::uint64_t i = 0; i < many; ++i) { (void)in.text(what); }
            }
            else {
                in.skip(many * sizes[element], what);
            }
            return std::monostate{};
        }
        [[fallthrough]];
    default:
        in.refuse(error_code::header_field, in.at(), what, " is of type ", type,
            ", which GGUF does not have: the file is damaged, or newer than version 3");
    }
}

} // namespace detail

/// Reads what stands before the data of a GGUF file of version 2 or 3, little-endian. Throws format_error, with the
/// byte, for another magic or version, a big-endian file, counts, texts and tensors that reach beyond the file, keys or
/// tensors that occur twice, an alignment that is no power of two (0 included), more than four extents or an extent of
/// 0, offsets that are not aligned, tensors that overlap; dtype_mismatch for tensors in quantised or unknown types. No
/// byte of the data is read.
///
///     const mapped_file map("math.gguf");
///     const auto header = parse_gguf(map.bytes(), "math.gguf");
[[nodiscard]] inline gguf_header parse_gguf(std::span<const std::byte> bytes, const std::string& label)
{
    detail::gguf_cursor in(bytes, label);
    gguf_header header;
    if (!is_gguf(bytes)) {
        const auto kind = what_is_this_file(bytes);
        in.refuse(error_code::header_field, 0, "does not begin with 'GGUF', the magic of GGUF files",
            bytes.size() < 4 ? std::string() : message(", but with ", detail::shown_bytes(bytes.first(4))), ": it is ",
            kind ? kind->what + "; " + kind->mend : std::string("damaged, or no GGUF file; fetch it again"));
    }
    in.skip(4, "the magic");
    header.version = in.number<std::uint32_t>("the version");
    if ((header.version & 0xffffu) == 0 && header.version != 0) {
        in.refuse(error_code::header_field, 4,
            "is a big-endian GGUF file: convert it on a machine like this one (without --bigendian)");
    }
    if (header.version != 2 && header.version != 3) {
        in.refuse(error_code::header_field, 4, "is GGUF of version ", header.version,
            "; versions 2 and 3 are read: convert the adapter again with a current llama.cpp");
    }
    constexpr std::uint64_t least_tensor = 8 + 4 + 8 + 4 + 8, least_key = 8 + 4 + 1;
    const auto tensors = in.count("the number of tensors", least_tensor);
    const auto keys = in.count("the number of metadata keys", least_key);
    for (std::uint64_t i = 0; i < keys; ++i) {
        const auto from = in.at();
        auto key = in.text(message("metadata key ", i + 1));
        if (!is_utf8(key)) { in.refuse(error_code::header_field, from, "metadata key ", i + 1, " is no UTF-8"); }
        const auto type = in.number<std::uint32_t>("the type of '" + key + "'");
        auto value = detail::read_gguf_value(in, type, key);
        if (!header.metadata.emplace(key, std::move(value)).second) {
            in.refuse(error_code::header_field, from, "the metadata key '", key, "' stands twice");
        }
    }
    if (const auto place = header.metadata.find("general.alignment"); place != header.metadata.end()) {
        const auto* const given = std::get_if<std::uint64_t>(&place->second);
        if (!given || !std::has_single_bit(*given) || *given > (std::uint64_t{1} << 31)) {
            in.refuse(error_code::header_field, 0, "general.alignment is ",
                given ? message(*given) : std::string("no unsigned number"), "; expected a power of two");
        }
        header.alignment = *given;
    }
    for (std::uint64_t i = 0; i < tensors; ++i) {
        safetensors_entry entry;
        const auto from = in.at();
        entry.name = in.text(message("the name of tensor ", i + 1));
        if (!is_utf8(entry.name)) {
            in.refuse(error_code::header_field, from, "the name of tensor ", i + 1, " is no UTF-8");
        }
        const std::string what = "tensor '" + entry.name + "'";
        const auto rank = in.number<std::uint32_t>(what);
        if (rank < 1 || rank > 4) {
            in.refuse(error_code::header_field, from, what, " has ", rank, " extents; GGUF has 1 to 4");
        }
        std::uint64_t elements = 1;
        for (std::uint32_t k = 0; k < rank; ++k) {
            const auto extent = in.number<std::uint64_t>(what);
            if (extent == 0 || extent > (std::uint64_t{1} << 56) / elements) {
                in.refuse(error_code::header_field, from, what, " has an extent of ", extent,
                    extent == 0 ? ": it is empty" : ": it has more elements than a file can hold");
            }
            elements *= extent;
            entry.shape.insert(entry.shape.begin(), static_cast<std::int64_t>(extent));
        }
        const auto type = in.number<std::uint32_t>(what);
        const auto known = std::find_if(
            detail::ggml_types.begin(), detail::ggml_types.end(), [&](const auto& one) { return one.number == type; });
        if (known == detail::ggml_types.end() || !known->stored) {
            raise<dtype_mismatch>(error_code::dtype_unsupported,
                message("'", label, "': ", what, " is of ggml's type ", type,
                    known == detail::ggml_types.end() ? std::string() : message(" (", known->name, ")"),
                    "; F32, F16 and BF16 are read: convert the adapter again with --outtype f16"));
        }
        entry.dtype = *known->stored;
        entry.bytes = elements * (bits_per_element(entry.dtype) / 8);
        entry.offset = in.number<std::uint64_t>(what);
        if (entry.offset % header.alignment != 0) {
            in.refuse(error_code::tensor_offsets, from, what, " begins at byte ", entry.offset,
                " of the data, which is no multiple of the alignment ", header.alignment);
        }
        header.tensors.entries.push_back(std::move(entry));
    }
    const std::uint64_t begin = (in.at() + header.alignment - 1) / header.alignment * header.alignment,
                        room = bytes.size() > begin ? bytes.size() - begin : 0;
    header.tensors.data_offset = std::min<std::uint64_t>(begin, bytes.size());
    for (auto& entry : header.tensors.entries) {
        if (entry.offset > room || entry.bytes > room - entry.offset) {
            in.refuse(error_code::file_truncated, bytes.size(), "tensor '", entry.name, "' takes bytes ", entry.offset,
                " to ", entry.offset + entry.bytes, " of the data, and the file has ", room,
                ": it was cut, or is damaged; fetch it again");
        }
        entry.offset += begin;
    }
    auto& entries = header.tensors.entries;
    std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.name < b.name; });
    for (std::size_t i = 1; i < entries.size(); ++i) {
        if (entries[i].name == entries[i - 1].name) {
            in.refuse(error_code::header_field, 0, "the tensor '", entries[i].name, "' stands twice");
        }
    }
    std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) { return a.offset < b.offset; });
    for (std::size_t i = 1; i < entries.size(); ++i) {
        if (entries[i].offset < entries[i - 1].offset + entries[i - 1].bytes) {
            in.refuse(error_code::tensor_offsets, entries[i].offset, "the tensors '", entries[i - 1].name, "' and '",
                entries[i].name, "' share bytes");
        }
    }
    return header;
}

/// A GGUF file (version 3, aligned to 32) as one run of bytes: metadata in the order of its keys, after
/// general.architecture; tensors as they are given, extents slowest first. Metadata are texts, unsigned numbers (as
/// u32) and numbers (as f32). Throws dtype_mismatch for a dtype that ggml does not have.
[[nodiscard]] inline std::vector<std::byte> gguf_bytes(const std::map<std::string, gguf_value>& metadata,
    const std::vector<tensor_spec>& specs, const std::vector<std::vector<std::byte>>& data)
{
    constexpr std::uint64_t alignment = 32;
    std::vector<std::byte> out;
    const auto number = [&](auto value) {
        auto raw = std::bit_cast<std::array<std::byte, sizeof value>>(value);
        if constexpr (std::endian::native == std::endian::big) { std::reverse(raw.begin(), raw.end()); }
        out.insert(out.end(), raw.begin(), raw.end());
    };
    const auto text = [&](std::string_view words) {
        number(std::uint64_t{words.size()});
        const auto* const from = reinterpret_cast<const std::byte*>(words.data());
        out.insert(out.end(), from, from + words.size());
    };
    const auto align = [&] { out.resize((out.size() + alignment - 1) / alignment * alignment); };
    const auto key = [&](const std::string& name, const gguf_value& value) {
        text(name);
        if (const auto* const words = std::get_if<std::string>(&value)) {
            number(std::uint32_t{8});
            text(*words);
        }
        else if (const auto* const count = std::get_if<std::uint64_t>(&value)) {
            number(std::uint32_t{4});
            number(static_cast<std::uint32_t>(*count));
        }
        else {
            const auto* const real = std::get_if<double>(&value);
            number(std::uint32_t{6});
            number(static_cast<float>(real ? *real : 0));
        }
    };
    for (const char c : {'G', 'G', 'U', 'F'}) { out.push_back(static_cast<std::byte>(c)); }
    number(std::uint32_t{3});
    number(std::uint64_t{specs.size()});
    number(std::uint64_t{metadata.size()});
    const std::string first = "general.architecture";
    if (const auto place = metadata.find(first); place != metadata.end()) { key(first, place->second); }
    for (const auto& [name, value] : metadata) {
        if (name != first) { key(name, value); }
    }
    std::uint64_t at = 0;
    for (std::size_t i = 0; i < specs.size(); ++i) {
        const auto& spec = specs[i];
        const auto type = std::find_if(detail::ggml_types.begin(), detail::ggml_types.end(),
            [&](const auto& one) { return one.stored == spec.dtype; });
        if (type == detail::ggml_types.end()) {
            raise<dtype_mismatch>(error_code::dtype_unsupported,
                message("tensor '", spec.name, "' has dtype ", to_string(spec.dtype), ", which GGUF does not have"));
        }
        text(spec.name);
        number(static_cast<std::uint32_t>(spec.shape.size()));
        for (auto extent = spec.shape.rbegin(); extent != spec.shape.rend(); ++extent) {
            number(static_cast<std::uint64_t>(*extent));
        }
        number(type->number);
        number(at);
        at += (data[i].size() + alignment - 1) / alignment * alignment;
    }
    for (const auto& one : data) {
        align();
        out.insert(out.end(), one.begin(), one.end());
    }
    align();
    return out;
}

/// A language model as llama.cpp knows it: what decides the names and the layout of an adapter for it.
struct gguf_target {
    std::string architecture{}; ///< llama.cpp's word: "llama", "qwen2", "gemma2", "phi3", …
    std::size_t heads = 0, kv_heads = 0; ///< of attention; 0: not known
    bool tied = false; ///< the head is the embedding, and llama.cpp keeps one tensor for both

    /// Whether rows of q and k lie in pairs that rotate together, as llama.cpp keeps them for Llama, Mistral and
    /// Mixtral: row h·d + 2j + s is the model's row h·d + s·d/2 + j, of d rows a head.
    [[nodiscard]] bool pairs_rows() const noexcept { return architecture == "llama"; }
};

namespace detail {

/// A family: transformers' classes, and llama.cpp's word.
struct gguf_family {
    std::string_view transformers, architecture;
};
inline constexpr std::array<gguf_family, 14> gguf_families{
    {{"LlamaForCausalLM", "llama"}, {"MistralForCausalLM", "llama"}, {"MixtralForCausalLM", "llama"},
        {"Qwen2ForCausalLM", "qwen2"}, {"Qwen2MoeForCausalLM", "qwen2moe"}, {"Qwen3ForCausalLM", "qwen3"},
        {"Qwen3MoeForCausalLM", "qwen3moe"}, {"GemmaForCausalLM", "gemma"}, {"Gemma2ForCausalLM", "gemma2"},
        {"Gemma3ForCausalLM", "gemma3"}, {"Gemma3ForConditionalGeneration", "gemma3"}, {"PhiForCausalLM", "phi2"},
        {"Phi3ForCausalLM", "phi3"}, {"Gemma3TextModel", "gemma3"}}};

[[nodiscard]] inline bool is_gguf_architecture(std::string_view word) noexcept
{
    return std::any_of(
        gguf_families.begin(), gguf_families.end(), [&](const auto& one) { return one.architecture == word; });
}
/// "llama, qwen2, …"
[[nodiscard]] inline std::string gguf_architectures()
{
    std::string words;
    std::vector<std::string_view> seen;
    for (const auto& one : gguf_families) {
        if (std::find(seen.begin(), seen.end(), one.architecture) != seen.end()) { continue; }
        seen.push_back(one.architecture);
        words += (words.empty() ? "" : ", ") + std::string(one.architecture);
    }
    return words;
}

/// A module of a layer: transformers' name, and llama.cpp's.
struct gguf_module {
    std::string_view name, stem;
};
[[nodiscard]] constexpr std::array<gguf_module, 9> gguf_modules(std::string_view architecture) noexcept
{
    if (architecture == "phi2") {
        return {{{"self_attn.q_proj", "attn_q"}, {"self_attn.k_proj", "attn_k"}, {"self_attn.v_proj", "attn_v"},
            {"self_attn.dense", "attn_output"}, {"mlp.fc1", "ffn_up"}, {"mlp.fc2", "ffn_down"}, {}, {}, {}}};
    }
    if (architecture == "phi3") {
        return {{{"self_attn.qkv_proj", "attn_qkv"}, {"self_attn.o_proj", "attn_output"},
            {"mlp.gate_up_proj", "ffn_up"}, {"mlp.down_proj", "ffn_down"}, {}, {}, {}, {}, {}}};
    }
    const bool experts = architecture.ends_with("moe"); // whose only dense feed-forward layer is their router
    return {{{"self_attn.q_proj", "attn_q"}, {"self_attn.k_proj", "attn_k"}, {"self_attn.v_proj", "attn_v"},
        {"self_attn.o_proj", "attn_output"}, {"mlp.gate_proj", "ffn_gate"}, {"mlp.up_proj", "ffn_up"},
        {"mlp.down_proj", "ffn_down"},
        experts                       ? gguf_module{"mlp.gate", "ffn_gate_inp"}
            : architecture == "llama" ? gguf_module{"block_sparse_moe.gate", "ffn_gate_inp"}
                                      : gguf_module{},
        {}}};
}

} // namespace detail

/// What a model is for llama.cpp, by its config.json. Throws format_error that names what is missing or unknown.
/// `label` is the configuration's, for messages.
[[nodiscard]] inline gguf_target gguf_target_of(const nlohmann::json& config, const std::string& label)
{
    const auto refuse = [&](const auto&... parts) {
        raise<format_error>(error_code::adapter_unsupported, message(parts...), label);
    };
    const auto text = config.find("text_config");
    const auto& inner = text != config.end() && text->is_object() ? *text : config;
    const auto named = [](const nlohmann::json& from) {
        const auto list = from.find("architectures");
        return list != from.end() && list->is_array() && !list->empty() && list->front().is_string()
            ? list->front().get<std::string>()
            : std::string();
    };
    const auto name = named(inner).empty() ? named(config) : named(inner);
    if (name.empty()) {
        refuse("has no \"architectures\": what llama.cpp calls the tensors depends on it; take the config.json of the "
               "model that the adapter was trained on");
    }
    const auto family = std::find_if(detail::gguf_families.begin(), detail::gguf_families.end(),
        [&](const auto& one) { return one.transformers == name; });
    if (family == detail::gguf_families.end()) {
        refuse("names the architecture ", name,
            ", whose names in GGUF are not known here (known: ", detail::gguf_architectures(),
            "): convert with llama.cpp's convert_lora_to_gguf.py");
    }
    gguf_target target{std::string(family->architecture)};
    const auto count = [&](const char* field) -> std::size_t {
        const auto place = inner.find(field);
        return place != inner.end() && place->is_number_unsigned() ? place->get<std::size_t>() : 0;
    };
    target.heads = count("num_attention_heads");
    target.kv_heads = count("num_key_value_heads");
    if (target.kv_heads == 0) { target.kv_heads = target.heads; }
    const auto tie = inner.find("tie_word_embeddings");
    const auto outer = config.find("tie_word_embeddings");
    target.tied = tie != inner.end() && tie->is_boolean() ? tie->get<bool>()
        : outer != config.end() && outer->is_boolean()    ? outer->get<bool>()
                                                          : target.architecture.starts_with("gemma");
    return target;
}

/// What llama.cpp calls the weight of a module ("blk.3.attn_q.weight"); empty: it has no such weight, or none is known.
[[nodiscard]] inline std::string gguf_tensor_name(std::string_view module, const gguf_target& target)
{
    const auto ends = [&](std::string_view word) {
        return module == word || (module.ends_with(word) && module[module.size() - word.size() - 1] == '.');
    };
    if (ends("embed_tokens")) { return "token_embd.weight"; }
    if (ends("lm_head")) { return "output.weight"; }
    const std::string_view list = "layers.";
    const auto at = module.starts_with(list) ? 0 : module.find(".layers.");
    if (at == module.npos) { return {}; }
    auto rest = module.substr(at + (at == 0 && module.starts_with(list) ? list.size() : list.size() + 1));
    const auto dot = rest.find('.');
    if (dot == rest.npos || dot == 0 || rest.substr(0, dot).find_first_not_of("0123456789") != rest.npos) { return {}; }
    const auto number = rest.substr(0, dot);
    rest.remove_prefix(dot + 1);
    for (const auto& one : detail::gguf_modules(target.architecture)) {
        if (!one.name.empty() && one.name == rest) { return message("blk.", number, ".", one.stem, ".weight"); }
    }
    return {};
}

/// The module of such a name, as transformers' class calls it ("model.layers.3.self_attn.q_proj"); empty: none is
/// known.
[[nodiscard]] inline std::string gguf_module_name(std::string_view tensor, const gguf_target& target)
{
    if (tensor == "token_embd.weight") { return "model.embed_tokens"; }
    if (tensor == "output.weight") { return "lm_head"; }
    constexpr std::string_view block = "blk.", weight = ".weight";
    if (!tensor.starts_with(block) || !tensor.ends_with(weight)) { return {}; }
    tensor = tensor.substr(block.size(), tensor.size() - block.size() - weight.size());
    const auto dot = tensor.find('.');
    if (dot == tensor.npos || dot == 0 || tensor.substr(0, dot).find_first_not_of("0123456789") != tensor.npos) {
        return {};
    }
    for (const auto& one : detail::gguf_modules(target.architecture)) {
        if (!one.name.empty() && one.stem == tensor.substr(dot + 1)) {
            return message("model.layers.", tensor.substr(0, dot), ".", one.name);
        }
    }
    return {};
}

/// The row of a q or k weight that stands at `row` of llama.cpp's (pairs_rows()), of `rows` in `heads` heads.
[[nodiscard]] constexpr std::size_t paired_row(std::size_t row, std::size_t rows, std::size_t heads) noexcept
{
    const std::size_t size = rows / heads, within = row % size;
    return row - within + within % 2 * (size / 2) + within / 2;
}

} // namespace taskvec::inline TASKVEC_ABI
