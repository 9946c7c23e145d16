// taskvec apply: a base plus a delta.
// SPDX-License-Identifier: Apache-2.0
#include "model_files.hpp"
#include "report.hpp"
#include "words.hpp"

#include <taskvec/formats/delta.hpp>
#include <taskvec/reuse/sparse_addition.hpp>

#include <memory>

namespace {

struct apply_settings {
    std::string base, delta, out, dtype, shard_size, nonfinite = "error", overflow = "error", index = "strict";
    double scale = 1;
    tool::copy_request copies;
    tool::run_options run;
};

void run_apply(const apply_settings& given)
{
    tool::check_finite(given.scale, "--scale");
    if (given.scale == 0) { tool::note(given.run, "--scale is 0: the delta adds nothing"); }
    tool::check_cpu(given.run);
    const auto base = tool::open_noted(given.base, given.run, given.index);
    tool::check_readable(base, {}, false);
    const taskvec::delta_file delta(given.delta);
    tool::guard_map(delta.file().map());
    const bool directory = tool::out_is_directory(given.out, given.base, !given.shard_size.empty());
    tool::claim_model(given.run, given.out, directory);
    tool::claim_report(given.run);
    taskvec::model_options options;
    options.base_label = "'" + given.base + "'";
    options.labels = {"'" + given.delta + "'"};
    options.on_nonfinite = given.nonfinite == "propagate" ? taskvec::nonfinite::propagate : taskvec::nonfinite::error;
    options.on_overflow = tool::overflow_of(given.overflow);
    options.output = tool::output_dtype(given.dtype);
    const taskvec::aligned_models models(&base.model(), {&base.model(), 1}, options);
    tool::runner run(given.run);
    taskvec::check_base(run.policy(), delta.base_fingerprint(), base.model(), given.delta, given.base);
    const auto kept = delta.kept();
    const auto plan = tool::outputs_of(given.run, models, base, given.dtype);
    if (given.run.dry_run) {
        tool::check_space(given.out, tool::bytes_of(plan));
        tool::print("would add " + tool::counted(kept, "entry") + " of '" + tool::printable(given.delta) + "' to '"
            + tool::printable(given.base) + "' into '" + tool::printable(given.out) + "' ("
            + tool::size_text(tool::bytes_of(plan)) + ")\n");
        return;
    }
    tool::report_file report(given.run.report);
    tool::model_output out(given.out, plan, base, given.shard_size, directory);
    tool::add_model_files(out, given.copies, given.run,
        {"Base plus delta", "", {{"base", tool::parse_task(given.base, "--base").name, given.base, 1, &base}}, ""},
        plan.specs);
    const auto done = taskvec::merge(run.policy(),
        taskvec::sparse_addition_options{delta.parts(), given.scale, options.on_nonfinite}, models, out.sink());
    out.finish();
    if (report.wanted()) {
        nlohmann::ordered_json content{{"output", given.out}, {"seconds", run.seconds()},
            {"bytes_read", 2 * base.data_bytes()}, {"bytes_written", out.file_size()},
            {"peak_memory", tool::peak_memory()}, {"peak_anonymous_memory", run.anonymous_peak()},
            {"scale", given.scale}, {"kept", kept}};
        if (given.overflow == "saturate") { content["saturated"] = done.saturated + out.saturated(); }
        report.finish(content);
    }
    const auto size = out.file_size();
    tool::conclude("added " + tool::counted(kept, "entry") + " to '" + tool::printable(given.base) + "' into '"
            + tool::printable(given.out) + "' (" + tool::size_text(size) + ") in " + tool::seconds_text(run.seconds())
            + "\n",
        report, out);
}

const tool::register_verb apply_verb(
    40, "apply", "Add a delta to the model that it was made for", [](tool::command& verb) {
        const auto given = std::make_shared<apply_settings>();
        verb.text("--base", given->base, "MODEL", "The model that the delta was made for", tool::presence::required);
        verb.text("--delta", given->delta, "FILE", "A delta, from prune or peru-fft", tool::presence::required);
        verb.number("--scale", given->scale, "S", "Factor of the delta (default: 1)");
        verb.text("--out", given->out, "PATH", "Where the sum goes: a file, or a directory", tool::presence::required);
        tool::add_dtype_option(verb, given->dtype, tool::dtype_of_result);
        tool::add_shard_size_option(verb, given->shard_size);
        tool::add_nonfinite_option(verb, given->nonfinite);
        tool::add_copy_options(verb, given->copies);
        tool::add_overflow_option(verb, given->overflow);
        tool::add_index_option(verb, given->index);
        tool::add_run_options(verb, given->run);
        verb.footer("Example:\n  taskvec apply --base reuse/merged.safetensors --delta reuse/math.delta.safetensors "
                    "--out math.safetensors");
        verb.action([given] { run_apply(*given); });
    });

} // namespace
