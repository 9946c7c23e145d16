// Task vectors on taskvec::gpu: difference, apply, negate, combine, dot, norm, cosine; dot and cosine matrices of
// models.
// SPDX-License-Identifier: Apache-2.0
//
// For nvcc, or for g++ and clang with THRUST_DEVICE_SYSTEM set to a host system. The CPU's meaning
// (arithmetic/task_vector.hpp) and the CPU's bits, sums included. Views are device_view; work is queued on the policy's
// stream. Who reports NaN and infinity waits for the stream: with nonfinite::propagate nothing here waits but dot, norm
// and cosine, whose result comes to the host.
#pragma once

#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/core/wrong_call.hpp>
#include <taskvec/device/arithmetic/linear_functors.hpp>
#include <taskvec/device/models/device_models.hpp>
#include <taskvec/device/models/tensor_dots.hpp>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <ranges>
#include <span>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {
template <>
inline constexpr bool gpu_header_included<gpu, gpu_room::arithmetic> = true;
} // namespace detail

/// out = tuned − base, as on the CPU. May work in place.
///
///     difference(policy, tuned.view(), base.view(), tau.view());
template <input_of<gpu> Tuned, input_of<gpu> Base, output_of<gpu> Out>
void difference(
    const gpu& policy, const Tuned& tuned, const Base& base, Out&& out, nonfinite on_nonfinite = nonfinite::error);

/// out = base + λ·vector, as on the CPU. May work in place.
template <input_of<gpu> Base, input_of<gpu> Vector, output_of<gpu> Out>
void apply(const gpu& policy, const Base& base, const Vector& vector, double lambda, Out&& out,
    nonfinite on_nonfinite = nonfinite::error);

/// out = −x, as on the CPU. May work in place.
template <input_of<gpu> X, output_of<gpu> Out>
void negate(const gpu& policy, const X& x, Out&& out, nonfinite on_nonfinite = nonfinite::error);

/// out = Σ wt·xt, as on the CPU, each vector read once.
///
///     combine(policy, std::vector{x.view(), y.view()}, std::vector{0.5, -0.5}, out.view());
template <std::ranges::input_range Vectors, output_of<gpu> Out>
    requires input_of<std::ranges::range_reference_t<const Vectors>, gpu>
void combine(const gpu& policy, const Vectors& vectors, std::span<const double> weights, Out&& out,
    nonfinite on_nonfinite = nonfinite::error);

/// Σ xi·yi, as on the CPU: the same bits. Waits.
template <input_of<gpu> X, input_of<gpu> Y>
[[nodiscard]] double dot(const gpu& policy, const X& x, const Y& y);

/// ‖x‖ = √(x·x).
template <input_of<gpu> X>
[[nodiscard]] double norm(const gpu& policy, const X& x);

/// x·y / (‖x‖·‖y‖), as on the CPU, but for vectors whose squares are beyond f64: these are not scaled, and give 0 or
/// NaN.
template <input_of<gpu> X, input_of<gpu> Y>
[[nodiscard]] double cosine(const gpu& policy, const X& x, const Y& y);

/// Dots of all pairs of task vectors, as on the CPU: the same bits. Waits. Errors: nonfinite_error.
///
///     const aligned_models models = align_on_device(policy, &base, tasks);
///     std::vector<double> dots = dot_matrix(policy, models);
[[nodiscard]] inline std::vector<double> dot_matrix(const gpu& policy, const aligned_models& models);

/// Cosines of all pairs of task vectors, as on the CPU: the same bits, but for task vectors whose entries or squares
/// are beyond f32 and f64: these are not scaled, and give 0 or NaN. Waits.
[[nodiscard]] inline std::vector<double> cosine_matrix(const gpu& policy, const aligned_models& models);

