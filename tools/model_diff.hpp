// What differs between two models, for inspect --diff.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "runner.hpp"

#include <taskvec/formats/checkpoint.hpp>

#include <nlohmann/json_fwd.hpp>

#include <string>

namespace tool {

/// The tensors that only one of the models has, those whose shapes or dtypes do not compare, and how much the others
/// differ: largest |b − a|, ‖b − a‖, ‖b − a‖/‖a‖ and the cosine of a and b, in f64 whatever the numbers are stored as.
/// Integers and truths compare as numbers; NaN is equal to NaN alone, and a number that it stands in the place of makes
/// the largest difference NaN (null in JSON). What has numbers that nothing computes with (C64, packed ones) differs
/// where its bytes do, without numbers.
[[nodiscard]] nlohmann::ordered_json diff_of(
    const runner& run, const taskvec::checkpoint& a, const taskvec::checkpoint& b);
/// The same as people read it.
[[nodiscard]] std::string diff_text(
    const nlohmann::ordered_json& diff, const taskvec::checkpoint& a, const taskvec::checkpoint& b);

} // namespace tool
