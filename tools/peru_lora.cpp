// taskvec peru-lora: a fine-tuned adapter at a lower rank.
// SPDX-License-Identifier: Apache-2.0
#include "adapters.hpp"

#include <taskvec/reuse/peru_lora.hpp>

#include <algorithm>
#include <memory>

namespace {

struct peru_lora_settings : tool::adapter_settings {
    std::string adapter;
    tool::rank_settings rank;
};

template <class T>
void truncate_as(const peru_lora_settings& given)
{
    const tool::runner run(given.run);
    auto report = tool::open_report(given, {given.adapter});
    auto adapter = tool::read_adapter<T>(given.adapter, given);
    auto result = taskvec::peru_lora(
        run.policy(), adapter.updates, {.rank = given.rank.choice(), .label = "'" + given.adapter + "'"});
    adapter.updates = std::move(result.adapter);
    const auto whole = static_cast<std::uint64_t>(
        std::count_if(result.layers.begin(), result.layers.end(), [](const auto& layer) { return layer.whole; }));
    const std::string summary = tool::counted(result.layers.size(), "layer") + " at " + given.rank.words(result.layers)
        + (whole == 0 ? "" : " (" + tool::grouped(whole) + " of smaller rank kept whole)") + ", "
        + tool::grouped(result.parameters()) + " parameters, relative error " + tool::percent(result.relative_error());
    if (given.run.dry_run) {
        tool::print("would write '" + tool::printable(given.out) + "': " + summary + "\n");
        return;
    }
    const auto bytes_read = tool::adapter_bytes(given.adapter);
    nlohmann::ordered_json content{{"adapter", given.adapter}};
    tool::add_result(content, result);
    tool::write_adapter(given, run, report, adapter, std::move(content), bytes_read,
        "wrote '" + tool::printable(given.out) + "': " + summary);
}

void run_peru_lora(const peru_lora_settings& given)
{
    tool::check_cpu(given.run);
    (void)given.rank.choice();
    tool::in_precision(
        tool::adapter_is_wide(given.adapter), [&]<class T>(std::type_identity<T>) { truncate_as<T>(given); });
}

const tool::register_verb peru_lora_verb(60, "peru-lora",
    "Truncate a LoRA adapter to a lower rank, as well as that rank can (PERU-LoRA)", [](tool::command& verb) {
        const auto given = std::make_shared<peru_lora_settings>();
        verb.text(
            "--adapter", given->adapter, "DIR", "The fine-tuned adapter, a PEFT directory", tool::presence::required);
        verb.text(
            "--out", given->out, "DIR", "Where the truncated adapter goes, a PEFT directory", tool::presence::required);
        tool::add_rank_options(verb, given->rank);
        tool::add_modules_to_save(verb, *given);
        tool::add_adapter_options(verb, *given);
        verb.footer("Example:\n  taskvec peru-lora --adapter math-lora --rank 4 --out math-lora-r4 --report "
                    "math-lora-r4.json");
        verb.action([given] { run_peru_lora(*given); });
    });

} // namespace
