// PEFT's LoRA adapter directories: adapter_config.json and adapter_model.safetensors, read strictly and written so that
// PEFT loads them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/adapter.hpp>
#include <taskvec/core/overflow.hpp>
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/peft_config.hpp>
#include <taskvec/formats/safetensors.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A tensor that an adapter carries beside its factors: a bias, or a weight of a module that was trained whole.
struct peft_tensor {
    taskvec::dtype dtype = taskvec::dtype::f32; ///< as it is stored
    extents shape{}; ///< slowest first
    std::vector<std::byte> bytes{}; ///< as they are stored
    friend bool operator==(const peft_tensor&, const peft_tensor&) = default;
};

/// An adapter as a PEFT directory holds it. Module names are those of the base model ("layers.0.attn.q_proj").
/// The update of an embedding (entries×dimensions) is kept as PEFT factors it, transposed: out = dimensions, in =
/// entries. The weight of a transposed layer (`fan_in_fan_out`) is in×out, its update here out×in like any other.
template <arithmetic_element T>
struct peft_adapter {
    lora_adapter<T> updates{}; ///< factors in T, scaling from the configuration
    std::set<std::string> embeddings{}; ///< which of the modules are embeddings
    std::map<std::string, dtype> stored{}; ///< the dtype of each module's factors in the file; absent: T
    /// Of the modules that are convolutions: their sides, slowest first. The update's `in` counts the kernel.
    std::map<std::string, extents> kernels{};
    std::map<std::string, peft_tensor>
        others{}; ///< biases, copies of base weights, whole modules: by name in the file without PEFT's prefix
    nlohmann::json config = nlohmann::json::object(); ///< the configuration as it was read
    std::string label{}; ///< names the adapter in messages: its directory
    std::vector<std::string> notes{}; ///< what a user should know of it, a sentence each
};

/// The narrowest floating storage dtype that holds the values of both.
[[nodiscard]] constexpr dtype wider(dtype a, dtype b) noexcept
{
    return a == b ? a : a == dtype::f64 || b == dtype::f64 ? dtype::f64 : dtype::f32;
}

/// What read_peft() accepts beside plain low-rank updates.
struct peft_read_options {
    /// Accept an adapter that is more than low-rank updates because whole weights come with it (modules_to_save,
    /// embeddings that were saved): they are kept in `others`. By default such an adapter is refused. The copies of
    /// base weights that PEFT stores beside the factors of embed_tokens and lm_head are not meant: they are always
    /// accepted.
    bool whole_modules = false;
    /// What messages call the switch above: the caller's own word for it, such as a flag.
    std::string whole_modules_word = "peft_read_options::whole_modules";
    /// What messages advise for DoRA and lora_bias: the caller's own way from there to a plain low-rank update.
    std::string fold_word = "fold it into its base with PEFT and extract an adapter from the result";
    /// What they advise for AdaLoRA, LoHa and LoKr.
    std::string convert_word = "read_adapter() reads it, and converted_adapter() writes it as the LoRA that it equals";
};

