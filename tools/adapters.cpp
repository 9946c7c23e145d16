// What the verbs on LoRA adapters share.
// SPDX-License-Identifier: Apache-2.0
#include "adapters.hpp"

#include <algorithm>
#include <cstdio>

namespace tool {

void add_adapter_options(command& verb, adapter_settings& settings, const std::string& kept)
{
    add_dtype_option(verb, settings.dtype, "dtype of the factors (default: keep, " + kept + ")");
    add_overflow_option(verb, settings.overflow);
    add_run_options(verb, settings.run);
}

void add_modules_to_save(command& verb, adapter_settings& settings)
{
    verb.word_or_flag("--modules-to-save", settings.modules_to_save, "equal",
        {"error", "equal", "average", "first", "drop"}, "[WHAT]",
        "Accept adapters with modules_to_save, and carry the fine-tuned weights along. Where several have some: equal "
        "(they are, "
        "the default of the flag), average (by weight), first, or drop; error accepts none");
}

void drop_whole_modules(std::map<std::string, taskvec::peft_tensor>& others, nlohmann::json& config)
{
    const auto bias = config.find("bias");
    const bool biases = bias != config.end() && bias->is_string() && *bias != "none";
    std::erase_if(others, [&](const auto& one) {
        return !one.first.ends_with(taskvec::peft_base_weight) && !(biases && one.first.ends_with(".bias"));
    });
    config["modules_to_save"] = nullptr;
}

taskvec::rank_choice rank_settings::choice() const
{
    if (!given()) { throw usage_error("give --rank Q or --energy E"); }
    if (rank && *rank == 0) { throw usage_error("--rank is 0; expected at least 1"); }
    if (energy && !(*energy > 0 && *energy <= 1)) {
        throw usage_error(
            taskvec::message("--energy is ", *energy, "; expected a share above 0 and at most 1, such as 0.99"));
    }
    return {.rank = rank.value_or(0), .energy = energy.value_or(0), .clamp = clamp};
}

std::string rank_settings::words(const std::vector<taskvec::layer_report>& layers) const
{
    if (!rank) { return percent(energy.value_or(1)) + " of the energy"; }
    std::size_t highest = 0;
    for (const auto& layer : layers) { highest = std::max(highest, layer.rank); }
    if (highest == 0 || highest >= *rank) { return "rank " + std::to_string(*rank); }
    return "rank " + std::to_string(highest) + ", the highest there is";
}

void add_rank_options(command& verb, rank_settings& settings)
{
    verb.count("--rank", settings.rank, "Q", "Rank of every layer; a layer of smaller rank is kept whole");
    verb.number("--energy", settings.energy, "E",
        "Or the smallest rank of each layer that keeps this share of its squared singular values");
    verb.exclude("--energy", "--rank");
    verb.flag(
        "--clamp", settings.clamp, "Lower a rank above every layer's to the highest there is, instead of refusing it");
}

std::uint64_t adapter_bytes(const fs::path& directory)
{
    std::uint64_t total = 0;
    for (const auto& file : {directory / taskvec::peft_config_name, taskvec::peft_tensor_file(directory)}) {
        std::error_code missing;
        const auto size = fs::file_size(file, missing);
        total += missing ? 0 : size;
    }
    return total;
}

bool adapter_is_wide(const fs::path& directory)
{
    std::error_code missing;
    return fs::exists(taskvec::peft_tensor_file(directory), missing) && taskvec::peft_is_wide(directory);
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
