// Tensors that models call differently: renames, tables, prefixes, and heads that are tied to embeddings.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"

#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/models/aligned_models.hpp>

#include <nlohmann/json_fwd.hpp>

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tool {

class command;

/// --rename REGEX=REPLACEMENT or --map FILE, in the order of the command line.
struct name_rule {
    bool is_table = false;
    std::string text;
};
/// The rules of each model: "" is the base, others are the texts of --task and its like.
using name_rules = std::map<std::string, std::vector<name_rule>>;

/// Adds --rename, --map and --match-prefixes. Each of the first two applies to the model that `model_options` named
/// last before it, or first where there is none before it.
void add_name_options(command& verb, name_rules& rules, bool& match_prefixes,
    const std::vector<std::string>& model_options = {"--base", "--task", "--task-adapter"});
/// The first two of these.
void add_rename_options(command& verb, name_rules& rules, const std::vector<std::string>& model_options);

/// A model's tensors under the names that rules give them. Throws usage_error for a rule that is none, invalid_argument
/// for one that matches nothing or gives one name to two tensors; notes how many names of a table match nothing.
/// `label`: the model, for messages.
[[nodiscard]] taskvec::const_model_ref renamed(const taskvec::const_model_ref& model,
    const std::vector<name_rule>& rules, const std::string& label, const run_options& run);

/// How names of `model` become names of `reference`: by prefixes that are taken off and put before, and by segments
/// that wrappers put within names (_fsdp_wrapped_module, PEFT's base_layer, …).
struct prefix_match {
    struct change {
        std::string off, on;
        std::size_t tensors = 0;
        std::set<std::string> next; ///< what comes after the prefix, up to a dot
        bool some_stay = false; ///< other names begin so too, and stay as they are
        bool within = false; ///< segments of wrappers between others, which one of the two has
        /// "'model.' put before", "'_orig_mod.' taken off", "'a.' in place of 'b.'".
        [[nodiscard]] std::string words() const;
        /// As a --rename.
        [[nodiscard]] std::string rename() const;
    };
    std::vector<change> changes;
    std::map<std::string, std::string> names; ///< what is renamed, and to what
    std::vector<std::string> doubtful; ///< prefixes between which nothing decides
    std::size_t same = 0; ///< tensors that have a name of the reference as they are

    [[nodiscard]] std::string words() const;
    /// How they become so: --match-prefixes, or --rename where that can say it; `model`: the argument that it follows.
    [[nodiscard]] std::string ways(const std::string& model) const;
    /// Whether all that differs are words that wrappers put before names (model., module., _orig_mod., …), so that they
    /// are names of the same things.
    [[nodiscard]] bool wrappers_only() const;
};
[[nodiscard]] prefix_match match_prefixes(
    const taskvec::const_model_ref& model, const taskvec::const_model_ref& reference);
/// The model under matched names.
[[nodiscard]] taskvec::const_model_ref renamed(const taskvec::const_model_ref& model, const prefix_match& match);

/// Adds to `model` what it lacks of `reference` because it is tied to one of its own embeddings: `lm_head.weight` where
/// `says_tied` (its configuration), and whatever in the reference has the bytes of an embedding. Takes away a head that
/// the reference lacks and that has the bytes of the model's own embedding. Says what it did, a sentence each.
[[nodiscard]] std::vector<std::string> resolve_ties(taskvec::const_model_ref& model,
    const taskvec::const_model_ref& reference, bool says_tied, const std::string& label,
    const std::string& reference_label);
/// Adds to a model whose head is its embedding the head that another one has for itself; the name of what was added.
[[nodiscard]] std::string add_tied_head(taskvec::const_model_ref& model, const taskvec::const_model_ref& other);
/// The config.json beside a model's weights; an empty object where there is none.
[[nodiscard]] nlohmann::json config_beside(const fs::path& model);
/// Whether a configuration, and that beside a model, says that the head is tied.
[[nodiscard]] bool config_says_tied(const nlohmann::json& config);
[[nodiscard]] bool says_tied(const fs::path& model);
/// Whether a model has a head that is not its embedding.
[[nodiscard]] bool has_own_head(const taskvec::const_model_ref& model);
/// Whether `count` elements from `first` on are the same: of one dtype, with the same bytes as they are stored, or as
/// what works them out gives them. Cost: reads of both up to where they differ; none where both are one place.
[[nodiscard]] bool same_elements(const taskvec::aligned_tensor::operand& a, const taskvec::aligned_tensor::operand& b,
    std::uint64_t first, std::size_t count);
/// Heads and embeddings that are one matrix under several names in the base and in every task: the outputs of each
/// further name and of the first. Cost: one comparison of the bytes.
[[nodiscard]] std::vector<std::pair<std::size_t, std::size_t>> shared_matrices(const taskvec::aligned_models& models);
/// How a model's head and its embedding are one, in words; empty where they are two, or none.
[[nodiscard]] std::string tie_text(const taskvec::const_model_ref& model, bool says_tied);

/// The layer in a tensor's name: what stands before the first number between dots, and that number.
[[nodiscard]] std::optional<std::pair<std::string, std::size_t>> layer_of(std::string_view name);
/// A name with another number for its layer, which layer_of() gave.
[[nodiscard]] std::string in_layer(
    std::string_view name, const std::pair<std::string, std::size_t>& layer, std::size_t number);
/// What a filter of a configuration calls a tensor. Experts that files hold one by one are one tensor of their layer in
/// mergekit, as in transformers 5: `experts.0.up_proj.weight` is `experts.gate_up_proj`, and Mixtral's
/// `block_sparse_moe` is `mlp`.
[[nodiscard]] std::string name_in_filters(std::string_view name);
/// Whether a tensor that is in no layer stands before them, as embeddings do; final norms and heads stand after them.
[[nodiscard]] bool stands_before_layers(std::string_view name);
/// How many layers a model has. Throws invalid_argument where it has none, or several lists of them. `label`: the
/// model.
[[nodiscard]] std::size_t count_layers(const taskvec::const_model_ref& model, const std::string& label);
/// Layers for predicting further tokens, as GLM-4.5 and DeepSeek-V3 store them behind their own, are none of a model's
/// depth: how many come before them, by what stands before a layer's number. They are those behind the number of layers
/// that the configuration says, where each holds a tensor that none before them has.
[[nodiscard]] std::map<std::string, std::size_t> layers_before_prediction(
    const taskvec::const_model_ref& model, const nlohmann::json& config);
/// Layers [first, last) of a model.
struct layers_taken {
    const taskvec::const_model_ref* model = nullptr;
    std::size_t first = 0, last = 0;
};
/// A model of the layers of several, one part after another and numbered anew. What is in no layer is the first part's
/// where it stands before the layers, and the last part's where it stands after them; a head that the first model has
/// and the last one's is tied to its embedding is that embedding.
[[nodiscard]] taskvec::const_model_ref model_of_layers(const std::vector<layers_taken>& parts);

/// What of an adapter a tensor is by its name, and by its neighbours where that is not enough.
struct adapter_part {
    std::string kind; ///< "LoRA", "LoHa", "OFT", …; empty: no part of an adapter
    std::string pattern; ///< what --exclude leaves such parts out by
    bool read = false; ///< whether the verbs for adapters read this kind
};
[[nodiscard]] adapter_part adapter_part_of(std::string_view name, const taskvec::const_model_ref& model);

/// The name that is most like a pattern that matched nothing, for "did you mean"; empty: none is.
[[nodiscard]] std::string closest_name(const std::string& pattern, const std::vector<std::string>& names);

} // namespace tool