namespace detail {

/// Refuses by name whatever is not a plain low-rank update.
inline void check_plain_lora(const nlohmann::json& config, const std::string& file, const peft_read_options& options)
{
    const peft_fields fields(config, file);
    const auto refuse_to = [&](std::string_view mend, std::string_view what, std::string_view why) {
        raise<format_error>(
            error_code::adapter_unsupported, message(what, ": ", why, ", not a plain low-rank update; ", mend), file);
    };
    const auto refuse = [&](std::string_view what, std::string_view why) {
        refuse_to(peft_read_options().fold_word, what, why);
    };
    const auto* type = fields.find("peft_type");
    if (!type) {
        raise<format_error>(
            error_code::adapter_config, "has no peft_type; expected the configuration of a LoRA adapter", file);
    }
    if (*type != "LORA") {
        const bool convertible = *type == "ADALORA" || *type == "LOHA" || *type == "LOKR";
        const auto what = "peft_type " + (type->is_string() ? type->get<std::string>() : fields.shown(*type));
        if (convertible) { refuse_to(options.convert_word, what, "another kind of adapter"); }
        if (const auto why = unmergeable_kind(peft_type_of(config)); !why.empty()) {
            raise<format_error>(error_code::adapter_unsupported, message(what, ": ", why), file);
        }
        refuse(what, "another kind of adapter");
    }

    // The configurations of initialisations that change the base stay where PEFT has saved them converted.
    check_lora_initialization(fields, refuse);
    if (fields.says_something("use_dora")) { refuse_to(options.fold_word, "use_dora", "DoRA rescales the weights"); }
    if (fields.says_something("lora_bias")) {
        refuse_to(options.fold_word, "lora_bias", "the update has a bias of its own");
    }
    if (fields.says_something("target_parameters")) {
        refuse_to(options.fold_word, "target_parameters", "bare parameters are adapted");
    }
    for (const auto& [field, why] : beyond_updates) {
        if (fields.says_something(field)) { refuse(field, why); }
    }
    if (fields.says_something("modules_to_save") && !options.whole_modules) {
        raise<format_error>(error_code::adapter_unsupported,
            message("modules_to_save: whole modules (", fields.shown(*fields.find("modules_to_save")),
                ") come with this adapter, which makes it more than a low-rank update; ask for them to "
                "be carried along (",
                options.whole_modules_word, "), or remove them"),
            file);
    }
    for (const char* names : {"target_modules", "exclude_modules", "modules_to_save"}) { fields.check_names(names); }
    (void)fields.flag("fan_in_fan_out");
    constexpr std::array<std::string_view, 3> biases{"none", "all", "lora_only"};
    if (const auto* bias = fields.find("bias");
        bias && std::find(biases.begin(), biases.end(), *bias) == biases.end()) {
        raise<format_error>(error_code::adapter_config,
            message("bias is ", fields.shown(*bias), "; expected \"none\", \"all\" or \"lora_only\""), file);
    }
    if (const double rank = fields.number("r", 8); !(rank >= 1 && rank == std::floor(rank))) {
        raise<format_error>(error_code::adapter_config,
            message("r is ", fields.shown(*fields.find("r")), "; expected a rank, a whole number above 0"), file);
    }
}

/// What is said of a tensor without an entry.
inline constexpr std::string_view not_gathered =
    "is empty, as DeepSpeed's ZeRO-3 leaves parameters that were not gathered before they were saved: save the adapter "
    "anew";

/// A stored factor (rows×cols) in T, row-major.
template <class T>
[[nodiscard]] matrix<T> read_factor(const safetensors_file& file, const safetensors_entry& entry)
{
    if (entry.shape == extents{0}) {
        raise<format_error>(error_code::adapter_tensors, message("tensor '", entry.name, "' ", not_gathered),
            file.path().string(), entry.offset);
    }
    if (entry.shape.size() != 2) {
        raise<format_error>(error_code::adapter_unsupported,
            message("tensor '", entry.name, "' has shape ", to_string(entry.shape),
                entry.shape.size() > 2 ? ": a convolution's factors are not merged with others; fold each adapter into "
                                         "its base (taskvec fuse, or PEFT's merge_and_unload) and merge the models"
                                       : "; expected a matrix"),
            file.path().string(), entry.offset);
    }
    if (!is_storage(entry.dtype)) {
        raise<dtype_mismatch>(error_code::dtype_unsupported,
            message("'", file.path().string(), "': tensor '", entry.name, "' has dtype ", to_string(entry.dtype),
                "; a factor is ", storage_names(), ": convert the adapter first"));
    }
    matrix<T> x(
        static_cast<std::size_t>(entry.shape[0]), static_cast<std::size_t>(entry.shape[1]), matrix_order::row_major);
    const auto* const from = static_cast<const std::byte*>(file.tensor(entry).data);
    visit_storage(entry.dtype, entry.name, [&]<class S>(std::type_identity<S>) {
        for (std::size_t i = 0; i < x.size(); ++i) {
            S value;
            std::memcpy(&value, from + i * sizeof(S), sizeof(S));
            x.data()[i] = static_cast<T>(widen<arithmetic_type<S>>(value));
        }
    });
    return x;
}

/// A stored tensor, copied as it is.
[[nodiscard]] inline peft_tensor carried_tensor(const safetensors_file& file, const safetensors_entry& entry)
{
    const auto* const data = static_cast<const std::byte*>(file.tensor(entry).data);
    return {entry.dtype, entry.shape, std::vector<std::byte>(data, data + entry.bytes)};
}

} // namespace detail

