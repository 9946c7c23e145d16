// What differs between two models, for inspect --diff.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "runner.hpp"

#include <taskvec/formats/checkpoint.hpp>

#include <nlohmann/json_fwd.hpp>

#include <string>

namespace tool {

/// The tensors that only one of the models has, those whose shapes or dtypes do not compare, and how much the others
/// differ: largest |b − a|, ‖b − a‖, ‖b − a‖/‖a‖ and the cosine of a and b.
[[nodiscard]] nlohmann::ordered_json diff_of(
    const runner& run, const taskvec::checkpoint& a, const taskvec::checkpoint& b);
/// The same as people read it.
[[nodiscard]] std::string diff_text(
    const nlohmann::ordered_json& diff, const taskvec::checkpoint& a, const taskvec::checkpoint& b);

} // namespace tool
