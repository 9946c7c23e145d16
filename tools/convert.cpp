// taskvec convert: an adapter in another dialect.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_sums.hpp"
#include "adapters.hpp"
#include "architectures.hpp"
#include "models.hpp"
#include "outputs.hpp"
#include "report.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <taskvec/core/option_table.hpp>
#include <taskvec/formats/adapter_convert.hpp>
#include <taskvec/formats/adapter_names.hpp>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace {

struct convert_settings {
    std::string in, base, out, as, dtype = "keep", index = "strict", overflow = "error";
    tool::peft_words words;
    tool::run_options run;
};

taskvec::adapter_dialect dialect_of(const std::string& word)
{
    const auto& known = taskvec::enum_words<taskvec::adapter_dialect>::words;
    return std::find_if(known.begin(), known.end(), [&](const auto& one) { return one.word == word; })->value;
}

/// A module of Stable Diffusion in the result. The base says where its dots are, and which model it is of: its name
/// stays one of its own kind, but diffusers' in diffusers' files, and in PEFT's and MLX's what diffusers' models have.
std::string name_of(const taskvec::diffusion_module& module, const std::string& as)
{
    constexpr std::string_view suffix = ".weight";
    const bool whole = module.tensor.ends_with(suffix); // and no block of rows, or a parameter that is no module
    const auto diffusers = module.component + "." + (module.diffusers.empty() ? module.called : module.diffusers);
    if (as == "diffusers") { return diffusers; }
    if (as == "kohya") { return module.component + "." + module.called; }
    return !whole || (module.translated && module.single_file)
        ? diffusers
        : module.tensor.substr(0, module.tensor.size() - suffix.size());
}

/// What an adapter does to an embedding and the head that the base ties to it, for a dialect that says it otherwise:
/// MLX has one module for the two, and PEFT one for each.
template <class T>
void adapt_tie(taskvec::adapter_contents<T>& adapter, const convert_settings& given, const tool::tied_matrix& tie)
{
    const auto own = adapter.modules.find(tie.embedding), head = adapter.modules.find(tie.head);
    const bool from_mlx = adapter.dialect == taskvec::adapter_dialect::mlx, to_mlx = given.as == "mlx";
    if (!tie.tied || (own == adapter.modules.end() && head == adapter.modules.end())) { return; }
    if (from_mlx && !to_mlx && head == adapter.modules.end()) {
        if (given.as != "peft" || !own->second.magnitude.empty()) { return; } // which no other dialect holds
        auto made = tool::as_head(own->second);
        adapter.modules.emplace(tie.head, std::move(made));
        adapter.tied = tie.head == "lm_head"; // the one that PEFT looks for
        tool::note(given.run,
            "'" + tie.head + "' of '" + given.base + "' is tied to '" + tie.embedding
                + "', and MLX adapts both as one: " + adapter.label + " has its update under each name");
        return;
    }
    if (!to_mlx || from_mlx) { return; }
    const bool as_one = own != adapter.modules.end()
        && (head == adapter.modules.end() ? adapter.tied : tool::same_change(own->second, head->second));
    if (!as_one) {
        const bool lacks = own == adapter.modules.end() || head == adapter.modules.end();
        taskvec::raise<taskvec::format_error>(taskvec::error_code::adapter_unsupported,
            taskvec::message("module '", own == adapter.modules.end() ? tie.head : tie.embedding,
                "' cannot be written as MLX: ",
                lacks ? "it is changed alone" : "it and its head are changed each by itself", ", and '", given.base,
                "' ties the two, which MLX adapts as one module: fold the adapter into its base (taskvec fuse), which "
                "gives the head a tensor of its own"),
            adapter.label);
    }
    if (head != adapter.modules.end()) { adapter.modules.erase(head); }
}

/// Throws for factors that do not fit the weight that they are of.
template <class T>
void check_fits(const taskvec::adapter_contents<T>& adapter, const std::string& module,
    const taskvec::adapted_module<T>& made, const taskvec::const_model_ref& base, const taskvec::module_match& match)
{
    const auto& tensor = match.tensors.at(module);
    const auto part = match.diffusion.find(module);
    taskvec::check_shape(made, *base.find(tensor),
        {.tensor = tensor,
            .module = module,
            .label = adapter.label,
            .blocks = part == match.diffusion.end() ? 1 : part->second.blocks,
            .may_grow = tool::is_head(tensor) || tool::is_embedding(tensor)});
}

