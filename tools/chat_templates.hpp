// Chat templates: how a conversation becomes one text, as tokenizers hold it for transformers (Jinja).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"

#include <optional>
#include <string>
#include <string_view>

namespace tool {

/// The format of <|im_start|> and <|im_end|>, which mergekit calls chatml.
inline constexpr std::string_view chatml_template =
    R"({% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }})"
    R"({% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %})";

/// The template that a model's directory has: chat_template.jinja, or what tokenizer_config.json says; of several, the
/// one that is called default. Nothing where it has none. Throws format_error for a tokenizer_config.json that is no
/// JSON.
[[nodiscard]] std::optional<std::string> chat_template_beside(const fs::path& model);

/// The text of a tokenizer_config.json with this template in it. `file`: for errors.
[[nodiscard]] std::string with_chat_template(
    const std::string& tokenizer_config, const fs::path& file, const std::string& chat_template);

} // namespace tool
