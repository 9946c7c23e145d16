// Adapters that merge-lora joins: read, and brought to the same modules, heads, tokens and whole weights.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adapters.hpp"
#include "arguments.hpp"

#include <taskvec/adapters/lora.hpp>
#include <taskvec/formats/peft.hpp>

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace tool {

/// What merge-lora is told of how its adapters belong together.
struct alignment_settings : adapter_settings {
    std::string init; ///< the initialisation that they share, a PEFT directory; empty: they are not merged in phi space
    std::string vocabulary = "error";
    bool any_base = false, match_prefixes = false, disjoint = false;

    [[nodiscard]] bool in_phi() const { return !init.empty(); }
};

/// Adapters that were found to belong together.
template <class T>
struct aligned_adapters {
    std::vector<taskvec::lora_adapter<T>> updates{}; ///< in the order of the command line
    std::vector<double> weights{};
    taskvec::lora_adapter<T> initial{}; ///< of phi space
    /// The merged adapter but for its updates: the first one's configuration where it fits the modules of all.
    taskvec::peft_adapter<T> merged{};
    bool rows_changed = false; ///< rows of tokens were lined up
    /// The tokenizer's files that go beside the result, by name: where rows of tokens were lined up by text.
    std::map<std::string, std::string> tokenizer{};
    std::uint64_t bytes = 0; ///< of what was read
};

/// Reads adapters and aligns them. Throws invalid_argument where they are not of one base, shape_mismatch where their
/// modules differ in shape, and whatever reading throws; what was changed is noted.
template <class T>
[[nodiscard]] aligned_adapters<T> align_adapters(
    const alignment_settings& given, const std::vector<task_argument>& arguments);

// Its steps, in their order.

/// The adapters while they are being aligned.
template <class T>
struct adapter_group {
    const alignment_settings& given;
    std::vector<fs::path> paths{};
    std::vector<taskvec::peft_adapter<T>> adapters{};
    std::vector<double> weights{};
    taskvec::peft_adapter<T> initial{}; ///< of phi space

    /// The modules that some adapter has factors of.
    [[nodiscard]] std::set<std::string> adapted_modules() const
    {
        std::set<std::string> modules;
        for (const auto& adapter : adapters) {
            for (const auto& one : adapter.updates) { modules.insert(one.first); }
        }
        return modules;
    }
};

/// Calls biases as PEFT calls them where it adapts these modules: their layers, with the biases, lie within others.
template <class T>
void call_biases(adapter_group<T>& group, const std::set<std::string>& adapted);
/// Brings modules to the names of the first adapter (--match-prefixes). Adapters that share no module are of different
/// parts of a model, or call the same modules differently: they are refused, or joined where --disjoint was given.
template <class T>
void align_modules(adapter_group<T>& group);
/// Adapters that tie the head to the embedding (ensure_weight_tying) have the factors of both where others have, or
/// change the two each by itself: the result then ties nothing. Returns what the result says of the two; nothing where
/// no adapter changes them.
template <class T>
[[nodiscard]] std::optional<bool> align_heads(adapter_group<T>& group);
/// Throws where one adapter has a module whole and another as factors.
template <class T>
void check_whole_or_factored(const adapter_group<T>& group);
/// What aligning the rows of tokens did.
struct token_alignment {
    bool changed = false;
    std::map<std::string, std::string> tokenizer{}; ///< files of the result's, by name
};
/// Lines the rows of tokens up as `merge` does those of models (--vocabulary): of the factors of embeddings and heads,
/// and of what comes with them whole. An adapter changes nothing of tokens that it lacks.
template <class T>
[[nodiscard]] token_alignment align_tokens(adapter_group<T>& group);
/// Makes what adapters carry whole one and the same in all of them (--modules-to-save): the mean by weight of those
/// that have it, or what the first of them has.
template <class T>
void join_whole_modules(adapter_group<T>& group);

} // namespace tool
