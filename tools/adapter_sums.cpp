// Adapters on a base.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_sums.hpp"

#include "models.hpp"
#include "runner.hpp"
#include "tokenizers.hpp"
#include "words.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <type_traits>
#include <utility>

namespace tool {

taskvec::checkpoint open_adapter(const fs::path& path)
{
    check_no_hub_cache(path);
    const auto file = taskvec::adapter_tensor_file(path);
    if (!taskvec::is_gguf_file(file)) { return open_guarded(file); }
    install_handlers();
    std::vector<taskvec::safetensors_file> files;
    files.push_back(taskvec::open_gguf(file));
    taskvec::checkpoint made(file, std::move(files));
    guard_map(made.files().front().map());
    return made;
}

namespace {

/// Modules and whole tensors under the names that --rename and --map give them.
template <class T>
void rename_modules(taskvec::adapter_contents<T>& adapter, const std::vector<name_rule>& rules, const run_options& run)
{
    if (rules.empty()) { return; }
    taskvec::const_model_ref names;
    std::vector<std::string> before;
    const auto add = [&](const std::string& name) { // the extent says which it was
        names.insert(name, {nullptr, taskvec::dtype::f32, {static_cast<std::int64_t>(before.size())}, {}});
        before.push_back(name);
    };
    for (const auto& [module, made] : adapter.modules) {
        const auto& parameter = made.slice.parameter;
        if (parameter.empty()) { add(module); }
        else if (!names.find(parameter)) {
            add(parameter);
        }
    }
    for (const auto& [name, tensor] : adapter.wholes) {
        if (!names.find(name)) { add(name); }
    }
    std::map<std::string, std::string> after;
    for (const auto& [name, tensor] : renamed(names, rules, adapter.label, run)) {
        after.emplace(before[static_cast<std::size_t>(tensor.shape[0])], name);
    }
    const auto under = [&](auto& map) {
        std::remove_reference_t<decltype(map)> result;
        for (auto& [name, value] : map) {
            const auto place = after.find(name);
            result.emplace(place == after.end() ? name : place->second, std::move(value));
        }
        map = std::move(result);
    };
    for (auto& [module, made] : adapter.modules) {
        if (const auto place = after.find(made.slice.parameter); place != after.end()) {
            made.slice.parameter = place->second;
        }
    }
    under(adapter.modules);
    under(adapter.wholes);
    under(adapter.copies);
}

/// Whether a tensor of a base has the bytes of one that an adapter carries.
bool holds_same(const taskvec::const_tensor_ref& base, const taskvec::peft_tensor& own)
{
    return base.dtype == own.dtype && base.shape == own.shape && base.data
        && std::memcmp(base.data, own.bytes.data(), own.bytes.size()) == 0;
}

/// Whether a matrix of a base has more rows in an adapter.
bool grows(const taskvec::const_tensor_ref* there, const taskvec::peft_tensor& own)
{
    return there && there->shape.size() == 2 && own.shape.size() == 2 && there->shape[1] == own.shape[1]
        && own.shape[0] > there->shape[0];
}

/// Whether a tensor's first rows are another's.
bool begins_with(const taskvec::const_tensor_ref& tensor, const taskvec::const_tensor_ref& rows)
{
    return rows.data && std::memcmp(tensor.data, rows.data, rows.bytes()) == 0;
}

} // namespace

/// Refuses what an adapter holds whole of a tensor that another has brought with more rows.
void adapter_sum::refuse_second(const std::string& tensor, const grown_tensor& grown, const std::string& label,
    std::int64_t rows, const std::string& base_label)
{
    taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::tensor_shape,
        taskvec::message("'", tensor, "' has ", grown.now.shape[0], " rows in ", grown.label, ", ", rows, " in ", label,
            " and ", grown.before.shape[0], " in ", base_label,
            ": rows that were added may be other tokens' in each; fold each adapter into the base by itself, and merge "
            "the models by their tokenizers (taskvec merge --vocabulary union)"));
}

std::uint64_t adapter_sum::bytes() const
{
    std::uint64_t total = 0;
    for (const auto& file : files_) { total += file.data_bytes(); }
    return total;
}

