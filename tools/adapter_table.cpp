// What an adapter holds, module by module.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_table.hpp"

#include "adapter_sums.hpp"
#include "outputs.hpp"
#include "runner.hpp"
#include "table.hpp"
#include "words.hpp"

#include <taskvec/adapters/adapter.hpp>
#include <taskvec/formats/adapter_convert.hpp>
#include <taskvec/formats/adapter_file.hpp>
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/linalg/eigen.hpp>
#include <taskvec/linalg/factored_svd.hpp>

#include <plot.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace tool {

namespace {

std::string short_number(double value)
{
    char text[32];
    std::snprintf(text, sizeof text, "%.4g", value);
    return text;
}

/// The singular values of an update, largest first.
struct spectrum_of_module {
    std::string module;
    double norm = 0;
    std::vector<double> values;

    /// The smallest rank that keeps this share of their squares.
    [[nodiscard]] std::size_t rank_of(double share) const
    {
        double total = 0, sum = 0;
        for (const double value : values) { total += value * value; }
        std::size_t rank = 0;
        while (rank < values.size() && sum < share * total) {
            sum += values[rank] * values[rank];
            ++rank;
        }
        return rank;
    }
};

/// The spectra of the modules with the largest norms, no more than there are colours for.
std::string picture_of(std::vector<spectrum_of_module> spectra, const std::string& adapter, const std::string& path)
{
    constexpr std::size_t most = 8;
    const std::size_t all = spectra.size();
    std::stable_sort(
        spectra.begin(), spectra.end(), [](const auto& one, const auto& other) { return one.norm > other.norm; });
    if (all > most) { spectra.resize(most); }
    plot::line_chart chart{.title = "Singular values of " + adapter
            + (all > most ? ": the " + std::to_string(most) + " largest updates of " + std::to_string(all) : ""),
        .x_label = "rank",
        .y_label = "singular value",
        .curves = {}};
    for (auto& one : spectra) {
        plot::curve curve{.label = one.module, .x = {}, .y = {}};
        for (std::size_t k = 0; k < one.values.size(); ++k) { curve.x.push_back(static_cast<double>(k + 1)); }
        curve.y = std::move(one.values);
        chart.curves.push_back(std::move(curve));
    }
    return plot::svg_of(chart, path);
}

/// What an adapter would lose in each other dialect, as text and, in `json`, whole.
template <class T>
std::string losses_of(const taskvec::adapter_contents<T>& adapter, nlohmann::ordered_json& json)
{
    using dialect = taskvec::adapter_dialect;
    std::string text;
    for (const auto one : {dialect::peft, dialect::kohya, dialect::diffusers, dialect::mlx, dialect::gguf}) {
        if (one == adapter.dialect) { continue; }
        const auto losses = taskvec::not_held(adapter, one);
        auto list = nlohmann::ordered_json::array();
        for (const auto& loss : losses) { list.push_back({{"what", loss.what}, {"why", loss.why}}); }
        const std::string name(taskvec::to_string(one));
        json[name] = std::move(list);
        text += "  as " + name + ": "
            + (losses.empty() ? std::string("nothing is lost")
                              : std::to_string(losses.size()) + (losses.size() == 1 ? " loss: " : " losses, first ")
                        + printable(losses[0].what) + ": " + losses[0].why + (losses.size() > 1 ? " …" : ""))
            + "\n";
    }
    return text;
}

template <class T>
std::string table_of(const fs::path& path, const adapter_table_settings& how, const run_options& run,
    std::vector<spectrum_of_module>& spectra)
{
    const auto adapter = taskvec::read_adapter<T>(path);
    for (const auto& text : adapter.notes) { note(run, text); }
    nlohmann::ordered_json json{
        {"dialect", taskvec::to_string(adapter.dialect)}, {"modules", nlohmann::ordered_json::array()}};
    std::vector<std::vector<std::string>> rows{{"module", "kind", "shape", "rank", "scaling", "norm", "dtype"}};
    const taskvec::cpu policy{.threads = run.threads};
    const bool wanted = how.singular_values || !how.svg.empty();
    if (how.singular_values) { rows[0].insert(rows[0].end() - 1, {"σ1", "σr", "90%"}); }
    double total = 0;
    std::uint64_t parameters = 0;
    for (const auto& [module, made] : adapter.modules) {
        const auto& update = made.update;
        const double squares = taskvec::squared_norm(policy, update);
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
        if (!wanted) { continue; }
        spectra.push_back({module, std::sqrt(squares),
            taskvec::factored_svd(policy, update.factors(1, module), taskvec::rank_choice{.rank = 1}).spectrum});
        const auto& spectrum = spectra.back();
        if (!how.singular_values) { continue; }
        json["modules"].back()["singular_values"] = spectrum.values;
        auto& row = rows.back();
        row.insert(row.end() - 1,
            {short_number(spectrum.values.front()), short_number(spectrum.values.back()),
                std::to_string(spectrum.rank_of(0.9))});
    }
    json["whole_tensors"] = nlohmann::ordered_json::array();
    for (const auto& [name, tensor] : adapter.wholes) { json["whole_tensors"].push_back(name); }
    json["norm"] = std::sqrt(total);
    json["parameters"] = parameters;
    json["not_held"] = nlohmann::ordered_json::object();
    const auto losses = losses_of(adapter, json["not_held"]);
    if (how.json) { return json.dump(2) + "\n"; }
    const std::vector<bool> right(rows[0].size(), false);
    std::string text = table_text(std::move(rows), right) + "\n" + std::string(taskvec::to_string(adapter.dialect))
        + ": " + counted(adapter.modules.size(), "module") + ", " + counted(parameters, "parameter")
        + ", norm of the update " + short_number(std::sqrt(total)) + "\n";
    for (const auto& [name, tensor] : adapter.wholes) {
        text += "  trained whole: " + printable(name) + "  " + taskvec::to_string(tensor.shape) + "\n";
    }
    return text + losses;
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
    for (const char* adapter : {"adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapters.safetensors",
             "adapter_model.bin"}) {
        if (fs::exists(path / adapter, ignored)) { return true; }
    }
    return false;
}

void print_adapter(const fs::path& path, const adapter_table_settings& how, const run_options& run)
{
    const auto file = open_adapter(path);
    if (!how.svg.empty()) { claim_output(how.svg, "--svg"); }
    text_output svg(how.svg);
    std::vector<spectrum_of_module> spectra;
    const auto text =
        holds_f64(file) ? table_of<double>(path, how, run, spectra) : table_of<float>(path, how, run, spectra);
    if (!svg.wanted()) {
        print(text);
        return;
    }
    svg.finish_text(picture_of(std::move(spectra), in_quotes(path), how.svg));
    conclude(text, svg);
}

} // namespace tool
