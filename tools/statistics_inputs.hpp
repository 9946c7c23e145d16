// Statistics files on the command line: one for each task, in task order.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "merging.hpp"

#include <taskvec/formats/statistics.hpp>

#include <deque>

namespace tool {

/// Throws usage_error unless there is one file for each task.
inline void check_statistics_count(
    const merge_settings& settings, const std::vector<std::string>& files, const std::string& option)
{
    if (files.size() != settings.tasks.size()) {
        throw usage_error("--method " + settings.method + " needs one " + option
            + " FILE for each --task, in task order: there "
            + (files.size() == 1 ? "is 1" : "are " + std::to_string(files.size())) + " for "
            + counted(settings.tasks.size(), "task"));
    }
}

/// The files, opened, and each checked to be of its task's model. Never moves: models() points into it.
class statistics_inputs {
public:
    statistics_inputs(
        const taskvec::cpu& policy, const merge_inputs& inputs, const std::vector<std::string>& paths, bool fishers)
    {
        for (std::size_t t = 0; t < paths.size(); ++t) {
            const auto& file = files_.emplace_back(paths[t]);
            guard_map(file.file().map());
            fishers ? file.require_fisher() : file.require_gram();
            const auto& task = inputs.tasks()[t];
            taskvec::check_statistics(policy, file, task.model(), task.path().string());
            if (file.described() && file.info().fingerprint) { checked_bytes_ += task.data_bytes(); }
            models_.push_back(file.model());
            labels_.push_back("'" + paths[t] + "'");
        }
    }
    statistics_inputs(const statistics_inputs&) = delete;
    statistics_inputs& operator=(const statistics_inputs&) = delete;

    [[nodiscard]] const std::deque<taskvec::statistics_file>& files() const { return files_; }
    [[nodiscard]] const std::vector<taskvec::const_model_ref>& models() const { return models_; }
    [[nodiscard]] const std::vector<std::string>& labels() const { return labels_; }
    /// Bytes of the models that were read to check that the statistics are theirs.
    [[nodiscard]] std::uint64_t checked_bytes() const { return checked_bytes_; }

private:
    std::deque<taskvec::statistics_file> files_;
    std::vector<taskvec::const_model_ref> models_;
    std::vector<std::string> labels_;
    std::uint64_t checked_bytes_ = 0;
};

} // namespace tool
