// What the verbs on LoRA adapters share.
// SPDX-License-Identifier: Apache-2.0
#include "adapters.hpp"

#include <cstdio>

namespace tool {

std::optional<taskvec::dtype> adapter_settings::output() const
{
    if (dtype == "f32") { return taskvec::dtype::f32; }
    if (dtype == "bf16") { return taskvec::dtype::bf16; }
    if (dtype == "f16") { return taskvec::dtype::f16; }
    return std::nullopt;
}

void add_adapter_options(CLI::App& verb, adapter_settings& settings, const std::string& kept)
{
    verb.add_option(
            "--dtype", settings.dtype, "keep, f32, bf16 or f16: dtype of the factors (default: keep, " + kept + ")")
        ->type_name("DTYPE")
        ->transform(CLI::IsMember({"keep", "f32", "bf16", "f16"}, CLI::ignore_case));
    add_run_options(verb, settings.run);
}

void add_modules_to_save(CLI::App& verb, adapter_settings& settings)
{
    verb.add_flag("--modules-to-save", settings.modules_to_save,
        "Accept adapters with modules_to_save, and carry the fine-tuned weights along");
}

taskvec::rank_choice rank_settings::choice() const
{
    if (!given()) { throw usage_error("give --rank Q or --energy E"); }
    if (energy && !(*energy > 0 && *energy <= 1)) {
        taskvec::raise<taskvec::invalid_argument>(
            taskvec::message("--energy is ", *energy, "; expected a share above 0 and at most 1, such as 0.99"));
    }
    return {.rank = rank.value_or(0), .energy = energy.value_or(0), .clamp = clamp};
}

std::string rank_settings::words() const
{
    return rank ? "rank " + std::to_string(*rank) : percent(energy.value_or(1)) + " of the energy";
}

void add_rank_options(CLI::App& verb, rank_settings& settings)
{
    auto* rank = verb.add_option("--rank", settings.rank, "Rank of every layer; a layer of smaller rank is kept whole")
                     ->type_name("Q")
                     ->transform(decimal_number());
    verb.add_option("--energy", settings.energy,
            "Or the smallest rank of each layer that keeps this share of its squared singular values")
        ->type_name("E")
        ->excludes(rank);
    verb.add_flag(
        "--clamp", settings.clamp, "Lower a rank above every layer's to the highest there is, instead of refusing it");
}

std::uint64_t adapter_bytes(const fs::path& directory)
{
    std::uint64_t total = 0;
    for (const auto name : {taskvec::peft_config_name, taskvec::peft_model_name}) {
        std::error_code missing;
        const auto size = fs::file_size(directory / name, missing);
        total += missing ? 0 : size;
    }
    return total;
}

bool adapter_is_wide(const fs::path& directory)
{
    std::error_code missing;
    return fs::exists(directory / taskvec::peft_model_name, missing) && taskvec::peft_is_wide(directory);
}

nlohmann::ordered_json layers_of(const std::vector<taskvec::layer_report>& layers)
{
    auto list = nlohmann::ordered_json::array();
    for (const auto& layer : layers) {
        nlohmann::ordered_json before; // null for what was dense
        if (layer.rank_before != 0) { before = layer.rank_before; }
        list.push_back({{"name", layer.name}, {"shape", {layer.out, layer.in}}, {"rank_before", before},
            {"rank", layer.rank}, {"whole", layer.whole}, {"energy", layer.energy()},
            {"relative_error", layer.relative_error()}, {"parameters", layer.parameters()}});
    }
    return list;
}

std::string percent(double share)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.3g%%", 100 * share);
    return text;
}

} // namespace tool
