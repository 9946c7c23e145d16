// For a test case that cannot run on this machine: `testing::skip("why"); return;`.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace testing {

/// The program goes on, prints "skipped: reason" at its end, and exits with 77 unless a check failed: ctest then counts
/// the file as skipped, with all of its cases.
void skip(std::string reason);

} // namespace testing
