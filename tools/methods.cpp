// The registry of merge methods, and what comes from their tables.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"

#include "command.hpp"
#include "device.hpp"
#include "report.hpp"
#include "words.hpp"

#include <taskvec/analysis/norms.hpp>
#include <taskvec/core/sink.hpp>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <set>
#include <typeindex>
#include <utility>
#include <vector>

namespace tool {

namespace {

std::vector<method_entry>& methods()
{
    static std::vector<method_entry> list;
    return list;
}
std::map<std::type_index, device_merge>& device_merges()
{
    static std::map<std::type_index, device_merge> list;
    return list;
}

/// What one flag stands for: the tables that have its row.
struct shared_option {
    taskvec::option_description option;
    std::vector<std::pair<std::string, std::string>> defaults; ///< of whom, which
    bool own = false;
};

std::vector<shared_option> shared_options(const std::vector<described>& own, const std::vector<described>& others)
{
    std::vector<shared_option> list;
    const auto add = [&](const std::vector<described>& tables, bool mine) {
        for (const auto& table : tables) {
            for (const auto& option : table.options) {
                if (option.per_task) { continue; }
                auto place = std::find_if(
                    list.begin(), list.end(), [&](const shared_option& one) { return one.option.name == option.name; });
                if (place == list.end()) { place = list.insert(place, {option, {}, mine}); }
                if (place->own == mine) { place->defaults.emplace_back(table.name, option.initial); }
                auto& words = place->option.words; // some methods know more of them than others
                for (const auto& word : option.words) {
                    if (std::find(words.begin(), words.end(), word) == words.end()) { words.push_back(word); }
                }
            }
        }
    };
    add(own, true);
    add(others, false);
    return list;
}

/// "1; 0.3 for task-arithmetic": the most frequent default, and who has another.
std::string defaults_text(const std::vector<std::pair<std::string, std::string>>& defaults)
{
    std::vector<std::pair<std::string, std::vector<std::string>>> values; // and who has them
    for (const auto& [who, value] : defaults) {
        auto place = std::find_if(
            values.begin(), values.end(), [&value = value](const auto& one) { return one.first == value; });
        if (place == values.end()) { place = values.insert(place, {value, {}}); }
        place->second.push_back(who);
    }
    std::stable_sort(
        values.begin(), values.end(), [](const auto& a, const auto& b) { return a.second.size() > b.second.size(); });
    std::string text = values.front().first;
    for (std::size_t i = 1; i < values.size(); ++i) {
        text += "; " + values[i].first + " for ";
        for (std::size_t w = 0; w < values[i].second.size(); ++w) {
            text += (w == 0 ? "" : ", ") + values[i].second[w];
        }
    }
    return text;
}

std::string words_text(const std::vector<std::string>& words)
{
    std::string text;
    for (std::size_t i = 0; i < words.size(); ++i) {
        text += (i == 0 ? "" : i + 1 == words.size() ? " or " : ", ") + words[i];
    }
    return text;
}

/// The help of a flag; `turned`: of the one that turns a truth off; `of_merge`: of the merge's own among options of the
/// same name.
std::string help_of(const shared_option& one, bool turned, bool of_merge)
{
    std::string text;
    if (!one.own && one.defaults.size() <= 2) { // which methods it belongs to, where these are few
        for (const auto& [who, value] : one.defaults) { text += (text.empty() ? "" : ", ") + who; }
        text += ": ";
    }
    const auto& option = one.option;
    std::string meaning = turned ? "do not " + option.meaning : option.meaning;
    if (of_merge) { meaning += " in the merge"; }
    if (!option.words.empty()) { meaning = words_text(option.words) + ": " + meaning; }
    if (text.empty() && option.words.empty() && meaning[0] >= 'a' && meaning[0] <= 'z') {
        meaning[0] = static_cast<char>(meaning[0] - 'a' + 'A');
    }
    text += meaning;
    return option.kind == taskvec::option_kind::truth ? text : text + " (default: " + defaults_text(one.defaults) + ")";
}

bool has(const std::vector<taskvec::option_description>& options, const std::string& name)
{
    return std::any_of(options.begin(), options.end(),
        [&](const taskvec::option_description& option) { return option.name == name && !option.per_task; });
}

/// Rows that a method takes for each task as well.
std::vector<std::string> names_of_each()
{
    std::vector<std::string> names;
    for (const auto& entry : all_methods()) {
        for (const auto& option : entry.options) {
            if (option.each_of.empty() || option.each_of == "weight") { continue; }
            if (!std::count(names.begin(), names.end(), option.each_of)) { names.push_back(option.each_of); }
        }
    }
    return names;
}

/// A sink that writes one tensor under several names; what is computed under the further names is let go.
class sharing_sink final : public taskvec::tensor_sink {
public:
    sharing_sink(taskvec::tensor_sink& out, const std::vector<std::pair<std::size_t, std::size_t>>& shared)
        : out_(&out)
    {
        for (const auto& [further, first] : shared) {
            further_.insert(further);
            names_[first].push_back(further);
        }
    }
    [[nodiscard]] void* direct(std::size_t index) override
    {
        return further_.contains(index) || names_.contains(index) ? nullptr : out_->direct(index);
    }
    [[nodiscard]] bool rewritable() const override { return out_->rewritable(); }
    [[nodiscard]] bool wants(std::size_t index) const override
    {
        const auto place = names_.find(index);
        return out_->wants(index)
            || (place != names_.end()
                && std::any_of(place->second.begin(), place->second.end(),
                    [&](std::size_t further) { return out_->wants(further); }));
    }
    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        if (further_.contains(index)) { return; }
        out_->write(index, offset, data, size);
        if (const auto place = names_.find(index); place != names_.end()) {
            for (const std::size_t further : place->second) { out_->write(further, offset, data, size); }
        }
    }

private:
    taskvec::tensor_sink* out_;
    std::set<std::size_t> further_;
    std::map<std::size_t, std::vector<std::size_t>> names_;
};

/// Values that the tables of others know, checked by them: what all of them refuse is wrong for every method.
void check_other_value(const option_value& value)
{
    std::exception_ptr refused;
    for (const auto& entry : all_methods()) {
        if (!has(entry.options, value.name)) { continue; }
        try {
            entry.check_values({value});
            return;
        }
        catch (const taskvec::invalid_argument&) {
            if (!refused) { refused = std::current_exception(); }
        }
    }
    if (refused) { std::rethrow_exception(refused); }
}

} // namespace