/// The file of an adapter's directory that has the factors: PEFT's old one where that is all there is.
[[nodiscard]] inline std::filesystem::path peft_tensor_file(const std::filesystem::path& directory)
{
    std::error_code ignored;
    auto file = directory / peft_model_name;
    const bool old =
        !std::filesystem::exists(file, ignored) && std::filesystem::exists(directory / peft_pickle_name, ignored);
    return old ? directory / peft_pickle_name : file;
}

/// True when some factor of an adapter is stored as F64: it then wants read_peft<double>().
[[nodiscard]] inline bool peft_is_wide(const std::filesystem::path& directory)
{
    std::vector<std::string> notes;
    const safetensors_file file = detail::open_weights(peft_tensor_file(directory), notes);
    return std::any_of(
        file.entries().begin(), file.entries().end(), [](const auto& entry) { return entry.dtype == dtype::f64; });
}

namespace detail {

/// What read_peft() does, in its steps.
template <class T>
class peft_reader {
public:
    /// Opens both files, and refuses what the configuration says to be no plain low-rank update.
    peft_reader(const std::filesystem::path& directory, const peft_read_options& options)
        : options_(options)
        , config_file_((directory / peft_config_name).string())
        , configuration_(directory / peft_config_name)
        , fields_(configuration_.fields(), config_file_)
    {
        adapter_.label = directory.string();
        adapter_.config = configuration_.fields();
        check_plain_lora(adapter_.config, config_file_, options);
        const auto stored = peft_tensor_file(directory);
        file_.emplace(open_weights(stored, adapter_.notes));
        model_file_ = stored.string();
    }

    [[nodiscard]] peft_adapter<T> read()
    {
        for (const auto& entry : file_->entries()) { sort_in(entry); }
        if (pairs_.empty()) { refuse("holds no LoRA factors"); }
        read_others();
        read_updates();
        leave_out();
        file_->map().check_unchanged();
        configuration_.check_unchanged(); // another run may have replaced both files between the two readings
        return std::move(adapter_);
    }

private:
    struct halves {
        const safetensors_entry *a = nullptr, *b = nullptr;
        bool embedding = false;
    };

    template <class... Parts>
    [[noreturn]] void refuse(const Parts&... parts) const
    {
        raise<format_error>(error_code::adapter_tensors, message(parts...), model_file_);
    }

    /// Pairs of factors go by module, everything else by name.
    void sort_in(const safetensors_entry& entry)
    {
        std::string_view name = entry.name;
        if (!name.starts_with(peft_prefix)) {
            refuse("tensor '", entry.name, "' does not begin with '", peft_prefix,
                "' as the names of a PEFT adapter do: ", options_.convert_word);
        }
        name.remove_prefix(peft_prefix.size());
        if (take(entry, name, ".lora_A.weight", true, false) || take(entry, name, ".lora_B.weight", false, false)
            || take(entry, name, ".lora_embedding_A", true, true)
            || take(entry, name, ".lora_embedding_B", false, true)) {
            return;
        }
        if (name.find(".lora_velora_embed") != name.npos) { return; } // of the training
        if (name.find(".lora_") != name.npos || name.find("lora_") == 0) {
            const bool named = name.ends_with(".weight")
                && (name.rfind(".lora_A.") != name.npos || name.rfind(".lora_B.") != name.npos);
            refuse("tensor '", entry.name,
                "' is not a factor of a plain low-rank update; expected lora_A.weight, lora_B.weight, "
                "lora_embedding_A and lora_embedding_B",
                named ? message(" without a name of the adapter: ", options_.convert_word) : std::string());
        }
        others_.emplace(name, &entry);
    }
    /// Takes the tensor for a half of its module's pair, if its name ends so.
    bool take(const safetensors_entry& entry, std::string_view name, std::string_view suffix, bool is_a, bool embedding)
    {
        if (!name.ends_with(suffix) || name.size() == suffix.size()) { return false; }
        auto& pair = pairs_[std::string(name.substr(0, name.size() - suffix.size()))];
        if (is_a ? pair.a : pair.b) { refuse("tensor '", entry.name, "' is the second such factor of its module"); }
        (is_a ? pair.a : pair.b) = &entry;
        if ((pair.a && pair.b) && pair.embedding != embedding) {
            refuse("tensor '", entry.name, "' and its other half are not both factors of an embedding, or of a layer");
        }
        pair.embedding = embedding;
        return true;
    }