adapter_sum::adapter_sum(const std::vector<task_argument>& arguments, const taskvec::checkpoint& base,
    const settings& how, const run_options& run)
    : base_(base.model())
{
    check_no_factors(base, how.include);
    std::vector<tied_modules> tied;
    for (const auto& argument : arguments) {
        files_.push_back(open_adapter(argument.path));
        if (holds_f64(files_.back())) { adapters_.emplace_back(taskvec::read_adapter<double>(argument.path)); }
        else {
            adapters_.emplace_back(taskvec::read_adapter<float>(argument.path));
        }
        std::visit([&](auto& read) { tied.push_back(prepare(read, argument, how, run)); }, adapters_.back());
    }
    // Which tensors the base has, and how large they are, is known once all have been read: then they are added.
    std::vector<taskvec::module_match> matches;
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        std::visit(
            [&](auto& read) {
                spread_tied(read, tied[i], how.base_path);
                matches.push_back(line_up(read, how, run));
            },
            adapters_[i]);
    }
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        std::visit(
            [&](auto& read) {
                if (how.may_untie) {
                    take_grown_vocabulary(read, matches[i], arguments[i].weight, how.base_label(), run);
                }
                else {
                    refuse_grown_vocabulary(read, matches[i], arguments[i], how);
                }
            },
            adapters_[i]);
    }
    for (std::size_t i = 0; i < arguments.size(); ++i) {
        std::visit(
            [&](auto& read) {
                fit_grown_vocabulary(read, matches[i], how.base_label());
                add(read, matches[i], arguments[i], how, run);
            },
            adapters_[i]);
    }
    if (changes_.empty() && taken_.empty()) {
        std::vector<std::string> names;
        for (const auto& [name, tensor] : base_) { names.push_back(name); }
        check_patterns(how.included, "--include", names, "tensor of " + how.base_label());
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::nothing_selected,
            "no module of the adapters is left: there is nothing to add to the base");
    }
}

/// Modules under the names that the base's files have, where the adapter has those of transformers 5.
template <class T>
void adapter_sum::call_as_files_do(
    taskvec::adapter_contents<T>& read, const nlohmann::json& config, const run_options& run) const
{
    taskvec::const_model_ref loaded;
    std::map<std::string, std::string> stored; // by the names of transformers 5
    constexpr std::string_view ending = ".weight";
    for (const auto& [name, tensor] : base_) {
        if (!name.ends_with(ending)) { continue; }
        const auto module = name.substr(0, name.size() - ending.size());
        stored.emplace(name_in_transformers_5(config, module), module);
    }
    if (std::all_of(stored.begin(), stored.end(), [](const auto& one) { return one.first == one.second; })) { return; }
    const auto call_whole = [&](std::map<std::string, taskvec::peft_tensor>& tensors) {
        std::map<std::string, taskvec::peft_tensor> called;
        for (auto& [name, tensor] : tensors) {
            const auto dot = std::min(name.rfind('.'), name.size());
            const auto place = base_.find(name) ? stored.end() : stored.find(name.substr(0, dot));
            called.emplace(place == stored.end() ? name : place->second + name.substr(dot), std::move(tensor));
        }
        tensors = std::move(called);
    };
    call_whole(read.wholes);
    call_whole(read.copies);
    auto left = taskvec::match_modules(read, base_).unmatched;
    std::erase_if(left, [&](const auto& module) { return !read.modules.contains(module); }); // of several experts
    if (left.empty()) { return; }
    for (const auto& [name, module] : stored) {
        loaded.insert(name + std::string(ending), *base_.find(module + std::string(ending)));
    }
    std::string example;
    for (const auto& [module, tensor] : taskvec::match_modules(left, loaded, read.dialect).tensors) {
        const auto& to = stored.at(tensor.substr(0, tensor.size() - ending.size()));
        if (read.modules.contains(to)) { continue; } // the adapter has both
        auto node = read.modules.extract(module);
        node.key() = to;
        read.modules.insert(std::move(node));
        if (example.empty()) { example = "'" + module + "' is '" + to + "'"; }
    }
    if (!example.empty()) {
        note(
            run, "modules of " + read.label + " have the names of transformers 5: " + example + " in the base's files");
    }
}

/// The name of a module of an adapter that is `name` in the base, with what either has before it left out.
template <class T>
std::string module_called(const taskvec::adapter_contents<T>& read, const std::string& name)
{
    if (read.modules.contains(name)) { return name; }
    for (const auto& [module, made] : read.modules) {
        if (module.ends_with("." + name) || name.ends_with("." + module)) { return module; }
    }
    return "";
}

