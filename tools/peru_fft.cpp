// taskvec peru-fft: one merged model, and for each task a delta of what the merge lost.
// SPDX-License-Identifier: Apache-2.0
#include "model_files.hpp"
#include "pruning.hpp"
#include "report.hpp"
#include "words.hpp"

#include <taskvec/formats/delta.hpp>
#include <taskvec/formats/fingerprint.hpp>

#include <algorithm>
#include <memory>

namespace {

/// The merge's part of the command line: its own density has another flag than the deltas'.
tool::merge_request merge_part(const tool::merge_request& request)
{
    auto part = request;
    std::erase_if(part.options, [](const tool::option_value& value) { return value.name == "density"; });
    for (auto& value : part.options) {
        if (value.name == "merge-density") { value.name = "density"; }
    }
    // What the deltas alone have (--scope of a merge that trims nothing) is no option without effect.
    const auto has = [](const std::vector<taskvec::option_description>& options, const std::string& name) {
        return std::any_of(options.begin(), options.end(), [&](const auto& option) { return option.name == name; });
    };
    if (const auto* const method = tool::method_named(request.method)) {
        const auto deltas = tool::pruning_table().options;
        std::erase_if(part.options, [&](const tool::option_value& value) {
            return value.name != "density" && has(deltas, value.name) && !has(method->options, value.name);
        });
    }
    return part;
}

/// A model that a directory already holds would be opened in place of merged.safetensors.
void check_no_other_model(const tool::fs::path& out)
{
    const auto refuse = [&](const std::string& name) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::output_path,
            tool::in_quotes(out) + " holds " + tool::printable(name)
                + ", which would be opened in place of merged.safetensors: remove it, or name another directory");
    };
    std::error_code ignored;
    for (const std::string_view stem : taskvec::model_stems) {
        const auto name = std::string(stem) + ".safetensors";
        if (tool::fs::exists(out / name, ignored)) { refuse(name); }
    }
    for (const auto& entry : tool::fs::directory_iterator(out, ignored)) {
        const auto name = entry.path().filename().string();
        if (taskvec::is_index_name(name)) { refuse(name); }
    }
}