    void read_others()
    {
        const auto* const bias = fields_.find("bias");
        const bool biases = bias && *bias != "none";
        for (const auto& [name, entry] : others_) {
            const bool is_bias = biases && name.ends_with(".bias");
            const bool is_copy = name.ends_with(peft_base_weight)
                && pairs_.contains(name.substr(0, name.size() - peft_base_weight.size()));
            if (!is_bias && !is_copy
                && !(options_.whole_modules
                    && (belongs_to_saved_module(name, adapter_.config) || name.ends_with(".weight")))) {
                raise<format_error>(error_code::adapter_unsupported,
                    message("tensor '", entry->name,
                        "' is neither a factor nor a bias that the configuration announces: this adapter is more than "
                        "a low-rank update; ask for whole weights to be carried along (",
                        options_.whole_modules_word, "), or remove it"),
                    model_file_);
            }
            adapter_.others.emplace(name, carried_tensor(*file_, *entry));
        }
    }

    void read_updates()
    {
        const auto ordered = configuration_.ordered();
        peft_patterns ranks(ordered, "rank_pattern", config_file_), alphas(ordered, "alpha_pattern", config_file_);
        const double rank = fields_.number("r", 8), alpha = fields_.number("lora_alpha", 8);
        const bool root = fields_.flag("use_rslora");
        for (const auto& [module, pair] : pairs_) {
            auto update = read_pair(module, pair);
            const double expected = ranks.find(module, rank), strength = alphas.find(module, alpha);
            if (static_cast<double>(update.rank()) != expected) {
                refuse("module '", module, "' has rank ", update.rank(), " but ", peft_config_name, " says ", expected);
            }
            if (update.rank() == 0) { refuse("module '", module, "' has rank 0"); }
            check_copy(module, update);
            update.scaling = root ? strength / std::sqrt(expected) : strength / expected;
            check_update(update, module);
            if (pair.embedding) { adapter_.embeddings.insert(module); }
            adapter_.stored.emplace(module, wider(pair.a->dtype, pair.b->dtype));
            adapter_.updates.emplace(module, std::move(update));
        }
        ranks.check_used("rank_pattern", config_file_);
        alphas.check_used("alpha_pattern", config_file_);
    }
    [[nodiscard]] lora_update<T> read_pair(const std::string& module, const halves& pair) const
    {
        if (!pair.a || !pair.b) {
            refuse("module '", module, "' has ", pair.a ? "lora_A but no lora_B" : "lora_B but no lora_A",
                ": half of its update is missing");
        }
        lora_update<T> update{read_factor<T>(*file_, *pair.b), read_factor<T>(*file_, *pair.a), 1};
        if (update.b.cols() != update.a.rows()) {
            raise<shape_mismatch>(error_code::factor_rank,
                message("'", model_file_, "': module '", module, "': lora_B is ", update.b.rows(), "×", update.b.cols(),
                    " and lora_A ", update.a.rows(), "×", update.a.cols(), "; their ranks differ"));
        }
        return update;
    }
    /// The copy of a module's base weight has the shape of its update, whichever way it lies.
    void check_copy(const std::string& module, const lora_update<T>& update) const
    {
        const auto copy = others_.find(module + std::string(peft_base_weight));
        if (copy == others_.end()) { return; }
        const auto out = static_cast<std::int64_t>(update.out()), in = static_cast<std::int64_t>(update.in());
        const auto& shape = copy->second->shape;
        if (shape == extents{out, in} || shape == extents{in, out}) { return; }
        refuse("tensor '", copy->second->name, "' has shape ", to_string(shape), ", but the update of its module is ",
            out, "×", in);
    }

    /// Leaves out what PEFT leaves out, with a note.
    void leave_out()
    {
        std::vector<std::string> modules;
        for (const auto& one : pairs_) { modules.push_back(one.first); }
        const auto out = modules_left_out(adapter_.config, config_file_, modules,
            [&](const std::string& module) { return is_tied_head(adapter_.config, module); });
        if (!out.empty()) { adapter_.notes.push_back(left_out_words("'" + adapter_.label + "'", out, modules.size())); }
        for (const auto& module : out) {
            adapter_.updates.erase(module);
            adapter_.stored.erase(module);
            adapter_.embeddings.erase(module);
            adapter_.others.erase(module + std::string(peft_base_weight));
        }
        if (adapter_.updates.empty()) {
            refuse("holds factors of no module that ", peft_config_name, " does not leave out");
        }
    }

