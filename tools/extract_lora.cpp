// taskvec extract-lora: what fine-tuning changed in the weight matrices, as a LoRA adapter.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_sums.hpp"
#include "adapters.hpp"
#include "architectures.hpp"
#include "decompose.hpp"

#include <taskvec/adapters/extract.hpp>
#include <taskvec/formats/delta.hpp>
#include <taskvec/formats/fingerprint.hpp>
#include <taskvec/formats/json.hpp>
#include <taskvec/models/aligned_models.hpp>
#include <taskvec/reuse/post_pruning.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

struct extract_lora_settings : tool::adapter_settings {
    std::string base, task, adapter; ///< the fine-tuned model: stored, or an adapter on the base
    tool::rank_settings rank;
    bool randomized = false, fan_in_fan_out = false, sparse_rest = false;
    std::uint64_t seed = 0;
    std::vector<std::string> include, exclude, embedding;
    std::string index = "strict";
    tool::name_rules names;
    bool match_prefixes = false;
    tool::resume_request resume;
};

/// Modules that common architectures implement by an embedding: PEFT factors those transposed, under other names.
constexpr const char* known_embeddings =
    "(^|\\.)(([a-z0-9]+_)*(tok|token|word|position|pos|token_type|segment|entity|lang|language|relative_position|"
    "distance|time_position|speaker|tag_sub|subs)s?_emb(ed(ding)?)?s?(_[0-9]+)?(\\.[0-9]+)?|"
    "embed_(tokens|tokens_per_layer|positions|in)|rel_attn_embed|input_embedding|pe_k|HashBucketCodepointEmbedder_[0-9]"
    "+|"
    "embeddings?|emb|shared|wte|wpe|relative_attention_bias)$";

/// Whether a module's name speaks of an embedding, in words that are not known. Some such are linear layers.
bool may_be_embedding(std::string_view module)
{
    return module.substr(module.rfind('.') + 1).find("embed") != module.npos;
}

template <class Names>
std::vector<std::string> list_of(const Names& entries)
{
    std::vector<std::string> names;
    for (const auto& [name, value] : entries) { names.push_back(name); }
    return names;
}

/// What the two models differ by, for messages.
std::string label_of_task(const extract_lora_settings& given)
{
    return given.adapter.empty() ? tool::in_quotes(given.task)
                                 : tool::in_quotes(given.adapter) + " on " + tool::in_quotes(given.base);
}

/// What PEFT finds the modules of a base by.
struct module_names {
    tool::tied_matrix tie;
    std::vector<std::string> copies; ///< what is the embedding in a model that is loaded, in place of its own name
    nlohmann::json config;
    bool renamed = false; ///< modules are called as transformers 5 calls them
    [[nodiscard]] std::string of(const std::string& module) const
    {
        return renamed ? tool::name_in_transformers_5(config, module) : module;
    }
};

/// The version of transformers that the adapter is for: that of the installation which wrote the fine-tuned model.
std::optional<int> version_of_library(const extract_lora_settings& given)
{
    const auto version =
        given.task.empty() ? std::nullopt : tool::transformers_version(tool::config_beside(given.task));
    return version ? version : tool::transformers_version(tool::config_beside(given.base));
}

module_names names_of_modules(const extract_lora_settings& given, const taskvec::checkpoint& base)
{
    module_names names;
    names.config = tool::config_beside(given.base);
    names.tie = tool::tied_matrix_of(names.config, base.model());
    const auto version = version_of_library(given);
    if (version.value_or(5) >= 5) { names.copies = names.tie.copies; }
    std::string example;
    for (const auto& [name, tensor] : base.model()) {
        if (!name.ends_with(".weight")) { continue; }
        const auto module = name.substr(0, name.size() - std::string_view(".weight").size());
        const auto other = tool::name_in_transformers_5(names.config, module);
        if (other != module && example.empty()) { example = "'" + other + "' for '" + module + "'"; }
    }
    if (example.empty()) { return names; }
    names.renamed = version.value_or(4) >= 5;
    tool::note(given.run,
        names.renamed ? "modules have the names of transformers 5, which wrote the configuration: " + example
                      : "modules have the names of the files of '" + given.base + "'; transformers 5 has others, "
                + example + ", in which PEFT finds them by --rename after --base and --task");
    return names;
}

