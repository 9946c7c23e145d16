// What the verbs on LoRA adapters share: the options about ranks and the output, reading, and reports.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "arguments.hpp"
#include "command.hpp"
#include "models.hpp"
#include "report.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <taskvec/adapters/lora.hpp>
#include <taskvec/core/matrix.hpp>
#include <taskvec/formats/delta.hpp>
#include <taskvec/formats/peft.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace tool {

// The command line.

/// What PEFT's configuration says of the model, by which AutoPeftModel loads an adapter.
struct peft_words {
    std::string base_name, task_type; ///< empty: as the adapter says
};
inline constexpr const char* as_adapter_says = "as the adapter says";
/// Adds --base-name and --task-type. `base_name`, `task_type`: what they are by default.
void add_peft_words(command& verb, peft_words& words, const std::string& base_name = as_adapter_says,
    const std::string& task_type = as_adapter_says);
/// The modules that PEFT trains and saves whole in models of a task type, by the ends of their names: heads of
/// classifiers.
[[nodiscard]] const std::vector<std::string>& heads_of_task(const std::string& task_type);
/// Throws usage_error where --task-type names a task whose heads PEFT looks for whole, and the adapter has factors of
/// one of `modules` in its place.
void check_task_type(const peft_words& words, const std::vector<std::string>& modules);
/// Notes a rank that vLLM does not serve.
void note_high_rank(const run_options& run, std::size_t rank);
/// Notes what AutoPeftModel needs and a configuration does not say.
void note_missing_words(const run_options& run, const nlohmann::json& config);

/// What every verb that writes an adapter is told.
struct adapter_settings {
    std::string out, dtype = "keep";
    std::string overflow = "error";
    std::string modules_to_save = "error"; ///< what becomes of whole modules: error, equal, average, first or drop
    peft_words words;
    bool makes_adapter = false; ///< of what was none: what AutoPeftModel needs, and nothing gives, is noted
    run_options run;

    /// Nothing for `keep`.
    [[nodiscard]] std::optional<taskvec::dtype> output() const { return output_dtype(dtype); }
};
/// Adds --dtype, whose `keep` means `kept`, add_peft_words() and the options of every run.
void add_adapter_options(command& verb, adapter_settings& settings, const std::string& kept = "the adapter's",
    const std::string& base_name = as_adapter_says, const std::string& task_type = as_adapter_says);
/// Adds --modules-to-save.
void add_modules_to_save(command& verb, adapter_settings& settings);

/// --rank or --energy.
struct rank_settings {
    std::optional<std::size_t> rank;
    std::optional<double> energy;
    bool clamp = false;

    [[nodiscard]] bool given() const { return rank || energy; }
    /// Throws usage_error where neither was given, or an energy that is not a share.
    [[nodiscard]] taskvec::rank_choice choice() const;
    /// "rank 8" or "99% of the energy", of what came out: a rank that was lowered is the one that the layers have.
    [[nodiscard]] std::string words(const std::vector<taskvec::layer_report>& layers) const;
};
void add_rank_options(command& verb, rank_settings& settings);

// Adapters.

/// The field of PEFT's configuration by which a head is adapted as the embedding that it is one matrix with.
inline constexpr const char* weight_tying = "ensure_weight_tying";

/// ΔWᵀ for ΔW.
template <class T>
[[nodiscard]] taskvec::lora_update<T> transposed(const taskvec::lora_update<T>& update)
{
    return {taskvec::transposed_copy(update.a), taskvec::transposed_copy(update.b), update.scaling};
}

/// Bytes of an adapter's two files; 0 for what is not there.
[[nodiscard]] std::uint64_t adapter_bytes(const fs::path& directory);
/// True when a file is there and holds f64: everything then computes in f64. What is not there is for read_peft() to
/// report.
[[nodiscard]] bool adapter_is_wide(const fs::path& directory);
/// Calls f(std::type_identity<T>{}) with the type to compute in.
template <class F>
void in_precision(bool wide, F&& f)
{
    if (wide) { f(std::type_identity<double>{}); }
    else {
        f(std::type_identity<float>{});
    }
}