    const peft_read_options& options_;
    std::string config_file_, model_file_;
    peft_config_file configuration_;
    peft_fields fields_;
    std::optional<safetensors_file> file_{};
    std::map<std::string, halves> pairs_{}; ///< by module
    std::map<std::string, const safetensors_entry*> others_{}; ///< by name
    peft_adapter<T> adapter_{};
};

} // namespace detail

/// Reads an adapter directory that PEFT (or write_peft) wrote. Modules that the configuration leaves out are left out,
/// as in PEFT, with a note. The scaling of a module is α/r, or α/√r with use_rslora,
/// with α and r from alpha_pattern and rank_pattern where these match (as PEFT matches: in file order, the whole name
/// or a dotted end). Throws io_error for a missing file; format_error for what is not a plain LoRA adapter (each by
/// name: DoRA, aLoRA, QA-LoRA, PiSSA, OLoRA, CorDA, LoftQ and the like, lora_bias, trainable tokens, target_parameters,
/// convolutions, other peft types, modules_to_save unless asked for), a half of a pair without the other, ranks that
/// contradict the configuration, patterns that match nothing, tensors with no place in an adapter; dtype_mismatch for
/// factors that are not floating.
///
///     const auto adapter = read_peft("adapter");
///     const auto served = peru_lora(cpu{}, adapter.updates, {.rank = {.rank = 8}});
template <arithmetic_element T = float>
[[nodiscard]] peft_adapter<T> read_peft(const std::filesystem::path& directory, const peft_read_options& options = {})
{
    std::error_code ignored;
    if (!std::filesystem::is_directory(directory, ignored)) {
        raise<io_error>(error_code::file_kind, "is not a directory; expected a PEFT adapter directory",
            directory.string(), ENOTDIR);
    }
    return detail::peft_reader<T>(directory, options).read();
}

namespace detail {

/// A number as JSON, without a fraction where it has none.
[[nodiscard]] inline nlohmann::json json_number(double x)
{
    if (x == std::floor(x) && std::abs(x) < 9e15) { return static_cast<std::int64_t>(x); }
    return x;
}

/// Key of a pattern that matches one module alone: its name, or, where that would match others too, an anchored
/// expression.
[[nodiscard]] inline std::string exact_pattern(const std::string& module, const std::vector<std::string>& modules)
{
    const bool plain_name =
        module.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == module.npos;
    const bool alone =
        std::none_of(modules.begin(), modules.end(), [&](const auto& other) { // a dot in the name matches any character
            if (other == module || other.size() < module.size()) { return false; }
            const std::size_t head = other.size() - module.size();
            return (head == 0 || other[head - 1] == '.')
                && std::equal(module.begin(), module.end(), other.begin() + static_cast<std::ptrdiff_t>(head),
                    [](char c, char x) { return c == '.' || c == x; });
        });
    if (plain_name && alone) { return module; }
    std::string escaped = "^";
    for (const char c : module) {
        if (std::string_view("\\^$.|?*+()[]{}").find(c) != std::string_view::npos) { escaped += '\\'; }
        escaped += c;
    }
    return escaped;
}

} // namespace detail