/// The expert that a module is of: "PREFIX.experts", its number and the rest of the name. Nothing for other modules.
struct expert_name {
    std::string all, number, rest;
};
std::optional<expert_name> expert_of(std::string_view module)
{
    constexpr std::string_view word = ".experts.";
    const auto at = module.find(word);
    if (at == module.npos) { return std::nullopt; }
    const auto first = at + word.size(), end = module.find('.', first);
    const auto number = module.substr(first, end == module.npos ? end : end - first);
    if (end == module.npos || number.empty() || number.find_first_not_of("0123456789") != number.npos) {
        return std::nullopt;
    }
    return expert_name{
        std::string(module.substr(0, first - 1)), std::string(number), std::string(module.substr(end + 1))};
}

/// What keeps PEFT from joining the factors of experts; "" where it does.
template <class T>
std::string hindrance_of_experts(const taskvec::lora_adapter<T>& adapter, const taskvec::const_model_ref& base)
{
    std::map<std::string, std::set<std::string>> numbers; // in the base
    for (const auto& [name, tensor] : base) {
        if (const auto expert = expert_of(name)) { numbers[expert->all].insert(expert->number); }
    }
    std::map<std::string, std::map<std::string, std::set<std::string>>> adapted; // numbers, by layer and kind
    std::set<std::string> kinds;
    std::set<std::size_t> ranks;
    std::size_t highest = 0;
    for (const auto& [module, update] : adapter) {
        highest = std::max(highest, update.rank());
        const auto expert = expert_of(module);
        if (!expert) { continue; }
        adapted[expert->all][expert->rest].insert(expert->number);
        kinds.insert(expert->rest);
        ranks.insert(update.rank());
    }
    for (const auto& [layer, of_kinds] : adapted) {
        for (const auto& [first, second] : {std::pair{"gate_proj", "up_proj"}, std::pair{"w1", "w3"}}) {
            if (of_kinds.contains(first) == of_kinds.contains(second)) { continue; }
            return std::string("only where '") + first + "' and '" + second + "' are adapted together";
        }
        for (const auto& [kind, of_numbers] : of_kinds) {
            if (of_numbers != numbers[layer]) { return "only where all experts of '" + layer + "' are adapted"; }
        }
    }
    if (ranks != std::set{highest}) {
        return "only where all are of the adapter's highest rank (--rank, not --energy)";
    }
    for (const auto& [module, update] : adapter) {
        if (expert_of(module) || !kinds.contains(module.substr(module.rfind('.') + 1))) { continue; }
        return "loses the factors of '" + module + "', a layer of the same name outside the experts";
    }
    return "";
}

/// What a user should know of experts among the modules of an adapter; "" where there are none.
template <class T>
std::string words_of_experts(
    const taskvec::lora_adapter<T>& adapter, const taskvec::const_model_ref& base, const nlohmann::json& config)
{
    const auto expert =
        std::find_if(adapter.begin(), adapter.end(), [](const auto& one) { return expert_of(one.first).has_value(); });
    if (expert == adapter.end()) { return ""; }
    const auto what = "'" + expert->first + "' is one of the experts that transformers 5 keeps as one parameter";
    const std::string fold = "fold the adapter by 'taskvec fuse'",
                      leave_out = ", or leave experts out by --exclude '\\.experts\\.'";
    if (!tool::peft_joins_experts(config)) { return what + ", where PEFT does not find it: " + fold + leave_out; }
    const auto but = hindrance_of_experts(adapter, base);
    return but.empty()
        ? what + ": PEFT 0.21 joins their factors as it loads the adapter; for an older one " + fold
        : what + ": PEFT 0.21 joins their factors as it loads an adapter, but " + but + ": " + fold + leave_out;
}