/// Takes away what an adapter carries beside its factors, but for copies of base weights and the biases that it
/// announces. With the head of a classifier goes the task type, by which PEFT would look for it: that is noted, and
/// throws usage_error where --task-type gives another such.
void drop_whole_modules(const adapter_settings& settings, std::map<std::string, taskvec::peft_tensor>& others,
    nlohmann::json& config, const std::string& label);

/// Notes modules that a configuration says were trained whole (modules_to_save), where none of `tensors`, which came
/// with the factors, is of them.
void note_modules_not_saved(const run_options& run, const nlohmann::json& config,
    const std::map<std::string, taskvec::peft_tensor>& tensors, const std::string& label);

/// Throws, naming the verb that goes on, for an adapter of another dialect than PEFT's: a file, or a directory of
/// another one's names.
void check_peft_directory(const fs::path& path);

/// read_peft(), which then looks for NaN and infinity, so that the message names the file.
template <class T>
[[nodiscard]] taskvec::peft_adapter<T> read_adapter(const fs::path& directory, const adapter_settings& settings)
{
    check_peft_directory(directory);
    auto adapter = taskvec::read_peft<T>(directory,
        {.whole_modules = settings.modules_to_save != "error",
            .whole_modules_word = "--modules-to-save",
            .fold_word = "fold it into its base (taskvec fuse), and take a LoRA of the result (taskvec extract-lora)",
            .convert_word = "write it as the LoRA that it equals (taskvec convert --as peft)"});
    for (const auto& text : adapter.notes) { note(settings.run, text); }
    if (settings.modules_to_save == "drop") {
        drop_whole_modules(settings, adapter.others, adapter.config, in_quotes(directory));
    }
    note_modules_not_saved(settings.run, adapter.config, adapter.others, in_quotes(directory));
    const auto check = [&](auto&& value, std::size_t size, const auto&... where) {
        for (std::size_t i = 0; i < size; ++i) {
            if (std::isfinite(value(i))) { continue; }
            taskvec::raise<taskvec::nonfinite_error>(taskvec::error_code::not_finite,
                taskvec::message("'", (directory / taskvec::peft_model_name).string(), "': ", where..., " holds ",
                    std::isnan(value(i)) ? "NaN" : "infinity", " at entry ", i,
                    "; repair the adapter or leave it out"));
        }
    };
    for (const auto& [name, update] : adapter.updates) {
        check([b = update.b.data()](std::size_t i) { return b[i]; }, update.b.size(), "lora_B of module '", name, "'");
        check([a = update.a.data()](std::size_t i) { return a[i]; }, update.a.size(), "lora_A of module '", name, "'");
    }
    for (const auto& other : adapter.others) {
        if (!taskvec::is_storage(other.second.dtype)) { continue; }
        taskvec::visit_storage(other.second.dtype, other.first, [&]<class S>(std::type_identity<S>) {
            const auto at = [bytes = other.second.bytes.data()](std::size_t i) {
                S value;
                std::memcpy(&value, bytes + i * sizeof(S), sizeof(S));
                return taskvec::widen<taskvec::arithmetic_type<S>>(value);
            };
            check(at, other.second.bytes.size() / sizeof(S), "tensor '", other.first, "'");
        });
    }
    return adapter;
}

// Results.

/// The report's list of layers.
[[nodiscard]] nlohmann::ordered_json layers_of(const std::vector<taskvec::layer_report>& layers);

/// What was done, in a report: the layers and their totals.
template <class T>
void add_result(nlohmann::ordered_json& content, const taskvec::adapter_result<T>& result)
{
    const double error = result.relative_error();
    content["layers"] = layers_of(result.layers);
    content["parameters"] = result.parameters();
    content["energy"] = 1 - error * error;
    content["relative_error"] = error;
}

