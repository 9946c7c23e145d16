// What an adapter holds, module by module.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_table.hpp"

#include "adapter_sums.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <taskvec/adapters/adapter.hpp>
#include <taskvec/formats/adapter_file.hpp>
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/linalg/eigen.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

namespace tool {

namespace {

std::string short_number(double value)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.4g", value);
    return text;
}

template <class T>
std::string table_of(const fs::path& path, bool as_json, const run_options& run)
{
    const auto adapter = taskvec::read_adapter<T>(path);
    for (const auto& text : adapter.notes) { note(run, text); }
    nlohmann::ordered_json json{
        {"dialect", taskvec::to_string(adapter.dialect)}, {"modules", nlohmann::ordered_json::array()}};
    std::vector<std::vector<std::string>> rows{{"module", "kind", "shape", "rank", "scaling", "norm", "dtype"}};
    double total = 0;
    std::uint64_t parameters = 0;
    for (const auto& [module, made] : adapter.modules) {
        const auto& update = made.update;
        const double squares = taskvec::squared_norm(taskvec::cpu{.threads = run.threads}, update);
        const std::string kind = made.embedding ? made.kind + ", embedding"
            : made.kernel.empty()               ? made.kind
                                                : made.kind + ", convolution";
        total += squares;
        parameters += update.a.size() + update.b.size() + made.magnitude.size() + made.bias.a.size();
        json["modules"].push_back(
            {{"name", module}, {"kind", kind}, {"shape", {update.out(), update.in()}}, {"rank", update.rank()},
                {"scaling", update.scaling}, {"norm", std::sqrt(squares)}, {"dtype", taskvec::to_string(made.stored)}});
        rows.push_back({printable(module), kind, std::to_string(update.out()) + "x" + std::to_string(update.in()),
            std::to_string(update.rank()), short_number(update.scaling), short_number(std::sqrt(squares)),
            std::string(taskvec::to_string(made.stored))});
    }
    json["whole_tensors"] = nlohmann::ordered_json::array();
    for (const auto& [name, tensor] : adapter.wholes) { json["whole_tensors"].push_back(name); }
    json["norm"] = std::sqrt(total);
    json["parameters"] = parameters;
    if (as_json) { return json.dump(2) + "\n"; }
    std::vector<std::size_t> widths(rows[0].size(), 0);
    for (const auto& row : rows) {
        for (std::size_t i = 0; i < row.size(); ++i) { widths[i] = std::max(widths[i], text_width(row[i])); }
    }
    std::string text;
    for (const auto& row : rows) {
        for (std::size_t i = 0; i < row.size(); ++i) {
            const bool last = i + 1 == row.size();
            text += row[i] + (last ? "\n" : std::string(widths[i] - text_width(row[i]) + 2, ' '));
        }
    }
    text += "\n" + std::string(taskvec::to_string(adapter.dialect)) + ": " + counted(adapter.modules.size(), "module")
        + ", " + counted(parameters, "parameter") + ", norm of the update " + short_number(std::sqrt(total)) + "\n";
    for (const auto& [name, tensor] : adapter.wholes) {
        text += "  trained whole: " + printable(name) + "  " + taskvec::to_string(tensor.shape) + "\n";
    }
    return text;
}

} // namespace

bool is_adapter(const fs::path& path)
{
    std::error_code ignored;
    if (fs::is_regular_file(path, ignored) && taskvec::is_gguf_file(path)) {
        const taskvec::mapped_file map(path);
        try {
            return taskvec::parse_gguf(map.bytes(), path.string()).text("general.type") != "model";
        }
        catch (const taskvec::dtype_mismatch&) { // the types of quantised models
            return false;
        }
    }
    if (!fs::is_directory(path, ignored)) { return false; }
    for (const char* model : {"model.safetensors", "model.safetensors.index.json"}) {
        if (fs::exists(path / model, ignored)) { return false; }
    }
    for (const char* adapter :
        {"adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapters.safetensors"}) {
        if (fs::exists(path / adapter, ignored)) { return true; }
    }
    return false;
}

std::string adapter_table(const fs::path& path, bool json, const run_options& run)
{
    const auto file = open_adapter(path);
    return holds_f64(file) ? table_of<double>(path, json, run) : table_of<float>(path, json, run);
}

} // namespace tool