void run_peru_fft(const tool::merge_request& request)
{
    taskvec::post_pruning_options pruning;
    for (const auto& value : request.options) {
        if (value.name == "density") { tool::check_none_by_tensor({value}, "peru-fft's own --density"); }
    }
    tool::check_usage([&] { pruning = tool::pruning_options(request.options); });
    const auto merging = merge_part(request);
    const auto& method = tool::find_method(merging);
    const tool::merge_inputs inputs(merging, method.needs_base);
    tool::claim_output(request.out, "--out", tool::output_kind::directory);
    check_no_other_model(request.out);
    tool::claim_report(request.run);
    tool::note_zero_lambda(request.run, merging.options);
    tool::runner run(request.run, tool::runs_on::any_device);
    const auto call = tool::call_of(run.policy(), merging, inputs);
    const auto plan = tool::outputs_of(merging, inputs);
    if (request.run.dry_run) {
        method.examine(call);
        tool::print("would merge " + tool::counted(inputs.tasks().size(), "task") + " by " + request.method
            + " and keep " + taskvec::message(100 * pruning.density) + "% of what each loses, into '"
            + tool::printable(request.out) + "'\n" + tool::describe(request, inputs));
        return;
    }
    tool::report_file report(request.run.report);
    std::error_code ignored;
    const bool inner = tool::fs::is_directory(tool::fs::path(request.out) / "merged", ignored); // keeps other files
    taskvec::output_directory folder(request.out, taskvec::durability::synchronised,
        inner ? taskvec::existing_directory::fill : taskvec::existing_directory::exchange);
    tool::model_output out(folder.path() / (request.shard_size.empty() ? "merged.safetensors" : "merged"), plan,
        inputs.reference(), request.shard_size);
    const auto options = tool::json_of(method.values(merging.options));
    const bool sharded = !request.shard_size.empty();
    if (!sharded) { out.set_folder(folder.path(), request.out); }
    tool::add_model_files(out, request.copies, request.run,
        {"Merged by " + request.method + ", with a delta for each task (PERU-FFT)", request.method,
            tool::recipe_models(request, inputs), options.dump(2), {}, false, &inputs.vocabulary()},
        plan.specs, sharded ? "" : "merged.safetensors");
    const auto merge_report = tool::run_method(method, call, out.sink());
    out.finish();

    const auto merged = out.reopen(inputs.reference());
    const auto stamp = taskvec::fingerprint(run.policy(), merged.model());
    auto how = inputs.models().options();
    how.base_label = "the merged model";
    how.output.reset();
    if (how.on_overflow == taskvec::overflow::propagate) { how.on_nonfinite = taskvec::nonfinite::propagate; }
    std::vector<std::unique_ptr<taskvec::delta_writer>> deltas;
    std::uint64_t written = out.file_size(), kept = 0;
    for (std::size_t t = 0; t < inputs.tasks().size(); ++t) {
        const auto& task = inputs.arguments()[t];
        deltas.push_back(
            std::make_unique<taskvec::delta_writer>(folder.path() / (task.name + ".delta.safetensors"), stamp));
        how.labels = {tool::in_quotes(task.path)};
        const bool whole = how.on_missing == taskvec::missing_tensors::error;
        const auto model =
            whole ? inputs.task_models()[t] : taskvec::completed(inputs.task_models()[t], inputs.base_model());
        taskvec::aligned_models residual(&merged.model(), {&model, 1}, how);
        const auto sources = inputs.attach(residual, 0, t);
        tool::prune_into(run.policy(), request.run, pruning, residual, *deltas.back());
        deltas.back()->finish();
        written += deltas.back()->file_size();
        kept += deltas.back()->kept();
    }
    if (report.wanted()) {
        auto content = tool::report_of(run, request, inputs, merge_report, written);
        content["bytes_read"] = content["bytes_read"].get<std::uint64_t>() + merged.data_bytes()
            + tool::pruning_walks * (inputs.tasks().size() * merged.data_bytes() + inputs.models().bytes());
        content["density"] = pruning.density;
        content["fingerprint"] = taskvec::fingerprint_text(taskvec::fingerprint_sketch(merged.model()));
        content["options"] = options;
        content["parameters"] = inputs.models().elements() + kept;
        for (std::size_t t = 0; t < deltas.size(); ++t) { content["tasks"][t]["stored"] = deltas[t]->kept(); }
        content["tensors"] = tool::norms_of(run.policy(), tool::beside_base(request, inputs, merged));
        report.finish(content);
    }
    // The deltas before the merged model that they belong to: whoever sees it sees them.
    struct {
        std::vector<std::unique_ptr<taskvec::delta_writer>>& deltas;
        void commit()
        {
            for (auto& delta : deltas) { delta->commit(); }
        }
    } all{deltas};
    const auto name = tool::fs::path(request.out) / out.path().filename();
    tool::conclude("merged " + tool::counted(inputs.tasks().size(), "task") + " by " + request.method + " into '"
            + tool::printable(name.string()) + "', kept " + tool::counted(kept, "entry") + " of what they lose, "
            + tool::size_text(written) + " in " + tool::seconds_text(run.seconds()) + "\n",
        report, all, out, folder);
}

const tool::register_verb peru_fft_verb(50, "peru-fft",
    "Merge, and keep for each task the largest entries of what the merge lost", [](tool::command& verb) {
        const auto request = std::make_shared<tool::merge_request>();
        tool::add_method_option(verb, *request, tool::presence::required, "How to merge; see below");
        tool::add_base_option(verb, *request);
        tool::add_weighted_tasks_option(verb, *request);
        verb.text("--out", request->out, "DIR", "Where merged.safetensors and <task>.delta.safetensors go",
            tool::presence::required);
        tool::add_merge_options(verb, *request, {tool::pruning_table("share of each residual that is kept")},
            {{"density", "merge-density"}});
        tool::add_copy_options(verb, request->copies);
        verb.footer("Methods:\n" + tool::method_list()
            + "\nExample:\n  taskvec peru-fft --method task-arithmetic --base base.safetensors --task math.safetensors "
              "\\\n"
              "      --task code.safetensors --density 0.1 --out reuse\n"
              "  taskvec apply --base reuse/merged.safetensors --delta reuse/math.delta.safetensors --out "
              "math.safetensors");
        verb.action([request] { run_peru_fft(*request); });
    });

} // namespace
