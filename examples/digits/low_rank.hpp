// The digits example's adapters as the library's low-rank updates: merged, truncated, stored, folded into encoders.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adapter.hpp"

#include <taskvec/adapters/adapter.hpp>

#include <cstddef>
#include <filesystem>
#include <vector>

namespace digits {

/// One update for each adapted weight, under the names of the modules: "fc1" and "fc2".
using updates = taskvec::lora_adapter<float>;
using compressed_updates = taskvec::adapter_result<float>;

/// The update lora_B·lora_A of each weight.
updates updates_of(const adapter& phi);

/// base + factor·ΔW.
encoder folded(const encoder& base, const updates& adapter, double factor = 1);
std::vector<encoder> folded(const encoder& base, const std::vector<updates>& adapters);

/// Σ ΔWt, exactly: the factors side by side.
updates summed(const std::vector<updates>& adapters);

/// TIES over the entries of the products ΔWt, λ = 1, decomposed without loss.
updates elected(const std::vector<updates>& adapters, double density);

/// PERU-LoRA: each ΔW's best approximation of rank q.
compressed_updates truncated(const updates& adapter, std::size_t q);

/// A PEFT adapter directory.
void save(const updates& adapter, const std::filesystem::path& folder);
updates load_updates(const std::filesystem::path& folder);
/// base.safetensors and head.safetensors, φ0 as llora-init/, and the linearized adapters as llora/<task>/.
void save_linearized(const network& base, const adapter& initial, const std::vector<adapter>& adapters,
    const std::filesystem::path& folder);

/// Each layer's singular values, descending, of one update.
std::vector<std::vector<double>> spectra(const updates& adapter);

/// Σ weightt·ΔWt, exactly.
updates combined(const std::vector<updates>& adapters, const std::vector<double>& weights);

} // namespace digits
