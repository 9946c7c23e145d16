// --method nuslerp.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"

#include <taskvec/methods/nuslerp.hpp>

namespace {

const tool::register_method<taskvec::nuslerp_options> nuslerp("nuslerp",
    "along the arc between two tasks by their weights, or with --base between their task vectors", 82,
    {.needs_base = false, .check = [](const tool::merge_request& request) {
         if (request.tasks.size() != 2) {
             throw tool::usage_error("--method nuslerp goes between two models: give two tasks");
         }
     }});

} // namespace