/// A tensor of a model, stored or worked out, as an adapter carries it.
taskvec::peft_tensor whole_tensor(const taskvec::cpu& policy, const taskvec::const_tensor_ref& tensor)
{
    taskvec::peft_tensor made{tensor.source ? tensor.source->type() : tensor.dtype, tensor.shape, {}};
    const auto count = taskvec::element_count(made.shape);
    made.bytes.resize(taskvec::byte_count(made.dtype, count));
    if (tensor.source) {
        std::vector<double> aligned(made.bytes.size() / sizeof(double) + 1);
        tensor.source->prepare(policy);
        tensor.source->read(0, count, aligned.data());
        tensor.source->release();
        std::memcpy(made.bytes.data(), aligned.data(), made.bytes.size());
    }
    else if (!made.bytes.empty()) {
        std::memcpy(made.bytes.data(), tensor.data, made.bytes.size());
    }
    return made;
}

/// What adapter_config.json is to say of the model: as the options do, then as an adapter that is the task does.
tool::peft_words words_of(const extract_lora_settings& given)
{
    auto words = given.words;
    std::error_code ignored;
    if (words.base_name.empty() && tool::fs::is_directory(given.base, ignored)) { words.base_name = given.base; }
    if (given.adapter.empty()) { return words; }
    const auto file = tool::parse_task(given.adapter, "--task-adapter").path / taskvec::peft_config_name;
    if (!tool::fs::is_regular_file(file, ignored)) { return words; }
    const auto config = taskvec::parse_json(taskvec::read_text_file(file), file.string());
    if (words.base_name.empty()) { words.base_name = taskvec::text_under(config, "base_model_name_or_path"); }
    if (words.task_type.empty()) { words.task_type = taskvec::text_under(config, "task_type"); }
    return words;
}

/// How the layers of two models are decomposed, and what earlier runs left of that (--resume).
struct decomposition_work {
    std::optional<tool::resumed_work> work{};
    std::optional<tool::kept_layers> layers{};
    tool::decompose how{};

    explicit decomposition_work(const extract_lora_settings& given)
    {
        if (!given.resume.directory.empty() && !given.run.dry_run) {
            std::vector<tool::fs::path> inputs{given.base};
            inputs.push_back(given.adapter.empty() ? tool::fs::path(given.task)
                                                   : tool::parse_task(given.adapter, "--task-adapter").path);
            work.emplace(given.resume, inputs);
            layers.emplace(work->path());
        }
        using way = tool::decompose::way;
        how = {given.run.dry_run   ? way::not_at_all
                : given.randomized ? way::randomized
                                   : way::exactly,
            given.seed, layers ? &*layers : nullptr};
    }
    void say_found(const tool::run_options& run) const
    {
        if (!layers || layers->found() == 0) { return; }
        tool::note(run,
            tool::counted(layers->found(), "layer") + " of " + tool::in_quotes(work->path())
                + " were finished by an earlier run");
    }
    void remove()
    {
        if (work) { work->remove(); }
    }
};

/// What fine-tuning changed, decomposed, and the adapter that it makes.
template <class T>
class extraction {
public:
    extraction(const extract_lora_settings& given, const taskvec::checkpoint& base,
        const taskvec::const_model_ref& tuned, const taskvec::cpu& policy, const tool::decompose& how)
        : given_(given)
        , base_(base)
        , tuned_(tuned)
        , policy_(policy)
        , words_(words_of(given))
        , heads_(tool::heads_of_task(words_.task_type))
        , chosen_(tool::name_filter(given.include, given.exclude))
        , config_(tool::config_beside(given.base))
        , bare_routers_(version_of_library(given).value_or(4) >= 5)
        , is_own_embedding_(tool::name_matcher(given.embedding, "--embedding"))
        , found_(taskvec::extract_lora<T>(policy, base.model(), tuned, options(), how))
    {
        refuse_nothing();
        others_.insert(found_.left_out.begin(), found_.left_out.end());
        if (!given.sparse_rest) { return; }
        taskvec::model_options left_out;
        left_out.include = [this](std::string_view name) { return others_.contains(name); };
        left_out.base_label = tool::in_quotes(given.base);
        left_out.labels = {label_of_task(given)};
        rest_.emplace(&base.model(), std::span(&tuned, 1), left_out);
        for (const auto& tensor : rest_->tensors()) { kept_.insert(tensor.name); }
    }
    extraction(const extraction&) = delete;
    extraction& operator=(const extraction&) = delete;