/// Holds an adapter whose names are not the base's to those of its weights that are known to be meant. Of GGUF a base's
/// configuration is enough, so there may be none.
template <class T>
void check_fits_base(const taskvec::adapter_contents<T>& adapter, const convert_settings& given)
{
    std::error_code ignored;
    if (tool::fs::is_directory(given.base, ignored) && taskvec::model_files_in(given.base).empty()) { return; }
    const auto base = tool::open_noted(given.base, given.run, given.index);
    const auto match = taskvec::match_modules(adapter, base.model());
    for (const auto& [module, made] : adapter.modules) {
        if (made.kernel.empty() && match.tensors.contains(module)) {
            check_fits(adapter, module, made, base.model(), match);
        }
    }
}

/// Modules under the names that the base has for them.
template <class T>
void name_as_base(taskvec::adapter_contents<T>& adapter, const convert_settings& given)
{
    const auto base = tool::open_noted(given.base, given.run, given.index);
    taskvec::split_experts(adapter, base.model());
    const auto tie = tool::tied_matrix_of(tool::config_beside(given.base), base.model());
    auto model = base.model();
    if (!tie.head_stored && !tie.embedding.empty() && !tie.head.empty()) { // a head that no file has
        model.insert(tie.head + ".weight", taskvec::const_tensor_ref(*model.find(tie.embedding + ".weight")));
    }
    tool::translate_flux(adapter, base.model(), given.run);
    const auto match = taskvec::match_modules(adapter, model);
    if (!match.unmatched.empty()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_unexpected,
            taskvec::message("module '", match.unmatched.front(), "' of ", adapter.label, " is no module of '",
                given.base, "': give the base that it was trained on", taskvec::form_of_base(match.unmatched.front())));
    }
    std::map<std::string, taskvec::adapted_module<T>> renamed;
    std::size_t translated = 0;
    for (auto& [module, made] : adapter.modules) {
        if (!made.slice.parameter.empty()) {
            renamed.emplace(module, std::move(made));
            continue;
        }
        const auto& tensor = match.tensors.at(module);
        taskvec::take_shape(made, *model.find(tensor), adapter.dialect);
        check_fits(adapter, module, made, model, match);
        auto name = tensor.substr(0, tensor.size() - 7);
        if (const auto known = match.diffusion.find(module); known != match.diffusion.end()) {
            name = name_of(known->second, given.as);
            translated += name.ends_with(known->second.called) ? 0 : 1;
        }
        else if (given.as == "diffusers") {
            name = taskvec::with_component_of(module, name);
        }
        if (!renamed.emplace(name, std::move(made)).second) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_unexpected,
                taskvec::message("module '", module, "' of ", adapter.label, " and another of it may both mean '",
                    tensor, "' of '", given.base, "': they are of different components, and this is one of these"));
        }
    }
    adapter.modules = std::move(renamed);
    adapt_tie(adapter, given, tie);
    if (translated > 0) {
        tool::note(given.run,
            tool::counted(translated, "name") + " of single files (LDM) in " + adapter.label
                + " translated to diffusers'");
    }
}

/// The model that a GGUF adapter is for: the base's configuration, or that of the model which the adapter names.
template <class T>
taskvec::gguf_target target_of(const taskvec::adapter_contents<T>& adapter, const convert_settings& given)
{
    tool::fs::path model = given.base;
    std::error_code ignored;
    if (!model.empty() && !tool::fs::exists(model, ignored)) {
        taskvec::raise<taskvec::io_error>(
            taskvec::error_code::file_not_found, "no such file or directory", given.base, ENOENT);
    }
    if (model.empty() && adapter.dialect == taskvec::adapter_dialect::gguf) { return adapter.target; }
    const auto named = adapter.config.find("base_model_name_or_path");
    if (model.empty() && named != adapter.config.end() && named->is_string()) {
        model = named->template get<std::string>();
        if (!tool::fs::is_directory(model, ignored)) { model.clear(); }
    }
    const auto config = model.empty() ? nlohmann::json::object() : tool::config_beside(model);
    if (config.empty()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
            taskvec::message("GGUF needs the architecture of the model that ", adapter.label,
                model.empty()
                    ? " was trained on, and nothing here says it: give the model's directory, or one with its "
                      "config.json (--base)"
                    : " was trained on: there is no config.json beside " + tool::in_quotes(model)
                        + "; give a directory that has it (--base)"));
    }
    return taskvec::gguf_target_of(config, (model / "config.json").string());
}

/// The modules of an adapter that are an embedding of tokens and a head; empty: it has none.
template <class T>
std::pair<std::string, std::string> embedding_and_head(const taskvec::adapter_contents<T>& adapter)
{
    std::pair<std::string, std::string> found;
    for (const auto& [module, made] : adapter.modules) {
        if (made.embedding && tool::is_embedding(module + ".weight")) { found.first = module; }
        if (tool::is_head_module(module)) { found.second = module; }
    }
    return found;
}

