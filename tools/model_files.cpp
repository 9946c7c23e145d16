// What lies beside weights in a model's directory.
// SPDX-License-Identifier: Apache-2.0
#include "model_files.hpp"

#include "chat_templates.hpp"

#include "adapter_sums.hpp"
#include "layer_kinds.hpp"
#include "runner.hpp"
#include "tokenizers.hpp"
#include "vocabulary.hpp"
#include "words.hpp"

#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/file_kind.hpp>
#include <taskvec/formats/fingerprint.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstddef>
#include <deque>
#include <iterator>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string_view>
#include <utility>

namespace tool {

namespace {

using json = nlohmann::ordered_json;

/// A configuration in its own order, read strictly: what is no JSON is refused by its name.
json parsed(const std::string& text, const fs::path& file)
{
    const auto quoted = taskvec::quoted_constants(text);
    (void)taskvec::parse_json(quoted, file.string());
    return json::parse(quoted);
}

bool holds_files(const fs::path& path)
{
    std::error_code ignored;
    return fs::is_directory(path, ignored);
}

/// Refuses to copy what stands for a file that was not fetched.
void refuse_pointer(const fs::path& file, const std::string& text)
{
    if (!taskvec::is_lfs_pointer(text)) { return; }
    if (const auto kind = taskvec::what_is_this_file(std::as_bytes(std::span(text)))) {
        taskvec::raise<taskvec::format_error>(taskvec::error_code::not_safetensors,
            kind->sentence() + "; --no-copy writes the weights alone", file.string());
    }
}

/// Whether a file of a model's directory is needed to load and use the model.
bool belongs_beside(const std::string& name, bool code)
{
    static const std::set<std::string_view> left_out{"trainer_state.json", "all_results.json", "train_results.json",
        "eval_results.json", "training_args.json", "adapter_config.json", "model_index.json", "quantize_config.json"};
    if (left_out.contains(name) || name.starts_with(".")) { return false; }
    const auto ends = [&](std::string_view ending) { return name.ends_with(ending); };
    if (ends(".json")) { return name.find(".index.") == name.npos; }
    if (ends(".py")) { return code; }
    if (ends(".txt")) { return name.find("vocab") != name.npos || name.find("merges") != name.npos; }
    for (const std::string_view ending : {".jinja", ".model", ".tiktoken", ".codes", ".spm", ".vocab"}) {
        if (ends(ending)) { return true; }
    }
    std::string upper = name;
    for (auto& c : upper) { c = static_cast<char>(std::toupper(static_cast<unsigned char>(c))); }
    return upper.starts_with("LICENSE") || upper.starts_with("NOTICE") || upper.find("USE_POLICY") != upper.npos;
}

/// Folders that sentence-transformers and chat templates have.
bool belongs_beside_as_folder(const std::string& name)
{
    const auto digits = name.find_first_not_of("0123456789");
    return name == "additional_chat_templates" || (digits != name.npos && digits > 0 && name[digits] == '_');
}

using named_files = std::vector<std::pair<std::string, fs::path>>;

/// Puts the tokenizer of one directory in place of another's among files to be copied; returns the names of its files.
std::set<std::string> take_tokenizer(named_files& files, const fs::path& source, const fs::path& whose)
{
    static const std::string templates = "additional_chat_templates";
    const auto of = [](const fs::path& directory) {
        named_files found;
        for (const auto& file : tokenizer_files_in(directory)) { found.emplace_back(file.filename().string(), file); }
        std::error_code ignored;
        for (fs::directory_iterator it(directory / templates, ignored), end; !ignored && it != end;
            it.increment(ignored)) {
            std::error_code unread;
            if (it->is_regular_file(unread)) {
                found.emplace_back(templates + "/" + it->path().filename().string(), it->path());
            }
        }
        return found;
    };
    std::set<std::string> left_out, names;
    for (const auto& [name, file] : of(source)) { left_out.insert(name); }
    std::erase_if(files, [&](const auto& one) { return left_out.contains(one.first); });
    for (auto& one : of(whose)) {
        names.insert(one.first);
        files.push_back(std::move(one));
    }
    return names;
}

std::string torch_name(taskvec::dtype type)
{
    switch (type) {
    case taskvec::dtype::f64: return "float64";
    case taskvec::dtype::f32: return "float32";
    case taskvec::dtype::f16: return "float16";
    case taskvec::dtype::bf16: return "bfloat16";
    default: return "";
    }
}

/// The dtype of most of a model's floating bytes.
std::string main_dtype(const std::vector<taskvec::tensor_spec>& specs)
{
    // Scales beside codes have a dtype of their own: a model that stays quantised keeps what its configuration says.
    if (std::any_of(specs.begin(), specs.end(), [](const auto& spec) { return taskvec::is_fp8(spec.dtype); })) {
        return "";
    }
    std::map<std::string, std::uint64_t> bytes;
    for (const auto& spec : specs) {
        if (auto name = torch_name(spec.dtype); !name.empty()) { bytes[name] += spec.bytes(); }
    }
    const auto most =
        std::max_element(bytes.begin(), bytes.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
    return most == bytes.end() ? "" : most->first;
}

/// Whether any tensor is stored as codes.
bool is_quantised(const std::vector<taskvec::tensor_spec>& specs)
{
    return std::any_of(specs.begin(), specs.end(), [](const taskvec::tensor_spec& spec) {
        return spec.dtype == taskvec::dtype::i8 || spec.dtype == taskvec::dtype::u8 || spec.dtype == taskvec::dtype::i32
            || (taskvec::bits_per_element(spec.dtype) <= 8 && spec.dtype != taskvec::dtype::boolean);
    });
}

/// Whether a result has a head.
bool vocabulary_head(const std::vector<taskvec::tensor_spec>& specs)
{
    return std::any_of(specs.begin(), specs.end(), [](const taskvec::tensor_spec& spec) { return is_head(spec.name); });
}

bool says_quantisation(const std::string& key)
{
    return key == "quantization_config" || key == "compression_config";
}

/// Leaves out what a configuration says of quantisation, at any depth. Returns where it stood.
std::vector<std::string> erase_quantisation(json& part, const std::string& path = "")
{
    std::vector<std::string> erased;
    if (!part.is_object()) { return erased; }
    std::vector<std::string> keys;
    for (const auto& [key, value] : part.items()) { keys.push_back(key); }
    for (const auto& key : keys) {
        if (says_quantisation(key)) {
            part.erase(key);
            erased.push_back(path + key);
            continue;
        }
        for (auto& inner : erase_quantisation(part[key], path + key + ".")) { erased.push_back(std::move(inner)); }
    }
    return erased;
}

/// What a configuration says of quantisation, at whatever depth, and under which keys; null where it says nothing.
json* find_quantisation(json& part, std::vector<std::string>& keys)
{
    if (!part.is_object()) { return nullptr; }
    for (auto& [key, value] : part.items()) {
        if (!says_quantisation(key)) { continue; }
        keys.push_back(key);
        return &value;
    }
    for (auto& [key, value] : part.items()) {
        keys.push_back(key);
        if (auto* const found = find_quantisation(value, keys)) { return found; }
        keys.pop_back();
    }
    return nullptr;
}

/// Brings what a configuration says of quantisation up to date: it is left out where nothing is quantised, taken from
/// the model whose layers these are where it is missing, and names the layers that became numbers beside those that did
/// not.
bool update_quantisation(
    json& config, const std::vector<taskvec::tensor_spec>& specs, const recipe& how, const run_options& run)
{
    if (!is_quantised(specs)) {
        const auto erased = erase_quantisation(config);
        if (erased.empty()) { return false; }
        for (const auto& path : erased) {
            note(run, "config.json: " + path + " is left out, as no tensor of the result is quantised");
        }
        return true;
    }
    const auto* const first = how.models.empty() ? nullptr : how.models.front().opened;
    if (!first || !first->layers() || first->layers()->layers().empty()) { return false; }
    bool changed = false;
    std::vector<std::string> keys;
    auto* place = find_quantisation(config, keys);
    if (!place) {
        const auto file = first->path() / "config.json";
        std::error_code ignored;
        if (!fs::is_regular_file(file, ignored)) { return false; }
        auto own = parsed(read_watched(file), file);
        auto* const theirs = find_quantisation(own, keys);
        if (!theirs) { return false; }
        const bool nested = keys.size() == 2 && config.contains(keys[0]) && config[keys[0]].is_object();
        place = nested ? &config[keys[0]][keys[1]] : &config[keys.back()];
        *place = *theirs;
        changed = true;
        note(run,
            "config.json: " + keys.back() + " is that of " + how.label_of(first->path()) + ", whose layers these are");
    }
    auto& said = *place;
    if (!said.is_object()) { return changed; }
    std::map<std::string_view, taskvec::dtype> stored;
    for (const auto& spec : specs) { stored[spec.name] = spec.dtype; }
    std::vector<std::string> numbers;
    for (const auto& layer : first->layers()->layers()) {
        const std::string name = layer.layer().name;
        const auto place = stored.find(name);
        if (place == stored.end() || taskvec::is_fp8(place->second)) { continue; }
        if (name.ends_with(".weight")) { numbers.push_back(name.substr(0, name.size() - 7)); }
    }
    if (numbers.empty()) { return changed; }
    const char* list = (said.contains("quant_method") && said["quant_method"] == "compressed-tensors")
        ? "ignore"
        : "modules_to_not_convert";
    for (const char* word : {"modules_to_not_convert", "ignored_layers", "ignore"}) {
        if (said.contains(word)) { list = word; }
    }
    if (!said[list].is_array()) { said[list] = json::array(); }
    for (const auto& name : numbers) {
        if (std::find(said[list].begin(), said[list].end(), name) == said[list].end()) { said[list].push_back(name); }
    }
    note(run,
        "config.json: " + counted(numbers.size(), "layer") + (numbers.size() == 1 ? " that is" : " that are")
            + " no longer quantised ('" + numbers.front() + (numbers.size() > 1 ? "' …" : "'") + ") added to "
            + std::string(list) + " of " + keys.back());
    return true;
}

/// A configuration that says of the result what is so; empty where nothing changes.
std::string updated_config(const std::string& text, const fs::path& file,
    const std::vector<taskvec::tensor_spec>& specs, const std::optional<std::int64_t>& rows_before, const recipe& how,
    const run_options& run)
{
    auto config = parsed(text, file);
    if (!config.is_object()) { return ""; }
    bool changed = false;
    const auto set = [&](json& part, const char* key, const json& value) {
        if (part[key] != value) {
            part[key] = value;
            changed = true;
        }
    };
    const auto dtype = main_dtype(specs);
    const auto rows = vocabulary_rows(specs);
    const auto update = [&](json& part, bool whole) {
        bool has = false;
        for (const char* key : {"torch_dtype", "dtype"}) {
            if (!dtype.empty() && part.contains(key) && (part[key].is_string() || part[key].is_null())) {
                set(part, key, dtype);
                has = true;
            }
        }
        if (whole && !has && !dtype.empty() && part.contains("model_type")) { set(part, "torch_dtype", dtype); }
        if (rows && rows_before && *rows != *rows_before && part.contains("vocab_size")
            && part["vocab_size"].is_number_integer()) {
            set(part, "vocab_size", *rows);
        }
    };
    update(config, true);
    for (const char* key : {"text_config", "llm_config", "language_config"}) {
        if (config.contains(key) && config[key].is_object()) { update(config[key], false); }
    }
    if (!how.layers.empty()) {
        layers_in_config layers(how.layers, run);
        changed = layers.update(config, "") || changed;
        for (const char* key : {"text_config", "llm_config", "language_config"}) {
            if (config.contains(key) && config[key].is_object()) {
                changed = layers.update(config[key], key) || changed;
            }
        }
        layers.check(specs);
    }
    const bool own_head = config_says_tied(nlohmann::json(config)) && vocabulary_head(specs)
        && std::any_of(how.models.begin(), how.models.end(),
            [](const recipe::model& one) { return has_own_head(one.opened->model()); });
    if (how.untied || own_head) {
        if (own_head) {
            note(run, "config.json: tie_word_embeddings is false, as a model has a head that is not its embedding");
        }
        set(config, "tie_word_embeddings", false);
        if (config.contains("text_config") && config["text_config"].is_object()) {
            set(config["text_config"], "tie_word_embeddings", false);
        }
    }
    changed = update_quantisation(config, specs, how, run) || changed;
    return changed ? taskvec::restored_constants(config.dump(2)) + "\n" : "";
}

/// The model's name on the Hub, as far as its path or configuration tells: "org/name"; else the directory's name.
std::string hub_name(const recipe::model& model)
{
    for (const auto& part : model.path) {
        const auto text = part.string();
        if (!text.starts_with("models--")) { continue; }
        auto name = text.substr(8);
        if (const auto at = name.find("--"); at != name.npos) { name.replace(at, 2, "/"); }
        return name;
    }
    return model.name;
}

std::string yaml_text(const std::string& text)
{
    const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
        return std::isalnum(static_cast<unsigned char>(c))
            || std::string_view("-_./").find(c) != std::string_view::npos;
    }) && (std::isalpha(static_cast<unsigned char>(text[0])) != 0);
    return plain ? text : json(printable(text)).dump();
}

std::string table_cell(std::string text)
{
    text = printable(text);
    for (std::size_t at = 0; (at = text.find('|', at)) != text.npos; at += 2) { text.insert(at, 1, '\\'); }
    return text;
}

constexpr const char* card_mark = "<!-- made by taskvec -->";
/// Models of up to so many bytes together have fingerprints of all of them in a card, larger ones sketches: reading
/// them once more would take half as long as merging them does.
constexpr std::uint64_t fingerprinted_bytes = std::uint64_t{1} << 28;

std::string library_of(const fs::path& source)
{
    std::error_code ignored;
    if (source.empty()) { return ""; }
    if (fs::exists(source / "modules.json", ignored)) { return "sentence-transformers"; }
    if (!fs::exists(source / "config.json", ignored)) { return ""; }
    const auto config = read_watched(source / "config.json");
    if (config.find("\"_diffusers_version\"") != config.npos) { return "diffusers"; }
    return config.find("\"model_type\"") != config.npos ? "transformers" : "";
}

/// A model as whoever opens it anew sees it: without other names, and tensors that were added to line it up.
taskvec::const_model_ref as_opened(const taskvec::checkpoint& model)
{
    if (model.layers()) { return model.layers()->model(); }
    taskvec::const_model_ref found;
    for (const auto& file : model.files()) {
        for (const auto& entry : file.entries()) {
            if (!found.find(entry.name)) { found.insert(entry.name, file.tensor(entry)); }
        }
    }
    return found;
}

/// What a result was made of, opened: `opened` is one of `files`.
std::vector<recipe::model> opened(const std::vector<ingredient>& parts, std::deque<taskvec::checkpoint>& files)
{
    std::vector<recipe::model> models;
    for (const auto& part : parts) {
        files.push_back(part.adapter ? open_adapter(part.path) : open_guarded(part.path));
        models.push_back({part.role, parse_task(part.path, "a model").name, part.path, part.weight, &files.back()});
    }
    return models;
}

std::string card_of(const recipe& how, const fs::path& out, const fs::path& source, const taskvec::cpu& policy)
{
    std::string text = "---\nbase_model:\n";
    std::set<std::string> named;
    std::deque<taskvec::checkpoint> files;
    auto models = how.models;
    for (auto& one : opened(how.made_of, files)) { models.push_back(std::move(one)); }
    for (const auto& model : models) {
        if (model.is_result) { continue; }
        const auto name = hub_name(model);
        if (named.insert(name).second) { text += "- " + yaml_text(name) + "\n"; }
    }
    if (const auto library = library_of(source); !library.empty()) { text += "library_name: " + library + "\n"; }
    text += "tags:\n- merge\n- taskvec\n";
    if (!how.method.empty()) { text += "- " + yaml_text(how.method) + "\n"; }
    const auto whole = out.has_filename() ? out : out.parent_path();
    text += "---\n" + std::string(card_mark) + "\n\n# " + table_cell(whole.filename().string()) + "\n\n" + how.done
        + " with taskvec " + tool_version() + ":\n\n```\ntaskvec";
    for (const auto& word : command_words()) { text += " " + shell_word(printable(word)); }
    const std::string head = "| model | role | weight | fingerprint |\n|---|---|---|---|\n";
    text += "\n```\n\n" + head;
    std::uint64_t bytes = 0;
    for (const auto& model : models) { bytes += model.opened->data_bytes(); }
    const bool all_bytes = bytes <= fingerprinted_bytes;
    for (const auto& model : models) {
        if (&model - models.data() == static_cast<std::ptrdiff_t>(how.models.size())) {
            text += "\nResults of other documents among them were made of:\n\n" + head;
        }
        const auto seen = model.unstored ? *model.unstored : as_opened(*model.opened);
        const auto fingerprint = all_bytes ? taskvec::fingerprint(policy, seen) : taskvec::fingerprint_sketch(seen);
        text += "| " + table_cell(hub_name(model)) + " | " + model.role + " | "
            + (model.role.starts_with("base") ? std::string("") : taskvec::message(model.weight)) + " | `"
            + taskvec::fingerprint_text(fingerprint) + "` |\n";
    }
    text += std::string("\nA fingerprint is a 64-bit number over names, dtypes, shapes and ")
        + (all_bytes ? "all bytes" : "the first and the last 4 KiB of each tensor (a sketch)")
        + "; `taskvec inspect MODEL --verify README.md` checks that a model is one of these.\n";
    if (!how.options.empty()) { text += "\nOptions in force:\n\n```json\n" + how.options + "\n```\n"; }
    return text;
}

} // namespace