    [[nodiscard]] const taskvec::extract_result<T>& found() const { return found_; }

    /// What is said of the rest: ", 3 other changed tensors left out".
    [[nodiscard]] std::string words_of_rest() const
    {
        const auto lost = found_.left_out.size() - kept_.size();
        return (kept_.empty() ? ""
                              : ", " + tool::counted(kept_.size(), "other changed tensor") + " as a delta beside it")
            + (lost == 0 ? "" : ", " + tool::counted(lost, "other changed tensor") + " left out");
    }
    void list_left_out() const
    {
        for (const auto& name : found_.left_out) {
            std::cerr << "taskvec: "
                      << (kept_.contains(name) ? "in " + std::string(tool::rest_file) + ": '" : "left out: '")
                      << tool::printable(name) << "' changed, and a LoRA cannot hold it\n";
        }
    }

    /// The adapter, as PEFT finds its modules in the model. Called once: the updates move into it.
    [[nodiscard]] taskvec::peft_adapter<T> adapter()
    {
        taskvec::peft_adapter<T> made;
        say_experts_and_routers();
        const auto names = names_of_modules(given_, base_);
        add_modules(made, names);
        if (given_.fan_in_fan_out) { made.config["fan_in_fan_out"] = true; }
        if (!words_.base_name.empty()) { made.config["base_model_name_or_path"] = words_.base_name; }
        if (!words_.task_type.empty()) { made.config["task_type"] = words_.task_type; }
        add_heads(made, names);
        return made;
    }
    /// Makes the delta of what no LoRA can hold (--sparse-rest); nothing where there is none.
    [[nodiscard]] std::function<std::unique_ptr<taskvec::delta_writer>(const tool::fs::path&)> rest_writer() const
    {
        if (!given_.sparse_rest) { return {}; }
        if (kept_.empty()) {
            tool::note(given_.run, "--sparse-rest: nothing else changed, so there is no delta beside the adapter");
            return {};
        }
        return [this](const tool::fs::path& path) {
            auto writer = std::make_unique<taskvec::delta_writer>(path, taskvec::fingerprint(policy_, base_.model()));
            taskvec::post_pruning(policy_, {.density = 1}, *rest_, *writer);
            writer->finish();
            return writer;
        };
    }

private:
    /// Whether a tensor is of a head that PEFT looks for whole, by the task type.
    [[nodiscard]] bool is_of_head(std::string_view name) const
    {
        return std::any_of(
            heads_.begin(), heads_.end(), [&](const auto& head) { return taskvec::is_within_module(name, head); });
    }
    [[nodiscard]] bool is_router(std::string_view module) const
    {
        return tool::is_router(config_, base_.model(), module);
    }
    [[nodiscard]] taskvec::extract_options options() const
    {
        return {.rank = given_.rank.choice(),
            .include = [this](std::string_view name) { return !is_of_head(name) && (!chosen_ || chosen_(name)); },
            .layers =
                [this](std::string_view name) {
                    const auto module = name.substr(0, name.size() - std::string_view(".weight").size());
                    // A library that has them as layers writes routers among the factors, as other modules.
                    if (bare_routers_ && is_router(module)) { return false; }
                    return !tool::is_read_past_its_module(config_, module) || is_own_embedding_(module);
                },
            .base_label = "'" + given_.base + "'",
            .tuned_label = label_of_task(given_)};
    }
    void refuse_nothing() const
    {
        if (!found_.adapter.empty()) { return; }
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::nothing_selected,
            taskvec::message("'", given_.base, "' and ", label_of_task(given_),
                " do not differ in any matrix or convolution '*.weight'",
                given_.include.empty() && given_.exclude.empty() && heads_.empty() ? "" : " that is looked at",
                found_.left_out.empty() ? std::string(": there is nothing to extract an adapter from")
                                        : taskvec::message(", but in ", tool::counted(found_.left_out.size(), "tensor"),
                                              " that no LoRA can hold ('", found_.left_out.front(), "'",
                                              found_.left_out.size() > 1 ? " …" : "",
                                              "): 'taskvec prune --density 1' keeps the whole change as a delta")));
    }
    void say_experts_and_routers() const
    {
        if (const auto text = words_of_experts(found_.adapter, base_.model(), config_); !text.empty()) {
            tool::note(given_.run, text);
        }
        const auto router = std::find_if(
            found_.adapter.begin(), found_.adapter.end(), [&](const auto& one) { return is_router(one.first); });
        if (router != found_.adapter.end()) {
            tool::note(given_.run,
                "'" + router->first
                    + "' is the router of a mixture of experts, which transformers 5 keeps as a parameter: PEFT loads "
                      "the adapter there if routers are left out, by --exclude '\\.(gate|router)\\.weight$'");
        }
        const auto routers = std::count_if(found_.left_out.begin(), found_.left_out.end(), [&](const auto& name) {
            return bare_routers_ && name.ends_with(".weight")
                && is_router(std::string_view(name).substr(0, name.size() - std::string_view(".weight").size()));
        });
        if (routers > 0) {
            tool::note(given_.run,
                tool::counted(static_cast<std::uint64_t>(routers), "router")
                    + " of the mixtures of experts left out: transformers 5, which wrote the configuration, keeps "
                      "them as parameters that PEFT cannot adapt; --sparse-rest keeps their changes");
        }
    }
    /// Adds the update of the module that the files call `stored`.
    void add(taskvec::peft_adapter<T>& made, const std::string& module, const std::string& stored, bool embedding,
        taskvec::lora_update<T> update) const
    {
        if (embedding) { made.embeddings.insert(module); }
        made.stored.emplace(module, base_.model().find(stored + ".weight")->dtype);
        if (const auto kernel = found_.kernels.find(stored); kernel != found_.kernels.end()) {
            made.kernels.emplace(module, kernel->second);
        }
        made.updates.emplace(module, std::move(update));
    }
    void add_modules(taskvec::peft_adapter<T>& made, const module_names& names)
    {
        const auto& tie = names.tie;
        const auto embedded = found_.adapter.find(tie.embedding);
        const bool tie_changed = embedded != found_.adapter.end();
        if (tie.tied && tie_changed) { found_.adapter.erase(tie.head); } // one matrix under two names is one module
        const bool by_peft = tie.tied && tie.head == taskvec::peft_tied_head && names.copies.empty();
        if (tie_changed && !by_peft) {
            // PEFT knows of heads called lm_head alone that they are an embedding: others have the update once more.
            for (const auto& copy : names.copies) {
                add(made, copy, tie.embedding, true, tool::transposed(embedded->second));
            }
            if (tie.tied) { add(made, tie.head, tie.embedding, false, embedded->second); }
        }
        auto patterns = given_.embedding;
        patterns.emplace_back(known_embeddings);
        const auto is_embedding = tool::name_matcher(patterns, "--embedding");
        std::vector<std::string> doubtful;
        for (auto& [name, update] : found_.adapter) {
            if (name == tie.embedding && !names.copies.empty()) { continue; }
            // Embeddings have no bias, and linear layers of such names mostly do.
            const bool convolution = found_.kernels.contains(name);
            const bool may_be = !convolution && !base_.model().find(name + ".bias");
            const bool embedding =
                !convolution && (is_own_embedding_(name) || name == tie.embedding || (may_be && is_embedding(name)));
            if (may_be && !embedding && may_be_embedding(name)) { doubtful.push_back(name); }
            const bool turned = given_.fan_in_fan_out && !tool::is_head_module(name) && !convolution;
            add(made, names.of(name), name, embedding,
                embedding || turned ? tool::transposed(update) : std::move(update));
        }
        if (!doubtful.empty()) {
            tool::note(given_.run,
                "'" + doubtful.front() + "'"
                    + (doubtful.size() > 1 ? " and " + std::to_string(doubtful.size() - 1) + " more are" : " is")
                    + " called as embeddings are, and factored as a linear layer's: where the model has an embedding "
                      "there, PEFT leaves it out unless --embedding names it");
        }
        if (tie_changed) { say_tied(made, names, by_peft); }
    }
    /// What the embedding changes by what is tied to it changes by.
    void say_tied(taskvec::peft_adapter<T>& made, const module_names& names, bool by_peft) const
    {
        const auto& tie = names.tie;
        if (by_peft) { // which adapts both when it is told so
            auto modules = list_of(made.updates);
            modules.emplace_back(taskvec::peft_tied_head);
            made.config["target_modules"] = modules;
            made.config[tool::weight_tying] = true;
            tool::note(given_.run,
                "the head of '" + given_.base + "' is tied to its embedding: the adapter says "
                    + std::string(tool::weight_tying) + ", so that PEFT adapts both");
            return;
        }
        if (!tie.tied && names.copies.empty()) { return; }
        std::string text;
        for (const auto& copy : names.copies) { text += (text.empty() ? "'" : ", '") + copy + "'"; }
        if (tie.tied) { text += (text.empty() ? "'" : ", '") + tie.head + "'"; }
        tool::note(given_.run,
            "'" + tie.embedding + "' of '" + given_.base + "' is one matrix with " + text
                + ": the adapter has its update under each name; fold it by 'taskvec fuse', which adds it once");
    }
    /// Heads come whole, under modules_to_save.
    void add_heads(taskvec::peft_adapter<T>& made, const module_names& names) const
    {
        for (const auto& [name, tensor] : tuned_) {
            if (!is_of_head(name)) { continue; }
            const auto* const before = base_.model().find(name);
            const auto at = name.rfind('.');
            made.others.emplace(names.of(name.substr(0, at)) + name.substr(at),
                whole_tensor(policy_, before && chosen_ && !chosen_(name) ? *before : tensor));
        }
        if (made.others.empty()) { return; }
        made.config["modules_to_save"] = heads_;
        tool::note(given_.run,
            "'" + made.others.begin()->first + "'"
                + (made.others.size() > 1 ? " and what else is of the head are" : " is")
                + " whole in the adapter, under modules_to_save, where PEFT looks for the head of a model of task type "
                + words_.task_type);
    }

    const extract_lora_settings& given_;
    const taskvec::checkpoint& base_;
    const taskvec::const_model_ref& tuned_;
    const taskvec::cpu& policy_;
    tool::peft_words words_;
    const std::vector<std::string>& heads_;
    std::function<bool(std::string_view)> chosen_;
    nlohmann::json config_;
    bool bare_routers_;
    std::function<bool(std::string_view)> is_own_embedding_;
    taskvec::extract_result<T> found_;
    std::set<std::string_view> others_; ///< what changed and no LoRA can hold
    std::optional<taskvec::aligned_models> rest_; ///< of that what can be computed with
    std::set<std::string_view> kept_; ///< its names
};

