// Task vectors as plain vectors: difference, application, weighted combination, negation; dot, norm, cosine.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/models/tensor_sums.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <ranges>
#include <span>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// out = tuned − base, the task vector τ. Flat views of one length; storage types may differ. Subtracted in f32 (f64
/// when an input is f64) and rounded once; bit-exact. May work in place. Errors: shape_mismatch, nonfinite_error.
///
///     std::vector<float> tau(n);
///     difference(cpu{}, tuned, base, tau);
template <input_of<cpu> Tuned, input_of<cpu> Base, output_of<cpu> Out>
void difference(
    const cpu& policy, const Tuned& tuned, const Base& base, Out&& out, nonfinite on_nonfinite = nonfinite::error);

/// out = base + λ·vector: a task vector applied. Product and sum round separately in f32 (f64 when an input is f64).
/// Bit-exact. May work in place. Errors: shape_mismatch, nonfinite_error.
///
///     apply(cpu{}, base, tau, 0.3, merged);
template <input_of<cpu> Base, input_of<cpu> Vector, output_of<cpu> Out>
void apply(const cpu& policy, const Base& base, const Vector& vector, double lambda, Out&& out,
    nonfinite on_nonfinite = nonfinite::error);

/// out = −x: forgetting instead of learning. Exact. May work in place.
template <input_of<cpu> X, output_of<cpu> Out>
void negate(const cpu& policy, const X& x, Out&& out, nonfinite on_nonfinite = nonfinite::error);

/// out = Σ wt·xt over flat views of one storage type, in f32 (f64 for f64), in the order of the list; every product and
/// sum rounds; bit-exact. `out` may not share memory with an input. Errors: invalid_argument (no vector, wrong number
/// of weights), shape_mismatch, nonfinite_error.
///
///     combine(cpu{}, vectors, std::vector{0.5, -0.5}, out);
template <std::ranges::input_range Vectors, output_of<cpu> Out>
    requires input_of<std::ranges::range_reference_t<const Vectors>, cpu>
void combine(const cpu& policy, const Vectors& vectors, std::span<const double> weights, Out&& out,
    nonfinite on_nonfinite = nonfinite::error);

/// Σ xi·yi in f64, in a fixed pairwise shape: the same bits for any threads. Relative to Σ|xi·yi| the error is below
/// (12 + log2 n)·2^-53 or so. Errors: shape_mismatch.
template <input_of<cpu> X, input_of<cpu> Y>
[[nodiscard]] double dot(const cpu& policy, const X& x, const Y& y);

/// ‖x‖ = √(x·x).
template <input_of<cpu> X>
[[nodiscard]] double norm(const cpu& policy, const X& x);

/// x·y / (‖x‖·‖y‖), in [−1, 1]; 0 when a vector is 0, NaN when one has NaN or infinity. Vectors whose squares are
/// beyond f64 are scaled first.
template <input_of<cpu> X, input_of<cpu> Y>
[[nodiscard]] double cosine(const cpu& policy, const X& x, const Y& y);

/// Dots of all pairs of task vectors τs·τt over all included tensors: a T×T symmetric matrix, row-major. One walk over
/// the models; f64; fixed shape. Entries of τ in f32 (f64 for f64); what is beyond their range becomes infinity.
/// Errors: nonfinite_error, cancelled.
[[nodiscard]] inline std::vector<double> dot_matrix(const cpu& policy, const aligned_models& models);

/// Cosines of all pairs of task vectors: T×T, row-major, ones on the diagonal (0 for a task vector that is 0), all in
/// [−1, 1]; NaN for a task vector with NaN or infinity, where these propagate. Task vectors whose squares are beyond
/// f64, or whose entries are beyond f32, are computed in f64 and scaled first: one or two more walks.
///
///     const aligned_models models(&base, tasks);
///     std::vector<double> cosines = cosine_matrix(cpu{}, models);
[[nodiscard]] inline std::vector<double> cosine_matrix(const cpu& policy, const aligned_models& models);

