// The models that a verb reads.
// SPDX-License-Identifier: Apache-2.0
#include "models.hpp"

#include "adapter_sums.hpp"
#include "vocabulary.hpp"
#include "words.hpp"

#include <taskvec/formats/name_pattern.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <tuple>

namespace tool {

namespace {

std::vector<taskvec::name_pattern> compile(const std::vector<std::string>& patterns, const std::string& option)
{
    std::vector<taskvec::name_pattern> result;
    for (const auto& pattern : patterns) {
        try {
            result.emplace_back(pattern);
        }
        catch (const taskvec::invalid_argument& wrong) {
            throw usage_error(option + ": " + wrong.what());
        }
    }
    return result;
}

bool any_matches(const std::vector<taskvec::name_pattern>& patterns, std::string_view name)
{
    return std::any_of(patterns.begin(), patterns.end(),
        [&](const taskvec::name_pattern& pattern) { return pattern.occurs_in(name); });
}

} // namespace

void append_layers(model_view& view, const std::string& path, std::size_t first, std::size_t last)
{
    const auto begin = view.empty() ? 0 : view.back().begin + view.back().last - view.back().first;
    view.push_back({path, first, last, begin});
}

layer_origin origin_of(const model_view& view, std::size_t layer)
{
    const auto after = std::upper_bound(
        view.begin(), view.end(), layer, [](std::size_t at, const layer_part& one) { return at < one.begin; });
    const auto& part = *(after - 1); // the first begins at 0
    return {&part, layer - part.begin + part.first};
}

std::function<bool(std::string_view)> name_matcher(const std::vector<std::string>& patterns, const std::string& option)
{
    return [compiled = compile(patterns, option)](std::string_view name) { return any_matches(compiled, name); };
}

std::function<bool(std::string_view)> name_filter(
    const std::vector<std::string>& include, const std::vector<std::string>& exclude)
{
    if (include.empty() && exclude.empty()) { return {}; }
    return [wanted = compile(include, "--include"), unwanted = compile(exclude, "--exclude")](std::string_view name) {
        return (wanted.empty() || any_matches(wanted, name)) && !any_matches(unwanted, name);
    };
}

void add_base_option(command& verb, model_request& request, presence how)
{
    verb.text("--base", request.base, "MODEL", "The pre-trained model that the tasks started from", how);
}

void add_tasks_options(command& verb, model_request& request, const std::string& unit, const std::string& help)
{
    const auto ignore = [](const std::string&) { };
    verb.take("--task", unit, help, ignore, true);
    verb.take("--task-adapter", "PATH[=W]",
        "An adapter: the base with W times its update (default 1) is a task, which no file holds", ignore, true);
    verb.after_parse([&request](const std::vector<std::pair<std::string, std::string>>& given) {
        for (const auto& [flag, value] : given) {
            if (flag != "--task" && flag != "--task-adapter") { continue; }
            const bool adapter = flag == "--task-adapter";
            for (const auto& other : request.tasks) {
                if (other == value && request.adapters.contains(value) != adapter) {
                    throw usage_error("'" + value + "' is given by --task and by --task-adapter; it is one of the two");
                }
            }
            if (adapter) { request.adapters.emplace(value, ""); }
            request.tasks.push_back(value);
        }
        if (request.tasks.empty()) { throw usage_error("--task is required"); }
        if (!request.adapters.empty() && request.base.empty()) {
            throw usage_error("--base is required by --task-adapter: the model that the adapter was trained on");
        }
    });
}

void add_weighted_tasks_option(command& verb, model_request& request)
{
    add_tasks_options(
        verb, request, "PATH[=WEIGHT]", "A fine-tuned model, with its weight (default 1); repeat, order counts");
}

void add_nonfinite_option(command& verb, std::string& nonfinite)
{
    verb.word("--nonfinite", nonfinite, {"error", "propagate"}, "WHAT",
        "error or propagate: NaN and infinity in an input (default: error)");
}

void add_tensor_options(command& verb, model_request& request, const std::string& others)
{
    verb.texts("--include", request.include, "REGEX", "Only tensors that match" + others);
    verb.texts("--exclude", request.exclude, "REGEX", "All but tensors that match");
    add_nonfinite_option(verb, request.nonfinite);
    verb.word("--missing", request.missing, {"error", "base"}, "WHAT",
        "error or base: a tensor that a task lacks (default: error, but for integers)");
    add_name_options(verb, request.names, request.match_prefixes);
    add_vocabulary_option(verb, request.vocabulary);
    add_index_option(verb, request.index);
}

void add_overflow_option(command& verb, std::string& overflow)
{
    verb.word("--overflow", overflow, {"error", "saturate", "propagate"}, "WHAT",
        "error, saturate or propagate: a finite result that its dtype cannot hold (default: error)");
}

taskvec::overflow overflow_of(const std::string& word)
{
    return word == "saturate" ? taskvec::overflow::saturate
        : word == "propagate" ? taskvec::overflow::propagate
                              : taskvec::overflow::error;
}

void add_index_option(command& verb, std::string& index)
{
    verb.word("--index", index, {"strict", "lenient"}, "WHAT",
        "strict or lenient: shards that hold other tensors than their index says (default: strict)");
}

taskvec::checkpoint open_noted(const fs::path& path, const run_options& run, const std::string& index,
    const std::vector<name_rule>& rules, const taskvec::const_model_ref* instead)
{
    auto model = open_guarded(path, index == "lenient" ? taskvec::index_check::lenient : taskvec::index_check::strict);
    for (const auto& text : model.notes()) { note(run, text); }
    if (instead) { model.set_model(*instead); }
    if (!rules.empty()) { check_readable(model, {}, false); } // its parts would go by other names than their layer
    if (!rules.empty()) { model.set_model(renamed(model.model(), rules, in_quotes(path), run)); }
    return model;
}

void check_patterns(const std::vector<std::string>& patterns, const std::string& option,
    const std::vector<std::string>& names, const std::string& what)
{
    for (const auto& pattern : patterns) {
        const auto matches = name_matcher({pattern}, option);
        if (std::any_of(names.begin(), names.end(), matches)) { continue; }
        const auto like = closest_name(pattern, names);
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::nothing_selected,
            taskvec::message(option, " '", pattern, "' matches no ", what,
                like.empty() ? "" : "; did you mean '" + like + "'?", " (see 'taskvec inspect' for the names)"));
    }
}

