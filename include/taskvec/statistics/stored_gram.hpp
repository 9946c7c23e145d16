// Gram matrices as they lie in memory or in a mapped file: read, and checked to be what they claim on the way.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/models/block.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <utility>

namespace taskvec::inline TASKVEC_ABI::detail {

/// How far entries of a Gram matrix may be from symmetric, as a share of what the diagonal allows: what storage rounds.
[[nodiscard]] constexpr double gram_tolerance(taskvec::dtype type) noexcept
{
    return type == taskvec::dtype::f64 ? 1e-9 : type == taskvec::dtype::f32 ? 1e-4 : 2e-2;
}
[[noreturn]] TASKVEC_COLD inline void refuse_gram_nonfinite(const std::string& where, double value, std::size_t index)
{
    raise<nonfinite_error>(error_code::statistics_not_finite,
        message(where, " holds ", std::isnan(value) ? "NaN" : "infinity", " at index ", index,
            ": collect the statistics again"));
}
[[noreturn]] TASKVEC_COLD inline void refuse_gram_negative(const std::string& where, double value, std::size_t i)
{
    raise<invalid_argument>(error_code::statistics_invalid,
        message(where, " has ", value, " at row and column ", i, ": a sum of squares cannot be negative"));
}
/// Entries (i, j) and (j, i), of which one is not finite, or which differ by more than is tolerated, or are too large.
[[noreturn]] TASKVEC_COLD inline void refuse_gram_entry(
    const std::string& where, std::size_t n, std::size_t i, std::size_t j, double lower, double upper, double tolerated)
{
    if (!std::isfinite(lower)) { refuse_gram_nonfinite(where, lower, i * n + j); }
    if (!std::isfinite(upper)) { refuse_gram_nonfinite(where, upper, j * n + i); }
    if (std::abs(lower - upper) > tolerated) {
        raise<invalid_argument>(error_code::statistics_invalid,
            message(
                where, " is not symmetric: ", lower, " at (", i, ", ", j, ") but ", upper, " at (", j, ", ", i, ")"));
    }
    raise<invalid_argument>(error_code::statistics_invalid,
        message(where, " is no Gram matrix: its entry ", lower, " at (", i, ", ", j,
            ") is larger than its diagonal allows"));
}

/// A Gram matrix that is read from memory or a mapped file, n×n, and checked to be one on the way: finite, symmetric,
/// no entry larger than its diagonal allows (each up to what storage rounds). Throws nonfinite_error, invalid_argument,
/// in which `where` names it.
class stored_gram {
public:
    static constexpr std::size_t tile = 128; ///< square pieces, both halves of which are in memory at a time

    /// `raw` has room for block_size doubles, `diagonal` for n; both are used again for the next one.
    stored_gram(const aligned_tensor::operand& from, std::size_t n, std::function<std::string()> where,
        std::span<double> diagonal, double* raw)
        : from_(from)
        , n_(n)
        , where_(std::move(where))
        , diagonal_(diagonal.first(n))
    {
        for (std::size_t i = 0; i < n; ++i) {
            (void)read(from, i * n + i, 1, &diagonal_[i], raw);
            if (!std::isfinite(diagonal_[i])) { refuse_gram_nonfinite(where_(), diagonal_[i], i * n + i); }
            if (diagonal_[i] < 0) { refuse_gram_negative(where_(), diagonal_[i], i); }
        }
    }

    [[nodiscard]] std::size_t tile_rows() const noexcept { return (n_ + tile - 1) / tile; }
    /// Calls use(i, j, value) for the entries of one row of tiles on and below the diagonal, the mean of both halves.
    /// `memory`: 2·tile² doubles. Rows of tiles may be read at the same time.
    template <class Use>
    void for_each_entry(std::size_t tile_row, double* memory, double* raw, Use&& use) const
    {
        const double tolerance = gram_tolerance(from_.dtype);
        double *const below = memory, *const above = memory + tile * tile;
        const std::size_t r = tile_row * tile, height = std::min(tile, n_ - r);
        for (std::size_t c = 0; c <= r; c += tile) {
            const std::size_t width = std::min(tile, n_ - c);
            for (std::size_t i = 0; i < height; ++i) {
                (void)read(from_, (r + i) * n_ + c, width, below + i * tile, raw);
            }
            for (std::size_t j = 0; j < width; ++j) {
                (void)read(from_, (c + j) * n_ + r, height, above + j * tile, raw);
            }
            for (std::size_t i = 0; i < height; ++i) {
                for (std::size_t j = 0; j < width && c + j <= r + i; ++j) {
                    const double lower = below[i * tile + j], upper = above[j * tile + i];
                    const double bound = std::sqrt(diagonal_[r + i]) * std::sqrt(diagonal_[c + j]);
                    if (!(std::abs(lower - upper) <= tolerance * bound)
                        || !(std::abs(lower) <= (1 + 10 * tolerance) * bound)) {
                        refuse_gram_entry(where_(), n_, r + i, c + j, lower, upper, tolerance * bound);
                    }
                    use(r + i, c + j, 0.5 * (lower + upper));
                }
            }
        }
    }

    /// `count` elements of any operand from `offset` on, in f64. Returns their largest magnitude bits.
    static std::uint64_t read(
        const aligned_tensor::operand& from, std::uint64_t offset, std::size_t count, double* out, double* raw)
    {
        std::uint64_t largest = 0;
        for (std::size_t at = 0; at < count; at += block_size) {
            const std::size_t n = std::min(block_size, count - at);
            largest = std::max(largest,
                with_elements(from, offset + at, n, reinterpret_cast<std::byte*>(raw),
                    [&](const auto* values) { return kernels::widen(values, out + at, n); }));
        }
        return largest;
    }

private:
    aligned_tensor::operand from_;
    std::size_t n_;
    std::function<std::string()> where_;
    std::span<double> diagonal_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
