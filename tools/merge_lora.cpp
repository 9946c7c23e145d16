// taskvec merge-lora: several adapters as one.
// SPDX-License-Identifier: Apache-2.0
#include "adapters.hpp"
#include "decompose.hpp"
#include "methods.hpp"
#include "runner.hpp"
#include "token_rows.hpp"
#include "tokenizers.hpp"
#include "vocabulary.hpp"
#include "words.hpp"

#include <taskvec/adapters/merge_as_peft.hpp>
#include <taskvec/adapters/merge_ties.hpp>
#include <taskvec/adapters/phi_space.hpp>
#include <taskvec/core/matrix.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>

namespace {

struct merge_lora_settings : tool::adapter_settings {
    std::string method = "linear", space = "product", init;
    std::vector<std::string> adapters;
    tool::rank_settings rank;
    tool::option_values options; ///< of the method: lambda, density and what else TIES is told
    std::string majority_sign = "total", vocabulary = "error";
    bool randomized = false, any_base = false, match_prefixes = false, disjoint = false;
    std::uint64_t seed = 0;

    [[nodiscard]] const tool::option_value* option(const std::string& name) const
    {
        const auto place = std::find_if(
            options.rbegin(), options.rend(), [&](const tool::option_value& one) { return one.name == name; });
        return place == options.rend() ? nullptr : &*place;
    }
    [[nodiscard]] bool semantics_of_peft() const
    {
        const auto* const given = option("semantics");
        return given && given->text == "peft";
    }
    /// PEFT's combination type; nothing for the library's own methods. With a rank PEFT's linear and ties are those of
    /// the updates, which the library's are too.
    [[nodiscard]] std::optional<taskvec::peft_combination> combination() const
    {
        if (in_phi() || !semantics_of_peft() || (rank.given() && (method == "linear" || method == "ties"))) {
            return {};
        }
        for (const auto& word : taskvec::enum_words<taskvec::peft_combination>::words) {
            if (word.word == method) { return word.value; }
        }
        return {};
    }