void add_dtype_option(command& verb, std::string& dtype, const std::string& help)
{
    verb.word("--dtype", dtype, {"keep", "f32", "bf16", "f16"}, "DTYPE", "keep, f32, bf16 or f16: " + help, true);
}

std::optional<taskvec::dtype> output_dtype(const std::string& text)
{
    std::string name = text;
    std::transform(name.begin(), name.end(), name.begin(),
        [](char c) { return static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c); });
    return taskvec::parse_dtype(name); // nothing for KEEP
}

void add_shard_size_option(command& verb, std::string& shard_size)
{
    verb.text("--shard-size", shard_size, "SIZE", "Write a directory of shards of at most this size, such as 5GB");
}

taskvec::model_options model_options_of(const model_request& request)
{
    taskvec::model_options options;
    options.include = name_filter(request.include, request.exclude);
    options.output = output_dtype(request.dtype);
    options.on_nonfinite = request.nonfinite == "propagate" ? taskvec::nonfinite::propagate : taskvec::nonfinite::error;
    options.on_overflow = overflow_of(request.overflow);
    options.on_missing = request.missing == "base" ? taskvec::missing_tensors::base : taskvec::missing_tensors::error;
    options.statistics = !request.run.report.empty();
    options.memory = static_cast<std::size_t>(request.run.memory_bytes());
    return options;
}

namespace {

const std::vector<name_rule>& rules_of(const model_request& request, const std::string& model)
{
    static const std::vector<name_rule> none;
    const auto place = request.names.find(model);
    return place == request.names.end() ? none : place->second;
}

/// The stored model of a task: of an adapter on one, that one.
fs::path model_of_task(const model_request& request, const task_argument& task)
{
    const auto place = request.adapters.find(task.text);
    return place == request.adapters.end() || place->second.empty() ? task.path : fs::path(place->second);
}

/// What a model is called in what is said.
std::string label_of(const model_request& request, const fs::path& path)
{
    return "'" + called(request, path.string()) + "'";
}

bool computes(taskvec::dtype type)
{
    return taskvec::is_storage(type) || taskvec::is_fp8(type);
}

using aligned_operand = taskvec::aligned_tensor::operand;

/// Without a base the first task's tensors are merged with those of all others.
void check_all_have(const std::vector<taskvec::const_model_ref>& tasks, const taskvec::model_options& options)
{
    for (const auto& [name, tensor] : tasks.front()) {
        if (options.include && !options.include(name)) { continue; }
        for (std::size_t t = 1; t < tasks.size(); ++t) {
            if (tasks[t].find(name)) { continue; }
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_missing,
                taskvec::message("tensor '", name, "' of ", options.labels.front(), " is missing in ",
                    options.labels[t], ": add it, or leave it out by --exclude, and the result has that of ",
                    options.labels.front()));
        }
    }
}

/// Whether task t has the base's bytes in every tensor that takes part. Costs nothing where the ends of some tensor
/// differ, as after any training; otherwise one read of both.
bool equals_base(const taskvec::aligned_models& models, std::size_t t)
{
    static constexpr std::size_t edge = 1024;
    const auto all = [&](const auto& same) {
        return std::all_of(models.tensors().begin(), models.tensors().end(),
            [&](const taskvec::aligned_tensor& one) { return same(one.base, one.tasks[t], one.size); });
    };
    const auto same_ends = [](const aligned_operand& base, const aligned_operand& task, std::size_t size) {
        const auto part = std::min(size, edge);
        return same_elements(base, task, 0, part) && same_elements(base, task, size - part, part);
    };
    return !models.tensors().empty() && all(same_ends)
        && all([](const aligned_operand& base, const aligned_operand& task, std::size_t size) {
               return same_elements(base, task, 0, size);
           });
}

} // namespace

