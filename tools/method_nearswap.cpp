// --method nearswap.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"

#include <taskvec/methods/nearswap.hpp>

namespace {

const tool::register_method<taskvec::nearswap_options> nearswap("nearswap",
    "entries of one task that are nearer to the base than --t ({t}); the others move by it", 92,
    {.without_weights = "--t says how far to go", .check = [](const tool::merge_request& request) {
         if (request.tasks.size() != 1) {
             throw tool::usage_error("--method nearswap takes --base and one task: give one --task");
         }
     }});

} // namespace
