// Selection on taskvec::gpu: exact top-k thresholds of views and of models; sparse vectors in device memory.
// SPDX-License-Identifier: Apache-2.0
//
// For nvcc, or for g++ and clang with THRUST_DEVICE_SYSTEM set to a host system. Thresholds come to the host, for which
// these wait.
#pragma once

#include <taskvec/core/wrong_call.hpp>
#include <taskvec/device/select/sparse.hpp>
#include <taskvec/device/select/top_k.hpp>

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {
template <>
inline constexpr bool gpu_header_included<gpu, gpu_room::select> = true;
} // namespace detail

/// The threshold that keeps the k entries of largest magnitude of a flat device view, lowest index first among equals:
/// the CPU's, bit for bit. `walks` receives how often the data were read: once, or where a sample misleads or very many
/// are equal 4 or 5 times (f64: 7 or 8). Takes 12 bytes (f64: 16) of device memory for each entry that lies close to
/// the threshold, a few in a hundred. Errors: as on the CPU. Waits.
///
///     auto threshold = top_k(policy, x.view(), 100);
template <input_of<gpu> X>
[[nodiscard]] auto top_k(const gpu& policy, const X& x, std::uint64_t k, unsigned* walks = nullptr)
{
    const auto values = as_view(x);
    using A = arithmetic_type<element_of<const X>>;
    if (k > values.size() || (k == 0 && !values.empty())) {
        raise<invalid_argument>(error_code::parameter_out_of_range,
            message("k is ", k, " for ", values.size(), " entries; expected 1 to ", values.size()));
    }
    const const_model_ref model = detail::flat_model(values);
    const aligned_models models(nullptr, {&model, 1}, {}, memory_space::device);
    resident_models resident(policy, models);
    const auto thresholds = detail::device_top_k_search<A>(resident, {0, 1}).run(std::array{k}, walks);
    resident.check_finite();
    return thresholds[0];
}

/// The k-th largest magnitude of a flat device view. Waits.
template <input_of<gpu> X>
[[nodiscard]] auto kth_magnitude(const gpu& policy, const X& x, std::uint64_t k)
{
    using A = arithmetic_type<element_of<const X>>;
    if (k == 0) { raise<invalid_argument>(error_code::parameter_out_of_range, "k is 0; expected at least 1"); }
    return std::bit_cast<A>(top_k(policy, x, k).magnitude);
}

/// Thresholds on every task vector of models in device memory (see align_on_device), over the whole model or tensor by
/// tensor: the CPU's. Waits. Errors: invalid_argument (density), nonfinite_error.
///
///     const trim_thresholds kept = find_thresholds(policy, models, 0.2, scope::model);
[[nodiscard]] inline trim_thresholds find_thresholds(
    const gpu& policy, const aligned_models& models, double density, scope over, trim_rule rule = trim_rule::exact)
{
    resident_models resident(policy, models);
    trim_thresholds thresholds = detail::thresholds_on_device(resident, density, over, rule);
    resident.check_finite();
    return thresholds;
}

// What calls say that are none of those above.
TASKVEC_WRONG_CALLS(gpu, top_k, any_arguments, "top_k(policy, x, k) of a device view, where k counts entries")
TASKVEC_WRONG_CALLS(
    gpu, kth_magnitude, any_arguments, "kth_magnitude(policy, x, k) of a device view, where k counts entries")

} // namespace taskvec::inline TASKVEC_ABI
