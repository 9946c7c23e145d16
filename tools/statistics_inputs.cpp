// Statistics files on the command line.
// SPDX-License-Identifier: Apache-2.0
#include "statistics_inputs.hpp"

namespace tool {

statistics_inputs::statistics_inputs(const method_call& call, const std::string& option)
{
    const auto& paths = call.request.list(option);
    for (std::size_t t = 0; t < paths.size(); ++t) {
        const auto& file = files_.emplace_back(paths[t]);
        guard_map(file.file().map());
        option == "fisher" ? file.require_fisher() : file.require_gram();
        const auto& task = call.inputs.tasks()[t];
        // Of an adapter's task there is no file to compare with.
        if (!call.inputs.adapter(t)) {
            taskvec::check_statistics(call.policy, file, task.model(), task.path().string());
        }
        if (!call.inputs.adapter(t) && file.described() && file.info().fingerprint) {
            checked_bytes_ += task.data_bytes();
        }
        models_.push_back(file.model());
        labels_.push_back("'" + paths[t] + "'");
    }
}

} // namespace tool