void add_copy_options(command& verb, copy_request& copies)
{
    verb.text("--copy-from", copies.from, "DIR",
        "Where the files beside the weights come from, configuration and tokenizer (default: the base's directory)");
    verb.flag("--no-copy", copies.no_copy, "Write the weights alone into an output directory");
    verb.flag("--copy-code", copies.copy_code, "Copy the model's own Python files too");
    verb.flag("--no-card", copies.no_card, "No README.md that says how the model was made");
}

bool out_is_directory(const fs::path& out, const fs::path& first_model, bool sharded)
{
    std::error_code ignored;
    const bool names_file = out.extension() == ".safetensors" || out.extension() == ".st"; // "o.safetensors/" has none
    if (names_file && sharded) {
        throw usage_error("--out '" + out.string()
            + "' names a file, and --shard-size makes a directory: leave it out, or name a directory such as '"
            + out.stem().string() + "'");
    }
    if (names_file && fs::is_directory(out, ignored)) {
        taskvec::raise<taskvec::io_error>(taskvec::error_code::file_kind,
            "is a directory, and by its name --out would be a file: choose another name, or end it with '/' for that "
            "directory",
            out.string(), EISDIR);
    }
    if (sharded || !out.has_filename() || fs::is_directory(out, ignored)) { return true; }
    return holds_files(first_model) && !names_file; // a file of that name is in its way
}

