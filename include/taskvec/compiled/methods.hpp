// What taskvec::compiled compiles of methods/, as a list; see compiled/linalg.hpp. Each method's header declares its
// own merges with it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/fwd.hpp>

#include <memory>
#include <span>
#include <vector>

namespace taskvec::inline TASKVEC_ABI::detail {
template <class Options>
std::vector<std::unique_ptr<operand_source>> merge_sources(
    const cpu& policy, const Options& options, const aligned_models& models); // methods/merge_on_read.hpp
} // namespace taskvec::inline TASKVEC_ABI::detail

/// The merges of a method of models of any storage types.
#define TASKVEC_COMPILED_MODEL_MERGE(EXTERN, OPTIONS)                                                                  \
    EXTERN template merge_report detail::merge_storing<storage_types, OPTIONS>(                                        \
        const cpu&, const OPTIONS&, const aligned_models&, tensor_sink&);                                              \
    EXTERN template std::vector<std::unique_ptr<operand_source>> detail::merge_sources<OPTIONS>(                       \
        const cpu&, const OPTIONS&, const aligned_models&);

/// The same, and those of flat views of one of the types that models come in.
#define TASKVEC_COMPILED_MERGES(EXTERN, OPTIONS)                                                                       \
    TASKVEC_COMPILED_MODEL_MERGE(EXTERN, OPTIONS)                                                                      \
    TASKVEC_COMPILED_TYPED_MERGE(EXTERN, OPTIONS, float)                                                               \
    TASKVEC_COMPILED_TYPED_MERGE(EXTERN, OPTIONS, f16)                                                                 \
    TASKVEC_COMPILED_TYPED_MERGE(EXTERN, OPTIONS, bf16)

#define TASKVEC_COMPILED_TYPED_MERGE(EXTERN, OPTIONS, T)                                                               \
    EXTERN template merge_report detail::merge_in_memory<storage_list<T>, OPTIONS>(const cpu&, const OPTIONS&,         \
        const const_model_ref*, std::span<const const_model_ref>, const model_ref&, const model_options&);

/// What merges share: the norms that a report gives.
#define TASKVEC_COMPILED_MERGED_NORMS(EXTERN, TYPES)                                                                   \
    EXTERN template void detail::add_norms<TYPES>(const cpu&, const aligned_models&, merge_report&);
