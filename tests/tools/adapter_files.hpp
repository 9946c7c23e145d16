// Adapters to feed the tool with, and what they make of a weight.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "run_tool.hpp"

#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

namespace tools_test {

inline values_tensor random_tensor(
    taskvec::extents shape, unsigned seed, taskvec::dtype type = taskvec::dtype::f32, float size = 1)
{
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, size);
    values_tensor made{type, std::move(shape), {}};
    made.values.resize(taskvec::element_count(made.shape));
    for (auto& value : made.values) { value = rounded(type, normal(random)); }
    return made;
}

inline void write_text(const std::filesystem::path& path, const std::string& text)
{
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text;
}

/// A directory as PEFT writes it. `tensors` are without PEFT's prefix.
inline void write_adapter_as(const std::filesystem::path& directory, const values_model& tensors,
    const nlohmann::json& more = {}, const std::string& prefix = "base_model.model.")
{
    nlohmann::json config{{"peft_type", "LORA"}, {"r", 2}, {"lora_alpha", 1}, {"base_model_name_or_path", "base"}};
    for (const auto& [key, value] : more.items()) { config[key] = value; }
    write_text(directory / "adapter_config.json", config.dump());
    values_model named;
    for (const auto& [name, tensor] : tensors) { named[prefix + name] = tensor; }
    write_values(directory / "adapter_model.safetensors", named);
}

inline values_model factors(
    const std::string& module, std::int64_t out, std::int64_t in, unsigned seed, std::int64_t rank = 2)
{
    return {{module + ".lora_A.weight", random_tensor({rank, in}, seed)},
        {module + ".lora_B.weight", random_tensor({out, rank}, seed + 1)}};
}

/// w + scaling·b·a, in the order and with the rounding that the tool documents; `turned`: w lies in×out.
inline values_tensor added(
    const values_tensor& w, const values_tensor& a, const values_tensor& b, double scaling, bool turned = false)
{
    values_tensor result = w;
    const auto rank = static_cast<std::size_t>(a.shape[0]), in = a.values.size() / rank, out = b.values.size() / rank;
    for (std::size_t o = 0; o < out; ++o) {
        for (std::size_t i = 0; i < in; ++i) {
            float sum = 0;
            for (std::size_t k = 0; k < rank; ++k) {
                const volatile float factor = static_cast<float>(static_cast<double>(b.values[o * rank + k]) * scaling);
                const volatile float product = factor * a.values[k * in + i];
                sum = sum + product;
            }
            auto& value = result.values[turned ? i * out + o : o * in + i];
            value = rounded(w.dtype, value + sum);
        }
    }
    return result;
}

} // namespace tools_test
