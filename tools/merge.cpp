// taskvec merge: several fine-tuned models become one.
// SPDX-License-Identifier: Apache-2.0
#include "as_config.hpp"
#include "methods.hpp"
#include "model_files.hpp"
#include "report.hpp"
#include "vocabulary.hpp"
#include "words.hpp"

#include <taskvec/formats/fingerprint.hpp>
#include <taskvec/formats/resumable_shards.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tool {

namespace {

/// Where the layers of the result come from in its first model; empty where they are all of that model's.
model_view layers_of_result(const merge_request& request)
{
    const auto view = request.views.find(request.base.empty() ? request.tasks.front() : "");
    return view == request.views.end() ? model_view() : view->second;
}

/// Which layers a tensor of slices is merged of, in words; empty where there are no slices.
std::string layers_behind(const merge_request& request, std::string_view tensor)
{
    std::vector<std::string> keys = request.tasks;
    if (!request.base.empty()) { keys.insert(keys.begin(), ""); }
    const auto layer = layer_of(tensor);
    std::string text;
    for (const auto& key : keys) {
        const auto view = request.views.find(key);
        if (view == request.views.end() || view->second.empty()) { continue; }
        const auto& parts = view->second;
        std::string whose = called(request, (stands_before_layers(tensor) ? parts.front() : parts.back()).path);
        if (layer) {
            const auto origin = origin_of(parts, layer->second);
            whose = taskvec::message("layer ", origin.layer, " of ", called(request, origin.part->path));
        }
        text += (text.empty() ? "" : ", ") + whose;
    }
    return text;
}

/// What the result is made of, as far as the request names it.
std::vector<fs::path> inputs_of(const merge_request& request)
{
    std::vector<fs::path> paths;
    if (!request.base.empty()) { paths.emplace_back(request.base); }
    if (!request.base_adapter.empty()) { paths.emplace_back(request.base_adapter); }
    for (const auto& task : parse_tasks(request.tasks)) { paths.push_back(task.path); }
    for (const auto& [adapter, model] : request.adapters) {
        if (!model.empty()) { paths.emplace_back(model); }
    }
    for (const auto& [key, view] : request.views) {
        for (const auto& part : view) { paths.emplace_back(part.path); }
    }
    return paths;
}

/// Puts what lies beside the result's weights into its folder. `options`: those in force.
void add_files(model_folder& out, const merge_request& request, const copy_request& copies, const merge_inputs& inputs,
    const std::string& options, const taskvec::quantised_outputs& plan)
{
    const auto layers = layers_of_result(request);
    const fs::path source = !copies.from.empty() ? copies.from
        : !request.base.empty()                  ? request.base
                                                 : inputs.arguments().front().path.string();
    const bool untied = !layers.empty() && says_tied(source) // a head of its own, of another model than the embedding
        && std::any_of(plan.specs.begin(), plan.specs.end(),
            [](const taskvec::tensor_spec& spec) { return spec.name.ends_with("lm_head.weight"); });
    auto models = recipe_models(request, inputs);
    auto made_of = recipe_ingredients(request, models);
    add_model_files(out, copies, request.run,
        {"Merged by " + request.method, request.method, std::move(models), options, layers, untied,
            &inputs.vocabulary(), request.called, std::move(made_of)},
        plan.specs);
}

/// A folder with what lies beside a model's weights, and their outline: a file whose tensors are holes.
class outline_folder final : public model_folder {
public:
    explicit outline_folder(fs::path folder)
        : folder_(std::move(folder))
    {
        fs::create_directories(folder_);
    }
    [[nodiscard]] const fs::path& folder() const override { return folder_; }
    [[nodiscard]] const fs::path& place() const override { return folder_; }
    void add_file(const std::string& name, std::string_view content) override
    {
        const auto path = folder_ / name;
        fs::create_directories(path.parent_path());
        std::ofstream file(path, std::ios::binary);
        file << content;
        if (!file.flush()) {
            taskvec::raise<taskvec::io_error>(taskvec::error_code::file_access, "cannot be written", path.string());
        }
    }
    void add_file(const std::string& name, std::function<std::string()> make) override
    {
        add_file(name, std::string_view(make()));
    }
    /// `mark`: the first byte of all tensors, so that no two outlines have the same bytes.
    void add_weights(const std::string& name, const std::vector<taskvec::tensor_spec>& specs,
        taskvec::metadata_map metadata, unsigned char mark)
    {
        const auto layout = taskvec::layout_safetensors(specs, std::move(metadata));
        const bool empty = layout.size == layout.head.size();
        add_file(name, std::string_view(layout.head + std::string(empty ? 0 : 1, static_cast<char>(mark))));
        fs::resize_file(folder_ / name, layout.size);
    }

private:
    fs::path folder_;
};

void add_outline(const merge_request& request, const merge_inputs& inputs, const taskvec::quantised_outputs& plan,
    const fs::path& folder, unsigned char mark)
{
    outline_folder out(folder);
    auto copies = request.copies;
    copies.no_card = true; // nobody reads it
    add_files(out, request, copies, inputs, "", plan);
    const auto& like = inputs.reference();
    out.add_weights(
        std::string(stem_of(like)) + ".safetensors", plan.specs, metadata_of(like.metadata(), plan.specs), mark);
}

/// A merge that is made while its result is read. Never moves: what it is made of points into it.
class unstored_merge {
public:
    unstored_merge(const merge_request& request, const fs::path& folder, unsigned char mark)
        : method_(find_method(request))
        , inputs_(request, method_.needs_base)
        , run_(request.run)
    {
        note_zero_lambda(request.run, request.options);
        add_outline(request, inputs_, outputs_of(request, inputs_), folder, mark);
        made_ = run_method_on_read(method_, call_of(run_.policy(), request, inputs_), model_);
    }
    unstored_merge(const unstored_merge&) = delete;
    unstored_merge& operator=(const unstored_merge&) = delete;
    [[nodiscard]] const taskvec::const_model_ref& model() const { return model_; }

private:
    const method_entry& method_;
    merge_inputs inputs_;
    runner run_;
    merge_sources made_;
    taskvec::const_model_ref model_;
};

/// Checks what a method finds in what it reads beside the models, and what values do together (weights that sum to 0):
/// as the merge does before it reads a tensor, on none, with the values of each.
void examine(const method_entry& method, const method_call& call)
{
    method.examine(call);
    if (!method.run_on_read || !method.lists.empty()) { return; }
    const taskvec::aligned_models none(call.models, std::span<const std::size_t>());
    option_values common;
    std::copy_if(call.values.begin(), call.values.end(), std::back_inserter(common),
        [](const option_value& value) { return !value.by_tensor; });
    std::set<std::vector<std::string>> seen;
    for (const auto& tensor : call.models.tensors()) {
        auto values = common;
        if (call.values_of) {
            for (auto& value : call.values_of(tensor.name)) { values.push_back(std::move(value)); }
        }
        const auto weights = call.weights_of ? call.weights_of(tensor.name) : call.weights;
        method_call one{call.policy, none, values, weights, call.request, call.inputs};
        one.of_tasks = call.of_tasks_in ? call.of_tasks_in(tensor.name) : call.of_tasks;
        std::vector<std::string> key;
        const auto add = [&](const option_values& list) {
            for (const auto& value : list) {
                key.push_back(value.name);
                key.push_back(value.text);
            }
            key.emplace_back();
        };
        add(values);
        for (const auto& own : one.of_tasks) { add(own); }
        for (const double weight : weights) { key.push_back(taskvec::csv_number(weight)); }
        if (!seen.insert(std::move(key)).second) { continue; }
        taskvec::const_model_ref nothing;
        (void)method.run_on_read(one, nothing);
    }
}

/// A merge whose shards stay when it is killed (--resume).
struct resumable_merge {
    resumed_work work;
    taskvec::resumable_shards shards;
    taskvec::merge_report merged{};

