// --device cuda in a build without CUDA.
// SPDX-License-Identifier: Apache-2.0
#include "../build_facts.hpp"
#include "../device.hpp"

namespace tool {

bool has_cuda() noexcept
{
    return false;
}

void require_cuda()
{
    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::device_unavailable,
        "--device cuda: this build of the tool computes on the CPU only; leave --device out, or build the cuda preset");
}

void prune_on_cuda(const taskvec::post_pruning_options&, const taskvec::aligned_models&, taskvec::sparse_sink&,
    std::size_t, const taskvec::cpu&)
{
    require_cuda();
}

} // namespace tool
