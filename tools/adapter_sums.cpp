// Adapters on a base.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_sums.hpp"

#include "models.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <type_traits>
#include <utility>

namespace tool {

taskvec::checkpoint open_adapter(const fs::path& path)
{
    const auto file = taskvec::adapter_tensor_file(path);
    if (!taskvec::is_gguf_file(file)) { return open_guarded(file); }
    install_handlers();
    std::vector<taskvec::safetensors_file> files;
    files.push_back(taskvec::open_gguf(file));
    taskvec::checkpoint made(file, std::move(files));
    guard_map(made.files().front().map());
    return made;
}

namespace {

/// Models whose linear layers are transformers' Conv1D: their weights lie in×out.
bool has_conv1d(const nlohmann::json& config)
{
    static constexpr std::array<std::string_view, 6> types{
        "gpt2", "openai-gpt", "imagegpt", "ctrl", "decision_transformer", "gpt-sw3"};
    const auto type = config.find("model_type");
    return type != config.end() && type->is_string()
        && std::find(types.begin(), types.end(), type->get_ref<const std::string&>()) != types.end();
}

/// Whether the head of a model is its embedding: as its configuration says, or as transformers takes it where that says
/// nothing and the head is in no file.
bool heads_are_tied(const nlohmann::json& config, bool head_missing)
{
    for (const auto* part : {&config, config.contains("text_config") ? &config["text_config"] : nullptr}) {
        if (!part || !part->is_object() || !part->contains("tie_word_embeddings")) { continue; }
        return (*part)["tie_word_embeddings"] == true;
    }
    const auto architectures = config.find("architectures");
    if (!head_missing || architectures == config.end() || !architectures->is_array() || architectures->empty()) {
        return false;
    }
    const auto& first = (*architectures)[0];
    if (!first.is_string()) { return false; }
    const auto& name = first.get_ref<const std::string&>();
    return name.ends_with("LMHeadModel") || name.ends_with("ForCausalLM") || name.ends_with("ForConditionalGeneration");
}

/// The input embedding of a language model by the name of its weight; nullptr: it has none.
const taskvec::const_model_ref::entry* input_embedding(const taskvec::const_model_ref& model)
{
    for (const std::string_view ending :
        {"embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight"}) {
        for (const auto& entry : model) {
            if (entry.name.ends_with(ending) && entry.tensor.shape.size() == 2) { return &entry; }
        }
    }
    return nullptr;
}

/// Modules and whole tensors under the names that --rename and --map give them.
template <class T>
void rename_modules(taskvec::adapter_contents<T>& adapter, const std::vector<name_rule>& rules)
{
    if (rules.empty()) { return; }
    taskvec::const_model_ref names;
    std::vector<std::string> before;
    const auto add = [&](const std::string& name) { // the extent says which it was
        names.insert(name, {nullptr, taskvec::dtype::f32, {static_cast<std::int64_t>(before.size())}, {}});
        before.push_back(name);
    };
    for (const auto& [module, made] : adapter.modules) { add(module); }
    for (const auto& [name, tensor] : adapter.wholes) {
        if (!names.find(name)) { add(name); }
    }
    std::map<std::string, std::string> after;
    for (const auto& [name, tensor] : renamed(names, rules, adapter.label)) {
        after.emplace(before[static_cast<std::size_t>(tensor.shape[0])], name);
    }
    const auto under = [&](auto& map) {
        std::remove_reference_t<decltype(map)> result;
        for (auto& [name, value] : map) {
            const auto place = after.find(name);
            result.emplace(place == after.end() ? name : place->second, std::move(value));
        }
        map = std::move(result);
    };
    under(adapter.modules);
    under(adapter.wholes);
    under(adapter.copies);
}

template <class T>
std::vector<std::string> module_names(const taskvec::adapter_contents<T>& adapter)
{
    std::vector<std::string> names;
    for (const auto& [module, made] : adapter.modules) { names.push_back(module); }
    return names;
}

} // namespace

bool is_head_module(std::string_view module)
{
    return module == "lm_head" || module.ends_with(".lm_head") || module == "embed_out"
        || module.ends_with(".embed_out");
}

bool has_conv1d_layers(const fs::path& model)
{
    return has_conv1d(config_beside(model));
}

bool ties_head(const fs::path& model, const taskvec::const_model_ref& tensors)
{
    const bool stored = std::any_of(tensors.begin(), tensors.end(), [](const auto& entry) {
        return entry.name.ends_with(".weight") && is_head_module(entry.name.substr(0, entry.name.size() - 7));
    });
    return heads_are_tied(config_beside(model), !stored);
}

std::uint64_t adapter_sum::bytes() const
{
    std::uint64_t total = 0;
    for (const auto& file : files_) { total += file.data_bytes(); }
    return total;
}

adapter_sum::adapter_sum(const std::vector<task_argument>& arguments, const taskvec::checkpoint& base,
    const settings& how, const run_options& run)
    : base_(base.model())
{
    for (const auto& argument : arguments) {
        files_.push_back(open_adapter(argument.path));
        if (holds_f64(files_.back())) { adapters_.emplace_back(taskvec::read_adapter<double>(argument.path)); }
        else {
            adapters_.emplace_back(taskvec::read_adapter<float>(argument.path));
        }
        std::visit([&](auto& read) { add(read, argument, how, run); }, adapters_.back());
    }
    if (changes_.empty() && taken_.empty()) {
        std::vector<std::string> names;
        for (const auto& [name, tensor] : base_) { names.push_back(name); }
        check_patterns(how.included, "--include", names, "tensor of '" + how.base_path.string() + "'");
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::nothing_selected,
            "no module of the adapters is left: there is nothing to add to the base");
    }
}

