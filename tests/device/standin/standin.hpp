// What tests ask of the stand-in for the CUDA libraries: errors at will, and what is still held.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace standin {

/// From now on `call` answers `code`; "gesvdj:info", "gesvdjBatched:info", "gesvd:info" and "gesvdr:info" are `info`
/// results.
void fail(const std::string& call, int code);
/// An error of earlier work that every call meets, as on a device that has failed; 0: none.
extern int sticky;
/// Undoes all that.
void repair();
/// Library objects, and bytes of device memory, not given back yet.
long long handles();
long long bytes();
/// Calls of gesvdjBatched so far.
extern int batches;

} // namespace standin
