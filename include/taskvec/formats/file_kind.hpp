// What a file is that is no safetensors file: said by its bytes, with the way on.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// What a file turned out to be, in words: "is <what>: <mend>".
struct file_kind {
    std::string what, mend; ///< completes "is …", and what to do about it
    /// "is <what>: <mend>".
    [[nodiscard]] std::string sentence() const { return message("is ", what, ": ", mend); }
};

namespace detail {

inline constexpr std::string_view convert_to_safetensors =
    "convert it once by transformers' save_pretrained(), or by safetensors.torch.save_file(torch.load(FILE, "
    "weights_only=True), 'model.safetensors')";
inline constexpr std::string_view fetch_again = "fetch it again, and compare its size with that at its source";

inline constexpr std::string_view pytorch_archive = "a PyTorch file (a zip archive with a pickle)";

[[nodiscard]] inline bool begins_like(std::string_view text, std::string_view lower_case)
{
    return text.size() >= lower_case.size()
        && std::equal(lower_case.begin(), lower_case.end(), text.begin(),
            [](char want, char found) { return want == (found >= 'A' && found <= 'Z' ? found - 'A' + 'a' : found); });
}

/// Whether bytes are text that people read: no control characters but white space.
[[nodiscard]] inline bool is_plain_text(std::string_view text)
{
    return !text.empty() && std::none_of(text.begin(), text.end(), [](char c) {
        const auto code = static_cast<unsigned char>(c);
        return (code < 0x20u && c != '\n' && c != '\r' && c != '\t') || code == 0x7fu;
    });
}

/// The first words of a text, on one line.
[[nodiscard]] inline std::string first_words(std::string_view text, std::size_t most = 60)
{
    std::string words(text.substr(0, most));
    for (auto& c : words) {
        if (c == '\n' || c == '\r' || c == '\t') { c = ' '; }
    }
    while (words.ends_with(' ')) { words.pop_back(); }
    return words + (text.size() > most ? " …" : "");
}

[[nodiscard]] inline file_kind kind_of_zip(std::string_view bytes)
{
    // Names stand in the directory at the end, and before each entry.
    constexpr std::size_t part = 65536;
    const auto head = bytes.substr(0, part), tail = bytes.substr(bytes.size() - std::min(part, bytes.size()));
    const auto names = [&](std::string_view name) {
        return head.find(name) != head.npos || tail.find(name) != tail.npos;
    };
    const bool cut = tail.find("PK\x05\x06") == tail.npos;
    const std::string lost = cut ? "the end of a zip archive is missing: " + std::string(fetch_again) + "; then " : "";
    if (names("constants.pkl") || names("/code/")) {
        return {"a TorchScript archive (PyTorch, zip)", lost + "save the model's state_dict() as safetensors"};
    }
    if (names("data.pkl")) { return {std::string(pytorch_archive), lost + std::string(convert_to_safetensors)}; }
    if (names(".npy")) {
        return {"a NumPy archive (.npz, zip)", lost + "save its arrays by safetensors.numpy.save_file()"};
    }
    return {"a zip archive, as PyTorch's .bin, .pt and .pth are (pickles in a zip)",
        lost + std::string(convert_to_safetensors) + ", or unpack it"};
}

} // namespace detail

/// Whether a file's text is a Git LFS pointer: what stands in a clone for a file that was not fetched.
[[nodiscard]] inline bool is_lfs_pointer(std::string_view text)
{
    return text.starts_with("version https://git-lfs.github.com/spec/");
}

