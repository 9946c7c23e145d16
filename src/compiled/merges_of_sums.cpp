// taskvec::compiled: merges by methods that sum or turn.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/arcee_fusion.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/breadcrumbs.hpp>
#include <taskvec/methods/checkpoint_average.hpp>
#include <taskvec/methods/dare.hpp>
#include <taskvec/methods/fisher.hpp>
#include <taskvec/methods/karcher.hpp>
#include <taskvec/methods/merge_on_read.hpp>
#include <taskvec/methods/model_stock.hpp>
#include <taskvec/methods/multi_slerp.hpp>
#include <taskvec/methods/nearswap.hpp>
#include <taskvec/methods/nuslerp.hpp>
#include <taskvec/methods/passthrough.hpp>
#include <taskvec/methods/regmean.hpp>
#include <taskvec/methods/slerp.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_COMPILED_MERGED_NORMS(, storage_types)
TASKVEC_COMPILED_MERGED_NORMS(, storage_list<float>)
TASKVEC_COMPILED_MERGED_NORMS(, storage_list<f16>)
TASKVEC_COMPILED_MERGED_NORMS(, storage_list<bf16>)

TASKVEC_COMPILED_MODEL_MERGE(, arcee_fusion_options)
TASKVEC_COMPILED_MERGES(, average_options)
TASKVEC_COMPILED_MERGES(, breadcrumbs_options)
TASKVEC_COMPILED_MODEL_MERGE(, checkpoint_average_options)
TASKVEC_COMPILED_MERGES(, dare_options)
TASKVEC_COMPILED_MERGES(, fisher_options)
TASKVEC_COMPILED_MERGES(, karcher_options)
TASKVEC_COMPILED_MERGES(, model_stock_options)
TASKVEC_COMPILED_MERGES(, multi_slerp_options)
TASKVEC_COMPILED_MERGES(, nearswap_options)
TASKVEC_COMPILED_MERGES(, nuslerp_options)
TASKVEC_COMPILED_MERGES(, passthrough_options)
TASKVEC_COMPILED_MERGES(, regmean_options)
TASKVEC_COMPILED_MERGES(, slerp_options)
TASKVEC_COMPILED_MERGES(, task_arithmetic_options)

} // namespace taskvec::inline TASKVEC_ABI