template <class T>
void extract_as(const extract_lora_settings& given, const taskvec::checkpoint& base,
    const taskvec::const_model_ref& tuned, std::uint64_t task_bytes)
{
    decomposition_work work(given);
    const tool::runner run(given.run);
    auto report = tool::open_report(given);
    const auto& policy = run.policy();
    extraction<T> made(given, base, tuned, policy, work.how);
    const auto& found = made.found();
    work.say_found(given.run);
    const auto also = made.words_of_rest();
    if (given.run.dry_run) {
        tool::print("would write '" + tool::printable(given.out) + "': " + tool::counted(found.layers.size(), "layer")
            + " at " + given.rank.words(found.layers) + also + "\n");
        made.list_left_out();
        return;
    }
    auto adapter = made.adapter();
    nlohmann::ordered_json content{{"base", given.base},
        {given.adapter.empty() ? "task" : "task_adapter", given.adapter.empty() ? given.task : given.adapter},
        {"method", given.randomized ? "randomized" : "exact"}};
    tool::add_result(content, found);
    content["unchanged"] = found.unchanged;
    content["left_out"] = found.left_out;
    content["left_out_norm"] = std::sqrt(found.left_out_squared_norm);
    content["embeddings"] = adapter.embeddings;
    tool::write_adapter(given, run, report, adapter, std::move(content), base.data_bytes() + task_bytes,
        "extracted '" + tool::printable(given.out) + "': " + tool::counted(found.layers.size(), "layer") + " at "
            + given.rank.words(found.layers) + ", " + tool::grouped(found.parameters()) + " parameters, relative error "
            + tool::percent(found.relative_error()) + also,
        made.rest_writer());
    made.list_left_out();
    work.remove();
}