    resumable_merge(const merge_request& request, const merge_inputs& inputs, const taskvec::quantised_outputs& plan)
        : work(request.resume, inputs_of(request))
        , shards(work.path(), plan.specs, parse_size(request.shard_size, "--shard-size"),
              metadata_of(inputs.metadata(), plan.specs))
    {
        if (shards.found() > 0) {
            note(request.run,
                taskvec::message(shards.found(), " of ", counted(shards.count(), "shard"), " in ",
                    in_quotes(work.path()), " were finished by an earlier run"));
        }
    }
};

/// Whether each of these files has another name in a directory.
bool holds_files(const fs::path& directory, const std::vector<fs::path>& files)
{
    return std::all_of(files.begin(), files.end(), [&](const fs::path& file) {
        std::error_code failure;
        for (const auto& entry : fs::directory_iterator(directory, failure)) {
            if (entry.is_regular_file(failure) && fs::equivalent(entry.path(), file, failure)) { return true; }
        }
        return false;
    });
}

} // namespace

void run_merge(const merge_request& request)
{
    const bool resumable = !request.resume.directory.empty();
    if (resumable && request.shard_size.empty()) {
        throw usage_error("--resume keeps the shards that are finished: give --shard-size too");
    }
    if (resumable && !request.run.report.empty()) {
        throw usage_error("--resume: a report counts what a merge does, and parts of this one may be done already; "
                          "leave --report out");
    }
    const auto& method = find_method(request);
    note_zero_lambda(request.run, request.options);
    const merge_inputs inputs(request, method.needs_base);
    const bool directory = out_is_directory(request.out,
        inputs.base() ? fs::path(request.base) : inputs.arguments().front().path, !request.shard_size.empty());
    claim_model(request.run, request.out, directory);
    claim_report(request.run);
    if (!request.as_config.empty()) { claim_output(request.as_config, "--as-config"); }
    const auto plan = outputs_of(request, inputs);
    const auto configuration =
        request.as_config.empty() ? std::string() : configuration_of(request, method, inputs, plan);
    runner run(request.run, runs_on::any_device);
    const auto call = call_of(run.policy(), request, inputs);
    if (request.run.dry_run) {
        examine(method, call);
        const auto bytes = bytes_of(plan);
        check_space(request.out, bytes);
        print("would merge " + counted(inputs.tasks().size(), "task") + " by " + request.method + " into '"
            + printable(request.out) + "' (" + size_text(bytes) + ")\n" + describe(request, inputs)
            + (configuration.empty() ? "" : "'" + printable(request.as_config) + "' would hold:\n" + configuration));
        return;
    }
    std::optional<resumable_merge> kept;
    if (resumable) {
        if (!plan.plain()) {
            throw usage_error("--resume: layers that are quantised again become codes at the end; leave --resume or "
                              "--dtype keep out");
        }
        kept.emplace(request, inputs, plan);
        if (kept->shards.found() == kept->shards.count() && holds_files(request.out, kept->shards.finish())) {
            // Killed when the model had its name already: all that is left to do is to clear up.
            print("'" + printable(request.out) + "' was finished by an earlier run\n");
            kept->work.remove();
            return;
        }
        kept->merged = run_method(method, call, kept->shards);
    }
    report_file report(request.run.report);
    text_output config(request.as_config);
    model_output out(request.out, plan, inputs.reference(), request.shard_size, directory,
        kept ? kept->shards.finish() : std::vector<fs::path>());
    const auto options = json_of(method.values(request.options));
    add_files(out, request, request.copies, inputs, options.dump(2), plan);
    auto merged = kept ? kept->merged : run_method(method, call, out.sink());
    out.finish();
    merged.saturated += out.saturated();
    if (report.wanted()) {
        auto content = report_of(run, request, inputs, merged, out.file_size());
        content["options"] = options;
        const auto stored = out.reopen(inputs.reference());
        content["fingerprint"] = taskvec::fingerprint_text(taskvec::fingerprint_sketch(stored.model()));
        content["tensors"] = norms_of(run.policy(), beside_base(request, inputs, stored));
        report.finish(content);
    }
    if (config.wanted()) { config.finish_text(configuration); }
    const auto size = out.file_size();
    conclude("merged " + counted(inputs.tasks().size(), "task") + " by " + request.method + " into '"
            + called(request, request.out) + "': " + counted(plan.specs.size(), "tensor") + ", " + size_text(size)
            + " in " + seconds_text(run.seconds()) + "\n",
        report, config, out);
    if (kept) { kept->work.remove(); }
}

