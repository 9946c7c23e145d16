// taskvec inspect: what a model holds.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_table.hpp"
#include "command.hpp"
#include "model_diff.hpp"
#include "models.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/fingerprint.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <map>
#include <memory>

namespace {

struct inspect_settings {
    std::string model;
    std::string index = "strict", diff;
    tool::adapter_table_settings table;
    bool json = false, sketch = false, adapter = false;
    tool::run_options run;
};

void print_json(const taskvec::checkpoint& model)
{
    // One tensor a line, so that people and line tools can read it too.
    std::string text = "{\"tensors\": [";
    for (const auto& [name, tensor] : model.stored()) {
        const nlohmann::ordered_json entry{{"name", name}, {"dtype", taskvec::to_string(tensor.dtype)},
            {"shape", tensor.shape}, {"bytes", tensor.bytes(name)}};
        text += (text.back() == '[' ? "\n  " : ",\n  ") + entry.dump();
    }
    auto metadata = nlohmann::ordered_json::object();
    for (const auto& [key, value] : model.metadata()) { metadata[key] = value; }
    tool::print(text + (text.back() == '[' ? "" : "\n") + "],\n\"metadata\": " + metadata.dump() + "}\n");
}

void print_table(const taskvec::checkpoint& model)
{
    struct row {
        std::string cells[4];
    };
    std::vector<row> rows{{{"name", "dtype", "shape", "bytes"}}};
    std::map<taskvec::dtype, std::pair<std::uint64_t, std::uint64_t>> by_dtype; // tensors, elements
    std::uint64_t elements = 0;
    for (const auto& [name, tensor] : model.stored()) {
        rows.push_back({{tool::printable(name), std::string(taskvec::to_string(tensor.dtype)),
            taskvec::to_string(tensor.shape), tool::grouped(tensor.bytes(name))}});
        auto& [tensors, count] = by_dtype[tensor.dtype];
        ++tensors;
        count += tensor.size(name);
        elements += tensor.size(name);
    }
    std::size_t width[4] = {};
    for (const auto& line : rows) {
        for (std::size_t i = 0; i < 4; ++i) { width[i] = std::max(width[i], tool::text_width(line.cells[i])); }
    }
    std::string text;
    for (const auto& line : rows) {
        for (std::size_t i = 0; i < 4; ++i) {
            const std::string space(width[i] - tool::text_width(line.cells[i]), ' ');
            text += i == 3 ? space + line.cells[i] + "\n" : line.cells[i] + space + "  ";
        }
    }
    text += "\n" + tool::counted(model.stored().size(), "tensor") + ", " + tool::counted(elements, "element") + ", "
        + tool::counted(model.data_bytes(), "byte");
    if (model.data_bytes() >= 1000) { text += " (" + tool::size_text(model.data_bytes()) + ")"; }
    text += " in " + tool::counted(model.files().size(), "file") + "\n";
    if (by_dtype.size() > 1) {
        for (const auto& [type, counts] : by_dtype) {
            text += "  " + std::string(taskvec::to_string(type)) + ": " + tool::counted(counts.first, "tensor") + ", "
                + tool::counted(counts.second, "element") + "\n";
        }
    }
    if (const auto layers = tool::layers_text(model); !layers.empty()) { text += "quantised: " + layers + "\n"; }
    if (!model.metadata().empty()) {
        text += "metadata\n";
        for (const auto& [key, value] : model.metadata()) {
            constexpr std::size_t most = 200; // training scripts keep whole files here
            const bool long_one = value.size() > most;
            text += "  " + tool::printable(key) + ": " + tool::printable(long_one ? value.substr(0, most - 40) : value)
                + (long_one ? " … (" + tool::counted(value.size(), "byte") + ", whole with --json)" : "") + "\n";
        }
    }
    tool::print(text);
}

const tool::register_verb inspect_verb(10, "inspect",
    "List a model's tensors, metadata and totals, or an adapter's modules; fails if the file is malformed",
    [](tool::command& verb) {
        const auto given = std::make_shared<inspect_settings>();
        verb.positional("MODEL", given->model, "The model to look into");
        verb.flag("--json", given->json, "Print JSON instead of a table");
        verb.text("--diff", given->diff, "MODEL", "What differs between the two: which tensors, and how much");
        verb.flag("--sketch", given->sketch,
            "Print the sketch that model cards hold: a number over names, dtypes, shapes and the ends of each tensor");
        verb.flag("--adapter", given->adapter,
            "As an adapter: ranks, scalings and norms of its modules (a directory of one, and a GGUF file, are seen to "
            "be it)");
        verb.flag("--singular-values", given->table.singular_values,
            "Of an adapter: the largest and least singular value of each update, and the rank that keeps 90% of their "
            "squares; with --json all of them");
        verb.text("--svg", given->table.svg, "FILE", "Of an adapter: draw its singular values (needs gnuplot)");
        tool::add_index_option(verb, given->index);
        tool::add_quiet(verb, given->run);
        verb.footer("Example:\n  taskvec inspect model.safetensors\n  taskvec inspect model.safetensors --json | jq "
                    "'.tensors | length'");
        verb.action([given] {
            if (given->adapter || (given->diff.empty() && !given->sketch && tool::is_adapter(given->model))) {
                auto how = given->table;
                how.json = given->json;
                tool::print_adapter(given->model, how, given->run);
                return;
            }
            if (given->table.singular_values || !given->table.svg.empty()) {
                throw tool::usage_error("--singular-values and --svg are of adapters, and '" + given->model
                    + "' is not taken for one: --adapter says that a file is");
            }
            const auto model = tool::open_noted(given->model, given->run, given->index);
            if (given->sketch) {
                tool::print(taskvec::fingerprint_text(taskvec::fingerprint_sketch(model.model())) + "\n");
                return;
            }
            if (!given->diff.empty()) {
                const auto other = tool::open_noted(given->diff, given->run, given->index);
                const tool::runner run(given->run);
                const auto diff = tool::diff_of(run, model, other);
                tool::print(given->json ? diff.dump(2) + "\n" : tool::diff_text(diff, model, other));
                return;
            }
            given->json ? print_json(model) : print_table(model);
        });
    });

} // namespace
