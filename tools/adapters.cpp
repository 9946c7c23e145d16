// What the verbs on LoRA adapters share.
// SPDX-License-Identifier: Apache-2.0
#include "adapters.hpp"

#include "adapter_table.hpp"

#include <taskvec/formats/json.hpp>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>

namespace tool {

void add_adapter_options(command& verb, adapter_settings& settings, const std::string& kept,
    const std::string& base_name, const std::string& task_type)
{
    add_dtype_option(verb, settings.dtype, "dtype of the factors (default: keep, " + kept + ")");
    add_overflow_option(verb, settings.overflow);
    add_peft_words(verb, settings.words, base_name, task_type);
    add_run_options(verb, settings.run);
}

void add_peft_words(command& verb, peft_words& words, const std::string& base_name, const std::string& task_type)
{
    verb.text("--base-name", words.base_name, "NAME",
        "What adapter_config.json says of the base, from where AutoPeftModel loads it: a path, or a name on the Hub "
        "(default: "
            + base_name + ")");
    verb.word("--task-type", words.task_type,
        {"CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"}, "TYPE",
        "The model's class for AutoPeftModel: CAUSAL_LM, SEQ_CLS, SEQ_2_SEQ_LM, TOKEN_CLS, QUESTION_ANS or "
        "FEATURE_EXTRACTION (default: "
            + task_type + ")");
}

const std::vector<std::string>& heads_of_task(const std::string& task_type)
{
    static const std::vector<std::string> none, classifiers{"classifier", "score"}, answers{"qa_outputs"};
    if (task_type == "SEQ_CLS" || task_type == "TOKEN_CLS") { return classifiers; }
    return task_type == "QUESTION_ANS" ? answers : none;
}

void check_task_type(const peft_words& words, const std::vector<std::string>& modules)
{
    for (const auto& head : heads_of_task(words.task_type)) {
        for (const auto& module : modules) {
            if (!taskvec::is_within_module(module + ".", head)) { continue; }
            throw usage_error("--task-type " + words.task_type + ": the adapter has factors of '" + printable(module)
                + "', which PEFT looks for whole in models of that type: leave the task type out, and load the adapter "
                  "by PeftModel.from_pretrained, or fold it by 'taskvec fuse'");
        }
    }
}

void note_high_rank(const run_options& run, std::size_t rank)
{
    constexpr std::size_t highest = 512; // of its --max-lora-rank
    if (rank <= highest) { return; }
    note(run,
        "the adapter's rank is " + std::to_string(rank) + ", and vLLM serves ranks up to " + std::to_string(highest)
            + ": peru-lora --rank " + std::to_string(highest) + " lowers it");
}

void note_missing_words(const run_options& run, const nlohmann::json& config)
{
    std::string lacks, mend;
    std::size_t count = 0;
    for (const auto& [field, what, flag] :
        {std::array<const char*, 3>{"base_model_name_or_path", "base", "--base-name"},
            std::array<const char*, 3>{"task_type", "task type", "--task-type"}}) {
        if (!taskvec::text_under(config, field).empty()) { continue; }
        lacks += (lacks.empty() ? "no " : " and no ") + std::string(what);
        ++count;
        mend += (mend.empty() ? "" : " and ") + std::string(flag);
    }
    if (lacks.empty()) { return; }
    note(run,
        "adapter_config.json names " + lacks + ", by which AutoPeftModel loads it: " + mend
            + (count == 1 ? " gives it" : " give them"));
}

void add_modules_to_save(command& verb, adapter_settings& settings)
{
    verb.word_or_flag("--modules-to-save", settings.modules_to_save, "equal",
        {"error", "equal", "average", "first", "drop"}, "[WHAT]",
        "Accept adapters with modules_to_save, and carry the fine-tuned weights along. Where several have some: equal "
        "(they are, "
        "the default of the flag), average (by weight), first, or drop; error accepts none");
}

void drop_whole_modules(const adapter_settings& settings, std::map<std::string, taskvec::peft_tensor>& others,
    nlohmann::json& config, const std::string& label)
{
    const auto is_head = [](const std::string& name, const std::string& task_type) {
        const auto& heads = heads_of_task(task_type);
        return std::any_of(
            heads.begin(), heads.end(), [&](const auto& one) { return taskvec::is_within_module(name, one); });
    };
    const auto trained = taskvec::text_under(config, "bias"), type = taskvec::text_under(config, "task_type");
    const bool biases = !trained.empty() && trained != "none";
    std::string head;
    std::erase_if(others, [&](const auto& one) {
        if (one.first.ends_with(taskvec::peft_base_weight)) { return false; }
        if (biases && one.first.ends_with(".bias") && !taskvec::belongs_to_saved_module(one.first, config)) {
            return false;
        }
        if (is_head(one.first, settings.words.task_type)) {
            throw usage_error("--task-type " + settings.words.task_type + ": PEFT looks for '" + printable(one.first)
                + "' in adapters of that type, which --modules-to-save drop leaves out");
        }
        if (is_head(one.first, type)) { head = one.first; }
        return true;
    });
    config["modules_to_save"] = nullptr;
    if (head.empty()) { return; }
    config["task_type"] = nullptr;
    if (!settings.words.task_type.empty()) { return; }
    note(settings.run,
        "with '" + printable(head) + "' of " + label + " goes its task type, " + type
            + ", by which PEFT would look for that: load what is written by PeftModel.from_pretrained on a model of "
              "that class");
}

void note_modules_not_saved(const run_options& run, const nlohmann::json& config,
    const std::map<std::string, taskvec::peft_tensor>& tensors, const std::string& label)
{
    const auto saved = config.find("modules_to_save");
    if (saved == config.end() || !saved->is_array()) { return; }
    const auto there = [&](const std::string& module) {
        return std::any_of(tensors.begin(), tensors.end(),
            [&](const auto& one) { return taskvec::is_within_module(one.first, module); });
    };
    for (const auto& one : *saved) {
        if (!one.is_string()) { continue; }
        const auto& module = one.get_ref<const std::string&>();
        // PEFT names both heads of classifiers, of which a model has one.
        const bool other = (module == "score" && there("classifier")) || (module == "classifier" && there("score"));
        if (other || there(module)) { continue; }
        note(run,
            "modules_to_save of " + label + " names '" + printable(module)
                + "', and the file holds nothing of it: in what is written PEFT finds none either, and takes the "
                  "base's or a new one");
    }
}

taskvec::rank_choice rank_settings::choice() const
{
    if (!given()) { throw usage_error("give --rank Q or --energy E"); }
    if (rank && *rank == 0) { throw usage_error("--rank is 0; expected at least 1"); }
    if (energy && !(*energy > 0 && *energy <= 1)) {
        throw usage_error(
            taskvec::message("--energy is ", *energy, "; expected a share above 0 and at most 1, such as 0.99"));
    }
    return {.rank = rank.value_or(0), .energy = energy.value_or(0), .clamp = clamp};
}

std::string rank_settings::words(const std::vector<taskvec::layer_report>& layers) const
{
    if (!rank) { return percent(energy.value_or(1)) + " of the energy"; }
    std::size_t highest = 0;
    for (const auto& layer : layers) { highest = std::max(highest, layer.rank); }
    if (highest == 0 || highest >= *rank) { return "rank " + std::to_string(*rank); }
    return "rank " + std::to_string(highest) + ", the highest there is";
}

void add_rank_options(command& verb, rank_settings& settings)
{
    verb.count("--rank", settings.rank, "Q",
        "Rank of every layer; a layer of smaller rank is kept whole. vLLM sets aside room for one of 1, 8, 16, 32, 64, "
        "128, 256, 320 or 512 (its --max-lora-rank), and serves none above");
    verb.number("--energy", settings.energy, "E",
        "Or the smallest rank of each layer that keeps this share of its squared singular values");
    verb.exclude("--energy", "--rank");
    verb.flag(
        "--clamp", settings.clamp, "Lower a rank above every layer's to the highest there is, instead of refusing it");
}

void check_peft_directory(const fs::path& path)
{
    std::error_code ignored;
    check_no_hub_cache(path);
    const bool directory = fs::is_directory(path, ignored);
    if (!directory && !fs::exists(path, ignored)) { return; } // which read_peft() says
    if (directory && (fs::exists(taskvec::peft_tensor_file(path), ignored) || !is_adapter(path))) {
        if (!directory || fs::exists(path / taskvec::peft_config_name, ignored) || !is_adapter(path)) { return; }
        taskvec::raise<taskvec::io_error>(taskvec::error_code::file_not_found,
            "no such file beside the adapter's tensors: fetch it, or write one by 'taskvec convert --as peft', which "
            "takes the scaling for 1 where nothing says another",
            (path / taskvec::peft_config_name).string(), ENOENT);
    }
    taskvec::raise<taskvec::io_error>(taskvec::error_code::file_kind,
        directory
            ? "holds an adapter of diffusers or MLX, and PEFT's are read here: convert it first (taskvec convert "
              "--as peft)"
            : "is no directory, as PEFT's adapters are: convert an adapter of kohya, diffusers or llama.cpp first "
              "(taskvec convert --as peft)",
        path.string(), directory ? 0 : ENOTDIR);
}

std::uint64_t adapter_bytes(const fs::path& directory)
{
    std::uint64_t total = 0;
    for (const auto& file : {directory / taskvec::peft_config_name, taskvec::peft_tensor_file(directory)}) {
        std::error_code missing;
        const auto size = fs::file_size(file, missing);
        total += missing ? 0 : size;
    }
    return total;
}

bool adapter_is_wide(const fs::path& directory)
{
    std::error_code missing;
    return fs::exists(taskvec::peft_tensor_file(directory), missing) && taskvec::peft_is_wide(directory);
}

nlohmann::ordered_json layers_of(const std::vector<taskvec::layer_report>& layers)
{
    auto list = nlohmann::ordered_json::array();
    for (const auto& layer : layers) {
        nlohmann::ordered_json before; // null for what was dense
        if (layer.rank_before != 0) { before = layer.rank_before; }
        list.push_back({{"name", layer.name}, {"shape", {layer.out, layer.in}}, {"rank_before", before},
            {"rank", layer.rank}, {"whole", layer.whole}, {"energy", layer.energy()},
            {"relative_error", layer.relative_error()}, {"parameters", layer.parameters()}});
    }
    return list;
}

std::string percent(double share)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.3g%%", 100 * share);
    return text;
}

} // namespace tool
