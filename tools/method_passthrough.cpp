// --method passthrough.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"

#include <taskvec/methods/passthrough.hpp>

namespace {

const tool::register_method<taskvec::passthrough_options> passthrough("passthrough",
    "one model as it is, times --scale ({scale}); needs no --base", 15,
    {.needs_base = false, .without_weights = "--scale is its factor", .check = [](const tool::merge_request& request) {
         if (request.tasks.size() != 1) {
             throw tool::usage_error("--method passthrough takes one model: give one --task");
         }
     }});

} // namespace
