// Models as a configuration names them.
// SPDX-License-Identifier: Apache-2.0
#include "config_names.hpp"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <system_error>
#include <vector>

namespace tool::configuration {

namespace {

fs::path cache_of_hub()
{
    const auto variable = [](const char* name) {
        const char* value = std::getenv(name);
        return std::string(value ? value : "");
    };
    for (const auto* name : {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"}) {
        if (auto folder = variable(name); !folder.empty()) { return folder; }
    }
    if (auto home = variable("HF_HOME"); !home.empty()) { return fs::path(home) / "hub"; }
    if (auto cache = variable("XDG_CACHE_HOME"); !cache.empty()) { return fs::path(cache) / "huggingface/hub"; }
    return fs::path(variable("HOME")) / ".cache/huggingface/hub";
}

/// A model of the configuration: what is there under its name, or the Hub's copy of it on this machine.
fs::path find_model(const place& where, const YAML::Node& node, const std::string& name)
{
    std::error_code ignored;
    if (fs::exists(name, ignored)) { return name; }
    const auto at = name.find('@');
    auto repository = name.substr(0, at);
    auto revision = at == name.npos ? std::string("main") : name.substr(at + 1);
    const auto plain = [](const std::string& text, std::size_t slashes) {
        return !text.empty() && !text.starts_with('.') && text.find("..") == text.npos
            && static_cast<std::size_t>(std::count(text.begin(), text.end(), '/')) <= slashes
            && std::none_of(text.begin(), text.end(), [](char c) { return c == '\\' || c == '\n' || c == '\0'; });
    };
    const auto cache = cache_of_hub();
    if (plain(repository, 1) && !repository.starts_with('/') && plain(revision, 8) && !revision.starts_with('/')) {
        for (std::size_t i = 0; (i = repository.find('/', i)) != repository.npos;) { repository.replace(i, 1, "--"); }
        const auto folder = cache / ("models--" + repository);
        if (std::ifstream reference(folder / "refs" / revision); reference) {
            std::string hash;
            if (reference >> hash && plain(hash, 0)) { revision = hash; }
        }
        if (auto found = folder / "snapshots" / revision; fs::is_directory(found, ignored)) { return found; }
    }
    where.fail(node,
        "there is no model '" + shown(name) + "': no file or directory has this name, and the Hub's cache '"
            + cache.string() + "' does not hold it; nothing is downloaded: fetch it first, or give a path",
        taskvec::error_code::model_not_found);
}

} // namespace

/// What a model is named, which mergekit writes as a mapping too: `{model: {path: P, revision: R}, lora: {path: L}}`.
model_names::reference model_names::reference_of(const YAML::Node& node) const
{
    if (!node.IsMap()) { return {scalar_of(where_, node, "a model"), std::nullopt}; }
    const auto path_of = [&](const YAML::Node& part) {
        if (!part.IsMap()) { return scalar_of(where_, part, "a model"); }
        const mapping parts(where_, part, "a model", {"path", "revision"});
        const auto place = parts.find("path");
        if (!place) { where_.fail(part, "a model without a 'path'"); }
        auto text = scalar_of(where_, place->value, "a path");
        if (const auto revision = parts.find("revision")) {
            text += "@" + scalar_of(where_, revision->value, "a revision");
        }
        return text;
    };
    const mapping parts(where_, node, "a model", {"model", "lora", "override_architecture", "path", "revision"});
    if (const auto one = parts.find("override_architecture")) {
        where_.fail(one->key, "'override_architecture' is not supported: names tell what tensors are");
    }
    if (parts.find("path")) { return {path_of(node), std::nullopt}; }
    const auto model = parts.find("model");
    if (!model) { where_.fail(node, "a model without a 'path'"); }
    const auto lora = parts.find("lora");
    return {path_of(model->value), lora ? std::optional(path_of(lora->value)) : std::nullopt};
}

const input& model_names::find(const YAML::Node& node)
{
    const auto at = node.Mark().pos;
    const auto place = found_.find(at);
    return place != found_.end() ? place->second : found_.emplace(at, read(node)).first->second;
}

named_places model_names::places() const
{
    named_places all;
    for (const auto& [at, one] : found_) { // from the beginning of the file on
        all.models.emplace(one.path, where_.of(one.at));
        if (!one.adapter.empty()) { all.adapters.emplace(one.adapter, where_.of(one.at)); }
    }
    return all;
}

input model_names::read(const YAML::Node& node)
{
    const auto reference = reference_of(node);
    input made;
    made.at = node;
    made.name = reference.model + (reference.adapter ? "+" + *reference.adapter : "");
    const auto put = [&](const std::string& model, const std::optional<std::string>& adapter) {
        const auto stage = stages_.find(model);
        if (stage != stages_.end()) { needs_.emplace(stage->first, node); }
        made.path = (stage != stages_.end() ? stage->second : find_model(where_, node, model)).string();
        if (adapter) { made.adapter = find_model(where_, node, *adapter).string(); }
        return made;
    };
    const auto is_there = [&](const std::string& name) {
        std::error_code ignored;
        return stages_.contains(name) || fs::exists(name, ignored);
    };
    const auto& name = reference.model;
    const auto first = name.find('+');
    if (reference.adapter || first == name.npos || is_there(name)) { return put(name, reference.adapter); }
    std::optional<std::size_t> between, behind; // of several the first between what is there, or behind it
    for (auto plus = first; plus != name.npos; plus = name.find('+', plus + 1)) {
        if (!is_there(name.substr(0, plus))) { continue; }
        if (!behind) { behind = plus; }
        if (!between && is_there(name.substr(plus + 1))) { between = plus; }
    }
    const auto at = between ? *between : behind.value_or(first);
    return put(name.substr(0, at), name.substr(at + 1));
}

} // namespace tool::configuration