void add_method(method_entry entry)
{
    methods().push_back(std::move(entry));
}

register_device_merge::register_device_merge(const std::type_info& type, device_merge merge)
{
    device_merges()[type] = merge;
}

taskvec::merge_report merge_on_device(
    const std::type_info& type, const void* options, const method_call& call, taskvec::tensor_sink& out)
{
    const auto place = device_merges().find(type);
    if (place == device_merges().end()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::device_unavailable,
            taskvec::message("--device cuda: --method ", call.request.method,
                " has no device version in this build; leave --device out"));
    }
    return place->second(options, call.models, out, call.memory, call.policy);
}

taskvec::merge_report run_method(const method_entry& method, const method_call& call, taskvec::tensor_sink& out)
{
    const auto shared = shared_matrices(call.models);
    if (shared.empty()) { return method.run(call, out); }
    sharing_sink sharing(out, shared);
    return method.run(call, sharing);
}

merge_sources run_method_on_read(const method_entry& method, const method_call& call, taskvec::const_model_ref& merged)
{
    taskvec::const_model_ref apart;
    auto made = method.run_on_read(call, apart);
    std::map<std::size_t, std::size_t> first_of;
    for (const auto& [further, first] : shared_matrices(call.models)) { first_of[further] = first; }
    const auto& outputs = call.models.outputs();
    merged = {};
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        const auto first = first_of.find(i);
        const auto& name = outputs[first == first_of.end() ? i : first->second].name;
        merged.insert(outputs[i].name, *apart.find(name));
    }
    return made;
}

const std::vector<method_entry>& all_methods()
{
    static const bool sorted = [] {
        std::stable_sort(methods().begin(), methods().end(),
            [](const method_entry& a, const method_entry& b) { return a.place < b.place; });
        return true;
    }();
    (void)sorted;
    return methods();
}

const method_entry* method_named(std::string_view name)
{
    for (const auto& entry : all_methods()) {
        if (entry.name == name || std::count(entry.aliases.begin(), entry.aliases.end(), name)) { return &entry; }
    }
    return nullptr;
}