    [[nodiscard]] bool in_phi() const { return space == "phi"; }
    [[nodiscard]] double lambda() const
    {
        taskvec::linear_merge_options linear;
        tool::apply_options(linear, options);
        return linear.lambda;
    }
    [[nodiscard]] taskvec::ties_options ties(std::vector<double> weights) const
    {
        taskvec::ties_options ties;
        tool::apply_options(ties, options);
        ties.weights = std::move(weights);
        return ties;
    }
};

/// The adapters of a command line, read, and found to belong together.
template <class T>
class inputs {
public:
    inputs(const merge_lora_settings& given, const std::vector<tool::task_argument>& arguments)
        : arguments_(arguments)
    {
        for (const auto& argument : arguments) {
            adapters_.push_back(tool::read_adapter<T>(argument.path, given));
            weights_.push_back(argument.weight);
            bytes_ += tool::adapter_bytes(argument.path);
        }
        if (given.in_phi()) {
            initial_ = tool::read_adapter<T>(given.init, given);
            bytes_ += tool::adapter_bytes(given.init);
        }
        call_biases({});
        line_up(given);
        line_up_heads(given);
        check_whole_or_factored();
        line_up_vocabularies(given);
        if (given.modules_to_save == "average" || given.modules_to_save == "first") {
            join_whole_modules(given.modules_to_save == "average", given);
        }
        for (std::size_t i = 1; i < adapters_.size(); ++i) {
            for (std::size_t j = 0; j < i; ++j) { check_together(adapters_[j], adapters_[i], given.any_base); }
        }
        for (const auto& adapter : adapters_) {
            if (given.in_phi()) { check_together(initial_, adapter, given.any_base); }
            updates_.push_back(adapter.updates);
        }
        check_shapes();
        call_biases(adapted_modules());
    }
    [[nodiscard]] std::span<const taskvec::lora_adapter<T>> updates() const { return updates_; }
    [[nodiscard]] const taskvec::lora_adapter<T>& initial() const { return initial_.updates; }
    [[nodiscard]] const std::vector<double>& weights() const { return weights_; }
    [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
    /// The tokenizer's files that go beside the result, by name: where rows of tokens were lined up by text.
    [[nodiscard]] const std::map<std::string, std::string>& tokenizer() const { return tokenizer_; }
    /// Whether rows of tokens were lined up.
    [[nodiscard]] bool lined_up() const { return lined_up_; }
    [[nodiscard]] std::vector<std::string> labels() const
    {
        std::vector<std::string> labels;
        for (const auto& argument : arguments_) { labels.push_back(tool::in_quotes(argument.path)); }
        return labels;
    }

    /// The merged adapter but for its updates: the first one's configuration where it fits the modules of all.
    [[nodiscard]] taskvec::peft_adapter<T> joined() const
    {
        taskvec::peft_adapter<T> result;
        result.config = adapters_[0].config;
        for (const auto& adapter : adapters_) {
            result.others.insert(adapter.others.begin(), adapter.others.end());
            for (const char* field : {base_name, "task_type"}) {
                const auto said = text_of(adapter.config, field);
                if (!said.empty() && text_of(result.config, field).empty()) { result.config[field] = said; }
            }
            const auto trained = text_of(adapter.config, "bias");
            if (trained == "all" || (trained == "lora_only" && text_of(result.config, "bias") != "all")) {
                result.config["bias"] = trained;
            }
            result.embeddings.insert(adapter.embeddings.begin(), adapter.embeddings.end());
            for (const auto& [name, type] : adapter.stored) {
                const auto [place, fresh] = result.stored.emplace(name, type);
                if (!fresh) { place->second = taskvec::wider(place->second, type); }
            }
        }
        const auto same_modules = [&](const auto& adapter) {
            return std::equal(adapter.updates.begin(), adapter.updates.end(), adapters_[0].updates.begin(),
                adapters_[0].updates.end(), [](const auto& a, const auto& b) { return a.first == b.first; });
        };
        const bool as_first = !tied_ || *tied_ == flag_of(result.config, tying);
        if (!as_first) { result.config[tying] = *tied_; }
        // write_peft() then lists every module
        if (!as_first || !std::all_of(adapters_.begin(), adapters_.end(), same_modules)) {
            for (const char* field : {"target_modules", "exclude_modules"}) { result.config[field] = nullptr; }
        }
        return result;
    }

private:
    using adapter_type = taskvec::peft_adapter<T>;
    static constexpr const char *base_name = "base_model_name_or_path", *tying = "ensure_weight_tying";
    inline static const std::string head{taskvec::peft_tied_head};

    static std::string text_of(const nlohmann::json& config, const char* field)
    {
        const auto place = config.find(field);
        return place != config.end() && place->is_string() ? place->get<std::string>() : "";
    }
    static bool flag_of(const nlohmann::json& config, const char* field)
    {
        const auto place = config.find(field);
        return place != config.end() && place->is_boolean() && place->get<bool>();
    }
    /// The modules of an adapter as tensors without data.
    static void add_modules(const adapter_type& adapter, taskvec::const_model_ref& model)
    {
        for (const auto& [name, update] : adapter.updates) {
            if (model.find(name)) { continue; }
            model.insert(name,
                {nullptr, taskvec::dtype::f32,
                    {static_cast<std::int64_t>(update.out()), static_cast<std::int64_t>(update.in())}, {}});
        }
    }
    [[nodiscard]] static std::size_t modules_of(const taskvec::const_model_ref& model)
    {
        return static_cast<std::size_t>(std::distance(model.begin(), model.end()));
    }
    /// "'q', 'v' and 6 more"
    [[nodiscard]] static std::string some_of(const taskvec::const_model_ref& model)
    {
        constexpr std::size_t most = 2;
        const std::size_t all = modules_of(model);
        std::string text;
        std::size_t at = 0;
        for (const auto& [name, tensor] : model) {
            if (at == most) { break; }
            const bool last = ++at == all;
            text += (text.empty() ? "'" : last ? " and '" : ", '") + name + "'";
        }
        return all > most ? text + " and " + std::to_string(all - most) + " more" : text;
    }
    template <class Map>
    static Map under_names(Map&& map, const std::map<std::string, std::string>& names)
    {
        Map result;
        for (auto& [name, value] : map) {
            const auto place = names.find(name);
            result.emplace(place == names.end() ? name : place->second, std::move(value));
        }
        return result;
    }
    /// What comes beside factors ("MODULE.base_layer.weight", "MODULE.weight", "MODULE.bias") as its module is called.
    static std::map<std::string, taskvec::peft_tensor> with_modules_under_names(
        std::map<std::string, taskvec::peft_tensor> tensors, const std::map<std::string, std::string>& names)
    {
        std::map<std::string, taskvec::peft_tensor> result;
        for (auto& [name, tensor] : tensors) {
            const auto at = name.ends_with(taskvec::peft_base_weight) ? name.size() - taskvec::peft_base_weight.size()
                                                                      : std::min(name.rfind('.'), name.size());
            const auto place = names.find(name.substr(0, at));
            result.emplace(place == names.end() ? name : place->second + name.substr(at), std::move(tensor));
        }
        return result;
    }
    /// Adapters that share no module are of different parts of a model, or call the same modules differently.
    void line_up(const merge_lora_settings& given)
    {
        taskvec::const_model_ref seen;
        add_modules(adapters_[0], seen);
        for (std::size_t i = 1; i < adapters_.size(); ++i) {
            auto& adapter = adapters_[i];
            taskvec::const_model_ref mine;
            add_modules(adapter, mine);
            const auto match = tool::match_prefixes(mine, seen);
            const std::string label = "'" + adapter.label + "'";
            if (given.match_prefixes && !match.names.empty()) {
                tool::note(given.run,
                    taskvec::message(
                        "modules of ", label, ": ", match.words(), ", ", tool::counted(match.names.size(), "module")));
                adapter.updates = under_names(std::move(adapter.updates), match.names);
                adapter.others = with_modules_under_names(std::move(adapter.others), match.names);
                adapter.stored = under_names(std::move(adapter.stored), match.names);
                std::remove_cvref_t<decltype(adapter.embeddings)> embeddings;
                for (const auto& name : adapter.embeddings) {
                    const auto place = match.names.find(name);
                    embeddings.insert(place == match.names.end() ? name : place->second);
                }
                adapter.embeddings = std::move(embeddings);
            }
            else {
                const std::size_t all = adapter.updates.size(), fewest = std::min(all, modules_of(seen));
                const std::string would = match.names.empty() ? std::string()
                                                              : "; with " + match.words() + ", "
                        + tool::counted(match.names.size(), "module") + " would be the same: --match-prefixes";
                if (match.same == 0 && match.names.empty() && !given.disjoint) {
                    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
                        taskvec::message(label, " shares no module with the adapters before it: it has ", some_of(mine),
                            ", and they have ", some_of(seen),
                            "; where they are of different parts of one model, --disjoint makes an adapter of all"));
                }
                if (2 * match.same < fewest || (!match.names.empty() && match.wrappers_only())) {
                    tool::note(given.run,
                        label + " shares " + (match.same == 0 ? "none" : tool::grouped(match.same)) + " of its "
                            + tool::counted(all, "module")
                            + " with the adapters before it: the result has those of both" + would);
                }
            }
            add_modules(adapter, seen);
        }
    }
    /// The embedding whose update is that of the head which an adapter ties to it; "" where that cannot be told.
    static std::string tied_embedding(const adapter_type& adapter)
    {
        for (const auto& module : adapter.embeddings) {
            if (module == "embed_tokens" || module.ends_with(".embed_tokens")) { return module; }
        }
        return adapter.embeddings.size() == 1 ? *adapter.embeddings.begin() : "";
    }
    /// Whether an adapter changes an embedding of tokens or a head.
    static bool changes_tokens(const adapter_type& adapter)
    {
        return std::any_of(adapter.updates.begin(), adapter.updates.end(), [](const auto& one) {
            return tool::has_rows_of_tokens(one.first + ".weight");
        }) || std::any_of(adapter.others.begin(), adapter.others.end(), [](const auto& one) {
            return one.first.ends_with(".weight") && !one.first.ends_with(taskvec::peft_base_weight)
                && tool::has_rows_of_tokens(one.first);
        });
    }
    /// Whether PEFT ties the head that an adapter changes, or whose embedding it does: of those that it looks for.
    static bool ties_head(const nlohmann::json& config)
    {
        const auto names = [&](const char* field) {
            const auto list = config.find(field);
            if (list == config.end() || !list->is_array()) { return list != config.end() && list->is_string(); }
            return std::any_of(list->begin(), list->end(), [](const auto& one) {
                if (!one.is_string()) { return false; }
                const std::string_view name = one.template get_ref<const std::string&>();
                const auto last = name.substr(name.rfind('.') + 1);
                return last == "embed_tokens" || last == head;
            });
        };
        return flag_of(config, tying) && (names("target_modules") || names("modules_to_save"));
    }
    static bool names_head(const nlohmann::json& config)
    {
        const auto targets = config.find("target_modules");
        return targets != config.end() && targets->is_array()
            && std::find(targets->begin(), targets->end(), head) != targets->end();
    }
    /// The head's factors are the embedding's, of which PEFT and `extract-lora` write the one or both.
    static void give_head(adapter_type& adapter)
    {
        const auto embedding = tied_embedding(adapter);
        if (embedding.empty() || adapter.updates.contains(head)) { return; }
        const auto& update = adapter.updates.at(embedding);
        adapter.updates.emplace(head,
            taskvec::lora_update<T>{
                taskvec::transposed_copy(update.a), taskvec::transposed_copy(update.b), update.scaling});
        if (const auto type = adapter.stored.find(embedding); type != adapter.stored.end()) {
            adapter.stored.emplace(head, type->second);
        }
    }
    /// Adapters that tie the head to the embedding (ensure_weight_tying) have the factors of both where others have, or
    /// change the two each by itself: the result then ties nothing.
    void line_up_heads(const merge_lora_settings& given)
    {
        std::vector<adapter_type*> tied;
        const adapter_type* by_itself = nullptr;
        for (auto& adapter : adapters_) {
            if (!changes_tokens(adapter)) { continue; }
            if (ties_head(adapter.config)) { tied.push_back(&adapter); }
            else if (!by_itself) {
                by_itself = &adapter;
            }
        }
        if (tied.empty()) {
            if (by_itself) { tied_ = false; }
            return;
        }
        tied_ = !by_itself;
        const bool known = std::any_of(tied.begin(), tied.end(), [](const auto* one) {
            return one->updates.contains(head) || names_head(one->config);
        }); // that the base has one matrix for the two
        for (auto* const one : tied) {
            if (known) { give_head(*one); }
            const bool both = one->updates.contains(head) && !tied_embedding(*one).empty();
            if (both || !by_itself) { continue; }
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
                taskvec::message("'", one->label, "' ties the head to the embedding (", tying, ") and '",
                    by_itself->label,
                    "' changes them each by itself, and the first holds no factors of both: fold each into the base "
                    "(taskvec fuse), and merge the models"));
        }
        if (known && given.in_phi() && ties_head(initial_.config)) { give_head(initial_); }
        if (!by_itself) { return; }
        tool::note(given.run,
            taskvec::message("'", tied.front()->label, "' ties the head to the embedding (", tying, ") and '",
                by_itself->label, "' does not: the result ties nothing, and changes the two each by itself"));
    }
    /// The modules that some adapter has factors of.
    [[nodiscard]] std::set<std::string> adapted_modules() const
    {
        std::set<std::string> modules;
        for (const auto& adapter : adapters_) {
            for (const auto& one : adapter.updates) { modules.insert(one.first); }
        }
        return modules;
    }
    /// Biases as PEFT calls them where it adapts these modules: their layers, with the biases, lie within others.
    void call_biases(const std::set<std::string>& adapted)
    {
        constexpr std::string_view plain = ".bias";
        const auto call = [&](adapter_type& adapter) {
            std::map<std::string, taskvec::peft_tensor> called;
            for (auto& [name, tensor] : adapter.others) {
                auto other = name;
                if (name.ends_with(plain)) {
                    const auto tail = name.ends_with(taskvec::peft_base_bias) ? taskvec::peft_base_bias : plain;
                    other.resize(name.size() - tail.size());
                    other += adapted.contains(other) ? taskvec::peft_base_bias : plain;
                }
                if (!called.emplace(other, std::move(tensor)).second) {
                    taskvec::raise<taskvec::format_error>(taskvec::error_code::adapter_tensors,
                        taskvec::message("'", name, "' and '", other, "' are one bias: take one of them out"),
                        adapter.label);
                }
            }
            adapter.others = std::move(called);
        };
        for (auto& adapter : adapters_) { call(adapter); }
        call(initial_);
    }
    /// No adapter has a module both whole and as factors.
    void check_whole_or_factored() const
    {
        for (const auto& whole : adapters_) {
            for (const auto& [name, tensor] : whole.others) {
                if (!name.ends_with(".weight") || name.ends_with(taskvec::peft_base_weight)) { continue; }
                const auto module = name.substr(0, name.rfind('.'));
                if (whole.updates.contains(module)) { continue; }
                for (const auto& other : adapters_) {
                    if (!other.updates.contains(module)) { continue; }
                    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
                        taskvec::message("module '", module, "' comes whole with '", whole.label, "', and '",
                            other.label,
                            "' has factors of it, which no one adapter holds: leave what is whole out "
                            "(--modules-to-save drop), or fold each into the base (taskvec fuse) and merge the "
                            "models"));
                }
            }
        }
    }
    /// An adapter whose factors, or whole tensors, have rows of tokens.
    struct token_rows {
        adapter_type* adapter;
        tool::vocabulary_input input;
        taskvec::const_model_ref shapes; ///< of its weights, without data
        std::optional<std::int64_t> count; ///< of rows; nothing: its tensors do not agree
    };
    /// The weight that a tensor beside factors is, or is a copy of.
    static std::string weight_of(const std::string& name)
    {
        if (!name.ends_with(taskvec::peft_base_weight)) { return name; }
        return name.substr(0, name.size() - taskvec::peft_base_weight.size()) + ".weight";
    }
    /// Adapters that have something with a row for each token; each has then all that some have.
    std::vector<token_rows> adapters_with_tokens(const merge_lora_settings& given)
    {
        std::vector<token_rows> members;
        std::map<std::string, taskvec::extents> all; // what has rows of tokens
        const auto add = [&](adapter_type& adapter, const tool::fs::path& path) {
            token_rows member{&adapter, {path, tool::in_quotes(path), nullptr}, {}, {}};
            bool any = false, same = true;
            const auto insert = [&](const std::string& name, const taskvec::extents& shape) {
                if (member.shapes.find(name)) { return; }
                member.shapes.insert(name, {nullptr, taskvec::dtype::f32, shape, {}});
                if (!tool::has_rows_of_tokens(name) || shape.empty()) { return; }
                all.emplace(name, shape);
                same = same && (!any || *member.count == shape[0]);
                any = true;
                member.count = shape[0];
            };
            for (const auto& [module, update] : adapter.updates) {
                const bool embedding = adapter.embeddings.contains(module);
                insert(module + ".weight",
                    {static_cast<std::int64_t>(embedding ? update.in() : update.out()),
                        static_cast<std::int64_t>(embedding ? update.out() : update.in())});
            }
            // The first one's are taken as they are, unless rows are asked to be lined up.
            const bool as_they_are = given.modules_to_save == "first" && given.vocabulary == "error";
            for (const auto& [name, tensor] : adapter.others) {
                if (!as_they_are && tool::has_rows_of_tokens(weight_of(name))) {
                    insert(weight_of(name), tensor.shape);
                }
            }
            if (!any) { return; }
            if (!same) { member.count.reset(); }
            members.push_back(std::move(member));
        };
        if (given.in_phi()) { add(initial_, given.init); }
        for (std::size_t i = 0; i < adapters_.size(); ++i) { add(adapters_[i], arguments_[i].path); }
        for (auto& member : members) {
            for (const auto& [name, shape] : all) {
                if (member.shapes.find(name) || !member.count) { continue; }
                auto own = shape;
                own[0] = *member.count;
                member.shapes.insert(name, {nullptr, taskvec::dtype::f32, own, {}});
            }
        }
        for (auto& member : members) { member.input.model = &member.shapes; }
        return members;
    }
    /// Lines the rows of tokens up as `merge` does those of models: of the factors of embeddings and heads, and of what
    /// comes with them whole. An adapter changes nothing of tokens that it lacks.
    void line_up_vocabularies(const merge_lora_settings& given)
    {
        auto members = adapters_with_tokens(given);
        if (members.size() < 2) { return; }
        std::vector<tool::vocabulary_input> inputs;
        for (const auto& member : members) { inputs.push_back(member.input); }
        const tool::lined_up_vocabulary lined(inputs, tool::vocabulary_policy_of(given.vocabulary), {}, given.run);
        for (const auto& name : lined.tensors()) {
            std::vector<rows_of_tokens> rows;
            for (std::size_t m = 0; m < members.size(); ++m) {
                rows.push_back(members[m].shapes.find(name) ? lined.rows_in(name, m) : rows_of_tokens());
            }
            line_up_factors(members, rows, name, given.in_phi());
            std::set<std::string> whole; // the weight itself, or copies of it
            for (const auto& member : members) {
                for (const auto& other : member.adapter->others) {
                    if (weight_of(other.first) == name) { whole.insert(other.first); }
                }
            }
            for (const auto& tensor : whole) { line_up_whole(members, rows, tensor); }
        }
        lined_up_ = lined.changed();
        if (!lined_up_) { return; }
        const auto changed = lined.tokenizer_files(given.run);
        for (const auto& file : tool::tokenizer_files_in(inputs.front().path)) {
            const auto name = file.filename().string();
            const auto place = changed.find(name);
            if (place == changed.end()) { tokenizer_[name] = tool::read_watched(file, std::size_t{4} << 30); }
            else if (place->second) {
                tokenizer_[name] = *place->second;
            }
        }
    }
    /// Which row of an adapter each row of the result is.
    using rows_of_tokens = std::vector<std::optional<std::uint64_t>>;

    /// The factor that has a row, or a column, for each token.
    static void line_up_factors(
        std::vector<token_rows>& members, const std::vector<rows_of_tokens>& rows, const std::string& name, bool in_phi)
    {
        const auto module = name.substr(0, name.rfind('.'));
        std::vector<taskvec::matrix<T>> before(members.size()); // tokens×rank
        for (std::size_t m = 0; m < members.size(); ++m) {
            const auto place = members[m].adapter->updates.find(module);
            if (place == members[m].adapter->updates.end() || name != module + ".weight") { continue; }
            const bool embedding = members[m].adapter->embeddings.contains(module);
            before[m] = embedding ? taskvec::transposed_copy(place->second.a) : place->second.b;
        }
        for (std::size_t m = 0; m < members.size(); ++m) {
            if (before[m].empty()) { continue; }
            const std::size_t rank = before[m].cols();
            taskvec::matrix<T> after(rows[m].size(), rank, taskvec::matrix_order::row_major); // zeros
            for (std::size_t i = 0; i < rows[m].size(); ++i) {
                // In phi space a row that is lacking is the initialisation's.
                const auto sources = sources_of(rows, m, i,
                    [&](std::size_t other) { return other == m || (in_phi && before[other].cols() == rank); });
                for (const auto& one : sources) {
                    const T* const row = &before[one.adapter](static_cast<std::size_t>(one.row), 0);
                    for (std::size_t k = 0; k < rank; ++k) {
                        after(i, k) = sources.size() == 1 ? row[k] : after(i, k) + static_cast<T>(one.share) * row[k];
                    }
                }
            }
            auto& update = members[m].adapter->updates.at(module);
            if (members[m].adapter->embeddings.contains(module)) { update.a = taskvec::transposed_copy(after); }
            else {
                update.b = std::move(after);
            }
        }
    }
    struct row_source {
        std::size_t adapter;
        std::uint64_t row;
        double share;
    };
    /// What stands for row i of the result in adapter m: its own row; where it has none the first one's, or, where that
    /// has none, the mean of those that have it.
    template <class May>
    static std::vector<row_source> sources_of(
        const std::vector<rows_of_tokens>& rows, std::size_t m, std::size_t i, const May& may)
    {
        const auto has = [&](std::size_t other) { return may(other) && i < rows[other].size() && rows[other][i]; };
        for (const auto one : {m, std::size_t{0}}) {
            if (has(one)) { return {{one, *rows[one][i], 1}}; }
        }
        std::vector<row_source> sources;
        for (std::size_t other = 1; other < rows.size(); ++other) {
            if (has(other)) { sources.push_back({other, *rows[other][i], 1}); }
        }
        for (auto& one : sources) { one.share /= static_cast<double>(sources.size()); }
        return sources;
    }
    /// A tensor that some adapters carry whole.
    static void line_up_whole(
        std::vector<token_rows>& members, const std::vector<rows_of_tokens>& rows, const std::string& name)
    {
        std::vector<const taskvec::peft_tensor*> before(members.size(), nullptr);
        std::vector<taskvec::peft_tensor> after(members.size());
        for (std::size_t m = 0; m < members.size(); ++m) {
            const auto place = members[m].adapter->others.find(name);
            if (place != members[m].adapter->others.end()) { before[m] = &place->second; }
        }
        for (std::size_t m = 0; m < members.size(); ++m) {
            if (!before[m]) { continue; }
            after[m] = {before[m]->dtype, before[m]->shape, {}};
            after[m].shape[0] = static_cast<std::int64_t>(rows[m].size());
            const std::size_t columns = taskvec::element_count(before[m]->shape)
                / static_cast<std::size_t>(std::max<std::int64_t>(before[m]->shape[0], 1));
            taskvec::visit_storage(before[m]->dtype, name, [&]<class S>(std::type_identity<S>) {
                after[m].bytes.resize(rows[m].size() * columns * sizeof(S));
                for (std::size_t i = 0; i < rows[m].size(); ++i) {
                    const auto sources =
                        sources_of(rows, m, i, [&](std::size_t other) { return before[other] != nullptr; });
                    if (sources.empty()) { refuse_lacking_rows(name, i, members[m].adapter->label); }
                    const auto& from = *before[sources[0].adapter];
                    if (sources.size() == 1 && from.dtype == before[m]->dtype) {
                        std::memcpy(after[m].bytes.data() + i * columns * sizeof(S),
                            from.bytes.data() + static_cast<std::size_t>(sources[0].row) * columns * sizeof(S),
                            columns * sizeof(S));
                        continue;
                    }
                    std::vector<double> sum(columns);
                    for (const auto& one : sources) {
                        add_row(*before[one.adapter], name, one.row * columns, one.share, sum);
                    }
                    for (std::size_t k = 0; k < columns; ++k) {
                        const S value = taskvec::narrow<S>(static_cast<taskvec::arithmetic_type<S>>(sum[k]));
                        std::memcpy(after[m].bytes.data() + (i * columns + k) * sizeof(S), &value, sizeof(S));
                    }
                }
            });
        }
        for (std::size_t m = 0; m < members.size(); ++m) {
            if (before[m]) { members[m].adapter->others.at(name) = std::move(after[m]); }
        }
    }
    static void add_row(const taskvec::peft_tensor& from, const std::string& name, std::uint64_t first, double share,
        std::vector<double>& sum)
    {
        taskvec::visit_storage(from.dtype, name, [&]<class S>(std::type_identity<S>) {
            for (std::size_t k = 0; k < sum.size(); ++k) {
                S value;
                std::memcpy(&value, from.bytes.data() + (static_cast<std::size_t>(first) + k) * sizeof(S), sizeof(S));
                sum[k] += share * static_cast<double>(taskvec::widen<taskvec::arithmetic_type<S>>(value));
            }
        });
    }
    [[noreturn]] static void refuse_lacking_rows(const std::string& name, std::size_t row, const std::string& label)
    {
        taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::adapter_shape,
            taskvec::message("tensor '", name, "' of '", label, "' has no row for token ", row,
                " of the result, nor has another adapter's: use another rule (--vocabulary base or truncate), or leave "
                "whole tensors out (--modules-to-save drop)"));
    }
    static void check_together(const adapter_type& first, const adapter_type& other, bool any_base)
    {
        const auto fail = [&](const auto&... parts) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapters_differ,
                taskvec::message("'", first.label, "' and '", other.label, "' ", parts...));
        };
        const auto base = text_of(first.config, base_name), its_base = text_of(other.config, base_name);
        if (!any_base && !base.empty() && !its_base.empty() && base != its_base) {
            fail("are adapters of different bases, '", base, "' and '", its_base,
                "': where these are one model under two names, say so by --any-base");
        }
        if (flag_of(first.config, "fan_in_fan_out") != flag_of(other.config, "fan_in_fan_out")) {
            fail("disagree about fan_in_fan_out: they are adapters of different bases");
        }
        for (const auto& [name, update] : first.updates) {
            if (other.updates.contains(name) && first.embeddings.contains(name) != other.embeddings.contains(name)) {
                fail("disagree whether module '", name, "' is an embedding: they are adapters of different bases");
            }
        }
        check_others(first, other, fail);
        check_others(other, first, fail);
    }
    /// Makes what adapters carry whole one and the same in all of them: the mean by weight of those that have it, or
    /// what the first of them has.
    void join_whole_modules(bool mean, const merge_lora_settings& given)
    {
        std::map<std::string, std::vector<std::size_t>> carried; // by whom
        std::set<std::string> listed;
        for (std::size_t i = 0; i < adapters_.size(); ++i) {
            for (const auto& [name, tensor] : adapters_[i].others) {
                if (!name.ends_with(taskvec::peft_base_weight)) { carried[name].push_back(i); }
            }
            const auto list = adapters_[i].config.find("modules_to_save");
            if (list == adapters_[i].config.end() || !list->is_array()) { continue; }
            for (const auto& module : *list) {
                if (module.is_string()) { listed.insert(module.template get<std::string>()); }
            }
        }
        for (const auto& [name, owners] : carried) {
            auto joined = adapters_[owners[0]].others.at(name);
            if (mean && owners.size() > 1) { joined = mean_of(name, owners, given); }
            for (auto& adapter : adapters_) { adapter.others[name] = joined; }
            initial_.others[name] = joined; // of which nothing is merged
        }
        for (auto& adapter : adapters_) {
            if (!listed.empty()) { adapter.config["modules_to_save"] = listed; }
        }
    }
    [[nodiscard]] taskvec::peft_tensor mean_of(
        const std::string& name, const std::vector<std::size_t>& owners, const merge_lora_settings& given) const
    {
        auto joined = adapters_[owners[0]].others.at(name);
        const auto& label = adapters_[owners[0]].label;
        double total = 0;
        std::vector<double> sum(taskvec::element_count(joined.shape));
        for (const auto i : owners) {
            const auto& tensor = adapters_[i].others.at(name);
            if (tensor.shape != joined.shape) {
                taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::tensor_shape,
                    taskvec::message("tensor '", name, "' has shape ", taskvec::to_string(tensor.shape), " in '",
                        adapters_[i].label, "' but ", taskvec::to_string(joined.shape), " in '", label,
                        "': they have no mean; take one of them (--modules-to-save first), or none (drop)"));
            }
            total += weights_[i];
            taskvec::visit_storage(tensor.dtype, name, [&]<class S>(std::type_identity<S>) {
                for (std::size_t k = 0; k < sum.size(); ++k) {
                    S value;
                    std::memcpy(&value, tensor.bytes.data() + k * sizeof(S), sizeof(S));
                    sum[k] += weights_[i] * static_cast<double>(taskvec::widen<taskvec::arithmetic_type<S>>(value));
                }
            });
        }
        if (total == 0) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::weights_sum_zero,
                taskvec::message("the weights of the adapters that carry '", name,
                    "' sum to 0, and nothing can be divided by that: take one of them (--modules-to-save first)"));
        }
        taskvec::visit_storage(joined.dtype, name, [&]<class S>(std::type_identity<S>) {
            for (std::size_t k = 0; k < sum.size(); ++k) {
                const auto mean = static_cast<taskvec::arithmetic_type<S>>(sum[k] / total);
                std::uint64_t saturated = 0;
                const S value = taskvec::narrow_within<S>(mean, tool::overflow_of(given.overflow), saturated, [&] {
                    taskvec::raise<taskvec::nonfinite_error>(taskvec::error_code::result_overflow,
                        taskvec::message("the mean of tensor '", name, "' would be ", sum[k] / total, " at index ", k,
                            ", which ", taskvec::to_string(joined.dtype),
                            " cannot hold; take one of the adapters' (--modules-to-save first), or let it saturate "
                            "or propagate (--overflow)"));
                });
                std::memcpy(joined.bytes.data() + k * sizeof(S), &value, sizeof(S));
            }
        });
        return joined;
    }
    /// What `first` carries beside its factors `other` carries too, but for the base weight of a module that it does
    /// not adapt.
    template <class Fail>
    static void check_others(const adapter_type& first, const adapter_type& other, const Fail& fail)
    {
        for (const auto& [name, tensor] : first.others) {
            const bool copy = name.ends_with(taskvec::peft_base_weight);
            const auto place = other.others.find(name);
            if (place == other.others.end() ? copy : place->second == tensor) { continue; }
            if (copy) { fail("carry different base weights '", name, "': they are adapters of different bases"); }
            fail("carry different tensors beside their factors ('", name,
                "' among them), which no merge of low-rank updates joins: choose what becomes of them "
                "(--modules-to-save "
                "average, first or drop), or remove them");
        }
    }
    void check_shapes() const
    {
        std::map<std::string, const adapter_type*> seen;
        for (const auto& adapter : adapters_) {
            for (const auto& [name, update] : adapter.updates) {
                const auto [place, fresh] = seen.emplace(name, &adapter);
                const auto& earlier = place->second->updates.at(name);
                if (!fresh && (earlier.out() != update.out() || earlier.in() != update.in())) {
                    taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::adapter_shape,
                        taskvec::message("module '", name, "' is ", update.out(), "×", update.in(), " in '",
                            adapter.label, "' but ", earlier.out(), "×", earlier.in(), " in '", place->second->label,
                            "': they are adapters of different bases"));
                }
            }
        }
    }

    const std::vector<tool::task_argument>& arguments_;
    std::vector<adapter_type> adapters_;
    std::vector<taskvec::lora_adapter<T>> updates_;
    std::vector<double> weights_;
    adapter_type initial_;
    std::map<std::string, std::string> tokenizer_;
    bool lined_up_ = false;
    std::optional<bool> tied_; ///< what the result says of the head and the embedding, where they are changed
    std::uint64_t bytes_ = 0;
};

