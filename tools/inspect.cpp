// taskvec inspect: what a model holds.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_table.hpp"
#include "command.hpp"
#include "model_diff.hpp"
#include "models.hpp"
#include "names.hpp"
#include "runner.hpp"
#include "table.hpp"
#include "words.hpp"

#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/fingerprint.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <map>
#include <memory>

namespace {

struct inspect_settings {
    std::string model;
    std::string index = "strict", diff, verify;
    tool::adapter_table_settings table;
    bool json = false, sketch = false, adapter = false;
    tool::run_options run;
};

/// What the configuration beside the weights calls the model; empty where there is none.
std::string architecture_text(const nlohmann::json& config)
{
    const auto word = [](const nlohmann::json& value) {
        return value.is_string() ? tool::printable(value.get_ref<const std::string&>()) : std::string();
    };
    std::string text;
    if (config.contains("architectures") && config["architectures"].is_array()) {
        for (const auto& one : config["architectures"]) { text += (text.empty() ? "" : ", ") + word(one); }
    }
    const auto type = config.contains("model_type") ? word(config["model_type"]) : "";
    if (text.empty() || type.empty()) { return text + type; }
    return text + " (" + type + ")";
}

/// A smallest and a largest number, one where they are the same.
std::string range_text(std::uint64_t least, std::uint64_t most, const std::string& unit)
{
    return (least == most ? "" : tool::grouped(least) + " to ") + tool::counted(most, unit);
}

/// Tensors and their elements, counted together.
struct totals {
    std::uint64_t tensors = 0, elements = 0;
    void add(std::uint64_t size)
    {
        ++tensors;
        elements += size;
    }
};
/// What a model's lists of layers hold, by what stands before their numbers, and what stands outside of them.
struct layer_lists {
    std::map<std::string, std::map<std::size_t, totals>> lists;
    totals outside;
};
layer_lists layer_lists_of(const taskvec::checkpoint& model)
{
    layer_lists found;
    for (const auto& [name, tensor] : model.stored()) {
        const auto layer = tool::layer_of(name);
        (layer ? found.lists[layer->first][layer->second] : found.outside).add(tensor.size(name));
    }
    return found;
}
/// The least and the most that a layer of a list holds.
std::pair<totals, totals> range_of(const std::map<std::size_t, totals>& layers)
{
    auto least = layers.begin()->second, most = least;
    for (const auto& [number, one] : layers) {
        least = {std::min(least.tensors, one.tensors), std::min(least.elements, one.elements)};
        most = {std::max(most.tensors, one.tensors), std::max(most.elements, one.elements)};
    }
    return {least, most};
}
/// What stands before the numbers of a list of layers, without its dot.
std::string list_name(const std::string& prefix)
{
    return prefix.empty() ? "(numbers)" : prefix.substr(0, prefix.size() - 1);
}

/// How many layers there are, what each holds, and what stands outside of them.
std::string layer_totals(const taskvec::checkpoint& model)
{
    const auto [lists, outside] = layer_lists_of(model);
    std::string text;
    for (const auto& [prefix, layers] : lists) {
        const auto [least, most] = range_of(layers);
        text += "  " + tool::printable(list_name(prefix)) + ": " + tool::counted(layers.size(), "layer")
            + (layers.size() == 1 ? " of " : ", each of ") + range_text(least.tensors, most.tensors, "tensor") + " and "
            + range_text(least.elements, most.elements, "element") + "\n";
    }
    if (!lists.empty() && outside.tensors > 0) {
        text += "  outside of layers: " + tool::counted(outside.tensors, "tensor") + ", "
            + tool::counted(outside.elements, "element") + "\n";
    }
    return text;
}

std::map<taskvec::dtype, totals> totals_by_dtype(const taskvec::checkpoint& model)
{
    std::map<taskvec::dtype, totals> found;
    for (const auto& [name, tensor] : model.stored()) { found[tensor.dtype].add(tensor.size(name)); }
    return found;
}

/// All that the table and what stands behind it say.
void print_json(const taskvec::checkpoint& model, const tool::fs::path& path)
{
    using json = nlohmann::ordered_json;
    // One tensor a line, so that people and line tools can read it too.
    std::string text = "{\"tensors\": [";
    std::uint64_t elements = 0;
    for (const auto& [name, tensor] : model.stored()) {
        const json entry{{"name", name}, {"dtype", taskvec::to_string(tensor.dtype)}, {"shape", tensor.shape},
            {"bytes", tensor.bytes(name)}};
        text += (text.back() == '[' ? "\n  " : ",\n  ") + entry.dump();
        elements += tensor.size(name);
    }
    text += (text.back() == '[' ? "" : "\n") + std::string("],\n");
    const auto add = [&](const char* key, const json& value) {
        text += "\"" + std::string(key) + "\": " + value.dump(-1, ' ', false, json::error_handler_t::replace) + ",\n";
    };
    const auto json_of = [](const totals& one) { return json{{"tensors", one.tensors}, {"elements", one.elements}}; };
    auto by_dtype = json::object();
    for (const auto& [type, counts] : totals_by_dtype(model)) {
        by_dtype[std::string(taskvec::to_string(type))] = json_of(counts);
    }
    add("totals",
        {{"tensors", model.stored().size()}, {"elements", elements}, {"bytes", model.data_bytes()},
            {"files", model.files().size()}, {"by_dtype", by_dtype}});
    const auto found = layer_lists_of(model);
    auto lists = json::array();
    for (const auto& [prefix, layers] : found.lists) {
        const auto range = range_of(layers);
        lists.push_back({{"name", list_name(prefix)}, {"layers", layers.size()}, {"least", json_of(range.first)},
            {"most", json_of(range.second)}});
    }
    add("layers", {{"lists", lists}, {"outside", json_of(found.outside)}});
    const auto config = tool::config_beside(path);
    const auto or_null = [](const std::string& words) { return words.empty() ? json() : json(words); };
    add("architecture",
        {{"architectures", config.contains("architectures") ? json(config["architectures"]) : json()},
            {"model_type", config.contains("model_type") ? json(config["model_type"]) : json()}});
    add("tied", or_null(tool::tie_text(model.model(), tool::config_says_tied(config))));
    add("quantised", or_null(tool::layers_text(model)));
    auto metadata = json::object();
    for (const auto& [key, value] : model.metadata()) { metadata[key] = value; }
    tool::print(text + "\"metadata\": " + metadata.dump(-1, ' ', false, json::error_handler_t::replace) + "}\n");
}

/// Fingerprints and sketches that a word or a file names: metadata of a delta or of statistics, or a text such as a
/// model card. Throws io_error, format_error, invalid_argument where there is none.
std::vector<std::uint64_t> fingerprints_in(const std::string& what)
{
    if (const auto one = taskvec::parse_fingerprint(what)) { return {*one}; }
    std::vector<std::uint64_t> found;
    const auto collect = [&](std::string_view text) {
        constexpr std::string_view start = "xxh64:";
        for (auto at = text.find(start); at != text.npos; at = text.find(start, at + 1)) {
            if (const auto one = taskvec::parse_fingerprint(text.substr(at, start.size() + 16))) {
                found.push_back(*one);
            }
        }
    };
    std::error_code ignored;
    const auto card = tool::fs::path(what) / "README.md";
    if (tool::fs::is_directory(what, ignored)) { collect(taskvec::read_text_file(card)); }
    else if (what.ends_with(".safetensors")) {
        for (const auto& [key, value] : taskvec::safetensors_file(what).metadata()) {
            if (key == "fingerprint") { collect(value); }
        }
    }
    else {
        collect(taskvec::read_text_file(what));
    }
    if (found.empty()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
            tool::in_quotes(what)
                + " holds no fingerprint; --verify takes one (xxh64: and 16 hexadecimal digits), or a delta, a file of "
                  "statistics, a report or a model card");
    }
    return found;
}