std::vector<described> method_tables()
{
    std::vector<described> tables;
    for (const auto& entry : all_methods()) { tables.push_back({entry.name, entry.options}); }
    return tables;
}

const std::vector<std::string>& merge_request::list(const std::string& name) const
{
    static const std::vector<std::string> none;
    const auto place = lists.find(name);
    return place == lists.end() ? none : place->second;
}

void add_described_options(command& verb, const std::vector<described>& own, const std::vector<described>& others,
    option_values& values, const std::map<std::string, std::string>& renamed, values_by_tensor by_tensor)
{
    const std::string by_tensor_help = "; REGEX=X for tensors that match";
    const auto add = [&](const shared_option& one) {
        const auto place = renamed.find(one.option.name);
        const bool other = !one.own && place != renamed.end();
        const std::string word = other ? place->second : one.option.name;
        const auto give = [&values, word](const std::string& flag, const std::string& text) {
            values.push_back({word, text, flag});
        };
        const auto give_number = [&values, word](const std::string& flag, const std::string& text) {
            auto value = parse_value(word, text, flag);
            if (!value.by_tensor && std::any_of(values.begin(), values.end(), [&](const option_value& other) {
                    return other.name == word && !other.by_tensor;
                })) {
                throw usage_error(flag + " is given twice for all tensors; only REGEX=VALUE may be repeated");
            }
            values.push_back(std::move(value));
        };
        const std::string flag = "--" + word;
        if (one.option.kind == taskvec::option_kind::number && by_tensor != values_by_tensor::never) {
            // A verb's own (the density of deltas) is one number, and says so where it is given.
            const bool taken = by_tensor == values_by_tensor::taken && !one.own;
            verb.take(
                flag, one.option.unit, help_of(one, false, other) + (taken ? by_tensor_help : ""),
                [give_number, flag](const std::string& text) { give_number(flag, text); }, true);
        }
        else if (one.option.kind != taskvec::option_kind::truth) {
            verb.take(flag, one.option.unit, help_of(one, false, other),
                [give, flag](const std::string& text) { give(flag, text); });
            if (!one.option.words.empty()) { verb.choices(flag, one.option.words); }
        }
        else if (one.option.negated.empty()) {
            verb.take(flag, help_of(one, false, other), [give, flag] { give(flag, "true"); });
        }
        else {
            const std::string off = "--" + one.option.negated;
            verb.take(off, help_of(one, true, other), [give, off] { give(off, "false"); });
        }
    };
    const auto list = shared_options(own, others);
    for (const auto& one : list) {
        add(one);
        if (one.own && renamed.contains(one.option.name)) { // the others have it under another flag
            for (const auto& other : shared_options({}, others)) {
                if (other.option.name == one.option.name) { add(other); }
            }
        }
    }
}

void add_merge_options(command& verb, merge_request& request, const std::vector<described>& own,
    const std::map<std::string, std::string>& renamed, values_by_tensor by_tensor)
{
    add_described_options(verb, own, method_tables(), request.options, renamed, by_tensor);
    verb.take(
        "--weight", "REGEX=W",
        "A weight for tensors that match, of the --task before it; several (W,W,…) are spread over the layers",
        [](const std::string&) { }, true);
    const auto of_each = names_of_each();
    for (const auto& name : of_each) {
        verb.take(
            "--task-" + name, "[REGEX=]X",
            "Its own " + name + " for the --task before it; several (X,X,…) are spread over the layers",
            [](const std::string&) { }, true);
    }
    verb.after_parse([&request, of_each](const std::vector<std::pair<std::string, std::string>>& given) {
        std::string task;
        for (const auto& [flag, value] : given) {
            if (flag == "--task" || flag == "--task-adapter") { task = value; }
            for (const auto& name : of_each) {
                if (flag != "--task-" + name) { continue; }
                if (task.empty()) {
                    throw usage_error(flag + " '" + value + "' stands before every --task; it belongs after one");
                }
                request.of_tasks[task].push_back(parse_value(name, value, flag));
            }
            if (flag != "--weight") { continue; }
            if (task.empty()) {
                throw usage_error("--weight '" + value + "' stands before every --task; it belongs after one");
            }
            auto parsed = parse_value("weight", value, "--weight");
            if (!parsed.by_tensor) {
                throw usage_error(
                    "--weight '" + value + "' names no tensors; expected REGEX=W, and PATH=W for a whole model");
            }
            request.weights[task].push_back(std::move(parsed));
        }
    });
    for (const auto& entry : all_methods()) {
        for (const auto& list : entry.lists) {
            verb.take_all("--" + list.name, list.unit, entry.name + ": " + list.help,
                [&request, name = list.name](const std::vector<std::string>& texts) { request.lists[name] = texts; });
        }
    }
    add_dtype_option(verb, request.dtype, dtype_of_result);
    add_tensor_options(verb, request, "; others are copied from the base");
    add_overflow_option(verb, request.overflow);
    add_shard_size_option(verb, request.shard_size);
    add_run_options(verb, request.run);
}