/// Names that differ by prefixes, and tied heads.
void line_up(const extract_lora_settings& given, const taskvec::checkpoint& base, taskvec::checkpoint& tuned)
{
    const auto include = tool::name_filter(given.include, given.exclude);
    tool::check_no_factors(base, include);
    tool::check_no_factors(tuned, include);
    const std::string label = "'" + given.task + "'", reference = "'" + given.base + "'";
    const auto match = tool::match_prefixes(tuned.model(), base.model());
    if (!match.names.empty() && !given.match_prefixes) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_unexpected,
            taskvec::message(label, " and ", reference, " call tensors differently: ", match.same, " of ",
                tuned.model().size(), " have one name, ", match.names.size(), " more have with ", match.words(), ": ",
                match.ways("--task " + given.task)));
    }
    if (!match.names.empty()) {
        tool::note(given.run,
            taskvec::message(
                "names of ", label, ": ", match.words(), ", ", tool::counted(match.names.size(), "tensor")));
        tuned.set_model(tool::renamed(tuned.model(), match));
    }
    auto model = tuned.model();
    const auto notes = tool::resolve_ties(model, base.model(), tool::says_tied(given.task), label, reference);
    if (!notes.empty()) { tuned.set_model(std::move(model)); }
    for (const auto& text : notes) { tool::note(given.run, text); }
}

