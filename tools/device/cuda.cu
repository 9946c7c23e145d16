// --device cuda, compiled by nvcc; for the test of it also for host threads (tests/device/tool). Nothing that computes
// on the CPU is called here: what nvcc makes of it keeps no promise about bits.
// SPDX-License-Identifier: Apache-2.0
#include "../device.hpp"

#include <taskvec/device/methods.hpp>
#include <taskvec/device/methods/regmean.hpp>
#include <taskvec/device/reuse/streamed.hpp>
#include <taskvec/methods/breadcrumbs.hpp>
#include <taskvec/methods/karcher.hpp>
#include <taskvec/methods/multi_slerp.hpp>
#include <taskvec/methods/nearswap.hpp>
#include <taskvec/methods/nuslerp.hpp>
#include <taskvec/methods/passthrough.hpp>
#include <taskvec/methods/ram.hpp>

namespace tool {

void require_cuda()
{
    try {
        taskvec::device::require_device();
    }
    catch (const taskvec::backend_error& failure) {
        taskvec::raise<taskvec::invalid_argument>(
            taskvec::error_code::device_unavailable, taskvec::message("--device cuda: ", failure.what()));
    }
}

namespace {

template <class Options>
taskvec::merge_report merge_on_cuda(const void* options, const taskvec::aligned_models& models,
    taskvec::tensor_sink& out, std::size_t memory, const taskvec::cpu& host)
{
    return taskvec::merge_streamed(
        taskvec::gpu{}, *static_cast<const Options*>(options), models, out, {.memory = memory, .host = host});
}

/// A method has a device version where its line is here, or in another device file.
template <class... Options>
struct register_device_methods {
    register_device_merge entries[sizeof...(Options)] = {{typeid(Options), &merge_on_cuda<Options>}...};
};
const register_device_methods<taskvec::average_options, taskvec::task_arithmetic_options, taskvec::ties_options,
    taskvec::dare_options, taskvec::dare_ties_options, taskvec::fisher_options, taskvec::regmean_options,
    taskvec::slerp_options, taskvec::model_stock_options, taskvec::breadcrumbs_options,
    taskvec::breadcrumbs_ties_options, taskvec::passthrough_options, taskvec::nuslerp_options,
    taskvec::multi_slerp_options, taskvec::karcher_options, taskvec::nearswap_options, taskvec::ram_options>
    methods{};

} // namespace

void prune_on_cuda(const taskvec::post_pruning_options& options, const taskvec::aligned_models& models,
    taskvec::sparse_sink& out, std::size_t memory, const taskvec::cpu& host)
{
    taskvec::post_pruning_streamed(taskvec::gpu{}, options, models, out, {.memory = memory, .host = host});
}

} // namespace tool
