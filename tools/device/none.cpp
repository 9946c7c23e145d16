// --device cuda in a build without CUDA.
// SPDX-License-Identifier: Apache-2.0
#include "../device.hpp"

namespace tool {

void require_cuda()
{
    taskvec::raise<taskvec::invalid_argument>(
        "--device cuda: this build of the tool computes on the CPU only; leave --device out, or build the cuda preset");
}

template <class Options>
taskvec::merge_report merge_on_cuda(
    const Options&, const taskvec::aligned_models&, taskvec::tensor_sink&, std::size_t, const taskvec::cpu&)
{
    require_cuda();
    return {};
}

void prune_on_cuda(const taskvec::post_pruning_options&, const taskvec::aligned_models&, taskvec::sparse_sink&,
    std::size_t, const taskvec::cpu&)
{
    require_cuda();
}

#define TASKVEC_TOOL_INSTANTIATE(options)                                                                              \
    template taskvec::merge_report merge_on_cuda(const taskvec::options&, const taskvec::aligned_models&,              \
        taskvec::tensor_sink&, std::size_t, const taskvec::cpu&);
TASKVEC_TOOL_METHODS(TASKVEC_TOOL_INSTANTIATE)

} // namespace tool