merge_inputs::merge_inputs(const model_request& request, bool base_wanted)
    : arguments_(parse_tasks(request.tasks))
{
    auto options = model_options_of(request);
    if (!request.shard_size.empty()) { (void)parse_size(request.shard_size, "--shard-size"); }
    if (base_wanted || !request.base.empty()) {
        base_.emplace(open(request, request.base, ""));
        options.base_label = label_of(request, request.base);
        if (!request.base_adapter.empty()) {
            put_on(*base_, parse_task(request.base_adapter, "the base's adapter"), request, std::nullopt);
        }
    }
    for (const auto& task : arguments_) {
        if (const auto place = request.adapters.find(task.text); place != request.adapters.end()) {
            options.labels.push_back(label_of(request, task.path));
            if (place->second.empty()) {
                add_adapter(request, task, tasks_.size());
                continue;
            }
            weights_.push_back(1);
            auto& model = tasks_.emplace_back(open(request, place->second, task.text));
            put_on(model, task, request, tasks_.size() - 1);
            continue;
        }
        weights_.push_back(task.weight);
        const auto& rules = rules_of(request, task.text);
        tasks_.push_back(open(request, task.path, task.text));
        options.labels.push_back(label_of(request, task.path));
        if (task.time > 1) {
            note(request.run, label_of(request, task.path) + " is given " + (task.time == 2 ? "twice" : "again"));
        }
        if (base_ && rules.empty() && place_of(task.path) == place_of(request.base)) {
            note(request.run, label_of(request, task.path) + " is the base itself: its task vector is 0");
        }
    }
    check_layers(request);
    const auto include = name_filter(request.include, request.exclude);
    if (base_) { check_no_factors(*base_, include); }
    for (const auto& task : tasks_) { check_no_factors(task, include); }
    line_up(request);
    check_scales(request);
    line_up_vocabulary(request);
    check_filters(request);
    if (!base_) { check_all_have(task_models_, options); }
    models_.emplace(base_ ? &base_model() : nullptr, task_models_, std::move(options));
    for (const auto& [t, sum] : sums_) {
        for (auto& source : sum->changes().attach(*models_, t)) { sources_.push_back(std::move(source)); }
    }
    if (models_->tensors().empty() && !models_->outputs().empty()) {
        const bool filtered = !request.include.empty() || !request.exclude.empty();
        const bool lacking = std::any_of(
            models_->filled().begin(), models_->filled().end(), [](std::size_t count) { return count > 0; });
        if (!lacking) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::nothing_selected,
                taskvec::message("no floating tensor of ", name_of_base(request),
                    filtered ? " is left by --include and --exclude" : " can be merged",
                    ": see 'taskvec inspect' for its tensors"));
        }
    }
    check_integers(request);
    note_what_is_missing(request);
    note_copies_of_the_base(request);
}

/// A model, or what is put together in its place.
taskvec::checkpoint merge_inputs::open(const model_request& request, const fs::path& path, const std::string& key)
{
    auto model = open_noted(path, request.run, request.index, rules_of(request, key), unstored(request, path));
    if (model.model().empty()) {
        taskvec::raise<taskvec::format_error>(taskvec::error_code::file_tensors,
            "holds no tensors: name the file or directory that holds the model's weights", path.string());
    }
    const auto view = request.views.find(key);
    if (view == request.views.end()) { return model; }
    const auto own = model.model();
    std::vector<layers_taken> taken;
    const auto check = [&request](const taskvec::checkpoint& one) {
        if (one.layers() && (!one.layers()->layers().empty() || !one.layers()->unread().empty())) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::layer_split,
                label_of(request, one.path())
                    + " has quantised layers, which are not taken apart: store it as numbers first (taskvec convert)");
        }
    };
    check(model);
    for (const auto& part : view->second) {
        const taskvec::const_model_ref* from = part.path == path ? &own : nullptr;
        for (const auto& one : parts_) {
            if (!from && one.path() == part.path) { from = &one.model(); }
        }
        if (!from) {
            parts_.push_back(open_noted(part.path, request.run, request.index, {}, unstored(request, part.path)));
            check(parts_.back());
            if (request.match_prefixes) { // one result has one name for what is the same
                const auto match = tool::match_prefixes(parts_.back().model(), own);
                if (!match.names.empty()) {
                    note(request.run, "names of " + label_of(request, part.path) + ": " + match.words());
                    parts_.back().set_model(renamed(parts_.back().model(), match));
                }
            }
            from = &parts_.back().model();
        }
        taken.push_back({from, part.first, part.last});
    }
    model.set_model(model_of_layers(taken));
    return model;
}

