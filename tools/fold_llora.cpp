// taskvec fold-llora: a linearized LoRA adapter as a plain one.
// SPDX-License-Identifier: Apache-2.0
#include "adapters.hpp"

#include <taskvec/adapters/fold_adapter.hpp>

#include <algorithm>
#include <memory>
#include <utility>

namespace {

struct fold_llora_settings : tool::adapter_settings {
    std::string init, adapter;
};

/// Modules whose B0 is 0 and whose A is not A0: linearized training gives such an A no gradient.
template <class T>
std::size_t moved_without_gradient(const taskvec::lora_adapter<T>& initial, const taskvec::lora_adapter<T>& adapter)
{
    std::size_t count = 0;
    for (const auto& [name, start] : initial) {
        const auto& a = adapter.at(name).a;
        const auto zero = [](T value) { return value == T(0); };
        bool same = true;
        for (std::size_t k = 0; k < a.rows(); ++k) {
            for (std::size_t j = 0; j < a.cols(); ++j) { same = same && a(k, j) == start.a(k, j); }
        }
        count += !same && std::all_of(start.b.data(), start.b.data() + start.b.size(), zero);
    }
    return count;
}

template <class T>
void fold_as(const fold_llora_settings& given)
{
    const tool::runner run(given.run);
    auto report = tool::open_report(given, {given.init, given.adapter});
    const auto initial = tool::read_adapter<T>(given.init, given);
    auto adapter = tool::read_adapter<T>(given.adapter, given);
    if (initial.embeddings != adapter.embeddings) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::initialization_differs,
            taskvec::message("'", given.init, "' and '", given.adapter,
                "' do not adapt the same embeddings: the first is not the initialisation that the second was trained "
                "from"));
    }
    auto folded = taskvec::fold_linearized(
        initial.updates, adapter.updates, {.initial = "'" + given.init + "'", .adapter = "'" + given.adapter + "'"});
    if (const auto count = moved_without_gradient(initial.updates, adapter.updates)) {
        tool::note(given.run,
            "lora_A differs from the initialisation's in " + tool::counted(count, "layer")
                + " whose initial lora_B is 0. Linearized training leaves it as it was (but for weight decay), and it "
                  "has no effect here: is '"
                + given.init + "' what the adapter was trained from, and was it trained linearized?");
    }
    adapter.updates = std::move(folded);
    std::size_t doubled = 0;
    auto layers = nlohmann::ordered_json::array();
    for (const auto& [name, update] : adapter.updates) {
        const auto before = initial.updates.at(name).rank();
        doubled += update.rank() != before;
        layers.push_back(
            {{"name", name}, {"shape", {update.out(), update.in()}}, {"rank_before", before}, {"rank", update.rank()}});
    }
    const std::string summary = tool::counted(adapter.updates.size(), "layer")
        + (doubled == 0 ? ", ranks unchanged because B0 is 0"
                        : ", the rank doubled in " + std::to_string(doubled) + " whose B0 is not 0");
    if (given.run.dry_run) {
        tool::print("would write '" + tool::printable(given.out) + "': " + summary + "\n");
        return;
    }
    const auto bytes_read = tool::adapter_bytes(given.init) + tool::adapter_bytes(given.adapter);
    tool::write_adapter(given, run, report, adapter,
        {{"init", given.init}, {"adapter", given.adapter}, {"layers", std::move(layers)}}, bytes_read,
        "folded a linearized adapter into '" + tool::printable(given.out) + "': " + summary);
}

void run_fold_llora(const fold_llora_settings& given)
{
    tool::check_cpu(given.run);
    tool::in_precision(tool::adapter_is_wide(given.init) || tool::adapter_is_wide(given.adapter),
        [&]<class T>(std::type_identity<T>) { fold_as<T>(given); });
}

const tool::register_verb fold_llora_verb(90, "fold-llora",
    "Turn an adapter that was fine-tuned linearized (L-LoRA, per layer) into a plain LoRA adapter",
    [](tool::command& verb) {
        const auto given = std::make_shared<fold_llora_settings>();
        verb.text(
            "--init", given->init, "DIR", "The adapter's initialisation, a PEFT directory", tool::presence::required);
        verb.text("--adapter", given->adapter, "DIR",
            "The fine-tuned adapter, a PEFT directory; also one that merge-lora --space phi wrote",
            tool::presence::required);
        verb.text("--out", given->out, "DIR",
            "Where the plain adapter goes: rank r where the initial lora_B is 0, otherwise 2r",
            tool::presence::required);
        tool::add_modules_to_save(verb, *given);
        tool::add_adapter_options(verb, *given);
        verb.footer("Example:\n  taskvec fold-llora --init llora-init --adapter math-llora --out math-lora");
        verb.action([given] { run_fold_llora(*given); });
    });

} // namespace