namespace detail {

/// The arithmetic type of several views together: f64 if one is f64, otherwise f32.
template <class... X>
using common_arithmetic = std::conditional_t<(std::same_as<element_of<X>, double> || ...), double, float>;

template <class Out, class... X>
void check_lengths(const Out& out, const X&... inputs)
{
    std::size_t which = 0;
    const auto check = [&](std::size_t size) {
        ++which;
        if (size != out.size()) {
            raise<shape_mismatch>(error_code::input_size,
                message("input ", which, " has ", size, " elements; the output has ", out.size()));
        }
    };
    (check(inputs.size()), ...);
}

/// One row of a flat view in arithmetic type A: in place where it is stored as A, otherwise widened into `row`.
template <arithmetic_element A, class T>
const A* widened(host_view<const T> x, std::size_t offset, std::size_t n, A* row, bits_type<A>& largest)
{
    if constexpr (std::same_as<T, A>) {
        largest = std::max(largest, kernels::largest_magnitude(x.data() + offset, n));
        return x.data() + offset;
    }
    else {
        largest = std::max(largest, kernels::widen(x.data() + offset, row, n));
        return row;
    }
}

template <class T>
host_view<const T> const_view(host_view<T> x) noexcept
{
    return x;
}

[[noreturn]] TASKVEC_COLD inline void refuse_nonfinite_input(std::size_t which, double found, std::uint64_t index)
{
    raise<nonfinite_error>(error_code::not_finite,
        message("input ", which, " holds ", std::isnan(found) ? "NaN" : "infinity", " at index ", index,
            ": repair it, or ask for non-finite values to propagate"));
}

template <class T>
void find_nonfinite(host_view<const T> x, std::size_t which, std::size_t offset, std::size_t n)
{
    for (std::size_t i = offset; i < offset + n; ++i) {
        const double value = widen<double>(x[i]);
        if (!std::isfinite(value)) { refuse_nonfinite_input(which, value, i); }
    }
}

/// out = combine(rows of the inputs), block by block: combine(A* out, const A* const* rows, n).
template <arithmetic_element A, class Out, class Combine, class... T>
void map_rows(
    const cpu& policy, nonfinite on_nonfinite, host_view<Out> out, Combine&& combine, host_view<const T>... inputs)
{
    check_lengths(out, inputs...);
    constexpr std::size_t step = 65536;
    for_each_index(policy, (out.size() + step - 1) / step, [&](std::size_t index, std::size_t) {
        std::array<std::array<A, block_size>, sizeof...(T)> scratch;
        std::array<A, block_size> result;
        for (std::size_t offset = index * step; offset < std::min(out.size(), (index + 1) * step);
            offset += block_size) {
            const std::size_t n = std::min(block_size, out.size() - offset);
            bits_type<A> largest = 0;
            std::size_t row = 0;
            const std::array<const A*, sizeof...(T)> rows{
                widened<A>(inputs, offset, n, scratch[row++].data(), largest)...};
            if (largest >= exponent_mask<A> && on_nonfinite == nonfinite::error) {
                std::size_t which = 0;
                (find_nonfinite(inputs, ++which, offset, n), ...);
            }
            combine(result.data(), rows, n);
            kernels::narrow(result.data(), out.data() + offset, n);
        }
    });
}

} // namespace detail

template <input_of<cpu> Tuned, input_of<cpu> Base, output_of<cpu> Out>
void difference(const cpu& policy, const Tuned& tuned, const Base& base, Out&& out, nonfinite on_nonfinite)
{
    using A = detail::common_arithmetic<const Tuned, const Base>;
    detail::map_rows<A>(
        policy, on_nonfinite, as_view(out),
        [](A* result, const auto& rows, std::size_t n) { kernels::subtract(rows[0], rows[1], result, n); },
        detail::const_view(as_view(tuned)), detail::const_view(as_view(base)));
}

template <input_of<cpu> Base, input_of<cpu> Vector, output_of<cpu> Out>
void apply(const cpu& policy, const Base& base, const Vector& vector, double lambda, Out&& out, nonfinite on_nonfinite)
{
    using A = detail::common_arithmetic<const Base, const Vector>;
    detail::map_rows<A>(
        policy, on_nonfinite, as_view(out),
        [lambda](A* result, const auto& rows, std::size_t n) {
            std::memcpy(result, rows[1], n * sizeof(A));
            kernels::add_scaled(result, rows[0], static_cast<A>(lambda), n);
        },
        detail::const_view(as_view(base)), detail::const_view(as_view(vector)));
}

template <input_of<cpu> X, output_of<cpu> Out>
void negate(const cpu& policy, const X& x, Out&& out, nonfinite on_nonfinite)
{
    using A = detail::common_arithmetic<const X>;
    detail::map_rows<A>(
        policy, on_nonfinite, as_view(out),
        [](A* result, const auto& rows, std::size_t n) { kernels::negate(rows[0], result, n); },
        detail::const_view(as_view(x)));
}