/// A merge that keeps every layer's rank: layers without errors to report.
template <class T>
nlohmann::ordered_json ranks_of(const taskvec::lora_adapter<T>& adapter)
{
    auto list = nlohmann::ordered_json::array();
    for (const auto& [name, update] : adapter) {
        list.push_back({{"name", name}, {"shape", {update.out(), update.in()}}, {"rank_before", update.rank()},
            {"rank", update.rank()}});
    }
    return list;
}

template <class T>
taskvec::lora_adapter<T> merge_phi(const taskvec::cpu& policy, const merge_lora_settings& given, const inputs<T>& from)
{
    taskvec::model_options how;
    how.base_label = "the initialisation '" + given.init + "'";
    how.labels = from.labels();
    const auto merged = [&](const auto& options) {
        return taskvec::merge_in_phi_space<T>(policy, options, from.initial(), from.updates(), how);
    };
    if (given.method == "ties") { return merged(given.ties(from.weights())); }
    if (given.method == "average") { return merged(taskvec::average_options{from.weights()}); }
    return merged(taskvec::task_arithmetic_options{.lambda = given.lambda(), .weights = from.weights()});
}

template <class T>
void merge_as(const merge_lora_settings& given, const std::vector<tool::task_argument>& arguments)
{
    const inputs<T> from(given, arguments);
    const tool::runner run(given.run);
    std::vector<std::string> read;
    if (given.in_phi()) { read.push_back(given.init); }
    for (const auto& argument : arguments) { read.push_back(argument.path.string()); }
    auto report = tool::open_report(given, read);
    auto adapter = from.joined();
    nlohmann::ordered_json content{{"method", given.method}, {"space", given.space}};
    for (const auto& argument : arguments) {
        content["adapters"].push_back({{"path", argument.path.string()}, {"weight", argument.weight}});
    }
    std::string summary =
        tool::counted(arguments.size(), "adapter") + " by " + given.method + (given.in_phi() ? " in phi space" : "");

    if (given.vocabulary != "error") { content["vocabulary"] = given.vocabulary; }
    const auto combination = given.combination();
    using way = tool::decompose::way;
    const tool::decompose decompose{given.run.dry_run ? way::not_at_all
            : given.randomized                        ? way::randomized
                                                      : way::exactly,
        given.seed};
    if (combination) {
        auto result = taskvec::merge_as_peft<T>(run.policy(), from.updates(),
            {.combination = *combination,
                .weights = from.weights(),
                .lambda = given.lambda(),
                .density = taskvec::prunes(*combination) ? given.ties({}).density : 1,
                .by_frequency = given.majority_sign == "frequency",
                .rank = given.rank.rank.value_or(0),
                .seed = given.seed},
            decompose);
        adapter.updates = std::move(result.adapter);
        content["semantics"] = "peft";
        summary += " as PEFT, " + tool::counted(adapter.updates.size(), "layer");
        if (taskvec::merges_updates(*combination) && arguments.size() > 1) {
            tool::add_result(content, result);
            summary += given.rank.given() ? " at " + given.rank.words(result.layers) : " at the highest rank";
            if (!given.run.dry_run) { summary += ", relative error " + tool::percent(result.relative_error()); }
        }
        else {
            content["layers"] = ranks_of(adapter.updates);
            summary += *combination == taskvec::peft_combination::cat && arguments.size() > 1
                ? " at the sum of the ranks, exact"
                : ", ranks unchanged";
        }
    }
    else if (given.in_phi() || given.method == "average-factors") {
        adapter.updates = given.in_phi() ? merge_phi(run.policy(), given, from)
                                         : taskvec::average_factors_separately<T>(from.updates(), from.weights());
        content["layers"] = ranks_of(adapter.updates);
        if (given.in_phi()) { content["init"] = given.init; }
        summary += ", " + tool::counted(adapter.updates.size(), "layer") + ", ranks unchanged";
    }
    else {
        taskvec::adapter_result<T> result;
        if (given.method == "linear") {
            result = taskvec::merge_linear<T>(run.policy(), from.updates(),
                {.weights = from.weights(),
                    .lambda = given.lambda(),
                    .rank = given.rank.given() ? given.rank.choice() : taskvec::rank_choice::full()});
        }
        else {
            result = taskvec::merge_ties<T>(run.policy(), from.updates(),
                {.ties = given.ties(from.weights()), .rank = given.rank.choice()}, decompose);
        }
        adapter.updates = std::move(result.adapter);
        tool::add_result(content, result);
        summary += ", " + tool::counted(adapter.updates.size(), "layer")
            + (given.rank.given() ? " at " + given.rank.words(result.layers) : " at the sum of the ranks, exact");
        if (given.rank.given() && !(given.run.dry_run && given.method == "ties")) {
            summary += ", relative error " + tool::percent(result.relative_error());
        }
    }
    if (given.run.dry_run) {
        tool::print("would merge " + summary + " into '" + tool::printable(given.out) + "'\n");
        return;
    }
    std::vector<std::string> without; // a tokenizer of other rows
    for (const auto& file : from.lined_up() ? tool::tokenizer_files_in(given.out) : std::vector<tool::fs::path>()) {
        without.push_back(file.filename().string());
    }
    tool::write_adapter(given, run, report, adapter, std::move(content), from.bytes(),
        "merged " + summary + " into '" + tool::printable(given.out) + "'", {}, from.tokenizer(), without);
}