/// The configuration with which PEFT gives the updates their ranks and scalings: r and lora_alpha of the largest rank,
/// patterns for what differs, everything that would make PEFT change the base reset. Fields that say which modules are
/// meant (target_modules and the like) are kept when they are there, otherwise every module is listed by its full name.
template <arithmetic_element T>
[[nodiscard]] nlohmann::json peft_config(const peft_adapter<T>& adapter)
{
    nlohmann::json config = adapter.config;
    const nlohmann::json defaults = {{"auto_mapping", nullptr}, {"base_model_name_or_path", nullptr}, {"bias", "none"},
        {"fan_in_fan_out", false}, {"layers_pattern", nullptr}, {"layers_to_transform", nullptr}, {"lora_dropout", 0.0},
        {"modules_to_save", nullptr}, {"revision", nullptr}, {"task_type", nullptr}};
    for (const auto& [key, value] : defaults.items()) {
        if (!config.contains(key)) { config[key] = value; }
    }
    std::size_t rank = 1;
    double alpha = 1;
    std::vector<std::string> modules;
    for (const auto& [module, update] : adapter.updates) {
        modules.push_back(module);
        if (update.rank() > rank || modules.size() == 1) {
            rank = update.rank();
            alpha = update.scaling * static_cast<double>(rank);
        }
    }
    nlohmann::json ranks = nlohmann::json::object(), alphas = nlohmann::json::object();
    for (const auto& [module, update] : adapter.updates) {
        const double own = update.scaling * static_cast<double>(update.rank());
        if (update.rank() != rank) { ranks[detail::exact_pattern(module, modules)] = update.rank(); }
        if (own != alpha) { alphas[detail::exact_pattern(module, modules)] = detail::json_number(own); }
    }
    config["peft_type"] = "LORA";
    config["r"] = rank;
    config["lora_alpha"] = detail::json_number(alpha);
    config["rank_pattern"] = ranks;
    config["alpha_pattern"] = alphas;
    config["use_rslora"] = false;
    config["init_lora_weights"] = true;
    config["inference_mode"] = true;
    if (config.contains("eva_config")) { config["eva_config"] = nullptr; }
    if (!config.contains("target_modules") || config["target_modules"].is_null()) {
        config["target_modules"] = modules;
        config["layers_to_transform"] = nullptr;
        config["layers_pattern"] = nullptr;
    }
    return config;
}

/// The shapes of stored factors: r×in and out×r; of a convolution r×in×kernel and out×r×1…, its `in` without the kernel
/// that the update's counts. Throws shape_mismatch for a kernel that is no divisor of the update's inputs.
template <arithmetic_element T>
[[nodiscard]] std::pair<extents, extents> factor_shapes(
    const lora_update<T>& update, const extents& kernel, std::string_view module)
{
    std::int64_t cells = 1;
    for (const auto side : kernel) { cells *= side; }
    const auto in = static_cast<std::int64_t>(update.in()), rank = static_cast<std::int64_t>(update.rank());
    if (cells < 1 || in % cells != 0) {
        raise<shape_mismatch>(error_code::adapter_shape,
            message("module '", module, "' has ", in, " inputs, which its kernel of ", to_string(kernel),
                " does not divide"));
    }
    extents a{rank, in / cells}, b{static_cast<std::int64_t>(update.out()), rank};
    a.insert(a.end(), kernel.begin(), kernel.end());
    b.insert(b.end(), kernel.size(), 1);
    return {std::move(a), std::move(b)};
}

/// How write_peft() stores factors and writes files.
struct peft_write_options {
    std::optional<dtype> output{}; ///< dtype of all factors; empty: as `stored` says
    durability mode = durability::synchronised; ///< how hard the files are forced to disk
    overflow on_overflow = overflow::error; ///< a factor that its dtype cannot hold
};

/// The two files of an adapter, complete and on disk under temporary names, which take their own on commit(): what
/// write_peft() does, for those who have something to do between the two.
///
///     peft_writer out("adapter-r8", adapter);
///     …
///     out.commit();
class peft_writer {
public:
    /// Throws like write_peft().
    template <arithmetic_element T>
    peft_writer(
        const std::filesystem::path& directory, const peft_adapter<T>& adapter, const peft_write_options& options = {});

    /// Gives the files their names. `obsolete`: names of files that go as they come.
    void commit(const std::vector<std::string>& obsolete = {})
    {
        model_->commit();
        settings_->commit();
        folder_->commit(obsolete);
    }
    /// Where the files are written until commit(): for what is to lie beside them.
    [[nodiscard]] const std::filesystem::path& folder() const noexcept { return folder_->path(); }
    /// Bytes of both files.
    [[nodiscard]] std::uint64_t file_size() const noexcept { return size_; }
    /// Entries of factors that became the largest number of their dtype (overflow::saturate).
    [[nodiscard]] std::uint64_t saturated() const noexcept { return saturated_; }

private:
    std::optional<output_directory> folder_; // before the files in it, so that it outlives them
    std::optional<safetensors_writer> model_;
    std::optional<atomic_file> settings_;
    std::uint64_t size_ = 0, saturated_ = 0;
};