/// What the result takes for granted of modules of which neither their names nor a base say more.
template <class T>
void note_guesses(
    const taskvec::adapter_contents<T>& adapter, const convert_settings& given, taskvec::adapter_dialect dialect)
{
    std::vector<std::string> flat, bare;
    for (const auto& [module, made] : adapter.modules) {
        const bool of_products = made.kind == "LoHa" || made.kind == "LoKr";
        if (given.base.empty() && of_products && made.kernel.empty()) { flat.push_back(module); }
        if (!taskvec::names_component(module)) { bare.push_back(module); }
    }
    const auto them = [](const std::vector<std::string>& modules) {
        return "'" + tool::printable(modules.front()) + "'"
            + (modules.size() > 1 ? " and " + std::to_string(modules.size() - 1) + " more" : "");
    };
    const auto of_them = [](const std::vector<std::string>& modules) { return modules.size() > 1 ? "are" : "is"; };
    if (!flat.empty()) {
        tool::note(given.run,
            "factors of LoHa and LoKr do not say whether a module is a convolution: " + them(flat) + " " + of_them(flat)
                + " taken for linear layers; --base says what they are");
    }
    const auto [embedding, head] = embedding_and_head(adapter);
    if (dialect == taskvec::adapter_dialect::mlx && adapter.dialect == taskvec::adapter_dialect::peft
        && given.base.empty() && !adapter.tied && embedding.empty() != head.empty()) {
        tool::note(given.run,
            "'" + tool::printable(embedding.empty() ? head : embedding)
                + "': of a model that ties its head to its embedding MLX adapts the two as one, and PEFT each by "
                  "itself; "
                  "--base says whether it does");
    }
    if (dialect == taskvec::adapter_dialect::diffusers && !bare.empty()) {
        tool::note(given.run,
            "nothing says which part of a pipeline " + them(bare) + " " + of_them(bare)
                + " of: it is called the UNet's (unet.), and diffusers finds it in no other model");
    }
}

template <class T>
void convert(const convert_settings& given, const tool::runner& run, std::uint64_t bytes_read)
{
    auto adapter = taskvec::read_adapter<T>(given.in);
    for (const auto& text : adapter.notes) { tool::note(given.run, text); }
    tool::note_modules_not_saved(given.run, adapter.config, adapter.wholes, adapter.label);
    const std::string from(taskvec::to_string(adapter.dialect));
    const auto dialect = dialect_of(given.as);
    const bool to_gguf = dialect == taskvec::adapter_dialect::gguf;
    const bool paired = std::any_of(
        adapter.modules.begin(), adapter.modules.end(), [](const auto& one) { return one.second.paired_rows; });
    if (paired && !to_gguf && given.base.empty()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
            taskvec::message(adapter.label,
                " has rows of q and k in the order of llama.cpp, in pairs within each head, and does not say how many "
                "heads there are: give the model that it was trained on, or a directory with its config.json "
                "(--base)"));
    }
    if (!given.base.empty()) { tool::restore_rows(adapter, given.base); }
    // Of GGUF only the configuration is needed, and names are its own.
    const bool own_names = to_gguf || adapter.dialect == taskvec::adapter_dialect::gguf;
    if (!given.base.empty()) {
        if (!own_names || adapter.dialect == taskvec::adapter_dialect::kohya) { name_as_base(adapter, given); }
        else {
            check_fits_base(adapter, given);
        }
    }
    if (adapter.dialect == taskvec::adapter_dialect::mlx && dialect == taskvec::adapter_dialect::peft
        && given.base.empty()) {
        // MLX's embedding is the head of a model that ties the two, and so is PEFT's where it is told so.
        const auto [embedding, head] = embedding_and_head(adapter);
        adapter.tied = !embedding.empty() && head.empty();
    }
    const taskvec::adapter_write_options options{.output = tool::output_dtype(given.dtype),
        .on_overflow = tool::overflow_of(given.overflow),
        .target = to_gguf ? target_of(adapter, given) : taskvec::gguf_target(),
        .base_name = given.words.base_name,
        .task_type = given.words.task_type};
    note_guesses(adapter, given, dialect);
    const auto made = taskvec::converted_adapter(adapter, dialect, options);
    if (dialect == taskvec::adapter_dialect::peft) {
        std::size_t highest = 0;
        std::vector<std::string> modules;
        for (const auto& [module, made_of] : adapter.modules) {
            highest = std::max(highest, made_of.update.rank());
            modules.push_back(module);
        }
        tool::check_task_type(given.words, modules);
        tool::note_high_rank(given.run, highest);
        tool::note_missing_words(given.run, nlohmann::json::parse(made.config));
    }
    std::uint64_t bytes = made.config.size();
    for (const auto& tensor : made.bytes) { bytes += tensor.size(); }
    const std::string what = "'" + tool::printable(given.in) + "' (" + from + ", "
        + tool::counted(adapter.modules.size(), "module") + ") as " + std::string(taskvec::to_string(dialect))
        + " into '" + tool::printable(given.out) + "'";
    if (given.run.dry_run) {
        tool::print("would write " + what + " (" + tool::size_text(bytes) + ")\n");
        return;
    }
    tool::report_file report(given.run.report);
    nlohmann::ordered_json content{{"output", given.out}, {"from", from}, {"as", given.as},
        {"modules", adapter.modules.size()}, {"seconds", run.seconds()}, {"bytes_read", bytes_read},
        {"bytes_written", bytes}, {"peak_memory", tool::peak_memory()},
        {"peak_anonymous_memory", run.anonymous_peak()}};
    if (given.overflow == "saturate") { content["saturated"] = made.saturated; }
    report.finish(content);
    try {
        taskvec::write_adapter(given.out, made, options, [&] {
            tool::check_before_commit();
            report.commit();
            tool::print("wrote " + what + " (" + tool::size_text(bytes) + ")\n");
        });
    }
    catch (...) {
        report.revert();
        throw;
    }
    tool::outputs_are_there();
}