void explain_merge(const merge_request& request, const std::string& fate)
{
    const auto& method = find_method(request);
    note_zero_lambda(request.run, request.options);
    const merge_inputs inputs(request, method.needs_base);
    runner run(request.run, runs_on::any_device);
    const auto call = call_of(run.policy(), request, inputs);
    examine(method, call);
    std::string text = "would merge " + counted(inputs.tasks().size(), "task") + " by " + request.method + " into '"
        + called(request, request.out) + "'" + (fate.empty() ? "" : ", which " + fate) + "\n"
        + describe(request, inputs) + "  options " + json_of(method.values(request.options)).dump() + "\n";
    for (const auto& tensor : inputs.models().tensors()) {
        text += printable(tensor.name) + ": ";
        std::map<std::string, std::string> own; // the last one counts
        for (const auto& value : call.values_of ? call.values_of(tensor.name) : option_values()) {
            own[value.name] = value.text;
        }
        std::string parts;
        for (const auto& [name, value] : own) { parts += (parts.empty() ? "" : ", ") + name + " " + value; }
        if (method.weighted) {
            parts += parts.empty() ? "weights" : ", weights";
            for (const double weight : call.weights_of ? call.weights_of(tensor.name) : inputs.weights()) {
                parts += " " + taskvec::csv_number(weight);
            }
        }
        const auto of_tasks = call.of_tasks_in ? call.of_tasks_in(tensor.name) : call.of_tasks;
        for (std::size_t t = 0; t < of_tasks.size(); ++t) {
            std::map<std::string, std::string> its;
            for (const auto& value : of_tasks[t]) { its[value.name] = value.text; }
            for (const auto& [name, value] : its) {
                parts += (parts.empty() ? "" : ", ") + name + " of task " + std::to_string(t + 1) + " " + value;
            }
        }
        if (const auto layers = layers_behind(request, tensor.name); !layers.empty()) { text += layers + ": "; }
        text += (parts.empty() ? "as the options say" : parts) + "\n";
    }
    for (const auto& tensor : inputs.models().copied()) { text += printable(tensor.name) + ": copied\n"; }
    print(text);
}