/// Says what a file is that was taken for a safetensors file, by its content alone: PyTorch's zip and pickle files, a
/// Git LFS pointer, a page of HTML, GGUF, HDF5, archives, text, zeros, nothing at all. Nothing for what is unknown. For
/// messages: a valid safetensors file is not asked about. Cost: looks at the first and last 64 KiB.
///
///     if (const auto kind = what_is_this_file(map.bytes())) { std::cerr << kind->sentence(); }
[[nodiscard]] inline std::optional<file_kind> what_is_this_file(std::span<const std::byte> content)
{
    using detail::convert_to_safetensors, detail::fetch_again;
    const std::string_view bytes(reinterpret_cast<const char*>(content.data()), content.size());
    const auto begins = [&](std::string_view magic) { return bytes.starts_with(magic); };
    const std::string again(fetch_again), convert(convert_to_safetensors);
    if (bytes.empty()) { return file_kind{"empty (0 bytes)", again}; }
    if (is_lfs_pointer(bytes)) {
        std::string size = "the";
        if (const auto at = bytes.substr(0, 1024).find("\nsize "); at != bytes.npos) {
            auto digits = bytes.substr(at + 6, 20);
            digits = digits.substr(0, digits.find_first_not_of("0123456789"));
            if (!digits.empty()) { size = "a file of " + std::string(digits) + " bytes, the"; }
        }
        return file_kind{"a Git LFS pointer, not the file that it stands for",
            "fetch " + size + " real one, by 'git lfs pull' in its repository or by 'hf download'"};
    }
    using namespace std::string_view_literals;
    if (begins("PK\x03\x04"sv) || begins("PK\x05\x06"sv)) { return detail::kind_of_zip(bytes); }
    if (begins("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"sv)) {
        return file_kind{"a PyTorch file of the old kind (before 1.6: a row of pickles)", convert};
    }
    if (bytes.size() > 2 && bytes[0] == '\x80' && bytes[1] >= 2 && bytes[1] <= 5) {
        return file_kind{"a Python pickle, as PyTorch and others write them", convert};
    }
    if (begins("algg")) {
        return file_kind{"an adapter of llama.cpp before GGUF (ggla)",
            "take the adapter that it was converted from, and convert that again with a current llama.cpp"};
    }
    if (begins("FUGG")) {
        return file_kind{"a GGUF file in another order of bytes", "convert it on a machine like this one"};
    }
    if (begins("GGUF")) {
        return file_kind{"a GGUF file (llama.cpp)", "take the model's safetensors files, from which it was converted"};
    }
    if (begins("lmgg") || begins("tjgg") || begins("fmgg")) {
        return file_kind{
            "a GGML file (llama.cpp of old)", "take the model's safetensors files, from which it was converted"};
    }
    if (begins("\x89HDF\r\n\x1a\n"sv)) {
        return file_kind{"an HDF5 file (Keras, TensorFlow: .h5)",
            "convert it once by transformers' from_pretrained(DIR, from_tf=True).save_pretrained()"};
    }
    if (begins("\x93NUMPY"sv)) { return file_kind{"a NumPy array (.npy)", "save it by safetensors.numpy.save_file()"}; }
    if (bytes.size() > 8 && bytes.substr(4, 4) == "TFL3") {
        return file_kind{"a TensorFlow Lite model", "take the safetensors files of the model that it was made of"};
    }
    if (bytes.size() > 262 && bytes.substr(257, 5) == "ustar") { return file_kind{"a tar archive", "unpack it first"}; }
    for (const auto& [magic, name] : {std::pair{"\x1f\x8b"sv, "gzip"sv}, std::pair{"\x28\xb5\x2f\xfd"sv, "zstd"sv},
             std::pair{"\xfd\x37zXZ\0"sv, "xz"sv}, std::pair{"BZh"sv, "bzip2"sv},
             std::pair{"7z\xbc\xaf\x27\x1c"sv, "7-Zip"sv}, std::pair{"Rar!\x1a\x07"sv, "RAR"sv}}) {
        if (begins(magic)) { return file_kind{message("compressed by ", name), "unpack it first"}; }
    }
    if (const auto head = bytes.substr(0, std::min<std::size_t>(bytes.size(), 65536));
        head.find_first_not_of('\0') == head.npos) {
        return file_kind{message("zeros from its first byte on"), "the download did not finish; " + again};
    }
    if (const auto first = static_cast<unsigned char>(bytes[0]);
        bytes.size() > 2 && first > 0x80u && first < 0x90u && (static_cast<unsigned char>(bytes[1]) & 0xe0u) == 0xa0u) {
        return file_kind{"MessagePack (Flax: .msgpack)",
            "convert it once by transformers' from_pretrained(DIR, from_flax=True).save_pretrained()"};
    }
    auto text = bytes.substr(0, 65536);
    if (text.starts_with("\xef\xbb\xbf")) { text.remove_prefix(3); }
    const auto start = text.find_first_not_of(" \t\r\n");
    const auto words = start == text.npos ? text : text.substr(start);
    if (detail::begins_like(words, "<!doctype html") || detail::begins_like(words, "<html")
        || detail::begins_like(words, "<head")) {
        return file_kind{"a page of HTML, not a model",
            "the address answered with a page (to log in, to accept terms, or an error): fetch the file itself, by "
            "'hf download' or from the address behind 'download'"};
    }
    if (detail::is_plain_text(text.size() < bytes.size() ? text.substr(0, text.size() - 4) : text)) {
        if (words.starts_with('<')) { return file_kind{"a page of XML", again}; }
        if (words.starts_with('{') || words.starts_with('[')) {
            return file_kind{"JSON (" + detail::first_words(words) + "), not tensors",
                "name the model's directory, its .safetensors file or its .safetensors.index.json"};
        }
        return file_kind{"a text ('" + detail::first_words(words) + "'), not a model", again};
    }
    if (bytes.size() > 16 && bytes[0] == '\x08' && bytes.substr(0, 256).find("onnx") != bytes.npos) {
        return file_kind{"an ONNX model", "take the safetensors files of the model that it was made of"};
    }
    return std::nullopt;
}

} // namespace taskvec::inline TASKVEC_ABI
