// --device cuda: merges and pruning that stream through a device. tools/device/cuda.cu has them where CUDA is,
// tools/device/none.cpp says so elsewhere. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/methods/merge.hpp>

#include <cstddef>

namespace taskvec::inline TASKVEC_ABI {
struct average_options;
struct task_arithmetic_options;
struct ties_options;
struct dare_options;
struct dare_ties_options;
struct fisher_options;
struct regmean_options;
struct slerp_options;
struct model_stock_options;
struct post_pruning_options;
class sparse_sink;
} // namespace taskvec::inline TASKVEC_ABI

/// The options of every method, for instantiations.
#define TASKVEC_TOOL_METHODS(each)                                                                                     \
    each(average_options) each(task_arithmetic_options) each(ties_options) each(dare_options) each(dare_ties_options)  \
        each(fisher_options) each(regmean_options) each(slerp_options) each(model_stock_options)

namespace tool {

/// Throws unless this build has CUDA and a device answers.
void require_cuda();

/// merge_streamed() with `memory` bytes of buffers, filled by `host`.
template <class Options>
taskvec::merge_report merge_on_cuda(const Options& options, const taskvec::aligned_models& models,
    taskvec::tensor_sink& out, std::size_t memory, const taskvec::cpu& host);

/// post_pruning_streamed() in the same way.
void prune_on_cuda(const taskvec::post_pruning_options& options, const taskvec::aligned_models& models,
    taskvec::sparse_sink& out, std::size_t memory, const taskvec::cpu& host);

} // namespace tool
