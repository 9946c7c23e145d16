// taskvec merge: several fine-tuned models become one.
// SPDX-License-Identifier: Apache-2.0
#include "merging.hpp"

namespace {

void merge(tool::merge_settings settings)
{
    const auto& method = tool::find_method(settings);
    const tool::merge_inputs inputs(settings, method.needs_base);
    tool::claim_output(
        settings.out, "--out", settings.shard_size.empty() ? tool::output_kind::model : tool::output_kind::directory);
    tool::claim_report(settings.run);
    tool::runner run(settings.run, tool::runs_on::any_device);
    if (settings.run.dry_run) {
        if (method.examine) { method.examine(run.policy(), settings, inputs); }
        std::uint64_t bytes = 0;
        for (const auto& spec : inputs.models().outputs()) { bytes += spec.bytes(); }
        tool::print("would merge " + tool::counted(inputs.tasks().size(), "task") + " by " + settings.method + " into '"
            + tool::printable(settings.out) + "' (" + tool::size_text(bytes) + ")\n" + tool::describe(inputs));
        return;
    }
    tool::report_file report(settings.run.report);
    tool::model_output out(settings.out, inputs.models().outputs(), inputs.metadata(), settings.shard_size);
    const auto merged = method.run(run.policy(), settings, inputs, out.sink());
    out.finish();
    if (report.wanted()) {
        auto content = tool::report_of(run, settings, inputs, merged, out.file_size());
        const auto stored = out.reopen();
        content["tensors"] = tool::norms_of(run.policy(), tool::beside_base(settings, inputs, stored));
        report.finish(content);
    }
    const auto size = out.file_size();
    tool::conclude("merged " + tool::counted(inputs.tasks().size(), "task") + " by " + settings.method + " into '"
            + tool::printable(settings.out) + "': " + tool::counted(inputs.models().outputs().size(), "tensor") + ", "
            + tool::size_text(size) + " in " + tool::seconds_text(run.seconds()) + "\n",
        out, report);
}

const tool::register_verb verb(20, [](CLI::App& app) {
    auto* merge_verb = app.add_subcommand("merge", "Merge fine-tuned models into one");
    const auto given = std::make_shared<tool::merge_settings>();
    tool::add_method_option(*merge_verb, *given);
    merge_verb->add_option("--base", given->base, "The pre-trained model that the tasks started from")
        ->type_name("MODEL");
    merge_verb
        ->add_option("--task", given->tasks, "A fine-tuned model, with its weight (default 1); repeat, order counts")
        ->type_name("PATH[=WEIGHT]")
        ->required()
        ->allow_extra_args(false);
    merge_verb->add_option("--out", given->out, "Where the merged model goes: a file, or a directory")
        ->type_name("PATH")
        ->required();
    tool::add_density_option(*merge_verb, *given, given->density, "--density",
        "Share of entries kept (default: 0.2 for ties, 0.5 for dare)");
    tool::add_merge_options(*merge_verb, *given);
    merge_verb->footer("Methods:\n" + tool::method_list()
        + "\nExample:\n  taskvec merge --method ties --density 0.2 --base base.safetensors --task math.safetensors \\\n"
          "      --task code.safetensors=0.5 --out merged.safetensors");
    merge_verb->callback([given] { merge(*given); });
});

} // namespace
