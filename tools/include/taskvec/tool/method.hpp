// Methods of the command line: one object makes an options struct with a table a `--method` of merge, peru-fft and
// sweep, with its flags, defaults, notes, report keys and sweep axes.
// SPDX-License-Identifier: Apache-2.0
//
// A method of your own, in your own build of the tool, is one file that links with taskvec::tool_main:
//
//     #include <taskvec/tool/method.hpp>
//     const tool::register_method<mine::options> entry("mine", "what it does, by --share ({share})", 1000);
#pragma once

#include <taskvec/core/csv.hpp>
#include <taskvec/core/option_text.hpp>
#include <taskvec/methods/merge_on_read.hpp>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <typeinfo>
#include <utility>
#include <vector>

namespace tool {

struct merge_request; // methods.hpp: the command line of a verb that merges
class merge_inputs; // models.hpp: the models that it names

/// Layers [first, last) of the result, and what stands before or after all layers.
struct part_of_model {
    std::size_t first = 0, last = 0;
    bool begins = false, ends = false;
    [[nodiscard]] bool holds(std::string_view tensor) const;
};

/// What the command line gives for a row of a table: its text, and the flag that messages name. By tensor: numbers for
/// the tensors that a pattern occurs in (an empty one: all), spread over the layers where there are several.
struct option_value {
    std::string name, text, flag;
    bool by_tensor = false;
    std::string pattern{};
    std::vector<double> numbers{};
    /// A pattern may match nothing, and tensors outside of the layers have the first of several numbers.
    bool as_in_mergekit = false;
    std::optional<part_of_model> part{}; ///< where it holds, and over what it is spread; nothing: everywhere
};
using option_values = std::vector<option_value>;

/// A repeatable option of a method that is no member of its table: files of statistics, patterns of names.
struct list_option {
    std::string name, unit, help;
    bool per_task = false; ///< one for each task, in task order: required
};

/// What a method reads beside the models; lives until the merge is done.
class attachment {
public:
    attachment() = default;
    attachment(const attachment&) = delete;
    attachment& operator=(const attachment&) = delete;
    virtual ~attachment() = default;
    /// Bytes that were read to check it, for reports.
    [[nodiscard]] virtual std::uint64_t bytes_read() const { return 0; }
};

/// What a method is run on.
struct method_call {
    const taskvec::cpu& policy;
    const taskvec::aligned_models& models;
    const option_values& values;
    const std::vector<double>& weights; ///< one for each task
    const merge_request& request;
    const merge_inputs& inputs;
    bool on_device = false; ///< --device cuda
    std::size_t memory = 0; ///< --memory
    std::function<option_values(std::string_view)> values_of{}; ///< of a tensor; empty: all have the same
    std::function<std::vector<double>(std::string_view)> weights_of{}; ///< the same of weights
    std::vector<option_values> of_tasks{}; ///< what tasks have for themselves: for each of them, or none
    std::function<std::vector<option_values>(std::string_view)>
        of_tasks_in{}; ///< of a tensor; empty: all have the same
};

/// What a merge lives on that is made when its result is read.
struct merge_sources {
    std::unique_ptr<attachment> beside{};
    std::vector<std::unique_ptr<taskvec::operand_source>> sources{};
};

/// What a method says beside its table. All of it may be left out.
template <class Options>
struct method_details {
    bool needs_base = true;
    std::string without_weights = "leave the weight out"; ///< the mend for a task's weight, where the table has no row
    std::vector<list_option> lists{};
    std::vector<std::string> aliases{}; ///< other names that --method takes, mergekit's; reports say the method's own
    /// Checks what needs no models.
    void (*check)(const merge_request&) = nullptr;
    /// Opens what is read beside the models, and points the options to it.
    std::unique_ptr<attachment> (*attach)(const method_call&, Options&) = nullptr;
    /// Checks, for a dry run, what attach() found against the models.
    void (*examine)(const taskvec::cpu&, const taskvec::aligned_models&, const Options&) = nullptr;
};

/// A method without its type.
struct method_entry {
    std::string name, line;
    std::vector<std::string> aliases;
    int place = 0;
    bool needs_base = true, weighted = false;
    std::string without_weights;
    std::vector<taskvec::option_description> options;
    std::vector<list_option> lists;
    void (*check)(const merge_request&) = nullptr;
    /// Throws invalid_argument for a text that is no value of its row.
    std::function<void(const option_values&)> check_values;
    /// All options with the values that they have, defaults included.
    std::function<std::vector<taskvec::option_description>(const option_values&)> values;
    std::function<void(const method_call&)> examine;
    std::function<taskvec::merge_report(const method_call&, taskvec::tensor_sink&)> run;
    /// Makes a model whose tensors are worked out when they are read (merge_on_read()); empty where the method cannot.
    std::function<merge_sources(const method_call&, taskvec::const_model_ref&)> run_on_read{};
};
void add_method(method_entry entry);

/// merge() on the device, by what a device file registered for this type (device.hpp). Throws invalid_argument where
/// none did.
[[nodiscard]] taskvec::merge_report merge_on_device(
    const std::type_info& type, const void* options, const method_call& call, taskvec::tensor_sink& out);

/// Sets what was given for all tensors, presets first; names that the table lacks are passed over.
template <taskvec::described_options Options>
void apply_options(Options& options, const option_values& values)
{
    const auto descriptions = taskvec::describe_options<Options>();
    for (const bool presets : {true, false}) {
        for (const auto& value : values) {
            if (value.by_tensor) { continue; }
            for (const auto& option : descriptions) {
                if (option.name == value.name && option.is_preset == presets) {
                    (void)taskvec::set_option(options, value.name, value.text, value.flag);
                }
            }
        }
    }
}

/// The table of a struct that has these values: `initial` is what a member holds.
template <taskvec::described_options Options>
[[nodiscard]] std::vector<taskvec::option_description> described_values(const option_values& given)
{
    Options options{};
    apply_options(options, given);
    auto list = taskvec::describe_options<Options>();
    taskvec::for_each_option(options, [&](const auto& row, const auto& member) {
        for (auto& option : list) {
            if (option.name == row.name) { option.initial = taskvec::write_option(member); }
        }
    });
    for (auto& option : list) {
        for (const auto& value : given) {
            if (option.is_preset && option.name == value.name) { option.initial = value.text; }
        }
    }
    return list;
}

/// Registers a method for as long as it lives: an object at namespace level.
template <class Options>
class register_method {
    static_assert(taskvec::described_options<Options>,
        "taskvec: this options struct has no table: specialise taskvec::options_of for it (core/option_table.hpp)");

public:
    /// `line`: one line for the help; {name} stands for an option's default. `place`: in lists of methods.
    register_method(std::string name, std::string line, int place, method_details<Options> details = {})
    {
        method_entry entry;
        entry.name = std::move(name);
        entry.place = place;
        entry.needs_base = details.needs_base;
        entry.without_weights = details.without_weights;
        entry.options = taskvec::describe_options<Options>();
        for (const auto& option : entry.options) {
            const std::string field = "{" + option.name + "}";
            if (const auto at = line.find(field); at != line.npos) { line.replace(at, field.size(), option.initial); }
            entry.weighted = entry.weighted || option.each_of == "weight";
        }
        entry.line = std::move(line);
        entry.lists = std::move(details.lists);
        entry.aliases = std::move(details.aliases);
        entry.check = details.check;
        entry.check_values = [](const option_values& values) {
            Options options{};
            apply_options(options, values);
            for (const auto& value : values) {
                for (const double number : value.numbers) {
                    apply_options(options, {{value.name, taskvec::csv_number(number), value.flag}});
                }
            }
        };
        entry.values = [](const option_values& values) { return described_values<Options>(values); };
        const auto attach = details.attach;
        const auto examine = details.examine;
        entry.examine = [attach, examine](const method_call& call) {
            auto options = options_of_call(call);
            const auto held = attach ? attach(call, options) : nullptr;
            if (examine) { examine(call.policy, call.models, options); }
        };
        entry.run = [attach](const method_call& call, taskvec::tensor_sink& out) {
            auto options = options_of_call(call);
            const auto held = attach ? attach(call, options) : nullptr;
            const auto merged = [&] {
                if (call.on_device) { return merge_on_device(typeid(Options), &options, call, out); }
                if (same_in_all(call)) { return taskvec::merge(call.policy, options, call.models, out); }
                const auto of = [&](std::string_view tensor) { return options_in(call, options, tensor); };
                return taskvec::merge_by_tensor<Options>(call.policy, of, call.models, out);
            };
            auto report = merged();
            if (held) { report.beside += held->bytes_read(); }
            return report;
        };
        if constexpr (taskvec::merges_on_read<Options>) {
            entry.run_on_read = [attach](const method_call& call, taskvec::const_model_ref& merged) {
                auto options = options_of_call(call);
                merge_sources made{attach ? attach(call, options) : nullptr};
                const auto of = [&](std::string_view tensor) { return options_in(call, options, tensor); };
                made.sources = same_in_all(call)
                    ? taskvec::merge_on_read(call.policy, options, call.models, merged)
                    : taskvec::merge_on_read_by_tensor<Options>(call.policy, of, call.models, merged);
                return made;
            };
        }
        add_method(std::move(entry));
    }

private:
    [[nodiscard]] static bool same_in_all(const method_call& call)
    {
        return !call.values_of && !call.weights_of && !call.of_tasks_in;
    }
    [[nodiscard]] static Options options_in(const method_call& call, Options its, std::string_view tensor)
    {
        if (call.values_of) { apply_options(its, call.values_of(tensor)); }
        if (call.weights_of) { set_weights(its, call.weights_of(tensor)); }
        set_of_tasks(its, call.of_tasks_in ? call.of_tasks_in(tensor) : call.of_tasks);
        return its;
    }
    static Options options_of_call(const method_call& call)
    {
        Options options{};
        apply_options(options, call.values);
        set_weights(options, call.weights);
        set_of_tasks(options, call.of_tasks);
        return options;
    }
    /// Lists of what each task has for itself; the others have what holds for all.
    static void set_of_tasks(Options& options, const std::vector<option_values>& of_tasks)
    {
        taskvec::for_each_option(options, [&]<class Value>(const auto& row, Value& member) {
            if constexpr (std::is_same_v<Value, std::vector<double>>) {
                if (row.each_of.empty() || row.each_of == "weight") { return; }
                std::vector<double> list;
                bool any = false;
                for (const auto& values : of_tasks) {
                    Options its = options;
                    for (const auto& value : values) {
                        if (value.name != row.each_of) { continue; }
                        any = true;
                        apply_options(its, {value});
                    }
                    list.push_back(number_of(its, row.each_of));
                }
                if (any) { member = std::move(list); }
            }
        });
    }
    static double number_of(const Options& options, std::string_view name)
    {
        double number = 0;
        taskvec::for_each_option(options, [&]<class Value>(const auto& row, const Value& member) {
            if constexpr (std::is_floating_point_v<Value>) {
                if (row.name == name) { number = static_cast<double>(member); }
            }
        });
        return number;
    }
    static void set_weights(Options& options, const std::vector<double>& weights)
    {
        taskvec::for_each_option(options, [&]<class Value>(const auto& row, Value& member) {
            if constexpr (std::is_same_v<Value, std::vector<double>>) {
                if (row.each_of == "weight") { member = weights; }
            }
        });
    }
};

} // namespace tool
