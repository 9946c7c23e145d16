// taskvec peru-fft: one merged model, and for each task a delta of what the merge lost.
// SPDX-License-Identifier: Apache-2.0
#include "delta_output.hpp"

#include <memory>

namespace {

void peru_fft(const tool::merge_settings& settings)
{
    const double density = settings.density.value_or(0.1);
    tool::check_density(density, "--density");
    auto merging = settings;
    merging.density = settings.merge_density;
    merging.density_option = "--merge-density";
    merging.given.erase("density");
    if (merging.given.erase("merge-density") != 0) { merging.given.insert("density"); }
    const auto& method = tool::find_method(merging);
    const tool::merge_inputs inputs(merging, method.needs_base);
    tool::claim_output(settings.out, "--out", tool::output_kind::directory);
    tool::claim_report(settings.run);
    tool::runner run(settings.run, tool::runs_on::any_device);
    if (settings.run.dry_run) {
        if (method.examine) { method.examine(run.policy(), merging, inputs); }
        tool::print("would merge " + tool::counted(inputs.tasks().size(), "task") + " by " + settings.method
            + " and keep " + taskvec::message(100 * density) + "% of what each loses, into '"
            + tool::printable(settings.out) + "'\n" + tool::describe(inputs));
        return;
    }
    tool::report_file report(settings.run.report);
    taskvec::output_directory folder(settings.out);
    for (const auto& made : folder.made()) { tool::guard_temporary(made); }
    tool::model_output out(folder.path() / (settings.shard_size.empty() ? "merged.safetensors" : "merged"),
        inputs.models().outputs(), inputs.metadata(), settings.shard_size);
    const auto merge_report = method.run(run.policy(), merging, inputs, out.sink());
    out.finish();

    const auto merged = out.reopen();
    const auto stamp = taskvec::fingerprint(run.policy(), merged.model());
    auto how = inputs.models().options();
    how.base_label = "the merged model";
    how.output.reset();
    std::vector<std::unique_ptr<tool::delta_output>> deltas;
    std::uint64_t written = out.file_size(), kept = 0;
    for (std::size_t t = 0; t < inputs.tasks().size(); ++t) {
        const auto& task = inputs.arguments()[t];
        deltas.push_back(
            std::make_unique<tool::delta_output>(folder.path() / (task.name + ".delta.safetensors"), stamp));
        how.labels = {"'" + task.path.string() + "'"};
        const bool whole = how.on_missing == taskvec::missing::error;
        const auto model =
            whole ? inputs.task_models()[t] : taskvec::completed(inputs.task_models()[t], inputs.base()->model());
        tool::prune(run.policy(), settings, density, taskvec::aligned_models(&merged.model(), {&model, 1}, how),
            *deltas.back());
        deltas.back()->writer().finish();
        written += deltas.back()->writer().file_size();
        kept += deltas.back()->writer().kept();
    }
    if (report.wanted()) {
        auto content = tool::report_of(run, settings, inputs, merge_report, written);
        content["bytes_read"] = content["bytes_read"].get<std::uint64_t>() + merged.data_bytes()
            + tool::pruning_walks * (inputs.tasks().size() * merged.data_bytes() + inputs.models().bytes());
        content["density"] = density;
        content["parameters"] = inputs.models().elements() + kept;
        for (std::size_t t = 0; t < deltas.size(); ++t) { content["tasks"][t]["stored"] = deltas[t]->writer().kept(); }
        content["tensors"] = tool::norms_of(run.policy(), tool::beside_base(settings, inputs, merged));
        report.finish(content);
    }
    // The deltas before the merged model that they belong to: whoever sees it sees them.
    struct {
        std::vector<std::unique_ptr<tool::delta_output>>& deltas;
        void commit()
        {
            for (auto& delta : deltas) { delta->writer().commit(); }
        }
    } all{deltas};
    const auto name = tool::fs::path(settings.out) / out.path().filename();
    tool::conclude("merged " + tool::counted(inputs.tasks().size(), "task") + " by " + settings.method + " into '"
            + tool::printable(name.string()) + "', kept " + tool::grouped(kept) + " entries of what they lose, "
            + tool::size_text(written) + " in " + tool::seconds_text(run.seconds()) + "\n",
        all, out, folder, report);
}

const tool::register_verb verb(50, [](CLI::App& app) {
    auto* peru_verb =
        app.add_subcommand("peru-fft", "Merge, and keep for each task the largest entries of what the merge lost");
    const auto given = std::make_shared<tool::merge_settings>();
    tool::add_method_option(*peru_verb, *given);
    peru_verb->add_option("--base", given->base, "The pre-trained model that the tasks started from")
        ->type_name("MODEL");
    peru_verb
        ->add_option("--task", given->tasks, "A fine-tuned model, with its weight (default 1); repeat, order counts")
        ->type_name("PATH[=WEIGHT]")
        ->required()
        ->allow_extra_args(false);
    peru_verb->add_option("--out", given->out, "Where merged.safetensors and <task>.delta.safetensors go")
        ->type_name("DIR")
        ->required();
    tool::add_density_option(
        *peru_verb, *given, given->density, "--density", "Share of each residual that is kept (default: 0.1)");
    tool::add_density_option(*peru_verb, *given, given->merge_density, "--merge-density",
        "The merge's own density (default: 0.2 for ties, 0.5 for dare)");
    tool::add_merge_options(*peru_verb, *given);
    peru_verb->footer("Methods:\n" + tool::method_list()
        + "\nExample:\n  taskvec peru-fft --method task-arithmetic --base base.safetensors --task math.safetensors \\\n"
          "      --task code.safetensors --density 0.1 --out reuse\n"
          "  taskvec apply --base reuse/merged.safetensors --delta reuse/math.delta.safetensors --out "
          "math.safetensors");
    peru_verb->callback([given] { peru_fft(*given); });
});

} // namespace
