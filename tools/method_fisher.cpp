// --method fisher.
// SPDX-License-Identifier: Apache-2.0
#include "statistics_inputs.hpp"

#include <taskvec/methods/fisher.hpp>

namespace {

const tool::register_method<taskvec::fisher_options> fisher("fisher",
    "mean weighted by each task's diagonal Fisher (--fisher FILE per task); needs no --base", 60,
    {.needs_base = false,
        .lists = {{"fisher", "FILE", "diagonal Fisher of a task; repeat in task order", true}},
        .attach = [](const tool::method_call& call,
                      taskvec::fisher_options& options) -> std::unique_ptr<tool::attachment> {
            auto fishers = std::make_unique<tool::statistics_inputs>(call, "fisher");
            options.fishers = fishers->models();
            options.labels = fishers->labels();
            return fishers;
        },
        .examine = [](const taskvec::cpu& policy, const taskvec::aligned_models& models,
                       const taskvec::fisher_options& options) { taskvec::check_merge(policy, options, models); }});

} // namespace