void add_method_option(command& verb, merge_request& request, presence how, const std::string& help)
{
    std::vector<std::string> names;
    for (const auto& entry : all_methods()) { names.push_back(entry.name); }
    for (const auto& entry : all_methods()) { names.insert(names.end(), entry.aliases.begin(), entry.aliases.end()); }
    verb.word("--method", request.method, names, "METHOD", help, false, how);
    verb.after_parse([&request](const std::vector<std::pair<std::string, std::string>>&) {
        if (const auto* entry = method_named(request.method)) { request.method = entry->name; }
    });
}

std::string method_list()
{
    std::size_t width = 0;
    for (const auto& entry : all_methods()) { width = std::max(width, entry.name.size() + 2); }
    std::string text;
    for (const auto& entry : all_methods()) {
        text += "  " + entry.name + std::string(width - entry.name.size(), ' ') + entry.line;
        for (const auto& alias : entry.aliases) { text += " (also: " + alias + ")"; }
        text += "\n";
    }
    return text;
}

void note_zero_lambda(const run_options& run, const option_values& values)
{
    const option_value* last = nullptr;
    for (const auto& value : values) {
        if (value.name != "lambda") { continue; }
        if (value.by_tensor) { return; }
        last = &value;
    }
    if (last && std::strtod(last->text.c_str(), nullptr) == 0) {
        note(run, last->flag + " is 0: no task adds anything");
    }
}

void check_usage(const std::function<void()>& check)
{
    try {
        check();
    }
    catch (const taskvec::invalid_argument& wrong) {
        throw usage_error(wrong.what());
    }
}

void check_options(const merge_request& request, const std::string& who, const described& table,
    const std::vector<std::string>& lists, const std::function<void(const option_values&)>& check_values)
{
    check_usage([&] {
        for (const auto& value : request.options) {
            if (has(table.options, value.name)) { continue; }
            check_other_value(value);
        }
        check_values(request.options);
    });
    std::set<std::string> without_effect;
    for (const auto& value : request.options) {
        if (!has(table.options, value.name)) { without_effect.insert(value.flag); }
    }
    for (const auto& [name, texts] : request.lists) {
        if (!std::count(lists.begin(), lists.end(), name)) { without_effect.insert("--" + name); }
    }
    for (const auto& flag : without_effect) { note(request.run, flag + " has no effect on " + who); }
}

const method_entry& find_method(const merge_request& request)
{
    const auto* const place = method_named(request.method);
    if (!place) { throw usage_error("--method '" + request.method + "' is unknown"); }
    const std::string who = "--method " + place->name;
    if (place->needs_base && request.base.empty()) { throw usage_error("--base is required by " + who); }
    std::vector<std::string> lists;
    for (const auto& list : place->lists) { lists.push_back(list.name); }
    check_options(request, who, {place->name, place->options}, lists, place->check_values);
    for (const auto& list : place->lists) {
        const auto count = request.list(list.name).size();
        if (list.per_task && count != request.tasks.size()) {
            throw usage_error(who + " needs one --" + list.name + " " + list.unit
                + " for each --task, in task order: there " + (count == 1 ? "is 1" : "are " + std::to_string(count))
                + " for " + counted(request.tasks.size(), "task"));
        }
    }
    for (const auto& [task, values] : request.of_tasks) {
        for (const auto& value : values) {
            const auto takes = [&](const taskvec::option_description& option) { return option.each_of == value.name; };
            if (std::none_of(place->options.begin(), place->options.end(), takes)) {
                throw usage_error(value.flag + " '" + value.text + "': " + who + " takes no " + value.name
                    + " of each task" + (has(place->options, value.name) ? ": give one for all" : ""));
            }
            check_usage([&] { place->check_values({value}); });
        }
    }
    if (place->check) { place->check(request); }
    if (!place->weighted) {
        check_no_weights(request, who, place->without_weights);
        if (!request.weights.empty()) {
            throw usage_error(who + " has no meaning for --weight: " + place->without_weights);
        }
    }
    return *place;
}