/// The task stands for the base; its tensors are worked out once all are lined up.
void merge_inputs::add_adapter(const model_request& request, const task_argument& task, std::size_t t)
{
    if (request.run.device != "cpu") {
        throw usage_error(
            "--task-adapter runs on the cpu; leave --device out, or store the model first (taskvec fuse)");
    }
    sums_.emplace(t,
        std::make_unique<adapter_sum>(std::vector{task}, *base_,
            adapter_sum::settings{.base_path = request.base,
                .include = name_filter(request.include, request.exclude),
                .included = request.include,
                .excluded = request.exclude,
                .names = request.names,
                .may_untie = false,
                .label = label_of(request, request.base)},
            request.run));
    weights_.push_back(1);
    tasks_.push_back(
        open_noted(request.base, request.run, request.index, rules_of(request, ""), unstored(request, request.base)));
}

/// A model with an adapter on it: tensors that the adapter changes are worked out as they are read.
void merge_inputs::put_on(taskvec::checkpoint& model, const task_argument& adapter, const model_request& request,
    std::optional<std::size_t> t)
{
    if (request.run.device != "cpu") {
        throw usage_error(
            "a model with an adapter is for the cpu; leave --device out, or store it first (taskvec fuse)");
    }
    auto& sum = worn_[t];
    sum = std::make_unique<adapter_sum>(std::vector{adapter}, model,
        adapter_sum::settings{.base_path = model.path(), .may_untie = false, .label = label_of(request, model.path())},
        request.run);
    auto changed = model.model();
    for (auto& source : sum->changes().put_into(changed)) { sources_.push_back(std::move(source)); }
    taskvec::const_model_ref stored; // a result has the model's dtypes, whatever sums are in
    for (const auto& [name, tensor] : changed) {
        auto one = tensor;
        const auto& before = *model.model().find(name);
        if (!before.source && taskvec::is_storage(before.dtype)) { one.dtype = before.dtype; }
        stored.insert(name, one);
    }
    model.set_model(std::move(stored));
}

merge_inputs::~merge_inputs() = default;

std::vector<std::unique_ptr<taskvec::operand_source>> merge_inputs::attach(
    taskvec::aligned_models& models, std::size_t place, std::size_t t) const
{
    if (!adapter(t)) { return {}; }
    return adapter(t)->changes().attach(models, place);
}

/// Quantised layers: those that are not read, those of which a part is named, those on a device.
void merge_inputs::check_layers(const model_request& request) const
{
    const auto include = name_filter(request.include, request.exclude);
    const auto split = [&](const taskvec::checkpoint& model, const std::vector<std::string>& patterns,
                           const std::string& option) {
        for (const auto& pattern : patterns) {
            const auto matches = name_matcher({pattern}, option);
            for (const auto& tensor : model.layers()->layers()) {
                const auto& layer = tensor.layer();
                if (matches(layer.name)) { continue; }
                for (const auto& part : layer.parts) {
                    const auto name = std::string(taskvec::layer_stem(layer.name)) + part.leaf;
                    if (!matches(name)) { continue; }
                    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::layer_split,
                        taskvec::message(option, " '", pattern, "' matches '", name, "' of ",
                            label_of(request, model.path()), ", which is part of the quantised layer '", layer.name,
                            "': name the whole layer, by that name"));
                }
            }
        }
    };
    const auto check = [&](const taskvec::checkpoint& model) {
        if (!model.layers()) { return; }
        check_readable(model, include);
        split(model, request.exclude, "--exclude");
        split(model, request.include, "--include");
        if (request.run.device != "cpu" && !model.layers()->layers().empty()) {
            throw usage_error(taskvec::message("--device ", request.run.device, ": ", label_of(request, model.path()),
                " has quantised layers, which are for the cpu; leave --device out"));
        }
    };
    if (base_) { check(*base_); }
    for (const auto& task : tasks_) { check(task); }
}

void merge_inputs::check_scales(const model_request& request) const
{
    std::vector<const taskvec::checkpoint*> models;
    if (base_) { models.push_back(&*base_); }
    for (const auto& task : tasks_) { models.push_back(&task); }
    check_scales_alike(models, name_filter(request.include, request.exclude));
}

std::string merge_inputs::name_of_base(const model_request& request) const
{
    return label_of(request, base_ ? fs::path(request.base) : arguments_.front().path);
}

