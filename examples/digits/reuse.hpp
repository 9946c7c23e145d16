// Both halves of the first paper against each other: sparse residuals of full models, and low-rank adapters.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "claims.hpp"
#include "fft.hpp"
#include "lora.hpp"

#include <string>
#include <vector>

namespace digits {

/// PERU-LoRA and PERU-FFT side by side with as many parameters, with the bytes of both in files; and both Single-Task.
[[nodiscard]] std::string equal_storage(const fft_results& fft, const lora_results& lora);

/// The first paper's claims that need both.
[[nodiscard]] std::vector<claim> reuse_claims(const fft_results& fft, const lora_results& lora);

} // namespace digits