void claim_model(const run_options& run, const fs::path& out, bool directory)
{
    claim_output(out, "--out", directory ? output_kind::directory : output_kind::model);
    if (!directory) { note_ending(run, out); }
    const bool model_of_folder = directory
        || std::any_of(std::begin(taskvec::model_stems), std::end(taskvec::model_stems),
            [&](std::string_view stem) { return out.filename() == std::string(stem) + ".safetensors"; });
    const auto folder = directory ? out : place_of(out).parent_path();
    std::error_code ignored;
    if (!model_of_folder || !fs::exists(folder / "merged.safetensors", ignored)) { return; }
    for (fs::directory_iterator it(folder, ignored), end; !ignored && it != end; it.increment(ignored)) {
        const auto name = it->path().filename().string();
        if (!name.ends_with(".delta.safetensors")) { continue; }
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::output_path,
            in_quotes(folder) + " holds merged.safetensors and deltas for it (" + in_quotes(name)
                + "), and a model there would be opened in place of that one: name another directory, or a file");
    }
}

std::vector<recipe::model> recipe_models(const model_request& request, const merge_inputs& inputs)
{
    std::vector<recipe::model> models;
    if (inputs.base()) {
        models.push_back({"base", parse_task(request.base, "--base").name, request.base, 1, inputs.base()});
        if (const auto* const sum = inputs.adapter_on(std::nullopt)) {
            const auto adapter = parse_task(request.base_adapter, "the base's adapter");
            models.push_back(
                {"adapter on the base", adapter.name, adapter.path, adapter.weight, &sum->files().front()});
        }
    }
    for (std::size_t t = 0; t < inputs.tasks().size(); ++t) {
        const auto& task = inputs.arguments()[t];
        if (const auto* const sum = inputs.adapter(t)) {
            models.push_back({"task, an adapter", task.name, task.path, task.weight, &sum->files().front()});
            continue;
        }
        if (const auto* const sum = inputs.adapter_on(t)) {
            const auto host = parse_task(request.adapters.at(task.text), "a model");
            models.push_back({"task", host.name, host.path, 1, &inputs.tasks()[t]});
            models.push_back(
                {"adapter on '" + host.name + "'", task.name, task.path, task.weight, &sum->files().front()});
            continue;
        }
        models.push_back({"task", task.name, task.path, task.weight, &inputs.tasks()[t]});
    }
    for (const auto& part : inputs.parts()) {
        const auto same = [&](const recipe::model& model) { return model.path == part.path(); };
        if (std::any_of(models.begin(), models.end(), same)) { continue; }
        models.push_back({"layers of it", parse_task(part.path().string(), "a model").name, part.path(), 1, &part});
    }
    for (auto& model : models) {
        model.unstored = unstored(request, model.path);
        model.is_result = request.made_of.contains(model.path.string());
    }
    return models;
}