void check_no_factors(const taskvec::checkpoint& model, const std::function<bool(std::string_view)>& include)
{
    adapter_part first, unread;
    std::string of_first, of_unread;
    std::set<std::string> patterns;
    for (const auto& [name, tensor] : model.model()) {
        if (include && !include(name)) { continue; }
        auto part = adapter_part_of(name, model.model());
        if (part.kind.empty()) { continue; }
        patterns.insert(part.pattern);
        const bool read = part.read;
        if (first.kind.empty()) { std::tie(first, of_first) = std::pair(part, name); }
        if (!read && unread.kind.empty()) { std::tie(unread, of_unread) = std::pair(std::move(part), name); }
    }
    if (patterns.empty()) { return; }
    std::string all;
    for (const auto& pattern : patterns) { all += (all.empty() ? "" : "|") + pattern; }
    const bool read = unread.kind.empty();
    const auto& part = read ? first : unread;
    taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapter_factors,
        taskvec::message(in_quotes(model.path()), " holds factors of an adapter (", part.kind, ": '",
            read ? of_first : of_unread, "'): merged each by itself they give ",
            read ? "cross terms, not the mean of the updates. 'taskvec merge-lora' merges adapters"
                 : "another model than the mean of what they make of theirs, and no verb reads this kind: fold each "
                   "adapter into its model with what made it (PEFT's merge_and_unload), and merge the models",
            "; where factors lie beside a whole model, --exclude '", all, "' leaves them out"));
}

/// Ties, and prefixes: both say what they did, and prefixes are only proposed unless --match-prefixes asks.
void merge_inputs::line_up(const model_request& request)
{
    const auto options = model_options_of(request);
    const auto reference_path = base_ ? fs::path(request.base) : arguments_.front().path;
    auto& first = base_ ? *base_ : tasks_.front();
    if (says_tied(reference_path)) { // a task may have a head of its own: the base's is its embedding
        for (std::size_t t = base_ ? 0 : 1; t < tasks_.size(); ++t) {
            auto model = first.model();
            const auto added = add_tied_head(model, tasks_[t].model());
            if (added.empty()) { continue; }
            first.set_model(std::move(model));
            note(request.run,
                label_of(request, model_of_task(request, arguments_[t])) + " has a head of its own, '" + added
                    + "'; that of " + label_of(request, reference_path)
                    + " is its embedding (config.json: tie_word_embeddings)");
        }
    }
    for (std::size_t t = base_ ? 0 : 1; t < tasks_.size(); ++t) {
        if (adapter(t)) { continue; }
        auto& task = tasks_[t];
        const auto label = label_of(request, model_of_task(request, arguments_[t]));
        std::size_t extra = 0, lacking = 0, present = 0;
        for (const auto& [name, tensor] : task.model()) {
            extra += !first.model().find(name) && (!options.include || options.include(name)) ? 1u : 0u;
        }
        for (const auto& [name, tensor] : first.model()) {
            if ((options.include && !options.include(name)) || !computes(tensor.dtype)) { continue; }
            (task.model().find(name) ? present : lacking) += 1;
        }
        if (extra + lacking > 0) {
            const auto match = tool::match_prefixes(task.model(), first.model());
            if (request.match_prefixes && !match.names.empty()) {
                note(request.run,
                    taskvec::message(
                        "names of ", label, ": ", match.words(), ", ", counted(match.names.size(), "tensor")));
                check_readable(task, {}, false);
                task.set_model(renamed(task.model(), match));
            }
            else if (!match.names.empty() && (extra > 0 || request.missing != "base" || present == 0)) {
                taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_unexpected,
                    taskvec::message(label, " and ", label_of(request, reference_path), " call tensors differently: ",
                        match.same, " of ", task.model().size(), " have one name, ", match.names.size(),
                        " more have with ", match.words(), ": ", match.ways("--task " + arguments_[t].path.string())));
            }
            else if (!match.doubtful.empty() && match.same == 0) {
                taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_unexpected,
                    taskvec::message("no tensor of ", label, " has a name of ", label_of(request, reference_path),
                        "; '", match.doubtful[0], "' and '", match.doubtful[1],
                        "' would both do before its names: say which by --rename, such as --rename '^=",
                        match.doubtful[0], "' after its --task"));
            }
        }
        auto model = task.model();
        const auto notes = resolve_ties(model, first.model(), says_tied(model_of_task(request, arguments_[t])), label,
            label_of(request, reference_path));
        if (!notes.empty()) { task.set_model(std::move(model)); }
        for (const auto& text : notes) { note(request.run, text); }
    }
}

