// Peak memory of a piece of work: bytes that malloc handed out, counted by standing in front of the C library's
// functions.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <optional>

namespace vit {

/// Forgets the peak so far and starts counting from what is held now.
void start_peak();
/// The largest number of bytes held since start_peak() beyond what was held then; nothing where they cannot be counted
/// (another C library than glibc, or a sanitizer).
std::optional<std::size_t> peak_bytes();

} // namespace vit
