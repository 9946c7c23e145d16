// One document of a configuration becomes a request.
// SPDX-License-Identifier: Apache-2.0
#include "config_document.hpp"

#include "config_parameters.hpp"
#include "config_tensors.hpp"
#include "config_tokenizer.hpp"
#include "words.hpp"

#include <algorithm>
#include <functional>
#include <optional>

namespace tool::configuration {

namespace {

/// One document of a file.
class reader {
public:
    /// `there`: whether the results of stages are.
    reader(run_settings& given, const YAML::Node& document, const stages& others, bool there)
        : it_(given, others, there)
        , where_(it_.where)
        , document_(document)
        , slices_(it_.slices)
        , request_(it_.request())
    { }

    void read()
    {
        const mapping top(where_, document_, "a configuration",
            {"merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype", "parameters",
                "tokenizer_source", "tokenizer", "chat_template", "taskvec", "name"});
        read_method(top);
        read_models(it_, top);
        read_dtype(top);
        const auto own = read_own(top);
        read_parameters(it_);
        request_.options.insert(request_.options.end(), own.begin(), own.end());
        read_tokenizer(it_, top);
        read_chat_template(it_, top);
        if (it_.models_are_there()) { look_at_tensors(it_); }
    }

    /// The other documents whose results this one takes, once it is read: where each is named first.
    [[nodiscard]] const stages_named& needs() const { return it_.names.needs(); }

private:
    void read_method(const mapping& top)
    {
        const auto one = top.find("merge_method");
        if (!one) { where_.fail(top.node(), "'merge_method' is missing"); }
        const auto name = scalar_of(where_, one->value, "merge_method");
        std::vector<std::string> known;
        for (const auto& method : mergekit_methods()) {
            known.push_back(method.theirs);
            if (method.theirs == name) { it_.method = &method; }
        }
        it_.at_method = one->value;
        it_.given.at_method = where_.of(one->value);
        auto ours = name; // the names of --method do as well
        std::replace(ours.begin(), ours.end(), '_', '-');
        if (const auto* entry = method_named(ours); entry && !it_.method) {
            for (const auto& method : mergekit_methods()) {
                if (method.ours == entry->name) { it_.method = &method; }
            }
        }
        if (!it_.method) {
            where_.fail(one->value, "merge_method '" + shown(name) + "' is unknown" + meant(name, known));
        }
        request_.method = it_.method->ours;
    }

    void read_dtype(const mapping& top)
    {
        for (const auto* key : {"dtype", "out_dtype"}) {
            const auto one = top.find(key);
            if (!one) { continue; }
            auto word = scalar_of(where_, one->value, key);
            if (word.starts_with("torch.")) { word.erase(0, std::string_view("torch.").size()); }
            const bool of_result = std::string_view(key) == "out_dtype";
            if (word == "float64" && !of_result) {
                where_.fail(one->value,
                    "dtype is 'float64', and sums are f64 only where a model is; expected float32, with out_dtype: "
                    "float64 for a result in it");
            }
            const auto dtype = word == "float32" ? "f32"
                : word == "bfloat16"             ? "bf16"
                : word == "float16"              ? "f16"
                : word == "float64"              ? "f64"
                                                 : "";
            if (*dtype == '\0') {
                auto known = std::vector<std::string>{"float32", "bfloat16", "float16"};
                if (of_result) { known.emplace_back("float64"); }
                where_.fail(one->value, std::string(key) + " is '" + shown(word) + "'" + meant(word, known));
            }
            request_.dtype = dtype;
        }
    }

    /// What stands under `taskvec`: whose definitions to follow, and options that mergekit has no word for.
    option_values read_own(const mapping& top)
    {
        option_values options;
        std::string semantics = "mergekit";
        if (const auto one = top.find("taskvec")) {
            const auto& entries = all_methods();
            const auto& rows = std::find_if(entries.begin(), entries.end(), [&](const method_entry& entry) {
                return entry.name == it_.method->ours;
            })->options;
            std::vector<std::string> known{"semantics"};
            for (const auto& row : rows) {
                if (!row.is_preset && !row.per_task) { known.push_back(row.name); }
            }
            const auto entries_of_own = mapping(where_, one->value, "'taskvec'", known).entries();
            for (const auto& entry : entries_of_own) {
                const auto word = scalar_of(where_, entry.value, entry.name);
                if (entry.name != "semantics") {
                    options.push_back({entry.name, word, where_.of(entry.value) + ": " + entry.name});
                    continue;
                }
                if (word != "mergekit" && word != "paper") {
                    where_.fail(entry.value, "semantics is '" + shown(word) + "'" + meant(word, {"mergekit", "paper"}));
                }
                semantics = word;
            }
        }
        if (it_.given.semantics.empty()) { it_.given.semantics = semantics; }
        return options;
    }

    reading it_;
    const place& where_;
    YAML::Node document_;
    std::vector<slice>& slices_;
    merge_request& request_;
};

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

} // namespace

stages_named read_document(run_settings& given, const YAML::Node& document, const stages& others, bool there)
{
    try {
        reader one(given, document, others, there);
        one.read();
        (void)find_method(given.request);
        return one.needs();
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
        merge();
    }
    catch (const taskvec::invalid_argument& wrong) {
        using code = taskvec::error_code;
        const bool of_values = wrong.code() == code::weights_sum_zero || wrong.code() == code::parameter_out_of_range
            || wrong.code() == code::no_solution;
        if (!of_values) { throw; }
        taskvec::raise<taskvec::invalid_argument>(wrong.code(), placed(given, wrong.what()));
    }
}

} // namespace tool::configuration