/// The methods that have options of their own. Ranks are the verb's, weights come with the adapters.
std::vector<tool::described> method_tables()
{
    std::vector<tool::described> tables{{"linear", taskvec::describe_options<taskvec::linear_merge_options>()},
        {"ties", taskvec::describe_options<taskvec::adapter_ties_options>()}};
    for (auto& table : tables) {
        std::erase_if(table.options, [](const taskvec::option_description& option) {
            return option.per_task || option.name == "rank" || option.name == "energy" || option.name == "clamp"
                || option.name == "sigma";
        });
    }
    return tables;
}

/// What does not go together with PEFT's combination types, and what they need.
void check_combination(const merge_lora_settings& given)
{
    const auto combination = given.combination();
    const bool of_peft = std::any_of(taskvec::enum_words<taskvec::peft_combination>::words.begin(),
                             taskvec::enum_words<taskvec::peft_combination>::words.end(),
                             [&](const auto& word) { return word.word == given.method; })
        && given.method != "linear" && given.method != "ties";
    if (of_peft && !combination) {
        throw tool::usage_error("--method " + given.method + " is a combination type of PEFT"
            + (given.in_phi() ? ", which has no --space phi" : ": say so by --semantics peft"));
    }
    if (given.majority_sign != "total" && !(combination && taskvec::elects_signs(*combination))) {
        throw tool::usage_error(
            "--majority-sign is of PEFT's ties and dare-ties: give --semantics peft, and no --rank with "
            "--method ties (--method ties-svd takes one)");
    }
    if (!combination) { return; }
    if (given.rank.energy || given.rank.clamp) {
        throw tool::usage_error("--energy and --clamp have no meaning with --semantics peft, which knows ranks alone");
    }
    if (given.rank.rank && !taskvec::merges_updates(*combination)) {
        throw tool::usage_error("--rank has no meaning with --method " + given.method
            + " of PEFT, which keeps the ranks; --method " + (given.method == "cat" ? "" : given.method + "-")
            + "svd takes one");
    }
    if (given.rank.rank && *given.rank.rank == 0) { throw tool::usage_error("--rank is 0; expected at least 1"); }
    if (taskvec::prunes(*combination) && !given.option("density")) {
        throw tool::usage_error("--method " + given.method + " of PEFT needs --density, the share of entries kept");
    }
}

