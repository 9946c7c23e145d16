// taskvec convert: an adapter in another dialect.
// SPDX-License-Identifier: Apache-2.0
#include "models.hpp"
#include "outputs.hpp"
#include "report.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <taskvec/formats/adapter_convert.hpp>
#include <taskvec/formats/adapter_names.hpp>

#include <memory>
#include <utility>

namespace {

struct convert_settings {
    std::string in, base, out, as, dtype = "keep", index = "strict", overflow = "error";
    tool::run_options run;
};

taskvec::adapter_dialect dialect_of(const std::string& word)
{
    return word == "kohya"    ? taskvec::adapter_dialect::kohya
        : word == "diffusers" ? taskvec::adapter_dialect::diffusers
        : word == "mlx"       ? taskvec::adapter_dialect::mlx
                              : taskvec::adapter_dialect::peft;
}

/// Modules under the names that the base has for them.
template <class T>
void name_as_base(taskvec::adapter_contents<T>& adapter, const convert_settings& given)
{
    const auto base = tool::open_noted(given.base, given.run, given.index);
    std::vector<std::string> names;
    for (const auto& [module, made] : adapter.modules) { names.push_back(module); }
    const auto match = taskvec::match_modules(names, base.model(), adapter.dialect);
    if (!match.unmatched.empty()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_unexpected,
            taskvec::message("module '", match.unmatched.front(), "' of ", adapter.label, " is no module of '",
                given.base, "': give the base that it was trained on"));
    }
    std::map<std::string, taskvec::adapted_module<T>> renamed;
    for (auto& [module, made] : adapter.modules) {
        const auto& tensor = match.tensors.at(module);
        renamed.emplace(tensor.substr(0, tensor.size() - 7), std::move(made));
    }
    adapter.modules = std::move(renamed);
}

template <class T>
void convert(const convert_settings& given)
{
    auto adapter = taskvec::read_adapter<T>(given.in);
    for (const auto& text : adapter.notes) { tool::note(given.run, text); }
    const std::string from(taskvec::to_string(adapter.dialect));
    if (!given.base.empty()) { name_as_base(adapter, given); }
    const auto dialect = dialect_of(given.as);
    const taskvec::adapter_write_options options{
        .output = tool::output_dtype(given.dtype), .on_overflow = tool::overflow_of(given.overflow)};
    const auto made = taskvec::converted_adapter(adapter, dialect, options);
    std::uint64_t bytes = made.config.size();
    for (const auto& tensor : made.bytes) { bytes += tensor.size(); }
    const std::string what = "'" + tool::printable(given.in) + "' (" + from + ", "
        + tool::counted(adapter.modules.size(), "module") + ") as " + std::string(taskvec::to_string(dialect))
        + " into '" + tool::printable(given.out) + "'";
    if (given.run.dry_run) {
        tool::print("would write " + what + " (" + tool::size_text(bytes) + ")\n");
        return;
    }
    tool::report_file report(given.run.report);
    nlohmann::ordered_json content{{"output", given.out}, {"from", from}, {"as", given.as},
        {"modules", adapter.modules.size()}, {"bytes_written", bytes}};
    if (given.overflow == "saturate") { content["saturated"] = made.saturated; }
    report.finish(content);
    try {
        taskvec::write_adapter(given.out, made, options, [&] {
            tool::check_before_commit();
            tool::print("wrote " + what + " (" + tool::size_text(bytes) + ")\n");
            report.commit();
        });
    }
    catch (...) {
        report.revert();
        throw;
    }
    tool::outputs_are_there();
}

void run_convert(const convert_settings& given)
{
    if (given.run.device != "cpu") { throw tool::usage_error("convert runs on the cpu; leave --device out"); }
    const auto file = tool::open_guarded(taskvec::adapter_tensor_file(given.in));
    const bool as_file =
        given.as == "kohya" || (given.as == "diffusers" && tool::fs::path(given.out).extension() == ".safetensors");
    tool::claim_output(given.out, "--out", as_file ? tool::output_kind::file : tool::output_kind::directory);
    tool::claim_report(given.run);
    if (tool::holds_f64(file)) { convert<double>(given); }
    else {
        convert<float>(given);
    }
}

const tool::register_verb convert_verb(
    78, "convert", "Write an adapter in another dialect: PEFT, kohya, diffusers or MLX", [](tool::command& verb) {
        const auto given = std::make_shared<convert_settings>();
        verb.positional("ADAPTER", given->in, "The adapter, in any of these dialects");
        verb.word("--as", given->as, {"peft", "kohya", "diffusers", "mlx"}, "DIALECT", "peft, kohya, diffusers or mlx",
            false, tool::presence::required);
        verb.text("--out", given->out, "PATH",
            "Where it goes: a directory for peft and mlx, a file for kohya, either for diffusers",
            tool::presence::required);
        verb.text("--base", given->base, "MODEL",
            "The model that it was trained on, which says what modules are called: for adapters of kohya");
        tool::add_dtype_option(verb, given->dtype, "dtype of the factors (default: keep, the adapter's)");
        tool::add_overflow_option(verb, given->overflow);
        tool::add_index_option(verb, given->index);
        tool::add_run_options(verb, given->run);
        verb.footer("Factors keep their bits, scalings become alphas. What a dialect cannot say (whole modules, "
                    "embeddings, DoRA "
                    "…) is an error that names it.\n\n"
                    "Example:\n  taskvec convert style-lora --as kohya --out style.safetensors");
        verb.action([given] { run_convert(*given); });
    });

} // namespace