template <std::ranges::input_range Vectors, output_of<cpu> Out>
    requires input_of<std::ranges::range_reference_t<const Vectors>, cpu>
void combine(
    const cpu& policy, const Vectors& vectors, std::span<const double> weights, Out&& out, nonfinite on_nonfinite)
{
    using X = std::remove_reference_t<std::ranges::range_reference_t<const Vectors>>;
    using T = element_of<X>;
    using A = arithmetic_type<T>;
    std::vector<host_view<const T>> inputs;
    for (const auto& vector : vectors) { inputs.push_back(as_view(vector)); }
    if (inputs.empty()) {
        raise<invalid_argument>(error_code::inputs_empty, "no vector was given: at least one is needed");
    }
    if (weights.size() != inputs.size()) {
        raise<invalid_argument>(error_code::list_length,
            message(weights.size(), " weights for ", inputs.size(), " vectors: give one each"));
    }
    const auto result = as_view(out);
    for (const auto& input : inputs) { detail::check_lengths(result, input); }
    constexpr std::size_t step = 65536;
    for_each_index(policy, (result.size() + step - 1) / step, [&](std::size_t index, std::size_t) {
        std::array<A, block_size> row, sum;
        for (std::size_t offset = index * step; offset < std::min(result.size(), (index + 1) * step);
            offset += block_size) {
            const std::size_t n = std::min(block_size, result.size() - offset);
            for (std::size_t t = 0; t < inputs.size(); ++t) {
                bits_type<A> largest = 0;
                const A* const x = detail::widened<A>(inputs[t], offset, n, row.data(), largest);
                if (largest >= exponent_mask<A> && on_nonfinite == nonfinite::error) {
                    detail::find_nonfinite(inputs[t], t + 1, offset, n);
                }
                const A weight = static_cast<A>(weights[t]);
                t == 0 ? kernels::begin_sum(sum.data(), x, weight, n) : kernels::accumulate(sum.data(), x, weight, n);
            }
            kernels::narrow(sum.data(), result.data() + offset, n);
        }
    });
}

template <input_of<cpu> X, input_of<cpu> Y>
double dot(const cpu& policy, const X& x, const Y& y)
{
    using A = detail::common_arithmetic<const X, const Y>;
    const auto a = detail::const_view(as_view(x));
    const auto b = detail::const_view(as_view(y));
    detail::check_lengths(a, b);
    std::pmr::vector<double> leaves((a.size() + block_size - 1) / block_size, memory_of(policy));
    for_each_index(policy, (leaves.size() + 31) / 32, [&](std::size_t index, std::size_t) {
        std::array<A, block_size> first, second;
        for (std::size_t leaf = 32 * index; leaf < std::min(leaves.size(), 32 * (index + 1)); ++leaf) {
            const std::size_t offset = leaf * block_size, n = std::min(block_size, a.size() - offset);
            bits_type<A> ignored = 0;
            leaves[leaf] = kernels::dot(detail::widened<A>(a, offset, n, first.data(), ignored),
                detail::widened<A>(b, offset, n, second.data(), ignored), n);
        }
    });
    detail::pairwise_sum sum;
    for (const double leaf : leaves) { sum.add(leaf); }
    return sum.total();
}

template <input_of<cpu> X>
double norm(const cpu& policy, const X& x)
{
    return std::sqrt(dot(policy, x, x));
}

namespace detail {
/// Whether a sum of squares lost nothing to the range of f64: 0 may be the square of 1e-200, infinity that of 1e200.
[[nodiscard]] inline bool squares_fit(double sum) noexcept
{
    return sum >= 0x1p-900 && sum <= 0x1p1000;
}
/// Cosine from a dot and two sums of squares, each of a vector of its own scale; NaN where one is not finite.
[[nodiscard]] inline double cosine_of(double dot, double square_x, double square_y) noexcept
{
    if (!std::isfinite(square_x) || !std::isfinite(square_y)) { return std::numeric_limits<double>::quiet_NaN(); }
    const double norms = std::sqrt(square_x) * std::sqrt(square_y);
    return norms == 0 ? 0.0 : std::clamp(dot / norms, -1.0, 1.0);
}

/// y − x of finite numbers in f64, as a number below 2 in magnitude and a power of two; what is not finite stays so.
struct scaled_difference {
    double value = 0;
    int exponent = std::numeric_limits<int>::min(); ///< of 0: as small as can be
    scaled_difference(double x, double y) noexcept
    {
        value = y - x;
        int halved = 0;
        if (std::isinf(value) && std::isfinite(x) && std::isfinite(y)) {
            value = y / 2 - x / 2;
            halved = 1;
        }
        if (value == 0 || !std::isfinite(value)) { return; }
        const int power = std::ilogb(value);
        value = std::scalbn(value, -power);
        exponent = power + halved;
    }
    /// The number in units of 2^power, where power is at least its own.
    [[nodiscard]] double in_units(int power) const noexcept
    {
        return value == 0 || !std::isfinite(value) ? value : std::scalbn(value, std::max(exponent - power, -1100));
    }
};
} // namespace detail