void run_merge_lora(const merge_lora_settings& given)
{
    tool::check_cpu(given.run);
    if (given.in_phi() == given.init.empty()) {
        throw tool::usage_error(given.in_phi()
                ? "--space phi needs --init DIR, the initialisation that the adapters share"
                : "--init has no meaning without --space phi");
    }
    if (given.in_phi() && given.method == "average-factors") {
        throw tool::usage_error("--method average-factors has no --space phi; --method average has");
    }
    if (!given.in_phi() && given.method == "average") {
        throw tool::usage_error("--method average needs --space phi; the mean of the updates is --method linear with "
                                "weights that sum to 1, and the mean of A "
                                "and of B, each by itself, is --method average-factors");
    }
    check_combination(given);
    const auto combination = given.combination();
    const bool keeps_ranks = given.in_phi() || given.method == "average-factors";
    if (keeps_ranks && given.rank.given()) {
        throw tool::usage_error("--rank and --energy have no meaning where the factors themselves are merged: the "
                                "ranks stay; truncate the result by peru-lora");
    }
    if (!keeps_ranks && !combination && given.method == "ties") { (void)given.rank.choice(); }
    tool::check_usage([&] {
        taskvec::adapter_ties_options all; // has every row that a method has
        tool::apply_options(all, given.options);
    });
    const auto tables = method_tables();
    const auto table = std::find_if(
        tables.begin(), tables.end(), [&](const tool::described& one) { return one.name == given.method; });
    for (const auto& value : given.options) {
        if (given.semantics_of_peft() && !given.in_phi() && value.name == "semantics"
            && (combination || given.method == "linear")) {
            continue;
        }
        if (combination) {
            if (value.name != "lambda" && !(value.name == "density" && taskvec::prunes(*combination))) {
                tool::note(given.run, value.flag + " has no effect on --method " + given.method + " of PEFT");
            }
            continue;
        }
        if (table == tables.end()
            || std::none_of(table->options.begin(), table->options.end(),
                [&](const auto& option) { return option.name == value.name; })) {
            tool::note(given.run, value.flag + " has no effect on --method " + given.method);
        }
    }

    std::vector<tool::task_argument> arguments;
    bool wide = given.in_phi() && tool::adapter_is_wide(given.init);
    for (const auto& text : given.adapters) {
        arguments.push_back(tool::parse_task(text, "--adapter"));
        wide = wide || tool::adapter_is_wide(arguments.back().path);
    }
    tool::note_zero_weights(given.run, arguments, "adapter");
    tool::note_zero_lambda(given.run, given.options);
    tool::in_precision(wide, [&]<class T>(std::type_identity<T>) { merge_as<T>(given, arguments); });
}

