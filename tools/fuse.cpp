// taskvec fuse: adapters folded into their base.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_sums.hpp"
#include "methods.hpp"
#include "model_files.hpp"
#include "report.hpp"
#include "words.hpp"

#include <taskvec/adapters/fuse.hpp>

#include <memory>

namespace {

struct fuse_settings {
    tool::model_request model;
    std::vector<std::string> adapters;
    bool subtract = false, fan_in_fan_out = false;
};

void run_fuse(const fuse_settings& given)
{
    const auto& request = given.model;
    if (given.adapters.empty()) { throw tool::usage_error("--adapter is required: what is folded into the base"); }
    if (!request.shard_size.empty()) { (void)tool::parse_size(request.shard_size, "--shard-size"); }
    tool::check_cpu(request.run);
    std::vector<tool::task_argument> arguments;
    for (const auto& text : given.adapters) { arguments.push_back(tool::parse_task(text, "--adapter")); }
    tool::note_zero_weights(request.run, arguments, "adapter");
    const auto base_rules = request.names.find("");
    const auto base = tool::open_noted(request.base, request.run, request.index,
        base_rules == request.names.end() ? std::vector<tool::name_rule>() : base_rules->second);
    tool::check_readable(base, tool::name_filter(request.include, request.exclude));
    auto options = tool::model_options_of(request);
    const tool::adapter_sum sum(arguments, base,
        {.base_path = request.base,
            .include = tool::name_filter(request.include, request.exclude),
            .included = request.include,
            .excluded = request.exclude,
            .names = request.names,
            .fan_in_fan_out = given.fan_in_fan_out,
            .subtract = given.subtract},
        request.run);
    std::vector<std::string> names;
    for (const auto& [name, tensor] : sum.base()) { names.push_back(name); }
    tool::check_patterns(request.include, "--include", names, "tensor of '" + request.base + "'");
    for (const auto& file : sum.files()) {
        for (const auto& [name, tensor] : file.model()) { names.push_back(name); }
    }
    tool::check_patterns(request.exclude, "--exclude", names, "tensor of '" + request.base + "' and the adapters");
    options.base_label = "'" + request.base + "'";
    options.labels = {arguments.size() == 1 ? tool::in_quotes(arguments[0].path) : std::string("the adapters")};
    const bool directory = tool::out_is_directory(request.out, request.base, !request.shard_size.empty());
    tool::claim_model(request.run, request.out, directory);
    tool::claim_report(request.run);
    taskvec::aligned_models models(&sum.base(), {&sum.base(), 1}, options);
    const auto sources = sum.changes().attach(models, 0);
    const tool::runner run(request.run);
    const auto plan = tool::outputs_of(request.run, models, base, request.dtype);
    const std::uint64_t bytes = tool::bytes_of(plan);
    const std::string what = tool::counted(arguments.size(), "adapter") + (given.subtract ? " out of '" : " into '")
        + tool::printable(request.base) + "'";
    if (request.run.dry_run) {
        tool::check_space(request.out, bytes);
        tool::print("would fold " + what + ": " + tool::counted(sources.size(), "tensor") + " of "
            + tool::counted(models.outputs().size(), "tensor") + ", into '" + tool::printable(request.out) + "' ("
            + tool::size_text(bytes) + ")\n");
        return;
    }
    tool::report_file report(request.run.report);
    tool::model_output out(request.out, plan, base, request.shard_size, directory);
    tool::recipe how{given.subtract ? "Base minus adapters" : "Base plus adapters", "",
        {{"base", tool::parse_task(request.base, "--base").name, request.base, 1, &base}}, ""};
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        how.models.push_back({"adapter", arguments[i].name, arguments[i].path,
            given.subtract ? -arguments[i].weight : arguments[i].weight, &sum.files()[i]});
    }
    how.untied = sum.untied();
    tool::add_model_files(out, request.copies, request.run, how, plan.specs);
    const auto done = taskvec::merge(run.policy(), taskvec::fuse_options{}, models, out.sink());
    out.finish();
    if (report.wanted()) {
        nlohmann::ordered_json content{{"output", request.out}, {"seconds", run.seconds()},
            {"bytes_read", base.data_bytes() + sum.bytes()}, {"bytes_written", out.file_size()},
            {"peak_memory", tool::peak_memory()}, {"peak_anonymous_memory", run.anonymous_peak()},
            {"changed", sources.size()}};
        if (request.overflow == "saturate") { content["saturated"] = done.saturated + out.saturated(); }
        content["untied"] = sum.untied();
        content["adapters"] = nlohmann::ordered_json::array();
        for (std::size_t i = 0; i < arguments.size(); ++i) {
            const auto& about = sum.about()[i];
            content["adapters"].push_back(
                {{"name", arguments[i].name}, {"path", arguments[i].path.string()}, {"weight", arguments[i].weight},
                    {"dialect", about.dialect}, {"modules", about.modules}, {"whole_tensors", about.wholes},
                    {"least_rank", about.least_rank}, {"greatest_rank", about.greatest_rank}});
        }
        const auto stored = out.reopen(base);
        auto reading = options;
        reading.on_nonfinite = taskvec::nonfinite::propagate;
        reading.output.reset();
        reading.labels.clear();
        content["tensors"] =
            tool::norms_of(run.policy(), taskvec::aligned_models(&sum.base(), {&stored.model(), 1}, reading));
        report.finish(content);
    }
    const auto size = out.file_size();
    tool::conclude("folded " + what + ", " + tool::counted(sources.size(), "tensor") + " of "
            + std::to_string(models.outputs().size()) + " changed: '" + tool::printable(request.out) + "' ("
            + tool::size_text(size) + ") in " + tool::seconds_text(run.seconds()) + "\n",
        report, out);
}

