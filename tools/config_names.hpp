// Models as a configuration names them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"
#include "config_values.hpp"
#include "run_config.hpp"

#include <cstddef>
#include <map>
#include <optional>
#include <string>

namespace tool::configuration {

/// Results of the other documents of a file, by their names: where they lie, or will lie.
using stages = std::map<std::string, fs::path>;
/// Those of them that a document takes: where each is named first.
using stages_named = std::map<std::string, YAML::Node>;

/// A model among `models` or `sources`. Copied, never assigned: an assignment to a node writes into the document.
struct input {
    std::string name, path, adapter;
    YAML::Node at; ///< its name
    std::optional<YAML::Node> parameters{}, layers{};
    std::size_t first = 0, last = 0; ///< its layers, in a slice of several

    [[nodiscard]] std::size_t count() const { return last - first; } ///< of layers
    [[nodiscard]] bool is_model_of(const input& other) const { return path == other.path && adapter == other.adapter; }
};
/// What names of models mean: what is there under the name, the result of another document, or the Hub's copy on this
/// machine; by itself or with an adapter on it.
class model_names {
public:
    /// Both outlive this.
    model_names(const place& where, const stages& others)
        : where_(where)
        , stages_(others)
    { }

    /// The model that is named here. Throws invalid_argument where there is none. What aliases name is sought once.
    [[nodiscard]] const input& find(const YAML::Node& node);
    /// The other documents whose results were found.
    [[nodiscard]] const stages_named& needs() const { return needs_; }
    /// Where each model and adapter is named that was found.
    [[nodiscard]] named_places places() const;

private:
    /// A model, and the adapter on it where it is named by itself; a name may hold both.
    struct reference {
        std::string model;
        std::optional<std::string> adapter{};
    };
    [[nodiscard]] reference reference_of(const YAML::Node& node) const;
    [[nodiscard]] input read(const YAML::Node& node);

    const place& where_;
    const stages& stages_;
    stages_named needs_;
    std::map<int, input> found_; ///< by where the names stand
};

} // namespace tool::configuration