std::vector<ingredient> recipe_ingredients(const model_request& request, const std::vector<recipe::model>& models)
{
    std::vector<ingredient> parts;
    std::set<std::string> seen;
    for (const auto& model : models) { seen.insert(model.path.string()); }
    for (const auto& model : models) {
        const auto place = request.made_of.find(model.path.string());
        if (place == request.made_of.end()) { continue; }
        for (const auto& part : place->second) {
            if (seen.insert(part.path).second) { parts.push_back(part); }
        }
    }
    return parts;
}

namespace {

/// --copy-from an adapter's directory, which holds a tokenizer and no model's configuration: the tokenizer is taken,
/// and the other files are the first model's.
copy_request with_configuration(copy_request copies, const recipe& how, const run_options& run)
{
    std::error_code ignored;
    const fs::path from = copies.from, first = how.models.front().path;
    if (from.empty() || tokenizer_of(from).empty() || !fs::is_directory(from, ignored)
        || fs::exists(from / "config.json", ignored) || !fs::exists(first / "config.json", ignored)) {
        return copies;
    }
    note(run,
        how.label_of(from) + " has a tokenizer and no config.json: the other files are those of "
            + how.label_of(first));
    copies.tokenizer_from = std::exchange(copies.from, first.string());
    return copies;
}

} // namespace

