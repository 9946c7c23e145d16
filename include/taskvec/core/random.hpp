// Counter-based random numbers: the same draw for an element wherever, and in whatever order, it is processed.
// Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>
#include <taskvec/core/hash.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// What Philox4x32-10 consists of.
inline constexpr int philox_rounds = 10;
/// What the first and the third word of a counter are multiplied by in each round.
inline constexpr std::array<std::uint32_t, 2> philox_multipliers{0xD2511F53u, 0xCD9E8D57u};
/// The key of the next round.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::array<std::uint32_t, 2> next_philox_key(
    std::array<std::uint32_t, 2> key) noexcept
{
    return {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
}
/// One block of Philox4x32-10: four random words for a 128-bit counter and a 64-bit key.
[[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::array<std::uint32_t, 4> philox4x32(
    std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) noexcept
{
    for (int round = 0; round < philox_rounds; ++round) {
        const std::uint64_t a = std::uint64_t{philox_multipliers[0]} * counter[0];
        const std::uint64_t b = std::uint64_t{philox_multipliers[1]} * counter[2];
        counter = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
            static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
        key = next_philox_key(key);
    }
    return counter;
}

/// The random numbers of one (seed, task, tensor name): element i's draw is a function of these and i alone.
/// Key: XXH64 of the name seeded with `seed`. Counter: (i / 4, task, 0) as (low word, high word, task, 0); word i
/// mod 4.
///
///     random_stream stream(seed, task, "layer.weight");
///     bool keep = stream.word(i) < keep_below(density);
class random_stream {
public:
    /// The numbers of (seed, task, tensor name).
    random_stream(std::uint64_t seed, std::uint32_t task, std::string_view name) noexcept
        : random_stream(hash64(name, seed), task)
    { }
    /// The same by the key, the hash of name and seed.
    TASKVEC_HOST_DEVICE constexpr random_stream(std::uint64_t key, std::uint32_t task) noexcept
        : key_{static_cast<std::uint32_t>(key), static_cast<std::uint32_t>(key >> 32)}
        , task_(task)
    { }

    /// The key of the first round.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::array<std::uint32_t, 2> key() const noexcept { return key_; }
    /// Which task's numbers they are.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint32_t task() const noexcept { return task_; }
    /// The four words of elements 4·block … 4·block + 3.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::array<std::uint32_t, 4> words(std::uint64_t block) const noexcept
    {
        return philox4x32(
            {static_cast<std::uint32_t>(block), static_cast<std::uint32_t>(block >> 32), task_, 0u}, key_);
    }
    /// A uniform 32-bit word for element `index`.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr std::uint32_t word(std::uint64_t index) const noexcept
    {
        return words(index / 4)[index % 4];
    }
    /// Uniform in [0, 1), a multiple of 2^-32.
    [[nodiscard]] TASKVEC_HOST_DEVICE constexpr double uniform(std::uint64_t index) const noexcept
    {
        return word(index) * 0x1p-32;
    }
    /// Standard normal, by Box and Muller: elements 2j and 2j + 1 are pair j.
    [[nodiscard]] std::array<double, 2> normal_pair(std::uint64_t pair) const noexcept
    {
        const auto four = words(pair);
        const double u = static_cast<double>(((std::uint64_t{four[0]} << 32 | four[1]) >> 11) + 1) * 0x1p-53; // (0, 1]
        const double v = static_cast<double>((std::uint64_t{four[2]} << 32 | four[3]) >> 11) * 0x1p-53; // [0, 1)
        const double radius = std::sqrt(-2.0 * std::log(u)), angle = 2.0 * std::numbers::pi * v;
        return {radius * std::cos(angle), radius * std::sin(angle)};
    }
    /// Standard normal: a half of the element's pair.
    [[nodiscard]] double normal(std::uint64_t index) const noexcept { return normal_pair(index / 2)[index % 2]; }

private:
    std::array<std::uint32_t, 2> key_;
    std::uint32_t task_;
};

/// An element is kept with probability `density` when its word is below this: density·2^32, rounded.
[[nodiscard]] inline std::uint64_t keep_below(double density) noexcept
{
    return static_cast<std::uint64_t>(std::llround(density * 0x1p32));
}

} // namespace taskvec::inline TASKVEC_ABI
