// SPDX-License-Identifier: Apache-2.0
#include "compare.hpp"

#include <taskvec/formats/safetensors.hpp>
#include <taskvec/jvp/linearize.hpp>

#include <algorithm>
#include <cstring>
#include <string_view>

namespace minilm {
namespace {

using matrix = row_matrix<float>;

double largest(const matrix& a)
{
    return a.size() == 0 ? 0.0 : static_cast<double>(a.cwiseAbs().maxCoeff());
}
double difference(const matrix& a, const matrix& b)
{
    return largest(a - b) / std::max(largest(b), 1e-30);
}

/// The golden file's tensors.
class golden_file {
public:
    explicit golden_file(const std::filesystem::path& file)
        : path_(file)
        , file_(file)
    { }

    [[nodiscard]] matrix operator[](const std::string& name) const
    {
        const taskvec::const_tensor_ref tensor = found(name);
        const bool flat = tensor.shape.size() == 1;
        matrix value(flat ? 1 : tensor.shape.at(0), tensor.shape.at(flat ? 0 : 1));
        std::memcpy(value.data(), tensor.data, tensor.bytes());
        return value;
    }
    [[nodiscard]] batch ids() const
    {
        const taskvec::const_tensor_ref tensor = found("ids");
        batch b{.ids = std::vector<std::int64_t>(tensor.size()), .length = tensor.shape.at(1)};
        std::memcpy(b.ids.data(), tensor.data, tensor.bytes());
        return b;
    }
    /// The tensors PREFIX.NAME by NAME.
    [[nodiscard]] parameters<float> all(std::string_view prefix) const
    {
        parameters<float> values;
        for (const auto& [name, tensor] : file_.model()) {
            if (name.starts_with(prefix)) {
                values.insert(std::string(name.substr(prefix.size())), (*this)[std::string(name)]);
            }
        }
        return values;
    }

private:
    [[nodiscard]] taskvec::const_tensor_ref found(const std::string& name) const
    {
        const auto model = file_.model();
        const auto* tensor = model.find(name);
        if (!tensor) {
            taskvec::raise<taskvec::format_error>(taskvec::error_code::file_tensors,
                taskvec::message("has no tensor '", name, "': scripts/make-minilm-goldens writes it"), path_.string());
        }
        return *tensor;
    }

    std::filesystem::path path_;
    taskvec::safetensors_file file_;
};

/// The largest difference over all tensors, as a share of the largest entry of all.
double difference(const parameters<float>& found, const parameters<float>& expected)
{
    double most = 0, scale = 1e-30;
    for (const auto& [name, value] : expected) {
        most = std::max(most, largest(found[name] - value));
        scale = std::max(scale, largest(value));
    }
    return most / scale;
}

} // namespace

std::vector<std::pair<std::string, double>> differences::named() const
{
    return {{"embedding", embedding}, {"jvp", jvp}, {"gradient", gradient}, {"LoRA embedding", lora},
        {"LoRA gradient", lora_gradient}, {"L-LoRA, whole network", linearized_network},
        {"L-LoRA, per layer", linearized_layers}};
}

differences compare(const loaded& model, const std::filesystem::path& golden)
{
    const golden_file file(golden);
    const batch b = file.ids();
    const matrix cotangent = file["cotangent"];
    const network<float> plain{.shape = model.shape};
    differences found;

    tape<float> record;
    const matrix embedding = embed(plain, model.values, b, &record);
    found.embedding = largest(normalized(embedding) - file["embedding"]);
    found.gradient = difference(gradient(plain, model.values, b, record, cotangent), file.all("gradient."));
    found.jvp = difference(
        taskvec::jvp([&](const auto& p) { return embed(plain, p, b); }, model.values, file.all("direction.")).tangent,
        file["jvp"]);

    // With adapters: φ0, and φ − φ0.
    const network<float> adapted_network{.shape = model.shape, .scaling = file["lora_scaling"](0, 0)};
    const parameters<float> start = file.all("lora."), moved = file.all("delta.");
    parameters<float> values = model.values;
    for (const auto& [name, value] : start) { values.insert(name, value); }
    tape<float> low_rank{.dense = false};
    found.lora = largest(normalized(embed(adapted_network, values, b, &low_rank)) - file["lora_embedding"]);
    found.lora_gradient =
        difference(gradient(adapted_network, values, b, low_rank, cotangent), file.all("lora_gradient."));

    std::vector<std::string> names;
    parameters<float> phi;
    for (const auto& [name, value] : start) {
        names.push_back(name);
        phi.insert(name, value + moved[name]);
    }
    const auto linearized = taskvec::linearize(
        [&](const auto& p, const batch& texts) { return embed(adapted_network, p, texts); }, values, {.active = names});
    found.linearized_network = difference(linearized(phi, b), file["linearized_network"]);

    network<float> by_layer{.shape = model.shape, .scaling = adapted_network.scaling};
    for (const auto& [name, a] : start) {
        if (!name.ends_with(".lora_A")) { continue; }
        const std::string projection = name.substr(0, name.size() - 7);
        auto& layer = by_layer.linearized.insert(projection,
            taskvec::linearized_lora_layer<float>(model.values[projection + ".weight"],
                model.values[projection + ".bias"],
                taskvec::make_lora(start[projection + ".lora_B"], a, by_layer.scaling)));
        layer.delta_a() += moved[name];
        layer.b() += moved[projection + ".lora_B"];
    }
    found.linearized_layers = difference(embed(by_layer, model.values, b), file["linearized_layers"]);
    return found;
}

} // namespace minilm
