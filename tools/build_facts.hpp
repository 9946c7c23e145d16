// What this build of the tool is made of, for --version and taskvec doctor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>

namespace tool {

/// The version, and below it the compiler, the instruction sets and the optional parts of this build.
[[nodiscard]] std::string version_page();
/// The instruction sets that kernels are compiled for: "baseline, AVX2, AVX-512".
[[nodiscard]] std::string compiled_instruction_sets();

/// Whether this build has --device cuda; a device may still be missing. Defined by the device's file.
[[nodiscard]] bool has_cuda() noexcept;

} // namespace tool