/// Rows of tokens; task_models_ are lined up then.
void merge_inputs::line_up_vocabulary(const model_request& request)
{
    std::vector<vocabulary_input> inputs;
    if (base_) { inputs.push_back({request.base, label_of(request, request.base), &base_->model()}); }
    for (std::size_t t = 0; t < tasks_.size(); ++t) {
        const auto path = model_of_task(request, arguments_[t]);
        inputs.push_back({adapter(t) ? fs::path(request.base) : path, label_of(request, path), &tasks_[t].model()});
    }
    vocabulary_ = std::make_unique<lined_up_vocabulary>(inputs, vocabulary_policy_of(request.vocabulary),
        name_filter(request.include, request.exclude), request.run, request.rows_of_tokens);
    const auto& models = vocabulary_->models();
    task_models_.assign(models.begin() + (base_ ? 1 : 0), models.end());
    if (!vocabulary_->changed()) { return; }
    if (vocabulary_->works_out_rows() && request.run.device != "cpu") {
        throw usage_error("--vocabulary lines rows up on the cpu; leave --device " + request.run.device + " out");
    }
    for (const auto& [t, sum] : sums_) {
        for (const auto& name : vocabulary_->tensors()) {
            if (!sum->changes().changes().contains(name)) { continue; }
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::option_value,
                taskvec::message("--vocabulary ", request.vocabulary, ": the adapter ",
                    label_of(request, arguments_[t].path), " changes '", name,
                    "', whose rows are lined up: store its model first (taskvec fuse)"));
        }
    }
}

const taskvec::const_model_ref& merge_inputs::base_model() const
{
    return vocabulary_->models().front();
}
const taskvec::const_model_ref& merge_inputs::reference_model() const
{
    return vocabulary_->models().front();
}

void merge_inputs::check_filters(const model_request& request) const
{
    if (request.include.empty() && request.exclude.empty()) { return; }
    std::vector<std::string> names;
    const auto add = [&](const taskvec::checkpoint& model) {
        for (const auto& [name, tensor] : model.model()) { names.push_back(name); }
    };
    if (base_) { add(*base_); }
    for (const auto& task : tasks_) { add(task); }
    for (const auto& [t, sum] : sums_) { add(sum->files().front()); }
    const auto what = "tensor of " + name_of_base(request) + (base_ || tasks_.size() > 1 ? " and the tasks" : "");
    check_patterns(request.include, "--include", names, what);
    check_patterns(request.exclude, "--exclude", names, what);
}

/// Integers that a task lacks are the base's, unless --missing error was given.
void merge_inputs::check_integers(const model_request& request) const
{
    const auto& include = models_->options().include;
    if (request.missing != "error" || !base_) { return; }
    for (const auto& tensor : models_->copied()) {
        if (include && !include(tensor.name)) { continue; }
        for (std::size_t t = 0; t < task_models_.size(); ++t) {
            if (task_models_[t].find(tensor.name)) { continue; }
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_missing,
                taskvec::message("tensor '", tensor.name, "' of ", label_of(request, request.base), " is missing in ",
                    label_of(request, arguments_[t].path),
                    ": add it, or leave --missing error out, and integers that a task lacks are the base's"));
        }
    }
}

void merge_inputs::note_what_is_missing(const model_request& request) const
{
    const auto& filled = models_->filled();
    for (std::size_t t = 0; t < filled.size(); ++t) {
        if (filled[t] == 0) { continue; }
        std::uint64_t entries = 0;
        std::size_t taking_part = 0, copied = 0;
        std::string first;
        const auto lacks = [&](const std::string& name) { return !task_models_[t].find(name); };
        for (const auto& tensor : models_->tensors()) {
            if (!lacks(tensor.name)) { continue; }
            entries += tensor.size;
            ++taking_part;
            if (first.empty()) { first = tensor.name; }
        }
        for (const auto& tensor : models_->copied()) {
            if (models_->options().include && !models_->options().include(tensor.name)) { continue; }
            if (lacks(tensor.name)) {
                ++copied;
                if (first.empty()) { first = tensor.name; }
            }
        }
        const auto label = label_of(request, arguments_[t].path);
        const bool gives_nothing = std::none_of(models_->tensors().begin(), models_->tensors().end(),
            [&](const taskvec::aligned_tensor& tensor) { return !lacks(tensor.name); });
        if (gives_nothing) {
            const auto match = tool::match_prefixes(task_models_[t], base_->model());
            const auto doubt = match.doubtful.size() == 2
                ? "; with '" + match.doubtful[0] + "' or '" + match.doubtful[1] + "' before its names they would match"
                : match.names.empty() ? std::string()
                                      : "; they match with " + match.words() + " (--match-prefixes)";
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_missing,
                taskvec::message(label, " has none of the tensors that take part ('", first, "' …): it gives nothing",
                    doubt,
                    ": leave it out, or change --include, --exclude or its names by "
                    "--rename"));
        }
        std::string text = label + " lacks " + counted(taking_part + copied, "tensor") + " ('" + first + "'"
            + (taking_part + copied > 1 ? " …" : "") + "): the base's stand for "
            + (taking_part + copied > 1 ? "them" : "it");
        if (taking_part > 0 && models_->elements() > 0) {
            text += taskvec::message(", ", grouped(entries), " of the ", grouped(models_->elements()),
                " entries that shares such as --density count");
        }
        note(request.run, text);
    }
}