nlohmann::ordered_json json_of(const std::vector<taskvec::option_description>& values)
{
    auto object = nlohmann::ordered_json::object();
    for (const auto& option : values) {
        if (option.per_task) { continue; }
        std::string key = option.name;
        std::replace(key.begin(), key.end(), '-', '_');
        switch (option.kind) {
        case taskvec::option_kind::truth: object[key] = option.initial == "true"; break;
        case taskvec::option_kind::number: object[key] = std::strtod(option.initial.c_str(), nullptr); break;
        case taskvec::option_kind::whole_number:
            object[key] = std::strtoull(option.initial.c_str(), nullptr, 10);
            break;
        default: object[key] = option.initial;
        }
    }
    return object;
}

nlohmann::ordered_json report_of(const runner& run, const merge_request& request, const merge_inputs& inputs,
    const taskvec::merge_report& merged, std::uint64_t written)
{
    nlohmann::ordered_json report;
    if (!request.method.empty()) { report["method"] = request.method; }
    report["output"] = request.out;
    report["seconds"] = run.seconds();
    report["bytes_read"] = merged.walks * inputs.models().bytes() + merged.beside + inputs.copied_bytes();
    report["bytes_written"] = written;
    report["peak_memory"] = peak_memory();
    report["peak_anonymous_memory"] = run.anonymous_peak();
    report["walks"] = merged.walks;
    if (auto given = json_by_tensor(request); !given.empty()) { report["by_tensor"] = std::move(given); }
    report["elements"] = inputs.models().elements();
    if (request.overflow == "saturate") { report["saturated"] = merged.saturated; }
    const auto kept = merged.kept.empty() ? taskvec::nonzero_entries(run.policy(), inputs.models()) : merged.kept;
    report["tasks"] = nlohmann::ordered_json::array();
    for (std::size_t t = 0; t < inputs.arguments().size(); ++t) {
        const auto& task = inputs.arguments()[t];
        nlohmann::ordered_json entry{{"name", task.name}, {"path", task.path.string()}, {"weight", task.weight}};
        if (inputs.adapter(t)) {
            entry["weight"] = 1;
            entry["adapter_weight"] = task.weight;
        }
        if (const auto own = request.of_tasks.find(task.text); own != request.of_tasks.end()) {
            for (const auto& value : own->second) {
                if (!value.by_tensor) { entry[value.name] = std::strtod(value.text.c_str(), nullptr); }
            }
        }
        if (const auto view = request.views.find(task.text); view != request.views.end()) {
            entry["layers"] = nlohmann::ordered_json::array(); // of the result, in order
            for (const auto& part : view->second) {
                entry["layers"].push_back({{"path", part.path}, {"first", part.first}, {"last", part.last}});
            }
        }
        if (inputs.models().filled()[t] > 0) { entry["missing"] = inputs.models().filled()[t]; }
        entry["kept"] = kept[t];
        entry["conflicting"] =
            t < merged.conflicting.size() ? merged.conflicting[t] : 0; // without an election nothing conflicts
        report["tasks"].push_back(std::move(entry));
    }
    return report;
}

nlohmann::ordered_json norms_of(const taskvec::cpu& policy, const taskvec::aligned_models& models)
{
    const auto norms = taskvec::norms_of(policy, models);
    auto list = nlohmann::ordered_json::array();
    for (std::size_t i = 0; i < norms.size(); ++i) {
        nlohmann::ordered_json entry{{"name", models.tensors()[i].name}, {"norm", norms[i].norm}};
        if (models.has_base()) { entry["change"] = norms[i].change; }
        list.push_back(std::move(entry));
    }
    return list;
}

} // namespace tool