/// An adapter of a head that is tied to the embedding, or of the embedding, changes one of the two: unless it says that
/// they stay one, the head becomes a tensor of its own. Returns the name of the head's tensor then.
template <class T>
std::string adapter_sum::untie(taskvec::adapter_contents<T>& read, const settings& how, const run_options& run)
{
    const auto names_of = [&](const auto& matches) {
        std::string found;
        for (const auto& [module, made] : read.modules) {
            if (matches(module)) { found = module; }
        }
        for (const auto& [name, tensor] : read.wholes) {
            if (name.ends_with(".weight") && matches(name.substr(0, name.size() - 7))) {
                found = name.substr(0, name.size() - 7);
            }
        }
        return found;
    };
    const std::string head = names_of([](const std::string& module) { return is_head_module(module); });
    const auto* const embedding = input_embedding(base_);
    if (!embedding) { return ""; }
    const auto last = [](std::string_view name) { return name.substr(name.rfind('.') + 1); };
    const std::string module = embedding->name.substr(0, embedding->name.size() - 7);
    const std::string adapted =
        names_of([&](const std::string& name) { return last(name) == last(module) || name == module; });
    if (head.empty() && adapted.empty()) { return ""; }
    std::string stored_head;
    for (const auto& [name, tensor] : base_) {
        if (name.ends_with(".weight") && is_head_module(name.substr(0, name.size() - 7))) { stored_head = name; }
    }
    const auto config = config_beside(how.base_path);
    const bool tied = heads_are_tied(config, stored_head.empty()) || (stored_head.empty() && !head.empty());
    if (!tied) { return ""; }
    if (read.tied) {
        // One matrix, changed once: by the embedding's factors, or the head's where these are all there are.
        if (!head.empty() && !adapted.empty() && stored_head.empty()) {
            read.modules.erase(head);
            read.wholes.erase(head + ".weight");
        }
        return "";
    }
    const std::string name =
        stored_head.empty() ? (head.empty() ? std::string("lm_head") : head) + ".weight" : stored_head;
    if (!how.may_untie) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_unexpected,
            taskvec::message(read.label, " changes '", head.empty() ? adapted : head,
                "' alone, and the base ties its head to its embedding: as a task it cannot; fold it first (taskvec "
                "fuse)"));
    }
    if (stored_head.empty()) { base_.insert(name, taskvec::const_tensor_ref(embedding->tensor)); }
    untied_ = true;
    note(run,
        taskvec::message(read.label, " changes ",
            head.empty()          ? "the embedding, and not the head that is tied to it"
                : adapted.empty() ? "the head, and not the embedding that it is tied to"
                                  : "the head and the embedding that it is tied to each by itself",
            ": the result holds '", name, "' for itself, and must be loaded with tie_word_embeddings: false"));
    return name;
}

