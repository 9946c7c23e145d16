// taskvec fold-llora: a linearized LoRA adapter as a plain one.
// SPDX-License-Identifier: Apache-2.0
#include "tool.hpp"

#include <taskvec/io/peft.hpp>
#include <taskvec/jvp/fold_adapter.hpp>

#include <memory>

namespace {

struct settings {
    std::string init, adapter, out, dtype = "keep";
    bool modules_to_save = false;
    tool::run_options run;
};

std::uint64_t bytes_of(const tool::fs::path& directory)
{
    std::uint64_t total = 0;
    for (const auto name : {taskvec::peft_config_name, taskvec::peft_model_name}) {
        std::error_code missing;
        const auto size = tool::fs::file_size(directory / name, missing);
        total += missing ? 0 : size;
    }
    return total;
}

/// True when a file is there and holds f64: everything then computes in f64. What is not there is for read_peft() to report.
bool wide(const tool::fs::path& directory)
{
    std::error_code missing;
    return tool::fs::exists(directory / taskvec::peft_model_name, missing) && taskvec::peft_is_wide(directory);
}

template <class T>
void fold_as(const settings& given)
{
    const tool::runner run(given.run, 0);
    const auto initial = taskvec::read_peft<T>(given.init, {.whole_modules = given.modules_to_save});
    auto adapter = taskvec::read_peft<T>(given.adapter, {.whole_modules = given.modules_to_save});
    if (initial.embeddings != adapter.embeddings) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::message("'", given.init, "' and '", given.adapter,
            "' do not adapt the same embeddings: the first is not the initialisation that the second was trained from"));
    }
    adapter.updates = taskvec::fold_linearized(initial.updates, adapter.updates);
    std::size_t doubled = 0;
    auto layers = nlohmann::ordered_json::array();
    for (const auto& [name, update] : adapter.updates) {
        const auto before = initial.updates.at(name).rank();
        doubled += update.rank() != before;
        layers.push_back({{"name", name}, {"shape", {update.out(), update.in()}}, {"rank_before", before}, {"rank", update.rank()}});
    }
    const std::string summary = tool::counted(adapter.updates.size(), "layer")
        + (doubled == 0 ? ", ranks unchanged because B0 is 0" : ", the rank doubled in " + std::to_string(doubled) + " whose B0 is not 0");
    if (given.run.dry_run) {
        tool::print("would write '" + tool::printable(given.out) + "': " + summary + "\n");
        return;
    }
    tool::report_file report(given.run.report);
    taskvec::peft_write_options how;
    if (given.dtype != "keep") { how.output = given.dtype == "f32" ? taskvec::dtype::f32 : given.dtype == "f16" ? taskvec::dtype::f16 : taskvec::dtype::bf16; }
    taskvec::write_peft(given.out, adapter, how);
    report.finish({{"init", given.init}, {"adapter", given.adapter}, {"output", given.out}, {"layers", std::move(layers)}, {"seconds", run.seconds()},
        {"bytes_read", bytes_of(given.init) + bytes_of(given.adapter)}, {"bytes_written", bytes_of(given.out)}, {"peak_memory", tool::peak_memory()}});
    report.commit();
    tool::print("folded a linearized adapter into '" + tool::printable(given.out) + "': " + summary + ", in " + tool::seconds_text(run.seconds()) + "\n");
}

void fold_llora(const settings& given)
{
    if (given.run.device != "cpu") { throw tool::usage_error("fold-llora runs on the cpu; leave --device out"); }
    if (wide(given.init) || wide(given.adapter)) { fold_as<double>(given); }
    else {
        fold_as<float>(given);
    }
}

const tool::register_verb verb(90, [](CLI::App& app) {
    auto* fold_verb = app.add_subcommand("fold-llora", "Turn an adapter that was fine-tuned linearized (L-LoRA, per layer) into a plain LoRA adapter");
    const auto given = std::make_shared<settings>();
    fold_verb->add_option("--init", given->init, "The adapter's initialisation, a PEFT directory")->type_name("DIR")->required();
    fold_verb->add_option("--adapter", given->adapter, "The fine-tuned adapter, a PEFT directory; also one that merge-lora --space phi wrote")
        ->type_name("DIR")
        ->required();
    fold_verb->add_option("--out", given->out, "Where the plain adapter goes: rank r where the initial lora_B is 0, otherwise 2r")
        ->type_name("DIR")
        ->required();
    fold_verb->add_option("--dtype", given->dtype, "keep, f32, bf16 or f16: dtype of the factors (default: keep)")
        ->type_name("DTYPE")
        ->transform(CLI::IsMember({"keep", "f32", "bf16", "f16"}, CLI::ignore_case));
    fold_verb->add_flag("--modules-to-save", given->modules_to_save, "Accept adapters with modules_to_save, and carry the fine-tuned weights along");
    tool::add_run_options(*fold_verb, given->run);
    fold_verb->footer("Example:\n  taskvec fold-llora --init llora-init --adapter math-llora --out math-lora");
    fold_verb->callback([given] { fold_llora(*given); });
});

} // namespace