void run_convert(const convert_settings& given)
{
    if (given.as != "peft" && !given.words.task_type.empty()) {
        throw tool::usage_error("--task-type is of PEFT's adapters: it has no meaning with --as " + given.as);
    }
    if (given.as != "peft" && given.as != "mlx" && !given.words.base_name.empty()) {
        throw tool::usage_error("--base-name is of PEFT's and MLX's adapters: it has no meaning with --as " + given.as);
    }
    tool::check_cpu(given.run);
    const auto file = tool::open_adapter(given.in);
    const bool as_file = given.as == "kohya" || given.as == "gguf"
        || (given.as == "diffusers" && tool::fs::path(given.out).extension() == ".safetensors");
    tool::claim_output(given.out, "--out", as_file ? tool::output_kind::file : tool::output_kind::directory);
    if (as_file && given.as != "gguf") { tool::note_ending(given.run, given.out); }
    tool::claim_report(given.run);
    const tool::runner run(given.run);
    if (tool::holds_f64(file)) { convert<double>(given, run, file.data_bytes()); }
    else {
        convert<float>(given, run, file.data_bytes());
    }
}

const tool::register_verb convert_verb(
    78, "convert", "Write an adapter in another dialect: PEFT, kohya, diffusers, MLX or GGUF", [](tool::command& verb) {
        const auto given = std::make_shared<convert_settings>();
        verb.positional("ADAPTER", given->in, "The adapter, in any of these dialects");
        std::vector<std::string> dialects;
        for (const auto& one : taskvec::enum_words<taskvec::adapter_dialect>::words) {
            dialects.emplace_back(one.word);
        }
        verb.word("--as", given->as, dialects, "DIALECT", "peft, kohya, diffusers, mlx or gguf", false,
            tool::presence::required);
        verb.text("--out", given->out, "PATH",
            "Where it goes: a directory for peft and mlx, a file for kohya and gguf, either for diffusers",
            tool::presence::required);
        verb.text("--base", given->base, "MODEL",
            "The model that it was trained on, which says what modules are called: for adapters of kohya. For gguf a "
            "directory "
            "with its config.json, which says what llama.cpp calls them and how many heads there are");
        tool::add_peft_words(verb, given->words);
        tool::add_dtype_option(verb, given->dtype, "dtype of the factors (default: keep, the adapter's)");
        tool::add_overflow_option(verb, given->overflow);
        tool::add_index_option(verb, given->index);
        tool::add_run_options(verb, given->run);
        verb.footer("Factors keep their bits, scalings become alphas. What a dialect cannot say (whole modules, "
                    "embeddings, convolutions …) is an error that names it; 'taskvec inspect ADAPTER' says it of "
                    "each.\n\n"
                    "Example:\n  taskvec convert style-lora --as kohya --out style.safetensors\n  taskvec convert "
                    "math-lora --as gguf --base llama-3 --out math.gguf");
        verb.action([given] { run_convert(*given); });
    });

} // namespace
