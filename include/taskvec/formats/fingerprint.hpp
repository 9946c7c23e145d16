// The fingerprint of a model: one 64-bit number over names, dtypes, shapes and bytes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/byte_buffer.hpp>
#include <taskvec/core/hash.hpp>
#include <taskvec/core/parallel.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/models/stored_elements.hpp>

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Bytes that are hashed as one piece.
inline constexpr std::size_t fingerprint_block = std::size_t{1} << 22;

/// The fingerprint of a model, by which a delta knows its base. All hashes are XXH64 with seed 0, all numbers 64-bit
/// little-endian:
///
///     block hash    XXH64 of up to 2^22 bytes of a tensor; a tensor of n bytes has ceil(n / 2^22) blocks
///     tensor hash   XXH64 of: length of the name, name, length of the dtype's name, dtype's name ("BF16"), rank,
///                   extents, the block hashes in order
///     fingerprint   XXH64 of: number of tensors, the tensor hashes in the order of the names' bytes
///
/// A tensor that is worked out (a quantised layer is F32) counts as if it were stored in its dtype.
///
/// Tensors must be contiguous host memory of any dtype and alignment. The value does not depend on the policy, on the
/// order of tensors in a file, or on how they are spread over shards.
/// Throws invalid_argument for a tensor that is not contiguous host memory; cancelled. Cost: one read of all bytes.
[[nodiscard]] inline std::uint64_t fingerprint(const cpu& policy, const const_model_ref& model)
{
    struct block {
        const std::byte* data;
        std::size_t size;
        const operand_source* source;
        taskvec::dtype stored;
        std::uint64_t first; ///< of the elements that are worked out
    };
    std::pmr::vector<block> blocks(memory_of(policy));
    std::uint64_t total = 0;
    for (const auto& [name, tensor] : model) {
        if (tensor.space != memory_space::host || !tensor.contiguous()) {
            raise<invalid_argument>(
                error_code::tensor_layout, message("tensor '", name, "' is not contiguous host memory; copy it first"));
        }
        const std::size_t bytes = tensor.bytes(name);
        const auto* data = static_cast<const std::byte*>(tensor.data);
        for (std::size_t at = 0; at < bytes; at += fingerprint_block) {
            const bool worked_out = tensor.source != nullptr;
            blocks.push_back({worked_out ? nullptr : data + at, std::min(fingerprint_block, bytes - at), tensor.source,
                tensor.dtype, worked_out ? at / byte_count(tensor.dtype, 1) : 0});
        }
        total += bytes;
    }
    std::pmr::vector<std::uint64_t> hashes(blocks.size(), memory_of(policy));
    detail::progress_meter progress(policy, "fingerprint", total);
    for_each_index(policy, blocks.size(), [&](std::size_t index, std::size_t) {
        xxh64 hash;
        const block& part = blocks[index];
        if (part.source) {
            constexpr std::size_t piece = 65536;
            const std::size_t width = byte_count(part.stored, 1), size = part.size / width;
            detail::byte_buffer words(memory_of(policy), std::min(piece, size) * width);
            for (std::size_t at = 0; at < size; at += piece) {
                const std::size_t n = std::min(piece, size - at);
                detail::read_stored(*part.source, part.stored, part.first + at, n, words.data());
                hash.update(words.data(), n * width);
            }
        }
        else {
            hash.update(part.data, part.size);
        }
        hashes[index] = hash.digest();
        if (!progress.advance(blocks[index].size)) { raise<cancelled>(error_code::cancelled); }
    });

    xxh64 whole;
    const auto number = [](xxh64& hash, std::uint64_t value) { hash.update(&value, sizeof value); };
    const auto text = [&](xxh64& hash, std::string_view value) {
        number(hash, value.size());
        hash.update(value);
    };
    number(whole, model.size());
    std::size_t next = 0;
    for (const auto& [label, tensor] : model) {
        xxh64 hash;
        text(hash, label);
        text(hash, to_string(tensor.dtype));
        number(hash, tensor.shape.size());
        for (const auto extent : tensor.shape) { number(hash, static_cast<std::uint64_t>(extent)); }
        const std::size_t bytes = tensor.bytes(label);
        for (std::size_t at = 0; at < bytes; at += fingerprint_block) { number(hash, hashes[next++]); }
        number(whole, hash.digest());
    }
    return whole.digest();
}

/// Bytes at the beginning and at the end of each tensor that a sketch looks at.
inline constexpr std::size_t sketch_bytes = 4096;

/// A fingerprint that costs nothing: as fingerprint(), with the first and the last 4 KiB of each tensor in place of its
/// bytes (all of a tensor of up to 8 KiB). It tells models apart by what training changes, and is no proof that two are
/// equal: fingerprint() is. For records such as model cards.
[[nodiscard]] inline std::uint64_t fingerprint_sketch(const const_model_ref& model)
{
    xxh64 whole;
    const auto number = [&](std::uint64_t value) { whole.update(&value, sizeof value); };
    const auto text = [&](std::string_view value) {
        number(value.size());
        whole.update(value);
    };
    number(model.size());
    for (const auto& [label, tensor] : model) {
        if (tensor.space != memory_space::host || !tensor.contiguous()) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", label, "' is not contiguous host memory; copy it first"));
        }
        text(label);
        text(to_string(tensor.dtype));
        number(tensor.shape.size());
        for (const auto extent : tensor.shape) { number(static_cast<std::uint64_t>(extent)); }
        const std::size_t bytes = tensor.bytes(label);
        if (tensor.source) {
            const std::size_t width = byte_count(tensor.dtype, 1), edge = sketch_bytes / width, size = bytes / width;
            std::vector<std::byte> words(std::min(size, 2 * edge) * width);
            if (size <= 2 * edge) { detail::read_stored(*tensor.source, tensor.dtype, 0, size, words.data()); }
            else {
                detail::read_stored(*tensor.source, tensor.dtype, 0, edge, words.data());
                detail::read_stored(*tensor.source, tensor.dtype, size - edge, edge, words.data() + sketch_bytes);
            }
            whole.update(words.data(), words.size());
            continue;
        }
        const std::string_view content(static_cast<const char*>(tensor.data), bytes);
        whole.update(content.substr(0, bytes <= 2 * sketch_bytes ? bytes : sketch_bytes));
        whole.update(content.substr(bytes <= 2 * sketch_bytes ? bytes : bytes - sketch_bytes));
    }
    return whole.digest();
}

/// A fingerprint as files spell it: "xxh64:" and 16 hexadecimal digits.
[[nodiscard]] inline std::string fingerprint_text(std::uint64_t value)
{
    constexpr char digits[] = "0123456789abcdef";
    std::string text = "xxh64:";
    for (int shift = 60; shift >= 0; shift -= 4) { text += digits[(value >> shift) & 15]; }
    return text;
}
/// The fingerprint that fingerprint_text() wrote; empty for any other text.
[[nodiscard]] inline std::optional<std::uint64_t> parse_fingerprint(std::string_view text)
{
    if (!text.starts_with("xxh64:") || text.size() != 22) { return std::nullopt; }
    std::uint64_t value = 0;
    const auto [end, failure] = std::from_chars(text.data() + 6, text.data() + 22, value, 16);
    if (failure != std::errc{} || end != text.data() + 22) { return std::nullopt; }
    return value;
}

} // namespace taskvec::inline TASKVEC_ABI