const tool::register_verb merge_lora_verb(80, "merge-lora",
    "Merge LoRA adapters, of different ranks and targets too, into one adapter", [](tool::command& verb) {
        const auto given = std::make_shared<merge_lora_settings>();
        verb.word("--method", given->method,
            {"linear", "ties", "average", "average-factors", "cat", "svd", "ties-svd", "dare-linear", "dare-linear-svd",
                "dare-ties", "dare-ties-svd", "magnitude-prune", "magnitude-prune-svd"},
            "METHOD", "How to merge; see below (default: linear)");
        verb.texts("--adapter", given->adapters, "DIR[=W]",
            "An adapter, with its weight (default 1); repeat, order counts", tool::presence::required);
        verb.text(
            "--out", given->out, "DIR", "Where the merged adapter goes, a PEFT directory", tool::presence::required);
        verb.word("--space", given->space, {"product", "phi"}, "SPACE",
            "product or phi: merge the updates, or the adapters' own parameters around the initialisation that they "
            "share (default: product)");
        verb.text("--init", given->init, "DIR", "The initialisation of --space phi, a PEFT directory");
        tool::add_rank_options(verb, given->rank);
        tool::add_described_options(verb, {}, method_tables(), given->options);
        verb.word("--majority-sign", given->majority_sign, {"total", "frequency"}, "HOW",
            "total or frequency: PEFT's ties and dare-ties elect the sign of the sum, or of most entries (default: "
            "total)");
        verb.flag("--randomized", given->randomized,
            "ties, and PEFT's types with svd: randomized SVD of the merged layers, nearly the best; with --energy a "
            "hundred times faster for large ones");
        verb.count("--seed", given->seed, "N", "Of --randomized, and of PEFT's DARE (default: 0)");
        verb.flag("--any-base", given->any_base, "Merge although the adapters name different base models");
        verb.flag("--match-prefixes", given->match_prefixes,
            "Line modules up where their names differ by what stands before them (model., _orig_mod., …)");
        verb.flag("--disjoint", given->disjoint,
            "Merge adapters that share no module, being of different parts of a model: the result has the modules of "
            "all");
        tool::add_modules_to_save(verb, *given);
        tool::add_vocabulary_option(verb, given->vocabulary);
        tool::add_adapter_options(verb, *given, "the adapters'");
        verb.footer("Methods:\n"
                    "  linear           sum of weight times update; exact, of the sum of the ranks, unless --rank "
                    "or --energy compress it.\n"
                    "                   Negative weights subtract. In phi space: the initialisation plus lambda "
                    "times the sum of weight times change\n"
                    "  ties             trim to the top --density (0.2), elect signs, merge what agrees. Needs "
                    "--rank or --energy, but in phi space\n"
                    "  average          in phi space only: the weighted mean of the parameters\n"
                    "  average-factors  the weighted mean of A and of B, each by itself. Not the mean of the "
                    "updates: it has cross terms\n"
                    "With --semantics peft, the combination types of PEFT's add_weighted_adapter:\n"
                    "  linear, ties, dare-linear, dare-ties, magnitude-prune\n"
                    "                   of the factors, A and B each by itself; adapters of one rank, which stays\n"
                    "  cat              the exact sum, of the sum of the ranks\n"
                    "  svd, and the others with -svd\n"
                    "                   of the updates, at --rank (default: the highest of the adapters)\n"
                    "  All but linear, cat and svd need --density. linear and ties with --rank are svd and ties-svd\n"
                    "\nExample:\n  taskvec merge-lora --method linear --adapter math-lora=0.5 --adapter "
                    "code-lora=0.5 --rank 16 --out both-lora\n"
                    "  taskvec merge-lora --space phi --init llora-init --adapter math-llora --adapter code-llora "
                    "--lambda 0.5 --out both-llora");
        verb.action([given] { run_merge_lora(*given); });
    });

} // namespace
