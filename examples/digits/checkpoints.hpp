// The digits example's models as safetensors files.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "merging.hpp"
#include "network.hpp"

#include <filesystem>

namespace digits {

/// The encoder's four tensors.
void save(const encoder& model, const std::filesystem::path& file);
encoder load_encoder(const std::filesystem::path& file);

/// The frozen head, `head.weight`: stored once, since all models share it.
void save_head(const matrix& head, const std::filesystem::path& file);
matrix load_head(const std::filesystem::path& file);

/// base.safetensors and head.safetensors, which everything else in the folder refers to.
void save_base(const network& base, const std::filesystem::path& folder);

/// What PERU-FFT serves from, as the tool's peru-fft writes it: merged.safetensors and <task>.delta.safetensors.
void save(const reused& compressed, const std::filesystem::path& folder);

} // namespace digits