/// Modules that are one matrix of the base under several names, made one.
template <class T>
void adapter_sum::join_copies(
    taskvec::adapter_contents<T>& read, const tied_matrix& tie, const std::string& base_label) const
{
    std::vector<std::string> there;
    std::string lacking;
    for (const auto& copy : tie.copies) {
        const auto module = module_called(read, copy);
        if (module.empty()) { lacking = copy; }
        else {
            there.push_back(module);
        }
    }
    if (there.empty()) { return; }
    const auto own = module_called(read, tie.embedding);
    if (!own.empty()) { there.push_back(own); }
    const auto other = std::find_if(there.begin(), there.end(),
        [&](const auto& module) { return !same_change(read.modules.at(there.front()), read.modules.at(module)); });
    if (other != there.end() || (own.empty() && !lacking.empty())) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_unexpected,
            taskvec::message(read.label, " changes '", there.front(), "' and not '",
                other != there.end() ? *other : lacking, "' alike, and both are '", tie.embedding, ".weight' of ",
                base_label, ", which holds one matrix for them: leave the module out by --exclude"));
    }
    auto node = read.modules.extract(there.front());
    for (const auto& module : there) { read.modules.erase(module); }
    node.key() = tie.embedding;
    read.modules.insert(std::move(node));
}

/// An adapter of a head that is tied to the embedding, or of the embedding, changes one of the two: unless it says that
/// they stay one, or changes both alike, the head becomes a tensor of its own.
template <class T>
adapter_sum::tied_modules adapter_sum::untie(
    taskvec::adapter_contents<T>& read, const settings& how, const run_options& run)
{
    auto tie = tied_matrix_of(config_beside(how.base_path), base_);
    tie.tied = tie.tied || untied_; // one was tied, until another adapter changed it
    if (!parted_.empty()) { tie.copies = parted_; }
    const std::string base_label = how.base_label();
    const auto names_of = [&](const auto& matches) {
        std::string found;
        for (const auto& [module, made] : read.modules) {
            if (matches(module)) { found = module; }
        }
        for (const auto& [name, tensor] : read.wholes) {
            if (name.ends_with(".weight") && matches(name.substr(0, name.size() - 7))) {
                found = name.substr(0, name.size() - 7);
            }
        }
        return found;
    };
    const auto last = [](std::string_view name) { return name.substr(name.rfind('.') + 1); };
    std::string head =
        names_of([&](const std::string& module) { return is_head_module(module) || module == tie.head; });
    if (tie.head_stored && !head.empty() && last(head) != last(tie.head) && !base_.find(head + ".weight")
        && read.modules.contains(head)) {
        note(run, "module '" + head + "' of " + read.label + " is the head, '" + tie.head + "' of " + base_label);
        auto node = read.modules.extract(head);
        node.key() = tie.head;
        read.modules.insert(std::move(node));
        head = tie.head;
    }
    if (tie.embedding.empty()) { return {}; }
    join_copies(read, tie, base_label);
    const auto is_embedding_module = [&](const std::string& name) {
        return last(name) == last(tie.embedding) || name == tie.embedding;
    };
    std::string adapted = names_of(is_embedding_module);
    // What is left out on purpose takes nothing apart.
    const auto leave_out = [&](std::string& module, const std::string& tensor) {
        if (module.empty() || !how.include || how.include(tensor)) { return; }
        read.modules.erase(module);
        read.wholes.erase(module + ".weight");
        module.clear();
    };
    if (tie.tied || !tie.head_stored) {
        leave_out(head, (tie.head_stored ? tie.head : head) + ".weight");
        leave_out(adapted, tie.embedding + ".weight");
    }
    if (head.empty() && adapted.empty()) { return {}; }
    const auto one = read.modules.find(head), other = read.modules.find(adapted);
    const bool both = one != read.modules.end() && other != read.modules.end();
    // DoRA's norms are those of dimensions in one of the two, and of entries in the other.
    const bool rescaled = both && one->second.embedding != other->second.embedding
        && !(one->second.magnitude.empty() && other->second.magnitude.empty());
    if (read.tied && tie.tied && head.empty() && other != read.modules.end() && other->second.embedding
        && !other->second.magnitude.empty()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_missing,
            taskvec::message("module '", adapted, "' of ", read.label, " is DoRA's, and '", tie.head,
                "', which is tied to it (ensure_weight_tying), has magnitudes of its own, which target_modules of its ",
                taskvec::peft_config_name, " leaves out: add '", last(tie.head), "' to target_modules"));
    }
    // MLX's embedding is the head, with all that is done to it.
    const bool says_one = (read.tied && !rescaled) || (read.dialect == taskvec::adapter_dialect::mlx && head.empty());
    if (!tie.tied && (tie.head_stored || head.empty())) { return {adapted, head, says_one && !tie.head_stored}; }
    // T5 and BART read the matrix under other names than its own: it changes under all of them.
    if (head.empty() && !tie.copies.empty()) { return {adapted, head, true}; }
    if (says_one || (both && same_change(other->second, one->second))) {
        // One matrix, changed once: by the embedding's factors, or the head's where these are all there are.
        if (!head.empty() && !adapted.empty() && !tie.head_stored) {
            read.modules.erase(head);
            read.wholes.erase(head + ".weight");
            head.clear();
        }
        return {adapted, head, true};
    }
    const std::string module = tie.head_stored || head.empty() ? tie.head : head;
    const std::string name = module + ".weight";
    if (!how.may_untie) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::tensor_unexpected,
            taskvec::message(read.label, " changes '", head.empty() ? adapted : head,
                "' alone, and the base ties its head to its embedding: as a task it cannot; fold it first (taskvec "
                "fuse)"));
    }
    if (!tie.head_stored) {
        base_.insert(name, taskvec::const_tensor_ref(*base_.find(tie.embedding + ".weight")));
        // A model that ties nothing looks for every name of the embedding.
        for (const auto& copy : tie.copies) {
            base_.insert(copy + ".weight", taskvec::const_tensor_ref(*base_.find(tie.embedding + ".weight")));
        }
        parted_ = tie.copies;
        // The bias of such a head is tied too, to one that lies beside it.
        const auto dot = module.rfind('.');
        const auto* const bias = base_.find(module.substr(0, dot == module.npos ? 0 : dot + 1) + "bias");
        if (last(module) == "decoder" && bias && !base_.find(module + ".bias")) {
            const auto tied = *bias;
            base_.insert(module + ".bias", tied);
        }
    }
    untied_ = true;
    note(run,
        taskvec::message(read.label, " changes ",
            head.empty()          ? "the embedding, and not the head that is tied to it"
                : adapted.empty() ? "the head, and not the embedding that it is tied to"
                                  : "the head and the embedding that it is tied to each by itself",
            ": the result holds '", name, "' for itself, and must be loaded with tie_word_embeddings: false"));
    return {adapted, head, false};
}

