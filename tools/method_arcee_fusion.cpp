// --method arcee-fusion.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"

#include <taskvec/methods/arcee_fusion.hpp>

namespace {

const tool::register_method<taskvec::arcee_fusion_options> arcee_fusion("arcee-fusion",
    "entries of one task whose importance is above the median by --spread ({spread}) interquartile ranges", 96,
    {.without_weights = "entries are taken or left", .check = [](const tool::merge_request& request) {
         if (request.tasks.size() != 1) {
             throw tool::usage_error("--method arcee-fusion takes --base and one task: give one --task");
         }
     }});

} // namespace