/// Claims --out and --report of a verb, and opens the report, before the work, so that a path that cannot be written is
/// known early; in a dry run nothing is opened. `inputs`: adapters, of which no report may replace a file.
[[nodiscard]] inline report_file open_report(
    const adapter_settings& settings, const std::vector<std::string>& inputs = {})
{
    for (const auto& input : inputs) {
        for (const auto& file : {fs::path(input) / taskvec::peft_config_name, taskvec::peft_tensor_file(input)}) {
            opened_places().push_back(place_of(file));
        }
    }
    claim_output(settings.out, "--out", output_kind::directory);
    claim_report(settings.run);
    return report_file(settings.run.dry_run ? std::string() : settings.run.report);
}

/// What an adapter cannot hold, as a delta beside it.
inline constexpr const char* rest_file = "rest.delta.safetensors";

/// An adapter's files, and with them its rest, where it has one; one of an earlier adapter goes.
struct adapter_output {
    taskvec::peft_writer& files;
    taskvec::delta_writer* rest;
    std::vector<std::string> obsolete; ///< names of files of an earlier adapter that do not fit this one
    void commit() const
    {
        if (rest) { rest->commit(); }
        files.commit(obsolete);
    }
};

/// Writes an adapter, with the words that were given in its configuration, and the report beside it: `content` and what
/// the run took. Says `summary` once both are complete,
/// before they take their names. `write_rest` makes the delta of a path, where one is wanted; `beside` are texts of
/// files that go with the adapter, by name; `without` are names of files of an earlier one that go, unless they are
/// among these.
template <class T>
void write_adapter(const adapter_settings& settings, const runner& run, report_file& report,
    taskvec::peft_adapter<T>& adapter, nlohmann::ordered_json content, std::uint64_t bytes_read,
    const std::string& summary,
    const std::function<std::unique_ptr<taskvec::delta_writer>(const fs::path&)>& write_rest = {},
    const std::map<std::string, std::string>& beside = {}, const std::vector<std::string>& without = {})
{
    if (!settings.words.base_name.empty()) { adapter.config["base_model_name_or_path"] = settings.words.base_name; }
    if (!settings.words.task_type.empty()) { adapter.config["task_type"] = settings.words.task_type; }
    std::vector<std::string> modules;
    for (const auto& one : adapter.updates) { modules.push_back(one.first); }
    check_task_type(settings.words, modules);
    std::size_t highest = 0;
    for (const auto& one : adapter.updates) { highest = std::max(highest, one.second.rank()); }
    note_high_rank(settings.run, highest);
    taskvec::peft_writer out(
        settings.out, adapter, {.output = settings.output(), .on_overflow = overflow_of(settings.overflow)});
    if (settings.makes_adapter) { note_missing_words(settings.run, adapter.config); }
    const auto rest = write_rest ? write_rest(out.folder() / rest_file) : nullptr;
    std::uint64_t bytes_beside = 0;
    for (const auto& [name, text] : beside) {
        taskvec::atomic_file file(out.folder() / name, text.size());
        file.write(0, text.data(), text.size());
        file.finish();
        file.commit();
        bytes_beside += text.size();
    }
    adapter_output files{out, rest.get(), {}};
    if (!rest) { files.obsolete.emplace_back(rest_file); }
    for (const auto& name : without) {
        if (!beside.contains(name)) { files.obsolete.push_back(name); }
    }
    content["output"] = settings.out;
    content["seconds"] = run.seconds();
    content["bytes_read"] = bytes_read;
    content["bytes_written"] = out.file_size() + (rest ? rest->file_size() : 0) + bytes_beside;
    if (rest) { content["rest"] = {{"file", rest_file}, {"entries", rest->kept()}}; }
    if (settings.overflow == "saturate") { content["saturated"] = out.saturated(); }
    content["peak_memory"] = peak_memory();
    content["peak_anonymous_memory"] = run.anonymous_peak();
    report.finish(content);
    conclude(summary + ", in " + seconds_text(run.seconds()) + "\n", report, files);
}

/// 0.0123 as "1.23%".
[[nodiscard]] std::string percent(double share);

} // namespace tool
