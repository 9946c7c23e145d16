// XXH64 (the xxHash specification by Yann Collet): the 64-bit hash behind fingerprints and random streams.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// Streaming XXH64. The result depends on the bytes alone, not on how they were split into updates.
///
///     xxh64 hash;
///     hash.update(data, size);
///     std::uint64_t value = hash.digest();
class xxh64 {
public:
    /// Begins a hash; the seed is XXH64's.
    explicit constexpr xxh64(std::uint64_t seed = 0) noexcept
        : lanes_{seed + p1 + p2, seed + p2, seed, seed - p1}
        , seed_(seed)
    { }

    /// Goes on with `size` bytes.
    void update(const void* data, std::size_t size) noexcept
    {
        const auto* bytes = static_cast<const unsigned char*>(data);
        total_ += size;
        if (size < 32 && held_ + size < 32) { // (the first half for compilers that take the sum for one that wraps)
            if (size) { std::memcpy(buffer_ + held_, bytes, size); }
            held_ += size;
            return;
        }
        if (held_) {
            const std::size_t missing = 32 - held_;
            std::memcpy(buffer_ + held_, bytes, missing);
            bytes += missing;
            size -= missing;
            stripe(buffer_);
        }
        for (; size >= 32; bytes += 32, size -= 32) { stripe(bytes); }
        if (size) { std::memcpy(buffer_, bytes, size); }
        held_ = size;
    }
    void update(std::string_view text) noexcept { update(text.data(), text.size()); }

    /// The hash of all that was given so far, which may go on.
    [[nodiscard]] std::uint64_t digest() const noexcept
    {
        std::uint64_t h;
        if (total_ >= 32) {
            h = std::rotl(lanes_[0], 1) + std::rotl(lanes_[1], 7) + std::rotl(lanes_[2], 12) + std::rotl(lanes_[3], 18);
            for (const auto lane : lanes_) { h = (h ^ round(0, lane)) * p1 + p4; }
        }
        else {
            h = seed_ + p5;
        }
        h += total_;
        std::size_t at = 0;
        for (; at + 8 <= held_; at += 8) {
            h = std::rotl(h ^ round(0, read<std::uint64_t>(buffer_ + at)), 27) * p1 + p4;
        }
        if (at + 4 <= held_) {
            h = std::rotl(h ^ (read<std::uint32_t>(buffer_ + at) * p1), 23) * p2 + p3;
            at += 4;
        }
        for (; at < held_; ++at) { h = std::rotl(h ^ (buffer_[at] * p5), 11) * p1; }
        h = (h ^ (h >> 33)) * p2;
        h = (h ^ (h >> 29)) * p3;
        return h ^ (h >> 32);
    }

private:
    static_assert(std::endian::native == std::endian::little, "taskvec reads and writes little-endian files in place");
    static constexpr std::uint64_t p1 = 0x9E3779B185EBCA87ull, p2 = 0xC2B2AE3D27D4EB4Full, p3 = 0x165667B19E3779F9ull,
                                   p4 = 0x85EBCA77C2B2AE63ull, p5 = 0x27D4EB2F165667C5ull;
    template <class Word>
    static std::uint64_t read(const unsigned char* bytes) noexcept
    {
        Word word;
        std::memcpy(&word, bytes, sizeof word);
        return word;
    }
    static constexpr std::uint64_t round(std::uint64_t lane, std::uint64_t input) noexcept
    {
        return std::rotl(lane + input * p2, 31) * p1;
    }
    void stripe(const unsigned char* bytes) noexcept
    {
        for (std::size_t i = 0; i < 4; ++i) { lanes_[i] = round(lanes_[i], read<std::uint64_t>(bytes + 8 * i)); }
    }

    std::uint64_t lanes_[4];
    std::uint64_t seed_;
    std::uint64_t total_ = 0;
    std::size_t held_ = 0;
    unsigned char buffer_[32] = {};
};

/// XXH64 of a string.
[[nodiscard]] inline std::uint64_t hash64(std::string_view text, std::uint64_t seed = 0) noexcept
{
    xxh64 hash(seed);
    hash.update(text);
    return hash.digest();
}

} // namespace taskvec::inline TASKVEC_ABI