namespace detail {

/// Flat device views as the operands of one piece: inputs beside each other, one output.
class device_inputs {
public:
    device_inputs(const gpu& policy, nonfinite on_nonfinite)
        : policy_(policy)
    {
        if (on_nonfinite == nonfinite::error) {
            least_ = device::buffer<elementwise::counter>(policy, std::vector{device_models::none});
        }
    }
    template <class T>
    void add(device_view<const T> x)
    {
        operands_.push_back({reinterpret_cast<const std::byte*>(x.data()), dtype_of<T>});
    }
    template <class T>
    [[nodiscard]] device_piece piece(device_view<T> out)
    {
        table_ = device::buffer<aligned_tensor::operand>(policy_, operands_);
        return {table_.data(), operands_.size() - 1, 0, 0, out.size(), out.data(), dtype_of<T>};
    }
    [[nodiscard]] elementwise::counter* flag() const noexcept { return least_.data(); }
    /// Throws nonfinite_error for the first input that holds NaN or infinity at the least index where one does.
    void check_finite() const
    {
        if (least_.size() == 0) { return; }
        const elementwise::counter index = least_.download()[0];
        if (index == device_models::none) { return; }
        for (std::size_t which = 1; which < operands_.size(); ++which) {
            const std::size_t width = bits_per_element(operands_[which].dtype) / 8;
            alignas(8) std::byte word[8];
            device::download(policy_, word, operands_[which].data + index * width, width);
            const double found = elementwise::load<double>({word, operands_[which].dtype}, 0);
            if (!std::isfinite(found)) { refuse_nonfinite_input(which, found, index); }
        }
    }

private:
    gpu policy_;
    std::vector<aligned_tensor::operand> operands_{{}}; // the first stands for a base
    device::buffer<aligned_tensor::operand> table_;
    device::buffer<elementwise::counter> least_;
};

template <class T>
device_view<const T> const_view(device_view<T> x) noexcept
{
    return x;
}

template <arithmetic_element A, class Out, class... T>
void map_on_device(const gpu& policy, nonfinite on_nonfinite, elementwise::pointwise_operation operation, double factor,
    device_view<Out> out, device_view<const T>... x)
{
    check_lengths(out, x...);
    device_inputs inputs(policy, on_nonfinite);
    (inputs.add(x), ...);
    device::sweep(policy, out.size(),
        elementwise::pointwise<A>{inputs.piece(out), operation, static_cast<A>(factor), inputs.flag()});
    inputs.check_finite();
}

} // namespace detail

template <input_of<gpu> Tuned, input_of<gpu> Base, output_of<gpu> Out>
void difference(const gpu& policy, const Tuned& tuned, const Base& base, Out&& out, nonfinite on_nonfinite)
{
    detail::map_on_device<detail::common_arithmetic<const Tuned, const Base>>(policy, on_nonfinite,
        elementwise::pointwise_operation::difference, 0, as_view(out), detail::const_view(as_view(tuned)),
        detail::const_view(as_view(base)));
}

template <input_of<gpu> Base, input_of<gpu> Vector, output_of<gpu> Out>
void apply(const gpu& policy, const Base& base, const Vector& vector, double lambda, Out&& out, nonfinite on_nonfinite)
{
    detail::map_on_device<detail::common_arithmetic<const Base, const Vector>>(policy, on_nonfinite,
        elementwise::pointwise_operation::apply, lambda, as_view(out), detail::const_view(as_view(base)),
        detail::const_view(as_view(vector)));
}

template <input_of<gpu> X, output_of<gpu> Out>
void negate(const gpu& policy, const X& x, Out&& out, nonfinite on_nonfinite)
{
    detail::map_on_device<detail::common_arithmetic<const X>>(policy, on_nonfinite,
        elementwise::pointwise_operation::negate, 0, as_view(out), detail::const_view(as_view(x)));
}

template <std::ranges::input_range Vectors, output_of<gpu> Out>
    requires input_of<std::ranges::range_reference_t<const Vectors>, gpu>