template <class T>
void adapter_sum::add(
    taskvec::adapter_contents<T>& read, const task_argument& argument, const settings& how, const run_options& run)
{
    for (const auto& text : read.notes) { note(run, text); }
    if (how.subtract) {
        for (const auto& [module, made] : read.modules) {
            if (made.magnitude.empty()) { continue; }
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapter_factors,
                taskvec::message("--subtract: module '", module, "' of ", read.label,
                    " is DoRA's, whose norms are those of the base: it cannot be taken out of a model that holds it"));
        }
        if (!read.wholes.empty()) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapter_factors,
                taskvec::message("--subtract: ", read.label, " replaces '", read.wholes.begin()->first,
                    "' whole, and nothing tells what was there before: leave it out by --exclude"));
        }
    }
    restore_rows(read, how.base_path);
    if (const auto rules = how.names.find(argument.text); rules != how.names.end()) {
        rename_modules(read, rules->second);
    }
    const std::string head = untie(read, how, run);
    auto match = taskvec::match_modules(module_names(read), base_, read.dialect);
    if (how.include) { // what is left out on purpose may be unknown to the base
        std::erase_if(match.unmatched, [&](const std::string& module) {
            if (how.include(module + ".weight")) { return false; }
            read.modules.erase(module);
            return true;
        });
        std::erase_if(read.modules, [&](const auto& one) {
            const auto place = match.tensors.find(one.first);
            return place != match.tensors.end() && !how.include(place->second);
        });
        std::erase_if(read.wholes, [&](const auto& one) { return !how.include(match.renamed(one.first, base_)); });
    }
    if (!match.changes.empty()) {
        std::string text;
        for (const auto& change : match.changes) { text += (text.empty() ? "" : ", ") + change; }
        note(run, "modules of " + read.label + ": " + text);
    }
    facts about{std::string(taskvec::to_string(read.dialect)), read.modules.size(), read.wholes.size(), 0, 0};
    for (const auto& [module, made] : read.modules) {
        const auto rank = made.update.rank();
        about.least_rank = about.least_rank == 0 ? rank : std::min(about.least_rank, rank);
        about.greatest_rank = std::max(about.greatest_rank, rank);
    }
    facts_.push_back(about);
    const std::string base_label = in_quotes(how.base_path);
    check_saved_modules(read, run);
    const auto config = config_beside(how.base_path);
    const bool linear = config.contains("model_type") && !has_conv1d(config) && !how.fan_in_fan_out;
    if (read.fan_in_fan_out && (linear || taskvec::denies_fan_in_fan_out(base_, read, match))) {
        note(run,
            read.label + " says fan_in_fan_out, and linear layers of " + base_label
                + " lie out×in: the flag is taken for false, as PEFT does");
        read.fan_in_fan_out = false;
    }
    if (how.may_untie) { take_grown_vocabulary(read, match, argument, base_label, run); }
    taskvec::add_adapter(changes_, base_, read, match, how.subtract ? -argument.weight : argument.weight,
        {.conv1d = how.fan_in_fan_out || has_conv1d(config), .label = base_label});
}