template <input_of<cpu> X, input_of<cpu> Y>
double cosine(const cpu& policy, const X& x, const Y& y)
{
    const double square_x = dot(policy, x, x), square_y = dot(policy, y, y);
    if (detail::squares_fit(square_x) && detail::squares_fit(square_y)) {
        return detail::cosine_of(dot(policy, x, y), square_x, square_y);
    }
    const auto a = detail::const_view(as_view(x));
    const auto b = detail::const_view(as_view(y));
    detail::check_lengths(a, b);
    std::array<int, 2> powers;
    powers.fill(std::numeric_limits<int>::min());
    for (std::size_t i = 0; i < a.size(); ++i) {
        powers[0] = std::max(powers[0], detail::scaled_difference(0, widen<double>(a[i])).exponent);
        powers[1] = std::max(powers[1], detail::scaled_difference(0, widen<double>(b[i])).exponent);
    }
    std::array<detail::pairwise_sum, 3> sums;
    for (std::size_t i = 0; i < a.size(); ++i) {
        const double first = detail::scaled_difference(0, widen<double>(a[i])).in_units(powers[0]);
        const double second = detail::scaled_difference(0, widen<double>(b[i])).in_units(powers[1]);
        sums[0].add(first * second);
        sums[1].add(first * first);
        sums[2].add(second * second);
    }
    return detail::cosine_of(sums[0].total(), sums[1].total(), sums[2].total());
}

namespace detail {
/// A symmetric matrix from the sums of its upper triangle, row by row, tensor by tensor.
[[nodiscard]] inline std::vector<double> symmetric_dots(const call_vector<call_vector<double>>& sums, std::size_t tasks)
{
    std::vector<double> matrix(tasks * tasks, 0.0);
    std::size_t pair = 0;
    for (std::size_t s = 0; s < tasks; ++s) {
        for (std::size_t t = s; t < tasks; ++t, ++pair) {
            detail::pairwise_sum total;
            for (const auto& tensor : sums) { total.add(tensor[pair]); }
            matrix[s * tasks + t] = matrix[t * tasks + s] = total.total();
        }
    }
    return matrix;
}

/// Whether no sum of squares of a matrix of dots lost anything. A task vector of 0 has no square at all: whether it is
/// one the sums cannot say.
[[nodiscard]] inline bool all_squares_fit(const std::vector<double>& dots, std::size_t tasks)
{
    for (std::size_t t = 0; t < tasks; ++t) {
        if (!squares_fit(dots[t * tasks + t])) { return false; }
    }
    return true;
}

/// Cosines from a matrix of dots.
[[nodiscard]] inline std::vector<double> cosines_of(const std::vector<double>& dots, std::size_t tasks)
{
    std::vector<double> cosines(tasks * tasks);
    for (std::size_t s = 0; s < tasks; ++s) {
        for (std::size_t t = 0; t < tasks; ++t) {
            const double square = dots[s * tasks + s];
            cosines[s * tasks + t] = s == t && std::isfinite(square)
                ? (square == 0 ? 0.0 : 1.0)
                : cosine_of(dots[s * tasks + t], square, dots[t * tasks + t]);
        }
    }
    return cosines;
}
} // namespace detail

inline std::vector<double> dot_matrix(const cpu& policy, const aligned_models& models)
{
    const std::size_t tasks = models.task_count(), pairs = tasks * (tasks + 1) / 2;
    const auto sums = tensor_sums(policy, models, pairs, 0, "dots", [&]<class A>(row_block<A>& rows, double* out) {
        std::pmr::vector<const A*> deltas(memory_of(policy));
        deltas.reserve(tasks);
        for (std::size_t t = 0; t < tasks; ++t) { deltas.push_back(rows.delta(t)); }
        for (std::size_t s = 0; s < tasks; ++s) {
            for (std::size_t t = s; t < tasks; ++t) { *out++ = kernels::dot(deltas[s], deltas[t], rows.size()); }
        }
    });
    return detail::symmetric_dots(sums, tasks);
}

