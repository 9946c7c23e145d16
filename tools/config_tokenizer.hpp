// The tokenizer that a configuration gives the result, and its chat template.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "config_models.hpp"

namespace tool::configuration {

/// Reads `tokenizer_source`, or `tokenizer`. The models are known, and the base.
void read_tokenizer(reading& it, const mapping& top);
/// Reads `chat_template`.
void read_chat_template(reading& it, const mapping& top);

} // namespace tool::configuration