/// Gives what was one matrix with the embedding, and has a tensor of its own in the base or by another adapter, what
/// this adapter does to the embedding: all but the head always, and that where it is one with it.
template <class T>
void adapter_sum::spread_tied(
    taskvec::adapter_contents<T>& read, const tied_modules& tied, const fs::path& base_path) const
{
    if (tied.embedding.empty()) { return; }
    const auto tie = tied_matrix_of(config_beside(base_path), base_);
    const auto give = [&](const std::string& module, bool as_linear) {
        if (const auto made = read.modules.find(tied.embedding); made != read.modules.end()) {
            auto copy = as_linear ? as_head(made->second) : made->second;
            read.modules.emplace(module, std::move(copy));
        }
        if (const auto whole = read.wholes.find(tied.embedding + ".weight"); whole != read.wholes.end()) {
            auto copy = whole->second;
            read.wholes.emplace(module + ".weight", std::move(copy));
        }
    };
    for (const auto& module : parted_) { give(module, false); }
    if (tied.as_one && tied.head.empty() && tie.head_stored) { give(tie.head, true); }
}

template <class T>
adapter_sum::tied_modules adapter_sum::prepare(
    taskvec::adapter_contents<T>& read, const task_argument& argument, const settings& how, const run_options& run)
{
    for (const auto& text : read.notes) { note(run, text); }
    restore_rows(read, how.base_path);
    taskvec::split_experts(read, base_);
    translate_flux(read, base_, run);
    if (const auto rules = how.names.find(argument.text); rules != how.names.end()) {
        rename_modules(read, rules->second, run);
    }
    const auto config = config_beside(how.base_path);
    call_as_files_do(read, config, run);
    check_saved_modules(read, run);
    if (read.dialect == taskvec::adapter_dialect::mlx) {
        const auto layers = config.find("num_hidden_layers");
        taskvec::check_mlx_base(read, base_, taskvec::match_modules(read, base_), how.base_label(),
            layers != config.end() && layers->is_number_integer() ? std::optional(layers->get<std::int64_t>())
                                                                  : std::nullopt);
    }
    if (!how.excluded.empty()) { // what an adapter calls otherwise than the base may be left out by its own name
        const auto keeps = name_filter({}, how.excluded);
        std::erase_if(read.modules, [&](const auto& one) { return !keeps(one.first + ".weight"); });
        std::erase_if(read.wholes, [&](const auto& one) { return !keeps(one.first); });
    }
    return untie(read, how, run);
}

