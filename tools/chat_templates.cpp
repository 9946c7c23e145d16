// Chat templates of models.
// SPDX-License-Identifier: Apache-2.0
#include "chat_templates.hpp"

#include "runner.hpp"

#include <taskvec/formats/file.hpp>
#include <taskvec/formats/json.hpp>

#include <nlohmann/json.hpp>

namespace tool {

std::optional<std::string> chat_template_beside(const fs::path& model)
{
    std::error_code ignored;
    if (const auto own = model / "chat_template.jinja"; fs::is_regular_file(own, ignored)) { return read_watched(own); }
    const auto file = model / "tokenizer_config.json";
    if (!fs::is_regular_file(file, ignored)) { return std::nullopt; }
    const auto config = taskvec::parse_configuration(read_watched(file), file.string());
    const auto own = config.find("chat_template");
    if (own == config.end()) { return std::nullopt; }
    if (own->is_string()) { return own->get<std::string>(); }
    if (!own->is_array()) { return std::nullopt; }
    for (const auto& one : *own) { // several, each with its name
        if (one.is_object() && one.value("name", "") == "default" && one.contains("template")
            && one["template"].is_string()) {
            return one["template"].get<std::string>();
        }
    }
    return std::nullopt;
}

std::string with_chat_template(
    const std::string& tokenizer_config, const fs::path& file, const std::string& chat_template)
{
    (void)taskvec::parse_configuration(tokenizer_config, file.string()); // strictly; the order of keys is kept below
    auto config = nlohmann::ordered_json::parse(taskvec::quoted_constants(tokenizer_config));
    if (!config.is_object()) {
        taskvec::raise<taskvec::format_error>(
            taskvec::error_code::tokenizer, "is no JSON object; a tokenizer's configuration is one", file.string());
    }
    config["chat_template"] = chat_template;
    return taskvec::restored_constants(config.dump(2)) + "\n";
}

} // namespace tool
