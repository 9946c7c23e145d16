// What configurations, indexes and headers say of how a model is quantised.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/json.hpp>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What is said about a model's layers beyond their tensors: by its configuration, its index and its file's header.
struct quantisation_hints {
    extents block{}; ///< that shares a scale, by the configuration; empty: deduced from shapes
    bool powers_of_two = false; ///< scale_fmt "ue8m0"
    std::string file{}; ///< the configuration, for messages
    std::string key{}; ///< where it has the block: "quantization_config.weight_block_size"
    std::vector<extents> more_blocks{}; ///< of other groups of its layers
    bool scaled_fp8 = false; ///< whether it says that FP8 has scales
    std::vector<std::string> absent{}; ///< tensors that the index lists and no file has
    std::map<std::string, std::string, std::less<>> formats{}; ///< "l" to "float8_e4m3fn", by the header (ComfyUI)
};

/// Where the headers of ComfyUI's files say how each layer is quantised.
inline constexpr std::string_view comfy_metadata_key = "_quantization_metadata";

namespace detail {

/// What configurations call what they say of quantisation, the older name later, ModelOpt's file of its own last.
inline constexpr std::string_view quantisation_keys[] = {"quantization_config", "compression_config", "quantization"};
/// Beside a layer, ComfyUI's files say how it is quantised under this name.
inline constexpr std::string_view comfy_mark = "comfy_quant";

/// What a configuration says of quantisation, at any depth, and where: "text_config.quantization_config".
inline void find_quantisation(const nlohmann::json& part, const std::string& path,
    std::vector<std::pair<std::string, const nlohmann::json*>>& found)
{
    if (!part.is_object()) { return; }
    bool here = false;
    for (const auto& [key, value] : part.items()) {
        const bool is_key =
            std::find(std::begin(quantisation_keys), std::end(quantisation_keys), key) != std::end(quantisation_keys);
        if (!is_key) { find_quantisation(value, path + key + ".", found); }
    }
    for (const auto key : quantisation_keys) {
        const auto place = part.find(key);
        if (here || place == part.end() || !place->is_object()) { continue; }
        found.emplace_back(path + std::string(key), &*place);
        here = true;
    }
}

/// Sizes of a block, as [128, 64] or "128x64"; none where it is neither.
[[nodiscard]] inline extents block_sizes(const nlohmann::json& said)
{
    constexpr std::uint64_t bound = std::uint64_t{1} << 32;
    extents sizes;
    if (said.is_string()) {
        std::uint64_t size = 0;
        for (const char c : said.get_ref<const std::string&>() + "x") {
            if (c >= '0' && c <= '9') { size = std::min(bound, 10 * size + static_cast<unsigned>(c - '0')); }
            else if ((c != 'x' && c != 'X') || size == 0 || size >= bound) {
                return {};
            }
            else {
                sizes.push_back(static_cast<std::int64_t>(size));
                size = 0;
            }
        }
        return sizes;
    }
    if (!said.is_array()) { return {}; }
    for (const auto& size : said) {
        if (!size.is_number_unsigned() || size.get<std::uint64_t>() == 0 || size.get<std::uint64_t>() >= bound) {
            return {};
        }
        sizes.push_back(size.get<std::int64_t>());
    }
    return sizes;
}

/// The formats of layers that a header's metadata give.
[[nodiscard]] inline std::map<std::string, std::string, std::less<>> comfy_formats(const std::string& metadata)
{
    std::map<std::string, std::string, std::less<>> formats;
    const auto json = nlohmann::json::parse(metadata, nullptr, false);
    if (!json.is_object() || !json.contains("layers") || !json["layers"].is_object()) { return formats; }
    for (const auto& [name, how] : json["layers"].items()) {
        if (how.is_object()) { formats[name] = text_under(how, "format"); }
    }
    return formats;
}

} // namespace detail

/// The hints of a config.json; none where it is not there, or says nothing. What it says of quantisation may stand at
/// any depth (`text_config`), as `quantization_config` or `compression_config`, and the block in it as a list, as text
/// ("128x64"), or as the size of a row's groups. Throws format_error for block sizes that are none.
[[nodiscard]] inline quantisation_hints read_quantisation_hints(const std::filesystem::path& config)
{
    quantisation_hints hints;
    std::error_code ignored;
    if (!std::filesystem::is_regular_file(config, ignored)) { return hints; }
    const auto json = parse_configuration(read_text_file(config), config.string());
    std::vector<std::pair<std::string, const nlohmann::json*>> found;
    detail::find_quantisation(json, "", found);
    if (found.empty()) { return hints; }
    hints.file = config.string();
    const auto add = [&](extents block, const std::string& key) {
        if (hints.block.empty()) {
            hints.block = std::move(block);
            hints.key = key;
        }
        else if (hints.block != block) {
            hints.more_blocks.push_back(std::move(block));
        }
    };
    const auto take = [&](const nlohmann::json& part, const std::string& path, const std::string& key) {
        const auto place = part.find(key);
        if (place == part.end() || place->is_null()) { return false; }
        auto sizes = detail::block_sizes(*place);
        if (sizes.empty()) {
            raise<format_error>(error_code::quantised_layer,
                message(path, " has a '", key, "' that is no list of sizes, such as [128, 128]"), hints.file);
        }
        add(std::move(sizes), path + "." + key);
        return true;
    };
    for (const auto& [path, said] : found) {
        const auto& how = *said;
        const auto method = text_under(how, "quant_method"), algorithm = text_under(how, "quant_algo");
        hints.scaled_fp8 =
            hints.scaled_fp8 || method.find("fp8") != method.npos || algorithm.find("FP8") != algorithm.npos;
        hints.powers_of_two = hints.powers_of_two || text_under(how, "scale_fmt") == "ue8m0";
        (void)take(how, path, "weight_block_size");
        if (!how.contains("config_groups") || !how["config_groups"].is_object()) { continue; }
        for (const auto& [name, group] : how["config_groups"].items()) {
            if (!group.is_object() || !group.contains("weights") || !group["weights"].is_object()) { continue; }
            const auto& weights = group["weights"];
            const auto bits = weights.find("num_bits");
            if (bits != weights.end() && !(bits->is_number_integer() && bits->get<std::int64_t>() == 8)) { continue; }
            hints.scaled_fp8 = hints.scaled_fp8 || text_under(weights, "type") == "float";
            const auto where = path + ".config_groups." + name + ".weights";
            if (take(weights, where, "block_structure")) { continue; }
            const auto size = weights.find("group_size");
            if (size != weights.end() && size->is_number_unsigned() && size->get<std::uint64_t>() > 0
                && size->get<std::uint64_t>() < (std::uint64_t{1} << 32)) {
                add({1, size->get<std::int64_t>()}, where + ".group_size");
            }
        }
    }
    return hints;
}

} // namespace taskvec::inline TASKVEC_ABI
