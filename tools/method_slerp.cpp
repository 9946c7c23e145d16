// --method slerp.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"

#include <taskvec/methods/slerp.hpp>

namespace {

const tool::register_method<taskvec::slerp_options> slerp("slerp",
    "along the arc between two models, by --t ({t}): two tasks, or --base and one task", 80,
    {.needs_base = false, .without_weights = "--t says how far to go", .check = [](const tool::merge_request& request) {
         if (request.tasks.size() > 2 || (request.tasks.size() == 1 && request.base.empty())) {
             throw tool::usage_error("--method slerp goes between two models: give two tasks, or --base and one task");
         }
     }});

} // namespace
