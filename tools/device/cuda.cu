// --device cuda, compiled by nvcc; for the test of it also for host threads (tests/device/tool). Nothing that computes
// on the CPU is called here: what nvcc makes of it keeps no promise about bits.
// SPDX-License-Identifier: Apache-2.0
#include "../build_facts.hpp"
#include "../device.hpp"

#include <library_methods.hpp>
#include <taskvec/device/methods.hpp>
#include <taskvec/device/methods/regmean.hpp>
#include <taskvec/device/reuse/streamed.hpp>

namespace tool {

bool has_cuda() noexcept
{
    return true;
}

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

/// Those of the methods that have a device version. One of a program's own is registered in a device file of its own.
template <class... Options>
struct register_device_methods {
    register_device_methods() { (add<Options>(), ...); }

private:
    template <class One>
    static void add()
    {
        if constexpr (taskvec::device_merge_method<One>) { register_device_merge(typeid(One), &merge_on_cuda<One>); }
    }
};
const with_library_methods<register_device_methods> methods;

} // namespace

void prune_on_cuda(const taskvec::post_pruning_options& options, const taskvec::aligned_models& models,
    taskvec::sparse_sink& out, std::size_t memory, const taskvec::cpu& host)
{
    taskvec::post_pruning_streamed(taskvec::gpu{}, options, models, out, {.memory = memory, .host = host});
}

} // namespace tool