/// The base under another path: the wrong file was fetched, or a model was saved before its training.
void merge_inputs::note_copies_of_the_base(const model_request& request) const
{
    if (!base_) { return; }
    for (std::size_t t = 0; t < tasks_.size(); ++t) {
        const auto& task = arguments_[t];
        const bool noted = rules_of(request, task.text).empty() && place_of(task.path) == place_of(request.base);
        if (noted || adapter(t) || !equals_base(*models_, t)) { continue; }
        const auto count = models_->tensors().size();
        note(request.run,
            taskvec::message(label_of(request, task.path), " has the base's bytes in ",
                count == 1 ? std::string("the tensor that takes part")
                           : "all " + counted(count, "tensor") + " that take part",
                ": its task vector is 0"));
    }
}

std::uint64_t merge_inputs::copied_bytes() const
{
    std::uint64_t total = 0;
    for (const auto& tensor : models_->copied()) {
        const auto* const decoder = tensor.source.source;
        total += decoder ? tensor.source.size() * decoder->stored_bits() / 8 : tensor.source.bytes();
    }
    return total;
}

void check_readable(
    const taskvec::checkpoint& model, const std::function<bool(std::string_view)>& include, bool excludable)
{
    if (model.layers()) { taskvec::refuse_unread(*model.layers(), include, model.path().string(), excludable); }
}

void check_scales_alike(
    const std::vector<const taskvec::checkpoint*>& models, const std::function<bool(std::string_view)>& include)
{
    for (const auto* const scaled : models) {
        if (!scaled->layers()) { continue; }
        for (const auto* const other : models) {
            taskvec::refuse_unscaled(other->model(), scaled->model(), *scaled->layers(), include,
                other->path().string(), scaled->path().string());
        }
    }
}

std::string layers_text(const taskvec::checkpoint& model)
{
    if (!model.layers()) { return ""; }
    std::map<std::string, std::size_t> kinds;
    for (const auto& tensor : model.layers()->layers()) {
        const auto& layer = tensor.layer();
        const bool fp8 = layer.scheme == taskvec::quantisation::fp8;
        ++kinds[std::string(taskvec::to_string(layer.scheme)) + (fp8 ? " (" + layer.granularity() + ")" : "")];
    }
    std::string text;
    for (const auto& [kind, count] : kinds) {
        text += (text.empty() ? "" : ", ") + counted(count, "layer") + " in " + kind;
    }
    std::map<std::string, std::size_t> unread;
    for (const auto& layer : model.layers()->unread()) { ++unread[layer.what]; }
    for (const auto& [what, count] : unread) {
        text += (text.empty() ? "" : ", ") + counted(count, "layer") + " that "
            + (count == 1 || !what.starts_with("is ") ? what : "are " + what.substr(3));
    }
    return text;
}

namespace {

/// outputs_of() of a reference that is called so.
taskvec::quantised_outputs outputs_beside(const run_options& run, const taskvec::aligned_models& models,
    const taskvec::checkpoint& reference, const std::string& label, const std::string& dtype,
    const taskvec::const_model_ref& lined_up)
{
    auto plan = taskvec::plan_outputs(models, lined_up, reference.layers(), dtype == "keep");
    if (plan.dequantised > 0) {
        std::string ways; // --dtype keep is for what is written again
        if (dtype.empty()) {
            const bool again = std::none_of(plan.outputs.begin(), plan.outputs.end(), [](const auto& output) {
                return output.layer && output.how == taskvec::quantised_outputs::way::numbers
                    && output.layer->scheme != taskvec::quantisation::fp8;
            });
            ways = again ? ": --dtype keep quantises them again, --dtype bf16 takes half the space"
                         : ": --dtype bf16 takes half the space";
        }
        note(run,
            counted(plan.dequantised, "quantised layer") + " of " + label + (plan.dequantised == 1 ? " is" : " are")
                + " written as numbers, without scales" + ways);
    }
    if (!plan.left_out.empty()) {
        note(run,
            counted(plan.left_out.size(), "tensor") + " about the quantisation of " + label + " ('"
                + plan.left_out.front() + "'" + (plan.left_out.size() > 1 ? " …" : "")
                + (plan.left_out.size() > 1 ? ") are" : ") is") + " left out");
    }
    std::size_t inputs = 0;
    for (const auto& output : plan.outputs) {
        if (output.how != taskvec::quantised_outputs::way::quantised) { continue; }
        const auto& parts = output.layer->parts;
        inputs += std::any_of(parts.begin() + 2, parts.end(),
                      [](const auto& part) {
                          return part.leaf.find("input") != part.leaf.npos || part.leaf.find("act") != part.leaf.npos;
                      })
            ? 1u
            : 0u;
    }
    if (inputs > 0) { note(run, "scales of the inputs of " + counted(inputs, "layer") + " stay those of " + label); }
    return plan;
}

} // namespace

