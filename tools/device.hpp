// --device cuda: merges and pruning that stream through a device. tools/device/cuda.cu has them where CUDA is,
// tools/device/none.cpp says so elsewhere.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/methods/merge.hpp>

#include <cstddef>
#include <typeinfo>

namespace taskvec::inline TASKVEC_ABI {
struct post_pruning_options;
class sparse_sink;
} // namespace taskvec::inline TASKVEC_ABI

namespace tool {

/// Throws unless this build has CUDA and a device answers.
void require_cuda();

/// A method's merge_streamed() with `memory` bytes of buffers, filled by `host`. `options` is the struct that it was
/// registered for.
using device_merge = taskvec::merge_report (*)(const void* options, const taskvec::aligned_models& models,
    taskvec::tensor_sink& out, std::size_t memory, const taskvec::cpu& host);

/// Makes a method known to --device cuda, by the type of its options: an object at namespace level of a device file.
struct register_device_merge {
    register_device_merge(const std::type_info& type, device_merge merge);
};

/// post_pruning_streamed() in the same way.
void prune_on_cuda(const taskvec::post_pruning_options& options, const taskvec::aligned_models& models,
    taskvec::sparse_sink& out, std::size_t memory, const taskvec::cpu& host);

} // namespace tool
