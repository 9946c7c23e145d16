// taskvec::compiled: merges by methods that elect signs or keep a part.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/breadcrumbs.hpp>
#include <taskvec/methods/dare.hpp>
#include <taskvec/methods/della.hpp>
#include <taskvec/methods/merge_on_read.hpp>
#include <taskvec/methods/ram.hpp>
#include <taskvec/methods/sce.hpp>
#include <taskvec/methods/ties.hpp>

namespace taskvec::inline TASKVEC_ABI {

TASKVEC_COMPILED_MERGES(, ties_options)
TASKVEC_COMPILED_MERGES(, dare_ties_options)
TASKVEC_COMPILED_MERGES(, breadcrumbs_ties_options)
TASKVEC_COMPILED_MODEL_MERGE(, della_options)
TASKVEC_COMPILED_MODEL_MERGE(, della_linear_options)
TASKVEC_COMPILED_MERGES(, sce_options)
TASKVEC_COMPILED_MERGES(, ram_options)
TASKVEC_COMPILED_MERGES(, ram_plus_options)

} // namespace taskvec::inline TASKVEC_ABI
