// --device cuda, compiled by nvcc; for the test of it also for host threads (tests/device/tool). Nothing that computes
// on the CPU is called here: what nvcc makes of it keeps no promise about bits. SPDX-License-Identifier: Apache-2.0
#include "../device.hpp"

#include <taskvec/device/methods.hpp>
#include <taskvec/device/methods/regmean.hpp>
#include <taskvec/device/reuse/streamed.hpp>

namespace tool {

void require_cuda()
{
    try {
        taskvec::device::require_device();
    }
    catch (const taskvec::backend_error& failure) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::message("--device cuda: ", failure.what()));
    }
}

template <class Options>
taskvec::merge_report merge_on_cuda(const Options& options, const taskvec::aligned_models& models,
    taskvec::tensor_sink& out, std::size_t memory, const taskvec::cpu& host)
{
    return taskvec::merge_streamed(taskvec::gpu{}, options, models, out, {.memory = memory, .host = host});
}

void prune_on_cuda(const taskvec::post_pruning_options& options, const taskvec::aligned_models& models,
    taskvec::sparse_sink& out, std::size_t memory, const taskvec::cpu& host)
{
    taskvec::post_pruning_streamed(taskvec::gpu{}, options, models, out, {.memory = memory, .host = host});
}

#define TASKVEC_TOOL_INSTANTIATE(options)                                                                              \
    template taskvec::merge_report merge_on_cuda(const taskvec::options&, const taskvec::aligned_models&,              \
        taskvec::tensor_sink&, std::size_t, const taskvec::cpu&);
TASKVEC_TOOL_METHODS(TASKVEC_TOOL_INSTANTIATE)

} // namespace tool