void add_model_files(model_folder& out, const copy_request& asked, const run_options& run, const recipe& how,
    const std::vector<taskvec::tensor_spec>& specs, const std::string& weights)
{
    const auto copies = with_configuration(asked, how, run);
    const auto& folder = out.folder();
    const fs::path source = !copies.from.empty() ? fs::path(copies.from) : how.models.front().path;
    if (!copies.from.empty() && !holds_files(source)) {
        taskvec::raise<taskvec::io_error>(taskvec::error_code::file_kind,
            "is no directory; --copy-from names one that holds a model's config.json", source.string(), ENOTDIR);
    }
    const bool has_source = holds_files(source) && !copies.no_copy;
    if (folder.empty() || (!has_source && copies.from.empty() && !holds_files(how.models.front().path))) { return; }
    if (!weights.empty()) {
        std::uint64_t bytes = 0;
        std::map<std::string_view, bool> names;
        for (const auto& spec : specs) {
            bytes += spec.bytes();
            names[spec.name] = true;
        }
        std::string index =
            "{\n  \"metadata\": {\n    \"total_size\": " + std::to_string(bytes) + "\n  },\n  \"weight_map\": {";
        for (const auto& [name, unused] : names) {
            index += (index.back() == '{' ? "\n    " : ",\n    ") + taskvec::json_string(name) + ": "
                + taskvec::json_string(weights);
        }
        const std::string stem(stem_of(*how.models.front().opened));
        out.add_file(stem + ".safetensors.index.json", index + "\n  }\n}\n");
    }
    const bool in_place = has_source && place_of(source) == place_of(out.place());
    if (has_source) {
        std::optional<std::int64_t> rows_before;
        for (const auto& [name, tensor] : how.models.front().opened->model()) {
            const std::vector<taskvec::tensor_spec> one{{name, tensor.dtype, tensor.shape}};
            if (!rows_before) { rows_before = vocabulary_rows(one); }
        }
        std::vector<std::pair<std::string, fs::path>> files;
        bool code = false;
        for (const auto& entry : fs::directory_iterator(source)) {
            const auto name = entry.path().filename().string();
            std::error_code ignored;
            if (entry.is_regular_file(ignored)) {
                code = code || name.ends_with(".py");
                if (belongs_beside(name, copies.copy_code)) { files.emplace_back(name, entry.path()); }
            }
            else if (entry.is_directory(ignored) && belongs_beside_as_folder(name)) {
                for (const auto& inner : fs::directory_iterator(entry.path())) {
                    if (inner.is_regular_file(ignored)) {
                        files.emplace_back(name + "/" + inner.path().filename().string(), inner.path());
                    }
                }
            }
        }
        std::set<std::string> of_another; // what is not from `source`
        if (!copies.tokenizer_from.empty()) { of_another = take_tokenizer(files, source, copies.tokenizer_from); }
        std::sort(files.begin(), files.end());
        std::map<std::string, std::optional<std::string>> tokenizer;
        if (how.vocabulary && how.vocabulary->changed() && copies.tokenizer_from.empty()) {
            if (copies.from.empty()) { tokenizer = how.vocabulary->tokenizer_files(run); }
            else {
                note(run,
                    "the tokenizer is that of " + how.label_of(copies.from)
                        + " as it is: --vocabulary changes only the base's");
            }
        }
        const auto with_template = [&](const std::string& name, const fs::path& file, const std::string& text) {
            if (!copies.chat_template) { return text; }
            return name == "chat_template.jinja"  ? *copies.chat_template
                : name == "tokenizer_config.json" ? with_chat_template(text, file, *copies.chat_template)
                                                  : text;
        };
        if (copies.chat_template && std::none_of(files.begin(), files.end(), [](const auto& one) {
                return one.first == "tokenizer_config.json";
            })) {
            note(run,
                how.label_of(source)
                    + " has no tokenizer_config.json: the chat template is written as "
                      "chat_template.jinja");
            out.add_file("chat_template.jinja", *copies.chat_template);
        }
        for (const auto& [name, file] : files) {
            if (const auto place = tokenizer.find(name); place != tokenizer.end()) {
                if (place->second) { out.add_file(name, with_template(name, file, *place->second)); }
                continue;
            }
            const auto text = read_watched(file, std::size_t{4} << 30);
            refuse_pointer(file, text);
            std::string updated;
            if (auto changed = with_template(name, file, text); changed != text) { updated = std::move(changed); }
            if (name == "config.json") {
                updated = updated_config(text, file, specs, rows_before, how, run);
                if (code && !copies.copy_code && text.find("\"auto_map\"") != text.npos) {
                    note(run,
                        "config.json leads to Python files of the model's own (auto_map), which are not copied: "
                        "--copy-code copies them");
                }
            }
            if (how.vocabulary && (name == "config.json" || name == "generation_config.json")) {
                auto content = updated.empty() ? text : updated;
                const auto dropped = how.vocabulary->drop_lost_ids(content);
                if (!dropped.empty()) { updated = content; }
                for (const auto& key : dropped) { note(run, name + ": " + key + " is left out: its token is no more"); }
            }
            if (name == "hf_quant_config.json" && !is_quantised(specs)) { continue; }
            if (in_place && updated.empty() && !of_another.contains(name)) { continue; }
            out.add_file(name, updated.empty() ? text : updated);
        }
        if (files.empty()) {
            note(run, how.label_of(source) + " holds no configuration or tokenizer: only weights are written");
        }
    }
    if (copies.no_card) { return; }
    std::error_code ignored;
    if (const auto card = out.place() / "README.md"; fs::exists(card, ignored)) {
        if (taskvec::read_text_file(card).find(card_mark) == std::string::npos) {
            note(run, "'" + card.string() + "' is somebody else's: it stays, and no card is written");
            return;
        }
    }
    const taskvec::cpu policy{.threads = run.threads};
    out.add_file("README.md", [how, policy, place = out.place(), from = has_source ? source : fs::path()] {
        return card_of(how, place, from, policy);
    });
}

void check_space(const fs::path& out, std::uint64_t bytes)
{
    std::error_code failure;
    auto folder = place_of(out).parent_path();
    while (!fs::exists(folder, failure) && folder.has_relative_path()) { folder = folder.parent_path(); }
    const auto space = fs::space(folder, failure);
    if (!failure && space.available < bytes) {
        taskvec::raise<taskvec::io_error>(taskvec::error_code::disk_full,
            taskvec::message("needs ", size_text(bytes), ", and ", size_text(space.available),
                " are free there: make room, or choose another output"),
            out.string(), ENOSPC);
    }
}

} // namespace tool