void outline_merge(const merge_request& request, const fs::path& folder, unsigned char mark)
{
    const merge_inputs inputs(request, find_method(request).needs_base);
    add_outline(request, inputs, outputs_of(request, inputs), folder, mark);
}

std::string why_stored(const merge_request& request)
{
    const auto* const method = method_named(request.method);
    if (request.run.device != "cpu") { return "--device " + request.run.device + " reads stored models"; }
    if (method && !method->run_on_read) { return "--method " + method->name + " writes whole tensors"; }
    if (request.dtype == "keep") { return "layers that are quantised again need all their numbers"; }
    return "";
}

std::shared_ptr<const taskvec::const_model_ref> merge_unstored(
    const merge_request& request, const fs::path& folder, unsigned char mark)
{
    const auto merge = std::make_shared<const unstored_merge>(request, folder, mark);
    return {merge, &merge->model()};
}

} // namespace tool

namespace {

const tool::register_verb merge_verb(20, "merge", "Merge fine-tuned models into one", [](tool::command& verb) {
    const auto request = std::make_shared<tool::merge_request>();
    tool::add_method_option(verb, *request, tool::presence::required, "How to merge; see below");
    tool::add_base_option(verb, *request);
    tool::add_weighted_tasks_option(verb, *request);
    verb.text("--out", request->out, "PATH",
        "Where the merged model goes: a file, or a directory, as which any name without .safetensors or .st stands "
        "where the models are directories",
        tool::presence::required);
    tool::add_merge_options(verb, *request);
    tool::add_copy_options(verb, request->copies);
    tool::add_resume_option(verb, request->resume, "Shards that are finished");
    verb.text("--as-config", request->as_config, "FILE",
        "Write the merge as a configuration too, with which 'taskvec run' makes it again, and mergekit where it can");
    verb.footer("Methods:\n" + tool::method_list()
        + "\nExample:\n  taskvec merge --method ties --density 0.2 --base base.safetensors --task math.safetensors \\\n"
          "      --task code.safetensors=0.5 --out merged.safetensors");
    verb.action([request] { run_merge(*request); });
});

} // namespace
