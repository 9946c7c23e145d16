// taskvec apply: a base plus a delta.
// SPDX-License-Identifier: Apache-2.0
#include "merging.hpp"

#include <taskvec/formats/delta.hpp>
#include <taskvec/reuse/sparse_addition.hpp>

namespace {

struct settings {
    std::string base, delta, out, shard_size, nonfinite = "error";
    double scale = 1;
    tool::run_options run;
};

void apply(const settings& given)
{
    tool::check_finite(given.scale, "--scale");
    const auto base = tool::open_model(given.base);
    const taskvec::delta_file delta(given.delta);
    tool::guard_map(delta.file().map());
    tool::claim_output(
        given.out, "--out", given.shard_size.empty() ? tool::output_kind::model : tool::output_kind::directory);
    tool::claim_report(given.run);
    taskvec::model_options options;
    options.base_label = "'" + given.base + "'";
    options.labels = {options.base_label};
    options.on_nonfinite = given.nonfinite == "propagate" ? taskvec::nonfinite::propagate : taskvec::nonfinite::error;
    const taskvec::aligned_models models(&base.model(), {&base.model(), 1}, options);
    tool::runner run(given.run);
    taskvec::check_base(run.policy(), delta.base_fingerprint(), base.model(), given.delta, given.base);
    const auto kept = delta.kept();
    if (given.run.dry_run) {
        tool::print("would add " + tool::counted(kept, "entry") + " of '" + tool::printable(given.delta) + "' to '"
            + tool::printable(given.base) + "' into '" + tool::printable(given.out) + "' ("
            + tool::size_text(base.data_bytes()) + ")\n");
        return;
    }
    tool::report_file report(given.run.report);
    tool::model_output out(given.out, models.outputs(), base.metadata(), given.shard_size);
    taskvec::add_delta(run.policy(), models, delta.parts(), given.scale, out.sink());
    out.finish();
    if (report.wanted()) {
        report.finish({{"output", given.out}, {"seconds", run.seconds()}, {"bytes_read", 2 * base.data_bytes()},
            {"bytes_written", out.file_size()}, {"peak_memory", tool::peak_memory()},
            {"peak_anonymous_memory", run.anonymous_peak()}, {"scale", given.scale}, {"kept", kept}});
    }
    const auto size = out.file_size();
    tool::conclude("added " + tool::counted(kept, "entry") + " to '" + tool::printable(given.base) + "' into '"
            + tool::printable(given.out) + "' (" + tool::size_text(size) + ") in " + tool::seconds_text(run.seconds())
            + "\n",
        out, report);
}

const tool::register_verb verb(40, [](CLI::App& app) {
    auto* apply_verb = app.add_subcommand("apply", "Add a delta to the model that it was made for");
    const auto given = std::make_shared<settings>();
    apply_verb->add_option("--base", given->base, "The model that the delta was made for")
        ->type_name("MODEL")
        ->required();
    apply_verb->add_option("--delta", given->delta, "A delta, from prune or peru-fft")->type_name("FILE")->required();
    apply_verb->add_option("--scale", given->scale, "Factor of the delta (default: 1)")->type_name("S");
    apply_verb->add_option("--out", given->out, "Where the sum goes: a file, or a directory")
        ->type_name("PATH")
        ->required();
    apply_verb
        ->add_option("--shard-size", given->shard_size, "Write a directory of shards of at most this size, such as 5GB")
        ->type_name("SIZE");
    tool::add_nonfinite_option(*apply_verb, given->nonfinite);
    tool::add_run_options(*apply_verb, given->run);
    apply_verb->footer("Example:\n  taskvec apply --base reuse/merged.safetensors --delta reuse/math.delta.safetensors "
                       "--out math.safetensors");
    apply_verb->callback([given] { apply(*given); });
});

} // namespace