template <class T>
taskvec::module_match adapter_sum::line_up(
    taskvec::adapter_contents<T>& read, const settings& how, const run_options& run)
{
    auto match = taskvec::match_modules(read, base_);
    if (how.include) { // what is left out on purpose may be unknown to the base
        std::erase_if(match.unmatched, [&](const std::string& module) {
            const auto own = read.modules.find(module);
            if (how.include(own == read.modules.end() ? module : module + ".weight")) { return false; }
            std::erase_if(read.modules,
                [&](const auto& one) { return one.first == module || one.second.slice.parameter == module; });
            return true;
        });
        std::erase_if(read.modules, [&](const auto& one) {
            const auto place = match.tensors.find(one.first);
            return place != match.tensors.end() && !how.include(place->second);
        });
        std::erase_if(read.wholes, [&](const auto& one) { return !how.include(match.renamed(one.first, base_)); });
    }
    if (how.subtract) {
        for (const auto& [module, made] : read.modules) {
            if (made.magnitude.empty()) { continue; }
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapter_factors,
                taskvec::message("--subtract: module '", module, "' of ", read.label,
                    " is DoRA's, whose norms are those of the base: it cannot be taken out of a model that holds it"));
        }
        if (!read.wholes.empty()) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::adapter_factors,
                taskvec::message("--subtract: ", read.label, " replaces '", read.wholes.begin()->first,
                    "' whole, and nothing tells what was there before: leave it out by --exclude"));
        }
    }
    if (!match.changes.empty()) {
        std::string text;
        for (const auto& change : match.changes) { text += (text.empty() ? "" : ", ") + change; }
        note(run, "modules of " + read.label + ": " + text);
    }
    return match;
}

template <class T>
void adapter_sum::add(taskvec::adapter_contents<T>& read, const taskvec::module_match& match,
    const task_argument& argument, const settings& how, const run_options& run)
{
    const auto config = config_beside(how.base_path);
    facts about{std::string(taskvec::to_string(read.dialect)), read.modules.size(), read.wholes.size(), 0, 0};
    for (const auto& [module, made] : read.modules) {
        const auto rank = made.update.rank();
        about.least_rank = about.least_rank == 0 ? rank : std::min(about.least_rank, rank);
        about.greatest_rank = std::max(about.greatest_rank, rank);
    }
    facts_.push_back(about);
    const std::string base_label = how.base_label();
    // Shapes tell more than the configuration, which may be of a model that is not known here.
    const bool linear = config.contains("model_type") && !has_conv1d_layers(config) && !how.fan_in_fan_out
        && !taskvec::shows_in_by_out(base_, read, match);
    if (read.fan_in_fan_out && (linear || taskvec::denies_fan_in_fan_out(base_, read, match))) {
        note(run,
            read.label + " says fan_in_fan_out, and linear layers of " + base_label
                + " lie out×in: the flag is taken for false, as PEFT does");
        read.fan_in_fan_out = false;
    }
    taskvec::add_adapter(changes_, base_, read, match, how.subtract ? -argument.weight : argument.weight,
        {.conv1d = how.fan_in_fan_out || has_conv1d_layers(config),
            .holds_adapter = how.subtract,
            .label = base_label,
            .renaming = "--rename, --map"});
}