const tool::register_verb fuse_verb(
    75, "fuse", "Fold LoRA adapters into their base: base plus their updates", [](tool::command& verb) {
        const auto given = std::make_shared<fuse_settings>();
        auto& request = given->model;
        verb.text(
            "--base", request.base, "MODEL", "The model that the adapters were trained on", tool::presence::required);
        verb.texts("--adapter", given->adapters, "PATH[=WEIGHT]", "An adapter, with its weight (default 1); repeat",
            tool::presence::required);
        verb.text("--out", request.out, "PATH",
            "Where the model goes: a file, or a directory, as which any name without .safetensors stands where the "
            "base is "
            "a directory",
            tool::presence::required);
        verb.flag("--subtract", given->subtract, "Take the adapters out of a model that holds them");
        verb.flag("--fan-in-fan-out", given->fan_in_fan_out,
            "Square weights are stored in×out, as in GPT-2 (a config.json beside the base says so by itself)");
        tool::add_dtype_option(verb, request.dtype, tool::dtype_of_result);
        verb.texts("--include", request.include, "REGEX", "Only tensors that match; others are copied from the base");
        verb.texts("--exclude", request.exclude, "REGEX",
            "All but tensors that match; modules of an adapter may be named as it calls them");
        tool::add_rename_options(verb, request.names, {"--base", "--adapter"});
        tool::add_nonfinite_option(verb, request.nonfinite);
        tool::add_overflow_option(verb, request.overflow);
        tool::add_index_option(verb, request.index);
        tool::add_shard_size_option(verb, request.shard_size);
        tool::add_copy_options(verb, request.copies);
        tool::add_run_options(verb, request.run);
        verb.footer(
            "Adapters of PEFT (LoRA, rsLoRA, DoRA, AdaLoRA, LoHa, LoKr), kohya, diffusers, MLX and llama.cpp (GGUF) "
            "are "
            "read, told apart by what they hold. What they hold whole (modules_to_save) takes the base's place.\n\n"
            "Example:\n  taskvec fuse --base base --adapter math-lora --adapter style-lora=0.5 --out fused");
        verb.action([given] { run_fuse(*given); });
    });

} // namespace
