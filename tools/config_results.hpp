// Results of a configuration's documents that others take, and what is said where their dtype cannot hold them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/tensor_ref.hpp>

#include <functional>
#include <memory>
#include <string>

namespace tool::configuration {

/// Runs the merge of a document that has a name. Where its result overflows, the nonfinite_error says whose result it
/// is: what takes it has tensors of the same names.
void as_result_of(const std::string& name, const std::function<void()>& merge);

/// A result that is worked out while it is read, which says the same where it overflows.
[[nodiscard]] std::shared_ptr<const taskvec::const_model_ref> as_result_of(
    const std::string& name, const std::shared_ptr<const taskvec::const_model_ref>& result);

} // namespace tool::configuration
