// Models of a configuration, and the slices that they are merged in.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "config_names.hpp"
#include "mergekit_words.hpp"
#include "run_config.hpp"

#include <cstddef>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace tool::configuration {

/// What is merged by itself: all, or a slice of the layers.
struct slice {
    std::vector<input> inputs; ///< the base not among them
    std::vector<YAML::Node> parameters; ///< of all its inputs, what counts most first
    std::optional<input> base{};
    std::optional<part_of_model> part{}; ///< of the result; nothing: all
    /// How many of its inputs count behind the layers, for the norm and the head: mergekit takes as many as the first
    /// slice has.
    std::size_t inputs_behind = std::numeric_limits<std::size_t>::max();
};

/// A document while it is read: what is known of it.
struct reading {
    /// `others`: results of other documents, which are there or not yet.
    reading(run_settings& settings, const stages& results, bool there)
        : given(settings)
        , where(settings.config)
        , others(results)
        , others_are_there(there)
        , copies_are_given(!settings.request.copies.from.empty())
        , names(where, results)
    { }
    reading(const reading&) = delete;
    reading& operator=(const reading&) = delete;

    run_settings& given;
    const place where;
    const stages& others;
    const bool others_are_there, copies_are_given; ///< the latter by --copy-from
    model_names names;
    const mergekit_method* method = nullptr;
    YAML::Node at_method; ///< where it is named
    std::vector<slice> slices; ///< one where there are none: the whole
    std::optional<input> files_of{}; ///< a base that is not merged: the result has its configuration and tokenizer

    /// What the document becomes.
    [[nodiscard]] merge_request& request() const { return given.request; }
    [[nodiscard]] bool sliced() const { return slices.front().part.has_value(); }
    /// Whether files of models can be looked at: those of other documents' results come later.
    [[nodiscard]] bool models_are_there() const { return others_are_there || others.empty(); }
    /// The paths of all models, each once, the base first.
    [[nodiscard]] std::vector<std::string> paths() const;
};

/// Reads `models`, `slices` or `modules`, and `base_model`. The method is known.
void read_models(reading& it, const mapping& top);

} // namespace tool::configuration
