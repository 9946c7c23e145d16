// Adapters to merge: heads that are tied to the embedding.
// SPDX-License-Identifier: Apache-2.0
#include "align_adapters.hpp"
#include "token_rows.hpp"

#include <taskvec/formats/json.hpp>

#include <algorithm>
#include <string_view>

namespace tool {

namespace {

const std::string tied_head{taskvec::peft_tied_head};

/// The embedding whose update is that of the head which an adapter ties to it; "" where that cannot be told.
template <class T>
std::string tied_embedding(const taskvec::peft_adapter<T>& adapter)
{
    for (const auto& module : adapter.embeddings) {
        if (module == "embed_tokens" || module.ends_with(".embed_tokens")) { return module; }
    }
    return adapter.embeddings.size() == 1 ? *adapter.embeddings.begin() : "";
}

/// Whether an adapter changes an embedding of tokens or a head.
template <class T>
bool changes_tokens(const taskvec::peft_adapter<T>& adapter)
{
    return std::any_of(adapter.updates.begin(), adapter.updates.end(), [](const auto& one) {
        return has_rows_of_tokens(one.first + ".weight");
    }) || std::any_of(adapter.others.begin(), adapter.others.end(), [](const auto& one) {
        return one.first.ends_with(".weight") && !one.first.ends_with(taskvec::peft_base_weight)
            && has_rows_of_tokens(one.first);
    });
}

/// Whether PEFT ties the head that an adapter changes, or whose embedding it does: of those that it looks for.
bool ties_head(const nlohmann::json& config)
{
    const auto names = [&](const char* field) {
        const auto list = config.find(field);
        if (list == config.end() || !list->is_array()) { return list != config.end() && list->is_string(); }
        return std::any_of(list->begin(), list->end(), [](const auto& one) {
            if (!one.is_string()) { return false; }
            const std::string_view name = one.template get_ref<const std::string&>();
            const auto last = name.substr(name.rfind('.') + 1);
            return last == "embed_tokens" || last == tied_head;
        });
    };
    return taskvec::flag_under(config, weight_tying) && (names("target_modules") || names("modules_to_save"));
}

bool names_head(const nlohmann::json& config)
{
    const auto targets = config.find("target_modules");
    return targets != config.end() && targets->is_array()
        && std::find(targets->begin(), targets->end(), tied_head) != targets->end();
}

/// The head's factors are the embedding's, of which PEFT and `extract-lora` write the one or both.
template <class T>
void give_head(taskvec::peft_adapter<T>& adapter)
{
    const auto embedding = tied_embedding(adapter);
    if (embedding.empty() || adapter.updates.contains(tied_head)) { return; }
    adapter.updates.emplace(tied_head, transposed(adapter.updates.at(embedding)));
    if (const auto type = adapter.stored.find(embedding); type != adapter.stored.end()) {
        adapter.stored.emplace(tied_head, type->second);
    }
}

} // namespace

template <class T>
std::optional<bool> align_heads(adapter_group<T>& group)
{
    std::vector<taskvec::peft_adapter<T>*> tied;
    const taskvec::peft_adapter<T>* by_itself = nullptr;
    for (auto& adapter : group.adapters) {
        if (!changes_tokens(adapter)) { continue; }
        if (ties_head(adapter.config)) { tied.push_back(&adapter); }
        else if (!by_itself) {
            by_itself = &adapter;
        }
    }
    if (tied.empty()) { return by_itself ? std::optional(false) : std::nullopt; }
    const bool known = std::any_of(tied.begin(), tied.end(), [](const auto* one) {
        return one->updates.contains(tied_head) || names_head(one->config);
    }); // that the base has one matrix for the two
    for (auto* const one : tied) {
        if (known) { give_head(*one); }
        const bool both = one->updates.contains(tied_head) && !tied_embedding(*one).empty();
        if (both || !by_itself) { continue; }
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
            taskvec::message("'", one->label, "' ties the head to the embedding (", weight_tying, ") and '",
                by_itself->label,
                "' changes them each by itself, and the first holds no factors of both: fold each into the base "
                "(taskvec fuse), and merge the models"));
    }
    if (known && group.given.in_phi() && ties_head(group.initial.config)) { give_head(group.initial); }
    if (!by_itself) { return true; }
    note(group.given.run,
        taskvec::message("'", tied.front()->label, "' ties the head to the embedding (", weight_tying, ") and '",
            by_itself->label, "' does not: the result ties nothing, and changes the two each by itself"));
    return false;
}

template std::optional<bool> align_heads(adapter_group<float>&);
template std::optional<bool> align_heads(adapter_group<double>&);

} // namespace tool
