// What prune and peru-fft share.
// SPDX-License-Identifier: Apache-2.0
#include "pruning.hpp"

#include "device.hpp"

namespace tool {

described pruning_table(const std::string& density)
{
    described table{"prune", taskvec::describe_options<taskvec::post_pruning_options>()};
    for (auto& option : table.options) {
        if (option.name == "density") { option.meaning = density; }
    }
    return table;
}

taskvec::post_pruning_options pruning_options(const option_values& values)
{
    taskvec::post_pruning_options options;
    apply_options(options, values);
    return options;
}

void prune_into(const taskvec::cpu& policy, const run_options& run, const taskvec::post_pruning_options& options,
    const taskvec::aligned_models& models, taskvec::sparse_sink& out)
{
    if (run.device == "cuda") {
        prune_on_cuda(options, models, out, static_cast<std::size_t>(run.memory_bytes()), policy);
    }
    else {
        taskvec::post_pruning(policy, options, models, out);
    }
}

} // namespace tool
