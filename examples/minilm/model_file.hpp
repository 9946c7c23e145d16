// all-MiniLM-L6-v2's files: config.json and model.safetensors in one folder.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "minilm.hpp"

#include <filesystem>

namespace minilm {

struct loaded {
    minilm::shape shape;
    parameters<float> values; ///< by the names of the file; the pooler, which the embedding does not use, is left out
};

/// Reads the model of a folder. Throws io_error where there is none, naming the package that has one; format_error for
/// another architecture, a tensor that is missing or of another shape or type.
loaded load(const std::filesystem::path& folder);

} // namespace minilm
