// mergekit's words for methods and their parameters, and what they are called here: what `run` reads and --as-config
// writes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace tool {

/// What mergekit calls a parameter, and the row of a table that it sets here.
struct mergekit_parameter {
    enum class kind { number, whole_number, truth };
    enum class scope { shared, input, tasks }; ///< one for all, one for each model, one for each but the base
    std::string name, row;
    kind type = kind::number;
    scope of = scope::shared;
    bool required = false;
    std::string on = "true", off = "false"; ///< what a truth sets the row to; empty: it leaves it as it is
    std::string unless{}; ///< mergekit's default, where it is not that of the table or of the preset

    /// What a truth sets the row to: the papers rescale by the density where mergekit does by the L1 norm.
    [[nodiscard]] std::string word(bool truth, const std::string& semantics) const
    {
        return !truth ? off : on == "l1" && semantics == "paper" ? "density" : on;
    }
};

/// A method of mergekit's, and the method that it is here.
struct mergekit_method {
    enum class base { required, optional, input };
    std::string theirs, ours;
    base takes = base::required;
    std::vector<mergekit_parameter> parameters{};
    bool semantics = false; ///< its table has presets
    std::size_t fewest = 1, most = 1000; ///< models that it takes beside the base
    std::size_t walks = 1; ///< how often it reads its models as a rule, where its result is worked out and read once
};
/// All that both have.
[[nodiscard]] const std::vector<mergekit_method>& mergekit_methods();

/// A dtype of a result, as PyTorch calls it, and as --dtype does.
struct mergekit_dtype {
    std::string theirs, ours;
};
[[nodiscard]] const std::vector<mergekit_dtype>& mergekit_dtypes();

} // namespace tool