void run_extract_lora(extract_lora_settings given)
{
    if (!given.fan_in_fan_out && tool::has_conv1d_layers(tool::fs::path(given.base))) {
        given.fan_in_fan_out = true;
        tool::note(given.run,
            "weights of '" + given.base
                + "' are taken to lie in×out, as its config.json names a model of Conv1D layers");
    }
    tool::check_cpu(given.run);
    (void)given.rank.choice();
    if (given.task.empty() == given.adapter.empty()) {
        throw tool::usage_error(given.task.empty() ? "--task or --task-adapter is required: what was fine-tuned"
                                                   : "--task and --task-adapter: give one of the two");
    }
    const auto rules = [&](const std::string& model) {
        const auto place = given.names.find(model);
        return place == given.names.end() ? std::vector<tool::name_rule>() : place->second;
    };
    const auto base = tool::open_noted(given.base, given.run, given.index, rules(""));
    const auto include = tool::name_filter(given.include, given.exclude);
    tool::check_readable(base, include);
    std::optional<taskvec::checkpoint> stored;
    std::optional<tool::adapter_sum> sum;
    std::vector<std::unique_ptr<taskvec::operand_source>> sources;
    taskvec::const_model_ref tuned;
    std::uint64_t task_bytes = 0;
    bool wide = tool::holds_f64(base);
    if (given.adapter.empty()) {
        stored.emplace(tool::open_noted(given.task, given.run, given.index, rules(given.task)));
        tool::check_readable(*stored, include);
        line_up(given, base, *stored);
        tool::check_scales_alike({&base, &*stored}, include);
        tuned = stored->model();
        task_bytes = stored->data_bytes();
        wide = wide || tool::holds_f64(*stored);
    }
    else {
        sum.emplace(std::vector{tool::parse_task(given.adapter, "--task-adapter")}, base,
            tool::adapter_sum::settings{.base_path = given.base,
                .include = include,
                .included = given.include,
                .excluded = given.exclude,
                .names = given.names,
                .fan_in_fan_out = given.fan_in_fan_out,
                .may_untie = false},
            given.run);
        tuned = base.model();
        sources = sum->changes().put_into(tuned);
        task_bytes = sum->bytes();
        wide = wide || std::any_of(sources.begin(), sources.end(), [](const auto& source) {
            return source->type() == taskvec::dtype::f64;
        });
    }
    auto names = list_of(base.model());
    for (auto& name : list_of(tuned)) { names.push_back(std::move(name)); }
    const auto models = "tensor of '" + given.base + "'" + (given.task.empty() ? "" : " and '" + given.task + "'");
    tool::check_patterns(given.include, "--include", names, models);
    tool::check_patterns(given.exclude, "--exclude", names, models);
    constexpr std::string_view suffix = ".weight";
    std::map<std::string, bool> modules;
    for (const auto& [name, tensor] : base.model()) {
        if (tensor.shape.size() == 2 && name.ends_with(suffix)) {
            modules.emplace(name.substr(0, name.size() - suffix.size()), true);
        }
    }
    tool::check_patterns(given.embedding, "--embedding", list_of(modules), "module of '" + given.base + "'");
    tool::in_precision(wide, [&]<class T>(std::type_identity<T>) { extract_as<T>(given, base, tuned, task_bytes); });
}

