// One document of a configuration becomes a request.
// SPDX-License-Identifier: Apache-2.0
#include "config_document.hpp"

#include "config_parameters.hpp"
#include "config_tensors.hpp"
#include "config_tokenizer.hpp"
#include "words.hpp"

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <string_view>

namespace tool::configuration {

namespace {

/// mergekit's words have underscores where those of command lines have dashes.
std::string dashed(std::string word)
{
    std::replace(word.begin(), word.end(), '_', '-');
    return word;
}

/// The method of mergekit's of this name, which may be its name here; nullptr where there is none.
const mergekit_method* method_called(const std::string& name)
{
    const auto find = [](const auto& is_it) -> const mergekit_method* {
        const auto& known = mergekit_methods();
        const auto place = std::find_if(known.begin(), known.end(), is_it);
        return place == known.end() ? nullptr : &*place;
    };
    if (const auto* const found = find([&](const mergekit_method& one) { return one.theirs == name; })) {
        return found;
    }
    const auto* const entry = method_named(dashed(name));
    return entry ? find([&](const mergekit_method& one) { return one.ours == entry->name; }) : nullptr;
}

void read_method(reading& it, const mapping& top)
{
    const auto one = top.find("merge_method");
    if (!one) { it.where.fail(top.node(), "'merge_method' is missing"); }
    const auto name = scalar_of(it.where, one->value, "merge_method");
    it.at_method = one->value;
    it.given.at_method = it.where.of(one->value);
    it.method = method_called(name);
    if (!it.method) {
        std::vector<std::string> known;
        for (const auto& method : mergekit_methods()) { known.push_back(method.theirs); }
        if (method_named(dashed(name))) {
            it.where.fail(one->value,
                "merge_method '" + shown(name) + "' is none of mergekit's, and no configuration can say it; 'taskvec "
                    + "merge --method " + method_named(dashed(name))->name + "' has it");
        }
        it.where.fail(one->value, "merge_method '" + shown(name) + "' is unknown" + meant(name, known));
    }
    it.request().method = it.method->ours;
}

void read_dtype(reading& it, const mapping& top)
{
    for (const auto* key : {"dtype", "out_dtype"}) {
        const auto one = top.find(key);
        if (!one) { continue; }
        auto word = scalar_of(it.where, one->value, key);
        if (word.starts_with("torch.")) { word.erase(0, std::string_view("torch.").size()); }
        const bool of_result = std::string_view(key) == "out_dtype";
        if (word == "float64" && !of_result) {
            it.where.fail(one->value,
                "dtype is 'float64', and sums are f64 only where a model is; expected float32, with out_dtype: "
                "float64 for a result in it");
        }
        std::vector<std::string> known;
        for (const auto& [theirs, ours] : mergekit_dtypes()) {
            if (theirs == word) { it.request().dtype = ours; }
            if (of_result || theirs != "float64") { known.push_back(theirs); }
        }
        if (!std::count(known.begin(), known.end(), word)) {
            it.where.fail(one->value, std::string(key) + " is '" + shown(word) + "'" + meant(word, known));
        }
    }
}

/// `dtype: keep` under `taskvec`: the base's, tensor by tensor, where mergekit's words give all tensors one.
void set_dtype_kept(reading& it, const mapping::entry& given, const std::string& word, const mapping& top)
{
    if (word != "keep") {
        it.where.fail(given.value,
            "dtype under 'taskvec' is '" + shown(word) + "'; expected keep, and others as mergekit's 'dtype'");
    }
    for (const auto* key : {"dtype", "out_dtype"}) {
        if (const auto other = top.find(key)) {
            it.where.fail(given.key,
                "'dtype: keep' is given beside '" + std::string(key) + "' of " + it.where.of(other->key)
                    + "; expected one of them");
        }
    }
    it.request().dtype = word;
}

/// What stands under `taskvec`: whose definitions to follow, and options that mergekit has no word for.
option_values read_own(reading& it, const mapping& top)
{
    option_values options;
    std::string semantics = "mergekit";
    if (const auto one = top.find("taskvec")) {
        std::vector<std::string> known{"semantics", "dtype"};
        for (const auto& row : method_named(it.method->ours)->options) {
            if (!row.is_preset && !row.per_task) { known.push_back(row.name); }
        }
        const mapping own(it.where, one->value, "'taskvec'", known);
        for (const auto& entry : own.entries()) {
            const auto word = scalar_of(it.where, entry.value, entry.name);
            if (entry.name == "dtype") {
                set_dtype_kept(it, entry, word, top);
                continue;
            }
            if (entry.name != "semantics") {
                options.push_back({entry.name, word, it.where.of(entry.value) + ": " + entry.name});
                continue;
            }
            if (word != "mergekit" && word != "paper") {
                it.where.fail(entry.value, "semantics is '" + shown(word) + "'" + meant(word, {"mergekit", "paper"}));
            }
            semantics = word;
        }
    }
    if (it.given.semantics.empty()) { it.given.semantics = semantics; }
    return options;
}

/// What makes a file one of mergekit's other commands', by a key that only these have.
void refuse_other_commands(const place& where, const YAML::Node& document)
{
    static const std::map<std::string, std::string> others = [] {
        std::map<std::string, std::string> made;
        for (const auto* key : {"gate_mode", "experts", "experts_per_token", "shared_experts"}) {
            made[key] = "mergekit-moe, which makes experts of models; that is not here: 'taskvec run' merges models of "
                        "one shape";
        }
        made["genome"] = "mergekit-evolve, which searches for parameters; 'taskvec sweep' tries them by a program that "
                         "scores each merge";
        made["layer_slices"] = "bakllama; here it is merge_method: passthrough with slices: [{sources: [{model: M, "
                               "layer_range: [START, END]}]}]";
        return made;
    }();
    const mapping top(where, document, "a configuration");
    for (const auto& entry : top.entries()) {
        const auto other = others.find(entry.name);
        if (other == others.end()) { continue; }
        where.fail(entry.key,
            "'" + entry.name + "' is a key of mergekit's other command " + other->second + " (docs/migrate.md)");
    }
}

void read(reading& it, const YAML::Node& document)
{
    refuse_other_commands(it.where, document);
    const mapping top(it.where, document, "a configuration",
        {"merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype", "parameters",
            "tokenizer_source", "tokenizer", "chat_template", "taskvec", "name"});
    read_method(it, top);
    read_models(it, top);
    read_dtype(it, top);
    const auto own = read_own(it, top);
    read_parameters(it);
    it.request().options.insert(it.request().options.end(), own.begin(), own.end());
    read_tokenizer(it, top);
    read_chat_template(it, top);
    if (it.models_are_there()) { look_at_tensors(it); }
}

/// What is wrong with a value, with its place: that of the option that it begins with, or else the method's.
std::string placed(const run_settings& given, const std::string& what)
{
    if (what.starts_with(given.config + ":")) { return what; }
    std::string place;
    const auto look = [&](const option_value& value) {
        if (what.starts_with(value.name + " is ") && value.flag.starts_with(given.config + ":")) {
            place = value.flag.substr(0, value.flag.rfind(": "));
        }
    };
    for (const auto& value : given.request.options) { look(value); }
    for (const auto& [task, values] : given.request.of_tasks) {
        for (const auto& value : values) { look(value); }
    }
    return (place.empty() ? given.at_method : place) + ": " + what;
}

/// What is wrong with a model or an adapter, with the place where that is named.
std::string placed_at_model(const named_places& places, const std::string& what)
{
    const auto is_about = [&](const std::string& path) {
        std::string_view text(what);
        if (text.starts_with('\'')) { text.remove_prefix(1); }
        if (!text.starts_with(path) || text.size() == path.size()) { return false; }
        return path.ends_with('/') || std::string_view(":/'").find(text[path.size()]) != std::string_view::npos;
    };
    const std::string *path = nullptr, *place = nullptr;
    const bool lacks_adapter = what.find(": holds no adapter") != what.npos; // which may be a model as well
    for (const auto* list : {&places.models, &places.adapters}) {
        for (const auto& one : *list) {
            const bool longer = !path || one.first.size() > path->size();
            const bool other = path && one.first == *path && list == &places.adapters && lacks_adapter;
            if (!(longer || other) || !is_about(one.first)) { continue; }
            path = &one.first;
            place = &one.second;
        }
    }
    return place ? *place + ": " + what : what;
}

/// Calls `work`; what it says of files of models is said with the places of these.
void with_places_of_models(const std::function<named_places()>& places, const std::function<void()>& work)
{
    try {
        work();
    }
    catch (const taskvec::io_error& wrong) {
        taskvec::raise<taskvec::io_error>(
            wrong.code(), placed_at_model(places(), wrong.what()), std::string(), wrong.system_code());
    }
    catch (const taskvec::format_error& wrong) {
        taskvec::raise<taskvec::format_error>(
            wrong.code(), placed_at_model(places(), wrong.what()), std::string(), wrong.offset());
    }
}

} // namespace

stages_named read_document(run_settings& given, const YAML::Node& document, const stages& others, bool there)
{
    reading one(given, others, there);
    try {
        with_places_of_models([&] { return one.names.places(); }, [&] { read(one, document); });
        (void)find_method(given.request);
        given.at_models = one.names.places();
        return one.names.needs();
    }
    catch (const YAML::Exception& wrong) {
        taskvec::raise<taskvec::invalid_argument>(
            taskvec::error_code::option_value, given.config + ": " + wrong.what());
    }
    catch (const usage_error& wrong) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value, placed(given, wrong.what()));
    }
}

void with_place(const run_settings& given, const std::function<void()>& merge)
{
    try {
        with_places_of_models([&] { return given.at_models; }, merge);
    }
    catch (const taskvec::invalid_argument& wrong) {
        using code = taskvec::error_code;
        const bool of_values = wrong.code() == code::weights_sum_zero || wrong.code() == code::parameter_out_of_range
            || wrong.code() == code::no_solution;
        taskvec::raise<taskvec::invalid_argument>(
            wrong.code(), of_values ? placed(given, wrong.what()) : placed_at_model(given.at_models, wrong.what()));
    }
}

} // namespace tool::configuration