/// Modules that were trained whole by the configuration, and are not in the file.
template <class T>
void adapter_sum::check_saved_modules(const taskvec::adapter_contents<T>& read, const run_options& run) const
{
    const auto within = [](std::string_view name, const std::string& module) {
        return ("." + std::string(name)).find("." + module + ".") != std::string::npos;
    };
    const auto saved = read.config.find("modules_to_save");
    for (const auto& one : saved != read.config.end() && saved->is_array() ? *saved : nlohmann::json::array()) {
        if (!one.is_string()) { continue; }
        const auto& module = one.template get_ref<const std::string&>();
        const bool there = std::any_of(
            read.wholes.begin(), read.wholes.end(), [&](const auto& whole) { return within(whole.first, module); });
        const bool known =
            std::any_of(base_.begin(), base_.end(), [&](const auto& entry) { return within(entry.name, module); });
        if (there || !known) { continue; }
        taskvec::raise<taskvec::format_error>(taskvec::error_code::adapter_tensors,
            "modules_to_save of adapter_config.json names '" + printable(module)
                + "', which was trained whole, and the file holds nothing of it: fetch or save it anew, or take the "
                  "name out of modules_to_save if it was not trained",
            read.file.string());
    }
    const auto bias = read.config.find("bias");
    if (bias != read.config.end() && (*bias == "all" || *bias == "lora_only")
        && std::none_of(
            read.wholes.begin(), read.wholes.end(), [](const auto& whole) { return whole.first.ends_with("bias"); })) {
        note(run,
            read.label + " says bias " + bias->template get<std::string>()
                + ", and holds no bias: those of the base stay");
    }
}

/// Embeddings and heads that an adapter holds whole with more rows than the base has, for tokens that were added: they
/// take the base's place, as they are.
template <class T>
void adapter_sum::take_grown_vocabulary(taskvec::adapter_contents<T>& read, const taskvec::module_match& match,
    const task_argument& argument, const std::string& base_label, const run_options& run)
{
    std::map<std::string, const taskvec::peft_tensor*> grown;
    for (const auto& [name, whole] : read.wholes) {
        const auto tensor = match.renamed(name, base_);
        const auto* const there = base_.find(tensor);
        if (there && there->shape.size() == 2 && whole.shape.size() == 2 && there->shape[1] == whole.shape[1]
            && whole.shape[0] > there->shape[0] && (is_head(tensor) || is_embedding(tensor))
            && there->dtype == whole.dtype && argument.weight == 1) {
            grown[tensor] = &whole;
        }
    }
    if (grown.empty()) { return; }
    const auto rows = grown.begin()->second->shape[0];
    for (const auto& [name, tensor] : base_) {
        const bool of_vocabulary =
            (is_head(name) || is_embedding(name)) && tensor.shape == base_.find(grown.begin()->first)->shape;
        if (of_vocabulary && !grown.contains(name)) {
            taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::tensor_shape,
                "'" + grown.begin()->first + "' has " + std::to_string(rows) + " rows in " + read.label + ", and '"
                    + name + "' of " + base_label + " " + std::to_string(tensor.shape[0])
                    + ", and is not in the adapter: one of the two would lack rows");
        }
    }
    taskvec::const_model_ref model;
    for (const auto& [name, tensor] : base_) {
        const auto place = grown.find(name);
        model.insert(name,
            place == grown.end()
                ? tensor
                : taskvec::const_tensor_ref{place->second->bytes.data(), place->second->dtype, place->second->shape});
    }
    base_ = std::move(model);
    for (const auto& [name, whole] : grown) {
        note(run,
            "'" + name + "' of " + read.label + " has " + std::to_string(rows) + " rows, more than " + base_label
                + ": it takes the place of that; --copy-from takes the adapter's tokenizer along");
    }
    for (auto one = read.wholes.begin(); one != read.wholes.end();) {
        if (!grown.contains(match.renamed(one->first, base_))) {
            ++one;
            continue;
        }
        taken_.push_back(std::move(one->second)); // base_ points to its bytes
        one = read.wholes.erase(one);
    }
}

} // namespace tool