const tool::register_verb extract_lora_verb(70, "extract-lora",
    "Make a LoRA adapter of what fine-tuning changed in a model's matrices and convolutions", [](tool::command& verb) {
        const auto given = std::make_shared<extract_lora_settings>();
        given->makes_adapter = true;
        verb.text("--base", given->base, "MODEL", "The pre-trained model", tool::presence::required);
        verb.text("--task", given->task, "MODEL", "The fine-tuned model");
        verb.text("--task-adapter", given->adapter, "PATH[=W]",
            "In its place an adapter of any dialect or kind: what W times it (default 1) makes of the base");
        verb.text("--out", given->out, "DIR", "Where the adapter goes, a PEFT directory", tool::presence::required);
        tool::add_rank_options(verb, given->rank);
        verb.flag("--randomized", given->randomized,
            "Randomized SVD: nearly the best; with --energy a hundred times faster for large layers");
        verb.count("--seed", given->seed, "N", "Of --randomized (default: 0)");
        verb.texts("--include", given->include, "REGEX", "Only tensors that match");
        verb.texts("--exclude", given->exclude, "REGEX", "All but tensors that match");
        verb.texts("--embedding", given->embedding, "REGEX",
            "Modules that are embeddings, beside those named so in common models (embed_tokens, wte, …)");
        tool::add_name_options(verb, given->names, given->match_prefixes);
        tool::add_index_option(verb, given->index);
        verb.flag("--fan-in-fan-out", given->fan_in_fan_out, "Weights are stored in×out, as in GPT-2");
        tool::add_adapter_options(verb, *given, "the base's, per tensor",
            "the directory of --base, or as --task-adapter says", "as --task-adapter says");
        verb.flag("--sparse-rest", given->sparse_rest,
            "Keep what changed and no LoRA can hold (biases, norms, …) as a delta beside the adapter, "
            "rest.delta.safetensors, which apply adds to the base");
        tool::add_resume_option(verb, given->resume, "Layers that are decomposed");
        verb.footer("Other tensors that changed (biases, norms) are listed on standard error and in the report: an "
                    "adapter cannot hold them, but --sparse-rest keeps them.\n\n"
                    "Example:\n  taskvec extract-lora --base base.safetensors --task math.safetensors --rank 16 --out "
                    "math-lora");
        verb.action([given] { run_extract_lora(*given); });
    });

} // namespace