/// An adapter with rows for tokens that were added makes another model than one of the base's shapes: as a task it
/// cannot.
template <class T>
void adapter_sum::refuse_grown_vocabulary(const taskvec::adapter_contents<T>& read, const taskvec::module_match& match,
    const task_argument& argument, const settings& how) const
{
    for (const auto* const tensors : {&read.wholes, &read.copies}) {
        for (const auto& [name, whole] : *tensors) {
            const auto tensor = match.renamed(name, base_);
            const auto* const there = base_.find(tensor);
            if (!grows(there, whole) || !(is_head(tensor) || is_embedding(tensor))) { continue; }
            const auto path = printable(argument.path.string());
            const auto copied = tokenizer_of(argument.path).empty() ? "" : " --copy-from " + path;
            taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::tensor_shape,
                taskvec::message("'", tensor, "' has ", whole.shape[0], " rows in ", read.label, " and ",
                    there->shape[0], " in ", how.base_label(),
                    ": the adapter adds tokens, which a model that is worked out as it is read cannot: store that "
                    "model first (taskvec fuse --base ",
                    printable(how.base_path.string()), " --adapter ", path, copied, ") and name it instead"));
        }
    }
}

/// Modules that were trained whole by the configuration, and are not in the file.
template <class T>
void adapter_sum::check_saved_modules(const taskvec::adapter_contents<T>& read, const run_options& run) const
{
    const auto within = [](std::string_view name, const std::string& module) {
        return ("." + std::string(name)).find("." + module + ".") != std::string::npos;
    };
    const auto saved = read.config.find("modules_to_save");
    for (const auto& one : saved != read.config.end() && saved->is_array() ? *saved : nlohmann::json::array()) {
        if (!one.is_string()) { continue; }
        const auto& module = one.template get_ref<const std::string&>();
        const bool there = std::any_of(
            read.wholes.begin(), read.wholes.end(), [&](const auto& whole) { return within(whole.first, module); });
        const bool known =
            std::any_of(base_.begin(), base_.end(), [&](const auto& entry) { return within(entry.name, module); });
        if (there || !known) { continue; }
        taskvec::raise<taskvec::format_error>(taskvec::error_code::adapter_tensors,
            "modules_to_save of adapter_config.json names '" + printable(module)
                + "', which was trained whole, and the file holds nothing of it: fetch or save it anew, or take the "
                  "name out of modules_to_save if it was not trained",
            read.file.string());
    }
    const auto bias = read.config.find("bias");
    if (bias != read.config.end() && (*bias == "all" || *bias == "lora_only")
        && std::none_of(
            read.wholes.begin(), read.wholes.end(), [](const auto& whole) { return whole.first.ends_with("bias"); })) {
        note(run,
            read.label + " says bias " + bias->template get<std::string>()
                + ", and holds no bias: those of the base stay");
    }
}

