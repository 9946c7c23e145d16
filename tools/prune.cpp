// taskvec prune: the largest entries of a task vector, as a delta.
// SPDX-License-Identifier: Apache-2.0
#include "pruning.hpp"
#include "report.hpp"
#include "words.hpp"

#include <taskvec/formats/delta.hpp>

#include <memory>

namespace {

void run_prune(const tool::merge_request& request)
{
    tool::check_none_by_tensor(request.options, "prune");
    tool::check_options(request, "prune", tool::pruning_table(), {},
        [](const tool::option_values& values) { (void)tool::pruning_options(values); });
    if (!request.dtype.empty() && request.dtype != "keep") {
        tool::note(request.run, "--dtype has no effect on prune: deltas hold F32, or F64 for F64 tensors");
    }
    if (!request.shard_size.empty()) {
        tool::note(request.run, "--shard-size has no effect on prune: a delta is one file");
    }
    if (request.tasks.size() != 1) {
        throw tool::usage_error("prune takes one --task; got " + std::to_string(request.tasks.size()));
    }
    for (const auto& [task, values] : request.of_tasks) {
        throw tool::usage_error(values.front().flag + " has no meaning for prune, which has one task: give --density");
    }
    tool::check_no_weights(request, "prune", "'taskvec apply --scale' scales a delta");
    if (!request.weights.empty()) {
        throw tool::usage_error("--weight has no meaning for prune: 'taskvec apply --scale' scales a delta");
    }
    if (request.vocabulary == "union" || request.vocabulary == "truncate") {
        throw tool::usage_error("--vocabulary " + request.vocabulary
            + " has no meaning for prune, whose delta is added to the base as it is: --vocabulary base");
    }
    const auto options = tool::pruning_options(request.options);
    const tool::merge_inputs inputs(request, true);
    const auto& models = inputs.models();
    tool::claim_output(request.out, "--out");
    tool::note_ending(request.run, request.out);
    tool::claim_report(request.run);
    tool::runner run(request.run, tool::runs_on::any_device);
    if (request.run.dry_run) {
        tool::print("would prune '" + tool::printable(inputs.arguments().front().path.string()) + "' to "
            + taskvec::message(100 * options.density) + "% of its task vector, into '" + tool::printable(request.out)
            + "'\n" + tool::describe(request, inputs, tool::others::left_alone));
        return;
    }
    tool::report_file report(request.run.report);
    taskvec::delta_writer writer(request.out, taskvec::fingerprint(run.policy(), inputs.base()->model()));
    tool::prune_into(run.policy(), request.run, options, models, writer);
    writer.finish();
    if (report.wanted()) {
        const taskvec::merge_report done{
            .kept = {writer.kept()}, .conflicting = {}, .norms = {}, .walks = tool::pruning_walks};
        auto content = tool::report_of(run, request, inputs, done, writer.file_size());
        content["bytes_read"] = content["bytes_read"].get<std::uint64_t>() + inputs.base()->data_bytes();
        content["density"] = options.density;
        content["options"] = tool::json_of(tool::described_values<taskvec::post_pruning_options>(request.options));
        content["tensors"] = tool::norms_of(run.policy(), models);
        for (std::size_t i = 0; i < writer.parts().size(); ++i) {
            content["tensors"][i]["kept"] = writer.parts()[i].kept;
        }
        report.finish(content);
    }
    const auto size = writer.file_size();
    tool::conclude("kept " + tool::grouped(writer.kept()) + " of " + tool::counted(models.elements(), "entry") + " in '"
            + tool::printable(request.out) + "' (" + tool::size_text(size) + ") in " + tool::seconds_text(run.seconds())
            + "\n",
        report, writer);
}

const tool::register_verb prune_verb(
    30, "prune", "Keep the largest entries of a task vector, as a delta (Post-Pruning)", [](tool::command& verb) {
        const auto request = std::make_shared<tool::merge_request>();
        verb.text("--base", request->base, "MODEL",
            "What the delta will be added to: the pre-trained model, or a merged one", tool::presence::required);
        tool::add_tasks_options(verb, *request, "PATH", "The fine-tuned model");
        verb.text("--out", request->out, "FILE", "Where the delta goes", tool::presence::required);
        tool::add_merge_options(verb, *request, {tool::pruning_table()}, {}, tool::values_by_tensor::refused);
        verb.footer("Example:\n  taskvec prune --base base.safetensors --task math.safetensors --density 0.1 --out "
                    "math.delta.safetensors\n"
                    "  taskvec apply --base base.safetensors --delta math.delta.safetensors --out pruned.safetensors");
        verb.action([request] { run_prune(*request); });
    });

} // namespace