taskvec::quantised_outputs outputs_of(const run_options& run, const taskvec::aligned_models& models,
    const taskvec::checkpoint& reference, const std::string& dtype, const taskvec::const_model_ref* lined_up)
{
    return outputs_beside(
        run, models, reference, in_quotes(reference.path()), dtype, lined_up ? *lined_up : reference.model());
}

taskvec::quantised_outputs outputs_of(const model_request& request, const merge_inputs& inputs)
{
    const auto& reference = inputs.reference();
    return outputs_beside(request.run, inputs.models(), reference, label_of(request, reference.path()), request.dtype,
        inputs.reference_model());
}

taskvec::metadata_map metadata_of(taskvec::metadata_map metadata, const std::vector<taskvec::tensor_spec>& specs)
{
    const auto place = metadata.find(std::string(taskvec::comfy_metadata_key));
    if (place == metadata.end()) { return metadata; }
    auto said = nlohmann::ordered_json::parse(place->second, nullptr, false);
    std::set<std::string_view> codes;
    for (const auto& spec : specs) {
        if (taskvec::bits_per_element(spec.dtype) <= 8 && spec.dtype != taskvec::dtype::boolean) {
            codes.insert(spec.name);
        }
    }
    auto kept = nlohmann::ordered_json::object();
    bool whole = said.is_object() && said.contains("layers") && said["layers"].is_object();
    if (whole) {
        for (const auto& [name, how] : said["layers"].items()) {
            if (codes.contains(name + ".weight")) { kept[name] = how; }
            else {
                whole = false;
            }
        }
    }
    if (whole) { return metadata; }
    if (kept.empty()) { metadata.erase(place); }
    else {
        said["layers"] = std::move(kept);
        place->second = said.dump();
    }
    return metadata;
}

std::uint64_t bytes_of(const taskvec::quantised_outputs& plan)
{
    std::uint64_t bytes = 0;
    for (const auto& spec : plan.specs) { bytes += spec.bytes(); }
    return bytes;
}

void check_no_weights(const model_request& request, const std::string& who, const std::string& mend)
{
    for (const auto& task : parse_tasks(request.tasks)) {
        if (task.weight != 1 && !request.adapters.contains(task.text)) {
            throw usage_error(taskvec::message(
                who, " has no meaning for the weight ", task.weight, " of --task '", task.path.string(), "': ", mend));
        }
    }
}

void check_finite(double factor, const std::string& option)
{
    if (!std::isfinite(factor)) {
        throw usage_error(taskvec::message(option, " is ", factor, "; expected a finite number"));
    }
}

taskvec::aligned_models beside_base(
    const model_request& request, const merge_inputs& inputs, const taskvec::checkpoint& merged)
{
    auto options = model_options_of(request);
    options.on_nonfinite = taskvec::nonfinite::propagate;
    options.output.reset();
    return {inputs.base() ? &inputs.base_model() : nullptr, {&merged.model(), 1}, options};
}

const taskvec::const_model_ref* unstored(const model_request& request, const fs::path& path)
{
    const auto place = request.unstored.find(path.string());
    return place == request.unstored.end() ? nullptr : place->second.get();
}

std::string called(const model_request& request, const std::string& path)
{
    const auto place = request.called.find(path);
    return printable(place == request.called.end() ? path : place->second);
}

std::string describe(const model_request& request, const merge_inputs& inputs, others rest)
{
    std::string text;
    const auto line = [&](const char* role, const taskvec::checkpoint& model, const std::string& more) {
        text += std::string("  ") + role + "  " + called(request, model.path().string()) + "  "
            + size_text(model.data_bytes()) + more + "\n";
    };
    if (inputs.base()) { line("base", *inputs.base(), ""); }
    for (std::size_t t = 0; t < inputs.tasks().size(); ++t) {
        if (const auto* const sum = inputs.adapter(t)) {
            line("task", sum->files().front(),
                taskvec::message("  adapter on the base, times ", inputs.arguments()[t].weight));
            continue;
        }
        line("task", inputs.tasks()[t],
            inputs.arguments()[t].weight == 1 ? "" : taskvec::message("  weight ", inputs.arguments()[t].weight));
    }
    for (const auto& part : inputs.parts()) {
        const auto same = [&](const taskvec::checkpoint& model) { return model.path() == part.path(); };
        if ((inputs.base() && same(*inputs.base()))
            || std::any_of(inputs.tasks().begin(), inputs.tasks().end(), same)) {
            continue;
        }
        line("layers of", part, "");
    }
    const auto copied = inputs.models().copied().size();
    text += "  " + counted(inputs.models().tensors().size(), "tensor") + " of "
        + counted(inputs.models().elements(), "element") + " take part";
    if (rest == others::copied) {
        text += ", " + counted(copied, "tensor") + (copied == 1 ? " is" : " are") + " copied";
    }
    else if (copied > 0) {
        text += ", " + counted(copied, "tensor") + (copied == 1 ? " does" : " do") + " not";
    }
    text += "\n";
    return text;
}

} // namespace tool