namespace detail {
/// The dots, of task vectors whose squares, or whose entries in f32, are beyond their types, again: in f64, each task
/// vector in units of the power of two of its largest entry. Nothing changes where none is. One walk, or two.
inline void rescale_dots(const cpu& policy, const aligned_models& models, std::vector<double>& dots)
{
    constexpr int none = std::numeric_limits<int>::min();
    const std::size_t tasks = models.task_count(), pairs = tasks * (tasks + 1) / 2;
    const auto each_row = [tasks]<class A>(row_block<A>& rows, const auto& use) {
        const A* const base = rows.models().has_base() ? rows.base() : nullptr;
        for (std::size_t t = 0; t < tasks; ++t) {
            const A* const task = rows.task(t);
            for (std::size_t i = 0; i < rows.size(); ++i) {
                use(t, i, scaled_difference(base ? static_cast<double>(base[i]) : 0.0, static_cast<double>(task[i])));
            }
        }
    };
    std::vector<int> of_chunks(models.chunks().size() * tasks, none), powers(tasks, none);
    for_each_block(policy, models, all_chunks(models), 0, "ranges", [&](std::size_t chunk, std::size_t, auto& rows) {
        each_row(rows, [&](std::size_t t, std::size_t, const scaled_difference& entry) {
            auto& power = of_chunks[chunk * tasks + t];
            power = std::max(power, entry.exponent);
        });
    });
    bool changed = false;
    for (std::size_t t = 0; t < tasks; ++t) {
        for (std::size_t c = t; c < of_chunks.size(); c += tasks) { powers[t] = std::max(powers[t], of_chunks[c]); }
        changed = changed || (powers[t] != none && !squares_fit(dots[t * tasks + t]));
    }
    if (!changed) { return; } // a task vector that is 0, or not finite
    const auto sums = tensor_sums(policy, models, pairs, 0, "dots", [&](auto& rows, double* out) {
        std::vector<double> scaled(tasks * rows.size());
        each_row(rows, [&](std::size_t t, std::size_t i, const scaled_difference& entry) {
            scaled[t * rows.size() + i] = entry.in_units(powers[t]);
        });
        for (std::size_t s = 0; s < tasks; ++s) {
            for (std::size_t t = s; t < tasks; ++t) {
                *out++ = kernels::dot(&scaled[s * rows.size()], &scaled[t * rows.size()], rows.size());
            }
        }
    });
    dots = symmetric_dots(sums, tasks);
}
} // namespace detail

inline std::vector<double> cosine_matrix(const cpu& policy, const aligned_models& models)
{
    auto dots = dot_matrix(policy, models);
    if (!detail::all_squares_fit(dots, models.task_count())) { detail::rescale_dots(policy, models, dots); }
    return detail::cosines_of(dots, models.task_count());
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(cpu, difference, any_arguments, "difference(policy, tuned, base, output), flat views of one length")
TASKVEC_WRONG_CALLS(cpu, apply, flat_arguments,
    "apply(policy, base, vector, lambda, output), or apply(policy, delta, live) of sparse entries")
TASKVEC_WRONG_CALLS(cpu, negate, any_arguments, "negate(policy, x, output), flat views of one length")
TASKVEC_WRONG_CALLS(
    cpu, combine, any_arguments, "combine(policy, vectors, weights, output), where weights are a std::vector<double>")
TASKVEC_WRONG_CALLS(cpu, dot, any_arguments, "dot(policy, x, y), flat views of one length")
TASKVEC_WRONG_CALLS(cpu, norm, any_arguments, "norm(policy, x) of a flat view")
TASKVEC_WRONG_CALLS(cpu, cosine, any_arguments, "cosine(policy, x, y), flat views of one length")
template <cpu_policy P, class Vectors, class... Arguments>
auto combine(const P&, const Vectors&, std::initializer_list<double>, const Arguments&...)
{
    static_assert(!policy<P>, "combine(): the weights stand in braces: name them, or pass std::vector{0.5, -0.5}");
    return detail::no_result{};
}

// On taskvec::gpu these live in a header of their own.
TASKVEC_CALLS_NEED_HEADER(difference, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(apply, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(negate, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(combine, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(dot, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(norm, arithmetic, "taskvec/device/arithmetic.hpp")
TASKVEC_CALLS_NEED_HEADER(cosine, arithmetic, "taskvec/device/arithmetic.hpp")

} // namespace taskvec::inline TASKVEC_ABI