void combine(
    const gpu& policy, const Vectors& vectors, std::span<const double> weights, Out&& out, nonfinite on_nonfinite)
{
    using A = arithmetic_type<element_of<std::remove_reference_t<std::ranges::range_reference_t<const Vectors>>>>;
    const auto result = as_view(out);
    detail::device_inputs inputs(policy, on_nonfinite);
    std::size_t count = 0;
    for (const auto& vector : vectors) {
        const auto x = detail::const_view(as_view(vector));
        detail::check_lengths(result, x);
        inputs.add(x);
        ++count;
    }
    if (count == 0) {
        raise<invalid_argument>(error_code::inputs_empty, "no vector was given: at least one is needed");
    }
    if (weights.size() != count) {
        raise<invalid_argument>(
            error_code::list_length, message(weights.size(), " weights for ", count, " vectors: give one each"));
    }
    const device::buffer<A> factors(policy, std::vector<A>(weights.begin(), weights.end()));
    device::sweep(policy, result.size(),
        elementwise::linear_combination<A>{inputs.piece(result), factors.data(), count, inputs.flag()});
    inputs.check_finite();
}

template <input_of<gpu> X, input_of<gpu> Y>
double dot(const gpu& policy, const X& x, const Y& y)
{
    const auto a = detail::const_view(as_view(x));
    const auto b = detail::const_view(as_view(y));
    detail::check_lengths(a, b);
    const std::array tasks{detail::flat_model(a), detail::flat_model(b)};
    model_options how;
    how.on_nonfinite = nonfinite::propagate;
    const aligned_models models(nullptr, tasks, how, memory_space::device);
    resident_models resident(policy, models);
    return tensor_dots(resident, {{1, 2}}, false)[0][0];
}

template <input_of<gpu> X>
double norm(const gpu& policy, const X& x)
{
    return std::sqrt(dot(policy, x, x));
}

template <input_of<gpu> X, input_of<gpu> Y>
double cosine(const gpu& policy, const X& x, const Y& y)
{
    return detail::cosine_of(dot(policy, x, y), dot(policy, x, x), dot(policy, y, y));
}

inline std::vector<double> dot_matrix(const gpu& policy, const aligned_models& models)
{
    const std::uint32_t tasks = static_cast<std::uint32_t>(models.task_count());
    std::vector<operand_pair> pairs;
    for (std::uint32_t s = 0; s < tasks; ++s) {
        for (std::uint32_t t = s; t < tasks; ++t) { pairs.push_back({1 + s, 1 + t}); }
    }
    resident_models resident(policy, models);
    const auto sums = tensor_dots(resident, pairs, models.has_base());
    resident.check_finite();
    return detail::symmetric_dots(sums, tasks);
}

inline std::vector<double> cosine_matrix(const gpu& policy, const aligned_models& models)
{
    return detail::cosines_of(dot_matrix(policy, models), models.task_count());
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(
    gpu, difference, any_arguments, "difference(policy, tuned, base, output), device views of one length")
TASKVEC_WRONG_CALLS(gpu, apply, flat_arguments,
    "apply(policy, base, vector, lambda, output), device views of one length; or apply(policy, delta, live) of sparse "
    "entries")
TASKVEC_WRONG_CALLS(gpu, negate, any_arguments, "negate(policy, x, output), device views of one length")
TASKVEC_WRONG_CALLS(
    gpu, combine, any_arguments, "combine(policy, vectors, weights, output), where weights are a std::vector<double>")
TASKVEC_WRONG_CALLS(gpu, dot, any_arguments, "dot(policy, x, y), device views of one length")
TASKVEC_WRONG_CALLS(gpu, norm, any_arguments, "norm(policy, x) of a device view")
TASKVEC_WRONG_CALLS(gpu, cosine, any_arguments, "cosine(policy, x, y), device views of one length")

} // namespace taskvec::inline TASKVEC_ABI
