// Statistics files on the command line: one for each task, in task order.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "methods.hpp"

#include <taskvec/formats/statistics.hpp>

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

namespace tool {

/// The files, opened, and each checked to be of its task's model. Never moves: models() points into it.
class statistics_inputs final : public attachment {
public:
    statistics_inputs(const method_call& call, const std::string& option);

    [[nodiscard]] const std::deque<taskvec::statistics_file>& files() const { return files_; }
    [[nodiscard]] const std::vector<taskvec::const_model_ref>& models() const { return models_; }
    [[nodiscard]] const std::vector<std::string>& labels() const { return labels_; }
    /// Bytes of the models that were read to check that the statistics are theirs.
    [[nodiscard]] std::uint64_t bytes_read() const override { return checked_bytes_; }

private:
    std::deque<taskvec::statistics_file> files_;
    std::vector<taskvec::const_model_ref> models_;
    std::vector<std::string> labels_;
    std::uint64_t checked_bytes_ = 0;
};

} // namespace tool
