// taskvec merge: several fine-tuned models become one.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"
#include "model_files.hpp"
#include "report.hpp"
#include "words.hpp"

namespace {

void run_merge(const tool::merge_request& request)
{
    const auto& method = tool::find_method(request);
    const tool::merge_inputs inputs(request, method.needs_base);
    const bool directory = tool::out_is_directory(request.out,
        inputs.base() ? tool::fs::path(request.base) : inputs.arguments().front().path, !request.shard_size.empty());
    tool::claim_output(request.out, "--out", directory ? tool::output_kind::directory : tool::output_kind::model);
    tool::claim_report(request.run);
    tool::runner run(request.run, tool::runs_on::any_device);
    const auto call = tool::call_of(run.policy(), request, inputs);
    if (request.run.dry_run) {
        method.examine(call);
        std::uint64_t bytes = 0;
        for (const auto& spec : inputs.models().outputs()) { bytes += spec.bytes(); }
        tool::check_space(request.out, bytes);
        tool::print("would merge " + tool::counted(inputs.tasks().size(), "task") + " by " + request.method + " into '"
            + tool::printable(request.out) + "' (" + tool::size_text(bytes) + ")\n" + tool::describe(inputs));
        return;
    }
    tool::report_file report(request.run.report);
    tool::model_output out(request.out, inputs.models().outputs(), inputs.metadata(), request.shard_size, directory);
    const auto options = tool::json_of(method.values(request.options));
    tool::add_model_files(out, request.copies, request.run,
        {"Merged by " + request.method, request.method, tool::recipe_models(request, inputs), options.dump(2)},
        inputs.models().outputs());
    const auto merged = method.run(call, out.sink());
    out.finish();
    if (report.wanted()) {
        auto content = tool::report_of(run, request, inputs, merged, out.file_size());
        content["options"] = options;
        const auto stored = out.reopen();
        content["tensors"] = tool::norms_of(run.policy(), tool::beside_base(request, inputs, stored));
        report.finish(content);
    }
    const auto size = out.file_size();
    tool::conclude("merged " + tool::counted(inputs.tasks().size(), "task") + " by " + request.method + " into '"
            + tool::printable(request.out) + "': " + tool::counted(inputs.models().outputs().size(), "tensor") + ", "
            + tool::size_text(size) + " in " + tool::seconds_text(run.seconds()) + "\n",
        report, out);
}

const tool::register_verb merge_verb(20, "merge", "Merge fine-tuned models into one", [](tool::command& verb) {
    const auto request = std::make_shared<tool::merge_request>();
    tool::add_method_option(verb, *request, tool::presence::required, "How to merge; see below");
    tool::add_base_option(verb, *request);
    tool::add_weighted_tasks_option(verb, *request);
    verb.text("--out", request->out, "PATH",
        "Where the merged model goes: a file, or a directory, as which any name without .safetensors or .st stands "
        "where the models are directories",
        tool::presence::required);
    tool::add_merge_options(verb, *request);
    tool::add_copy_options(verb, request->copies);
    verb.footer("Methods:\n" + tool::method_list()
        + "\nExample:\n  taskvec merge --method ties --density 0.2 --base base.safetensors --task math.safetensors \\\n"
          "      --task code.safetensors=0.5 --out merged.safetensors");
    verb.action([request] { run_merge(*request); });
});

} // namespace