/// Embeddings and heads that an adapter holds whole with more rows than the base has, for tokens that were added: they
/// take the base's place, as they are. Only one adapter may bring them: rows that two have added are not of one token,
/// unless they are the same, and nothing was trained of the base's.
template <class T>
void adapter_sum::take_grown_vocabulary(taskvec::adapter_contents<T>& read, const taskvec::module_match& match,
    double weight, const std::string& base_label, const run_options& run)
{
    std::map<std::string, const taskvec::peft_tensor*> grown;
    std::vector<std::string> untrained; // rows that another adapter has brought too, beside those of the base
    const auto look_at = [&](const std::string& name, const taskvec::peft_tensor& own, bool is_copy) {
        const auto tensor = match.renamed(name, base_);
        const auto other = grown_.find(tensor);
        const auto* const there = other == grown_.end() ? base_.find(tensor) : &other->second.before;
        if (!grows(there, own) || there->dtype != own.dtype
            || !(is_copy || ((is_head(tensor) || is_embedding(tensor)) && weight == 1))) {
            return;
        }
        if (other == grown_.end()) {
            grown[tensor] = &own;
            return;
        }
        const auto& [label, before, now] = other->second;
        if (!holds_same(now, own) || !(is_copy || begins_with(now, before))) {
            refuse_second(tensor, other->second, read.label, own.shape[0], base_label);
        }
        if (!is_copy) { untrained.push_back(name); }
    };
    for (const auto& [name, whole] : read.wholes) { look_at(name, whole, false); }
    // Beside their factors PEFT keeps the weights that grew: what the update is added to.
    for (const auto& [name, copy] : read.copies) { look_at(name, copy, true); }
    for (const auto& name : untrained) { read.wholes.erase(name); }
    if (grown.empty()) { return; }
    const auto rows = grown.begin()->second->shape[0];
    for (const auto& [name, tensor] : base_) {
        const bool of_vocabulary =
            (is_head(name) || is_embedding(name)) && tensor.shape == base_.find(grown.begin()->first)->shape;
        if (of_vocabulary && !grown.contains(name)) {
            taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::tensor_shape,
                "'" + grown.begin()->first + "' has " + std::to_string(rows) + " rows in " + read.label + ", and '"
                    + name + "' of " + base_label + " " + std::to_string(tensor.shape[0])
                    + ", and is not in the adapter: one of the two would lack rows");
        }
    }
    taskvec::const_model_ref model;
    for (const auto& [name, tensor] : base_) {
        const auto place = grown.find(name);
        if (place == grown.end()) {
            model.insert(name, taskvec::const_tensor_ref(tensor));
            continue;
        }
        const taskvec::const_tensor_ref now{place->second->bytes.data(), place->second->dtype, place->second->shape};
        grown_.emplace(name, grown_tensor{read.label, tensor, now});
        model.insert(name, taskvec::const_tensor_ref(now));
    }
    base_ = std::move(model);
    for (const auto& [name, whole] : grown) {
        note(run,
            "'" + name + "' of " + read.label + " has " + std::to_string(rows) + " rows, more than " + base_label
                + ": it takes the place of that; --copy-from takes the adapter's tokenizer along");
    }
    for (auto* const tensors : {&read.wholes, &read.copies}) {
        for (auto one = tensors->begin(); one != tensors->end();) {
            if (!grown.contains(match.renamed(one->first, base_))) {
                ++one;
                continue;
            }
            taken_.push_back(std::move(one->second)); // base_ points to its bytes
            one = tensors->erase(one);
        }
    }
}

/// What an adapter says of embeddings and heads that another one has brought with more rows: its factors change the
/// rows that they know.
template <class T>
void adapter_sum::fit_grown_vocabulary(
    taskvec::adapter_contents<T>& read, const taskvec::module_match& match, const std::string& base_label) const
{
    for (const auto& one : grown_) {
        const auto& tensor = one.first;
        const auto& grown = one.second;
        const auto rows = static_cast<std::size_t>(grown.before.shape[0]),
                   all = static_cast<std::size_t>(grown.now.shape[0]);
        for (const auto& [name, whole] : read.wholes) {
            if (match.renamed(name, base_) == tensor) {
                refuse_second(tensor, grown, read.label, whole.shape.empty() ? 0 : whole.shape[0], base_label);
            }
        }
        // A copy of the base's own, as PEFT keeps beside factors of any embedding.
        std::erase_if(read.copies, [&](const auto& copy) {
            return match.renamed(copy.first, base_) == tensor && holds_same(grown.before, copy.second);
        });
        for (auto& [module, made] : read.modules) {
            const auto place = match.tensors.find(module);
            if (place == match.tensors.end() || place->second != tensor || !made.slice.parameter.empty()) { continue; }
            if ((made.embedding ? made.update.in() : made.update.out()) == all) { continue; }
            const bool turned = made.embedding || made.update.out() != rows;
            if ((turned ? made.update.in() : made.update.out()) != rows) { continue; }
            if (!made.magnitude.empty()) {
                taskvec::raise<taskvec::shape_mismatch>(taskvec::error_code::tensor_shape,
                    taskvec::message("module '", module, "' of ", read.label, " is DoRA's, whose norms are those of ",
                        rows, " rows, and '", tensor, "' has ", all, " in ", grown.label,
                        ": fold it into the base by itself"));
            }
            auto& factor = turned ? made.update.a : made.update.b;
            taskvec::matrix<T> longer(
                turned ? factor.rows() : all, turned ? all : factor.cols(), taskvec::matrix_order::row_major);
            for (std::size_t i = 0; i < factor.rows(); ++i) {
                for (std::size_t j = 0; j < factor.cols(); ++j) { longer(i, j) = factor(i, j); }
            }
            factor = std::move(longer);
        }
    }
}

} // namespace tool