/// What matched, as people or programs read it.
void print_match(const inspect_settings& given, const char* what, std::uint64_t value)
{
    const auto text = taskvec::fingerprint_text(value);
    if (given.json) {
        const nlohmann::ordered_json found{{"matches", what}, {what, text}, {"named_by", given.verify}};
        tool::print(found.dump(2) + "\n");
        return;
    }
    tool::print(tool::printable(tool::in_quotes(given.model) + " has the " + what + " that "
                    + tool::in_quotes(given.verify) + " names: " + text)
        + "\n");
}

void verify(const taskvec::checkpoint& model, const inspect_settings& given)
{
    const auto wanted = fingerprints_in(given.verify);
    const auto has = [&](std::uint64_t value) { return std::count(wanted.begin(), wanted.end(), value) > 0; };
    const auto name = tool::in_quotes(given.model), file = tool::in_quotes(given.verify);
    const auto sketch = taskvec::fingerprint_sketch(model.model());
    if (has(sketch)) {
        print_match(given, "sketch", sketch);
        return;
    }
    const tool::runner run(given.run);
    const auto found = taskvec::fingerprint(run.policy(), model.model());
    if (has(found)) {
        print_match(given, "fingerprint", found);
        return;
    }
    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::fingerprint_differs,
        name + " is not what " + file + " names: its fingerprint is " + taskvec::fingerprint_text(found)
            + " and its sketch " + taskvec::fingerprint_text(sketch) + "; expected "
            + (wanted.size() == 1 ? "" : "one of " + std::to_string(wanted.size()) + ", such as ")
            + taskvec::fingerprint_text(wanted.front()));
}