/// Writes an adapter directory that PEFT loads and that gives the same updates (once rounded to the stored dtype). A
/// directory that does not exist appears whole or not at all; one that does is exchanged for one with both new files,
/// in one step where the system can (see output_directory), otherwise the two files are replaced once both are
/// complete, the configuration last. Throws invalid_argument (no module, a rank of 0), dtype_mismatch, nonfinite_error
/// where a factor overflows its dtype, io_error.
///
///     write_peft("adapter-r8", adapter);
template <arithmetic_element T>
void write_peft(
    const std::filesystem::path& directory, const peft_adapter<T>& adapter, const peft_write_options& options = {})
{
    peft_writer(directory, adapter, options).commit();
}

template <arithmetic_element T>
peft_writer::peft_writer(
    const std::filesystem::path& directory, const peft_adapter<T>& adapter, const peft_write_options& options)
{
    if (adapter.updates.empty()) {
        raise<invalid_argument>(error_code::inputs_empty,
            message("'", directory.string(), "': an adapter without a module cannot be written"));
    }
    std::vector<tensor_spec> specs;
    std::vector<std::vector<std::byte>> buffers;
    const auto add = [&](std::string name, const matrix<T>& x, dtype type, extents shape) {
        auto& bytes = buffers.emplace_back();
        visit_storage(type, name, [&]<class S>(std::type_identity<S>) {
            bytes.resize(x.size() * sizeof(S));
            for (std::size_t i = 0; i < x.rows(); ++i) {
                for (std::size_t j = 0; j < x.cols(); ++j) {
                    const S value = narrow_within<S>(x(i, j), options.on_overflow, saturated_, [&] {
                        raise<nonfinite_error>(error_code::result_overflow,
                            message("factor '", name, "' holds ", static_cast<double>(x(i, j)), " at index ",
                                i * x.cols() + j, ", which ", to_string(type), " cannot; ",
                                detail::if_narrow<S>("choose a wider dtype for the adapter, or "),
                                "let it saturate or propagate (overflow)"));
                    });
                    std::memcpy(bytes.data() + (i * x.cols() + j) * sizeof(S), &value, sizeof(S));
                }
            }
        });
        specs.push_back({std::move(name), type, std::move(shape)});
    };
    for (const auto& [module, update] : adapter.updates) {
        check_update(update, module);
        if (update.rank() == 0) {
            raise<invalid_argument>(
                error_code::rank_out_of_range, message("module '", module, "' has rank 0; PEFT has no such adapter"));
        }
        const auto place = adapter.stored.find(module);
        const dtype type = options.output.value_or(place == adapter.stored.end() ? dtype_of<T> : place->second);
        const bool embedding = adapter.embeddings.contains(module);
        const std::string stem = std::string(peft_prefix) + module;
        const auto kernel = adapter.kernels.find(module);
        auto [a_shape, b_shape] =
            factor_shapes(update, kernel == adapter.kernels.end() ? extents() : kernel->second, module);
        add(stem + (embedding ? ".lora_embedding_A" : ".lora_A.weight"), update.a, type, std::move(a_shape));
        add(stem + (embedding ? ".lora_embedding_B" : ".lora_B.weight"), update.b, type, std::move(b_shape));
    }
    const std::string config = peft_config(adapter).dump(2) + "\n";

    folder_.emplace(directory, options.mode, existing_directory::exchange);
    std::vector<tensor_spec> all = specs;
    for (const auto& [name, tensor] : adapter.others) {
        all.push_back({std::string(peft_prefix) + name, tensor.dtype, tensor.shape});
    }
    auto& model = model_.emplace(folder_->path() / peft_model_name, all, metadata_map{}, options.mode);
    for (std::size_t i = 0; i < buffers.size(); ++i) { model.write(i, 0, buffers[i].data(), buffers[i].size()); }
    std::size_t index = buffers.size();
    for (const auto& [name, tensor] : adapter.others) {
        model.write(index++, 0, tensor.bytes.data(), tensor.bytes.size());
    }
    auto& settings = settings_.emplace(folder_->path() / peft_config_name, config.size(), options.mode);
    settings.write(0, config.data(), config.size());
    model.finish();
    settings.finish();
    size_ = model.file_size() + config.size();
}

} // namespace taskvec::inline TASKVEC_ABI
