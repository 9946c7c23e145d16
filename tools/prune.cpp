// taskvec prune: the largest entries of a task vector, as a delta.
// SPDX-License-Identifier: Apache-2.0
#include "delta_output.hpp"

namespace {

void prune(tool::merge_settings settings)
{
    const double density = settings.density.value_or(0.1);
    tool::check_density(density, "--density");
    for (const char* option : {"lambda", "merge-weights", "seed", "fisher", "gram"}) {
        if (settings.given.contains(option)) {
            tool::note(settings.run, std::string("--") + option + " has no effect on prune");
        }
    }
    if (settings.dtype != "keep") {
        tool::note(settings.run, "--dtype has no effect on prune: deltas hold F32, or F64 for F64 tensors");
    }
    if (!settings.shard_size.empty()) {
        tool::note(settings.run, "--shard-size has no effect on prune: a delta is one file");
    }
    if (settings.tasks.size() != 1) {
        throw tool::usage_error("prune takes one --task; got " + std::to_string(settings.tasks.size()));
    }
    tool::check_no_weights(settings, "prune", "'taskvec apply --scale' scales a delta");
    const tool::merge_inputs inputs(settings, true);
    const auto& models = inputs.models();
    tool::claim_output(settings.out, "--out");
    tool::claim_report(settings.run);
    tool::runner run(settings.run, tool::runs_on::any_device);
    if (settings.run.dry_run) {
        tool::print("would prune '" + tool::printable(inputs.arguments().front().path.string()) + "' to "
            + taskvec::message(100 * density) + "% of its task vector, into '" + tool::printable(settings.out) + "'\n"
            + tool::describe(inputs));
        return;
    }
    tool::report_file report(settings.run.report);
    tool::delta_output out(settings.out, taskvec::fingerprint(run.policy(), inputs.base()->model()));
    tool::prune(run.policy(), settings, density, models, out);
    auto& writer = out.writer();
    writer.finish();
    if (report.wanted()) {
        const taskvec::merge_report done{
            .kept = {writer.kept()}, .conflicting = {}, .norms = {}, .walks = tool::pruning_walks};
        auto content = tool::report_of(run, settings, inputs, done, writer.file_size());
        content["bytes_read"] = content["bytes_read"].get<std::uint64_t>() + inputs.base()->data_bytes();
        content["density"] = density;
        content["tensors"] = tool::norms_of(run.policy(), models);
        for (std::size_t i = 0; i < writer.parts().size(); ++i) {
            content["tensors"][i]["kept"] = writer.parts()[i].kept;
        }
        report.finish(content);
    }
    const auto size = writer.file_size();
    tool::conclude("kept " + tool::grouped(writer.kept()) + " of " + tool::counted(models.elements(), "entry") + " in '"
            + tool::printable(settings.out) + "' (" + tool::size_text(size) + ") in "
            + tool::seconds_text(run.seconds()) + "\n",
        writer, report);
}

const tool::register_verb verb(30, [](CLI::App& app) {
    auto* prune_verb =
        app.add_subcommand("prune", "Keep the largest entries of a task vector, as a delta (Post-Pruning)");
    const auto given = std::make_shared<tool::merge_settings>();
    prune_verb
        ->add_option("--base", given->base, "What the delta will be added to: the pre-trained model, or a merged one")
        ->type_name("MODEL")
        ->required();
    prune_verb->add_option("--task", given->tasks, "The fine-tuned model")
        ->type_name("PATH")
        ->required()
        ->allow_extra_args(false);
    prune_verb->add_option("--out", given->out, "Where the delta goes")->type_name("FILE")->required();
    tool::add_density_option(*prune_verb, *given, given->density, "--density", "Share of entries kept (default: 0.1)");
    tool::add_merge_options(*prune_verb, *given);
    prune_verb->footer(
        "Example:\n  taskvec prune --base base.safetensors --task math.safetensors --density 0.1 --out "
        "math.delta.safetensors\n"
        "  taskvec apply --base base.safetensors --delta math.delta.safetensors --out pruned.safetensors");
    prune_verb->callback([given] { prune(*given); });
});

} // namespace