/// --diff, --sketch, --verify and --adapter each ask something else.
void check_one_question(const inspect_settings& given)
{
    std::string first;
    const auto ask = [&](const char* flag, bool asked) {
        if (!asked) { return; }
        if (!first.empty()) { throw tool::usage_error(first + " and " + flag + " exclude each other"); }
        first = flag;
    };
    ask("--diff", !given.diff.empty());
    ask("--sketch", given.sketch);
    ask("--verify", !given.verify.empty());
    ask("--adapter", given.adapter);
    ask("--singular-values", given.table.singular_values && !given.adapter);
}

void print_table(const taskvec::checkpoint& model, const tool::fs::path& path)
{
    std::vector<std::vector<std::string>> rows{{"name", "dtype", "shape", "bytes"}};
    std::uint64_t elements = 0;
    for (const auto& [name, tensor] : model.stored()) {
        rows.push_back({tool::printable(name), std::string(taskvec::to_string(tensor.dtype)),
            taskvec::to_string(tensor.shape), tool::grouped(tensor.bytes(name))});
        elements += tensor.size(name);
    }
    std::string text = tool::table_text(std::move(rows), {false, false, false, true});
    text += "\n" + tool::counted(model.stored().size(), "tensor") + ", " + tool::counted(elements, "element") + ", "
        + tool::counted(model.data_bytes(), "byte");
    if (model.data_bytes() >= 1000) { text += " (" + tool::size_text(model.data_bytes()) + ")"; }
    text += " in " + tool::counted(model.files().size(), "file") + "\n";
    if (const auto by_dtype = totals_by_dtype(model); by_dtype.size() > 1) {
        for (const auto& [type, counts] : by_dtype) {
            text += "  " + std::string(taskvec::to_string(type)) + ": " + tool::counted(counts.tensors, "tensor") + ", "
                + tool::counted(counts.elements, "element") + "\n";
        }
    }
    text += layer_totals(model);
    const auto config = tool::config_beside(path);
    if (const auto name = architecture_text(config); !name.empty()) { text += "architecture: " + name + "\n"; }
    if (const auto tie = tool::tie_text(model.model(), tool::config_says_tied(config)); !tie.empty()) {
        text += "tied: " + tool::printable(tie) + "\n";
    }
    if (const auto layers = tool::layers_text(model); !layers.empty()) { text += "quantised: " + layers + "\n"; }
    if (!model.metadata().empty()) {
        text += "metadata\n";
        std::size_t shown = 0;
        for (const auto& [key, value] : model.metadata()) {
            constexpr std::size_t most_keys = 50;
            if (shown == most_keys) {
                text += "  … and " + tool::counted(model.metadata().size() - shown, "key") + " more, all with --json\n";
                break;
            }
            ++shown;
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
            "Print a sketch: a number over names, dtypes, shapes and the ends of each tensor");
        verb.flag("--adapter", given->adapter,
            "As an adapter: ranks, scalings and norms of its modules (a directory of one, and a GGUF file, are seen to "
            "be it)");
        verb.flag("--singular-values", given->table.singular_values,
            "Of an adapter: the largest and least singular value of each update, and the rank that keeps 90% of their "
            "squares; with --json all of them");
        verb.text("--svg", given->table.svg, "FILE", "Of an adapter: draw its singular values (needs gnuplot)");
        verb.text("--verify", given->verify, "WHAT",
            "Check that this is the model that a fingerprint, or a delta, statistics, a report or a model card names");
        tool::add_index_option(verb, given->index);
        tool::add_quiet(verb, given->run);
        verb.footer("Example:\n  taskvec inspect model.safetensors\n  taskvec inspect model.safetensors --json | jq "
                    "'.tensors | length'");
        verb.action([given] {
            check_one_question(*given);
            if (given->adapter
                || (given->diff.empty() && !given->sketch && given->verify.empty() && tool::is_adapter(given->model))) {
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
                const auto text = taskvec::fingerprint_text(taskvec::fingerprint_sketch(model.model()));
                tool::print(given->json ? nlohmann::ordered_json{{"sketch", text}}.dump(2) + "\n" : text + "\n");
                return;
            }
            if (!given->verify.empty()) {
                verify(model, *given);
                return;
            }
            if (!given->diff.empty()) {
                const auto other = tool::open_noted(given->diff, given->run, given->index);
                const tool::runner run(given->run);
                const auto diff = tool::diff_of(run, model, other);
                tool::print(given->json ? diff.dump(2) + "\n" : tool::diff_text(diff, model, other));
                return;
            }
            given->json ? print_json(model, given->model) : print_table(model, given->model);
        });
    });

} // namespace
