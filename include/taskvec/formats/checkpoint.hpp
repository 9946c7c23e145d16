// Checkpoints: one safetensors file, or a directory of shards with its index, read and written as one model.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/callback.hpp>
#include <taskvec/formats/pytorch.hpp>
#include <taskvec/formats/quantised.hpp>
#include <taskvec/formats/safetensors.hpp>
#include <taskvec/formats/system.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The file names of a checkpoint directory.
inline constexpr std::string_view single_file_name = "model.safetensors";
/// Of the index of a sharded checkpoint.
inline constexpr std::string_view index_file_name = "model.safetensors.index.json";

/// What the names of a checkpoint's files begin with: transformers', and diffusers'. Where a directory holds both, the
/// first is the model.
inline constexpr std::string_view model_stems[] = {"model", "diffusion_pytorch_model"};

/// Whether the tensors of shards have to be those that their index gives them.
enum class index_check : std::uint8_t {
    strict, ///< each of them, and no other
    lenient ///< what is there counts, as for transformers: a note says what differs
};

/// A model on disk: the maps of its files, and the tensors in them by name. Move-only; views stay valid when it moves.
class checkpoint {
public:
    /// `take`: which tensors of which file (by its place in `files`) the model has; all, where it is empty. `absent`:
    /// names that its index lists and no file has.
    checkpoint(std::filesystem::path path, std::vector<safetensors_file> files,
        const callback<bool(std::size_t, const safetensors_entry&)>& take = {}, std::vector<std::string> notes = {},
        std::vector<std::string> absent = {})
        : path_(std::move(path))
        , files_(std::move(files))
        , notes_(std::move(notes))
        , absent_(std::move(absent))
    {
        struct item {
            const safetensors_file* file;
            const safetensors_entry* entry;
        };
        std::vector<item> sorted;
        for (std::size_t f = 0; f < files_.size(); ++f) {
            const auto& file = files_[f];
            for (const auto& entry : file.entries()) {
                if (take && !take(f, entry)) { continue; }
                sorted.push_back({&file, &entry});
                data_bytes_ += entry.bytes;
            }
            metadata_.insert(file.metadata().begin(), file.metadata().end());
        }
        std::sort(
            sorted.begin(), sorted.end(), [](const item& a, const item& b) { return a.entry->name < b.entry->name; });
        for (std::size_t i = 0; i < sorted.size(); ++i) {
            if (i && sorted[i].entry->name == sorted[i - 1].entry->name) {
                raise<format_error>(error_code::file_tensors,
                    message("tensor '", sorted[i].entry->name, "' is in this file and in '",
                        sorted[i - 1].file->path().string(), "'"),
                    sorted[i].file->path().string());
            }
            model_.insert(sorted[i].entry->name, sorted[i].file->tensor(*sorted[i].entry));
        }
    }

    /// What open_model() was given.
    [[nodiscard]] const std::filesystem::path& path() const& noexcept { return path_; }
    [[nodiscard]] std::filesystem::path path() && { return path_; }
    /// The mapped files, in the order of their names.
    [[nodiscard]] const std::vector<safetensors_file>& files() const& noexcept { return files_; }
    void files() const&& = delete; // name the owner first: its views would dangle
    /// All tensors as they are stored, views into the files.
    [[nodiscard]] const const_model_ref& model() const& noexcept { return model_; }
    void model() const&& = delete; // name the owner first: its views would dangle
    /// The files' metadata; of a key in several shards, the first shard's value.
    [[nodiscard]] const metadata_map& metadata() const& noexcept { return metadata_; }
    [[nodiscard]] metadata_map metadata() && { return std::move(metadata_); }
    /// Bytes of all tensors.
    [[nodiscard]] std::uint64_t data_bytes() const noexcept { return data_bytes_; }
    /// What whoever opened it should know: sentences without a full stop.
    [[nodiscard]] const std::vector<std::string>& notes() const& noexcept { return notes_; }
    void notes() const&& = delete; // name the owner first: the reference would dangle
    /// Tensors that its index lists and no file has: none, unless it was opened leniently.
    [[nodiscard]] const std::vector<std::string>& absent() const noexcept { return absent_; }
    /// The same files under other names, or with other views into them: what `model` holds must outlive the checkpoint
    /// (views of its own files do).
    void set_model(const_model_ref model) { model_ = std::move(model); }
    /// Makes model() have quantised layers as tensors of numbers (formats/quantised.hpp). stored() keeps what the files
    /// hold. open_model() has done so.
    void read_layers(quantised_layers::hint_source hints)
    {
        auto layers = std::make_shared<const quantised_layers>(model_, std::move(hints));
        if (!layers->any()) { return; }
        stored_ = std::exchange(model_, layers->model());
        layers_ = std::move(layers);
    }
    /// The tensors of the files: model(), but for quantised layers and names that were changed.
    [[nodiscard]] const const_model_ref& stored() const& noexcept { return layers_ ? stored_ : model_; }
    void stored() const&& = delete; // name the owner first: its views would dangle
    /// The quantised layers; null where no layer is.
    [[nodiscard]] const quantised_layers* layers() const& noexcept { return layers_.get(); }
    void layers() const&& = delete; // name the owner first: its views would dangle

private:
    std::filesystem::path path_;
    std::vector<safetensors_file> files_;
    std::vector<std::string> notes_, absent_;
    const_model_ref model_, stored_;
    std::shared_ptr<const quantised_layers> layers_;
    metadata_map metadata_;
    std::uint64_t data_bytes_ = 0;
};

/// Refuses a shard name that could lead out of the checkpoint's directory.
inline void check_shard_name(std::string_view shard, std::string_view index)
{
    if (shard.empty() || shard == "." || shard.find('/') != shard.npos || shard.find('\\') != shard.npos
        || shard.find("..") != shard.npos || shard.find('\0') != shard.npos) {
        raise<format_error>(error_code::index_field,
            message("names the shard '", shard,
                "'; a shard is a file beside its index, with no '/', '\\' or '..' in its name"),
            std::string(index));
    }
}

/// What an index file says: the shard of each tensor. Keys other than `weight_map` are ignored, as transformers does.
/// Throws format_error for JSON that is not an index, or names a shard outside the directory.
[[nodiscard]] inline std::map<std::string, std::string> read_index(const std::filesystem::path& path)
{
    const auto file = path.string();
    const auto json = parse_json(read_text_file(path), file);
    if (!json.is_object() || !json.contains("weight_map") || !json["weight_map"].is_object()) {
        raise<format_error>(
            error_code::index_field, "has no object 'weight_map'; an index maps each tensor's name to its shard", file);
    }
    std::map<std::string, std::string> result;
    for (const auto& [name, shard] : json["weight_map"].items()) {
        if (!shard.is_string()) {
            raise<format_error>(
                error_code::index_field, message("maps tensor '", name, "' to something that is not a string"), file);
        }
        const auto& text = shard.get_ref<const std::string&>();
        check_shard_name(text, file);
        result.emplace(name, text);
    }
    return result;
}

/// Whether a file's name is that of an index of shards: `model.safetensors.index.json`, another stem, as diffusers has
/// it, or a variant (`….safetensors.index.fp16.json`).
[[nodiscard]] inline bool is_index_name(std::string_view name)
{
    const auto at = name.find(".safetensors.index.");
    return at != name.npos && at > 0 && name.ends_with(".json");
}

/// The same for PyTorch's shards: `pytorch_model.bin.index.json`.
[[nodiscard]] inline bool is_pytorch_index_name(std::string_view name)
{
    const auto at = name.find(".bin.index.");
    return at != name.npos && at > 0 && name.ends_with(".json");
}

/// The parts of a shard's name, such as `model-00001-of-00003.safetensors`.
struct shard_name_parts {
    std::string stem, rest; ///< before the numbers, and what stands after them
    std::size_t number = 0, count = 0; ///< the two numbers
};
/// The parts of a shard's name, which ends as `ending` says; empty for a name that is none.
[[nodiscard]] inline std::optional<shard_name_parts> parse_shard_name(
    std::string_view name, std::string_view ending = ".safetensors")
{
    constexpr std::size_t digits = 5;
    constexpr std::string_view between = "-of-";
    if (!name.ends_with(ending)) { return std::nullopt; }
    for (std::size_t at = name.find('-'); at != name.npos; at = name.find('-', at + 1)) {
        const auto field = name.substr(at + 1);
        if (field.size() < 2 * digits + between.size() + ending.size()
            || field.substr(digits, between.size()) != between) {
            continue;
        }
        std::size_t values[2] = {0, 0};
        bool numbers = true;
        for (std::size_t i = 0; i < 2; ++i) {
            for (const char c : field.substr(i * (digits + between.size()), digits)) {
                numbers = numbers && c >= '0' && c <= '9';
                values[i] = 10 * values[i] + static_cast<std::size_t>(c - '0');
            }
        }
        if (!numbers || values[0] == 0 || values[0] > values[1]) { continue; }
        return shard_name_parts{std::string(name.substr(0, at)), std::string(field.substr(2 * digits + between.size())),
            values[0], values[1]};
    }
    return std::nullopt;
}

namespace detail {

/// What a directory holds that could be a model, by name.
struct model_directory {
    std::vector<std::string> indexes, weights, others, folders;
    std::error_code unreadable; ///< why it could not be looked into

    explicit model_directory(const std::filesystem::path& path)
    {
        std::error_code ignored;
        std::filesystem::directory_iterator it(path, ignored);
        unreadable = ignored;
        for (const std::filesystem::directory_iterator end; !ignored && it != end; it.increment(ignored)) {
            const auto name = it->path().filename().string();
            std::error_code unknown;
            if (it->is_directory(unknown)) { folders.push_back(name); }
            else if (is_index_name(name)) {
                indexes.push_back(name);
            }
            else if (name.ends_with(".safetensors")) {
                weights.push_back(name);
            }
            else {
                others.push_back(name);
            }
        }
        for (auto* list : {&indexes, &weights, &others, &folders}) { std::sort(list->begin(), list->end()); }
    }
};

[[nodiscard]] inline std::string quoted_list(const std::vector<std::string>& names, std::size_t most = 4)
{
    std::string text;
    for (std::size_t i = 0; i < names.size() && i < most; ++i) { text += (i ? ", '" : "'") + names[i] + "'"; }
    return names.size() > most ? text + " and " + std::to_string(names.size() - most) + " more" : text;
}

/// Whether a file's name is one that PyTorch's weights have; not what training keeps beside them.
[[nodiscard]] inline bool may_be_pytorch_weights(std::string_view name)
{
    for (const std::string_view beside : {"training_args.", "optimizer", "scheduler", "scaler", "rng_state",
             "random_states", "trainer_state", "global_step"}) {
        if (name.starts_with(beside)) { return false; }
    }
    for (const std::string_view ending : {".bin", ".pt", ".pth", ".ckpt"}) {
        if (name.ends_with(ending)) { return true; }
    }
    return false;
}

/// Whether a file's name is one that a model's weights have in another format than safetensors.
[[nodiscard]] inline bool may_be_other_weights(std::string_view name)
{
    for (const std::string_view ending : {".bin.index.json", ".gguf", ".h5", ".msgpack", ".onnx", ".pkl"}) {
        if (name.ends_with(ending)) { return true; }
    }
    return may_be_pytorch_weights(name);
}

/// The one file of a directory that PyTorch's weights may lie in, by its name and content. Nothing where there are
/// several.
[[nodiscard]] inline std::optional<std::string> only_pytorch_file(
    const std::filesystem::path& directory, const std::vector<std::string>& names)
{
    const auto first = std::find_if(names.begin(), names.end(), may_be_pytorch_weights);
    if (first == names.end() || std::find_if(first + 1, names.end(), may_be_pytorch_weights) != names.end()) {
        return std::nullopt;
    }
    std::error_code ignored;
    if (std::filesystem::file_size(directory / *first, ignored) == 0 || ignored) { return std::nullopt; }
    const mapped_file map(directory / *first);
    const auto kind = what_is_this_file(map.bytes());
    return kind && kind->what == pytorch_archive ? std::optional(*first) : std::nullopt;
}

/// Says of a directory without a model what it holds instead, and what to name.
[[noreturn]] TASKVEC_COLD inline void refuse_directory(const std::filesystem::path& path, const model_directory& found)
{
    const auto fail = [&](const std::string& what) {
        raise<io_error>(error_code::model_not_found, what, path.string());
    };
    if (found.unreadable) { raise_io(path, "cannot be read as a directory", found.unreadable.value()); }
    std::vector<std::string> inner;
    for (const auto& folder : found.folders) {
        const model_directory inside(path / folder);
        if (!inside.weights.empty() || !inside.indexes.empty()) { inner.push_back(folder); }
    }
    for (const auto& name : found.weights) {
        if (name == "adapter_model.safetensors") {
            fail("holds an adapter ('adapter_model.safetensors'), not a model: name the model that it was trained on, "
                 "or read it as an adapter");
        }
    }
    if (found.weights.size() > 1) {
        fail(message("holds no '", single_file_name, "', no index, and several files (", quoted_list(found.weights),
            "): name the file that is meant"));
    }
    std::vector<std::string> pytorch;
    std::copy_if(found.others.begin(), found.others.end(), std::back_inserter(pytorch), may_be_pytorch_weights);
    if (pytorch.size() > 1) {
        fail(message("holds no safetensors file, and several of PyTorch's (", quoted_list(pytorch),
            "): name the file that is meant"));
    }
    if (const auto other = std::find_if(found.others.begin(), found.others.end(), may_be_other_weights);
        other != found.others.end()) {
        file_kind kind{"the weights lie in files of another format", std::string(convert_to_safetensors)};
        std::error_code ignored;
        if (std::filesystem::file_size(path / *other, ignored) > 0 && !ignored && !other->ends_with(".json")) {
            const mapped_file file(path / *other);
            if (const auto known = what_is_this_file(file.bytes())) { kind = {"that is " + known->what, known->mend}; }
        }
        fail(message("holds no safetensors file, but '", *other, "': ", kind.what, "; ", kind.mend));
    }
    if (!inner.empty()) {
        fail(message("holds no model itself, but its folders do (", quoted_list(inner), "): name one of them"));
    }
    raise<io_error>(error_code::model_not_found,
        message("holds neither '", single_file_name, "' nor '", index_file_name,
            "'; name a checkpoint directory or a .safetensors file"),
        path.string());
}

/// A file of tensors: safetensors, or PyTorch's, as its first bytes say.
[[nodiscard]] inline safetensors_file open_weights(const std::filesystem::path& path, std::vector<std::string>& notes)
{
    mapped_file map(path);
    const auto bytes = map.bytes();
    constexpr std::string_view zip = "PK\x03\x04";
    if (bytes.size() < zip.size() || std::memcmp(bytes.data(), zip.data(), zip.size()) != 0) {
        auto header = parse_safetensors(bytes, path.string());
        return {std::move(map), std::move(header)};
    }
    auto contents = parse_pytorch(bytes, path.string());
    std::error_code unknown;
    auto rows = lay_out_rows(contents, bytes, path.string(), std::filesystem::temp_directory_path(unknown));
    notes.insert(notes.end(), contents.notes.begin(), contents.notes.end());
    return {std::move(map), std::move(contents.header), std::move(rows)};
}

/// Shards of the set that an index's shards belong to (by stem, count, and what stands after the numbers) that it does
/// not name: `listed` has those that it does.
[[nodiscard]] inline std::vector<std::string> shards_beside(
    const std::filesystem::path& directory, const std::map<std::string_view, std::size_t>& listed)
{
    std::vector<std::string> found;
    const std::string_view first = listed.empty() ? std::string_view() : listed.begin()->first;
    for (const std::string_view ending : {".safetensors", ".bin"}) {
        const auto set = parse_shard_name(first, ending);
        if (!set) { continue; }
        std::error_code ignored;
        std::filesystem::directory_iterator it(directory, ignored);
        for (const std::filesystem::directory_iterator end; !ignored && it != end; it.increment(ignored)) {
            auto name = it->path().filename().string();
            const auto parts = parse_shard_name(name, ending);
            if (parts && parts->stem == set->stem && parts->rest == set->rest && parts->count == set->count
                && !listed.contains(name)) {
                found.push_back(std::move(name));
            }
        }
    }
    std::sort(found.begin(), found.end());
    return found;
}

/// The shards that an index names, beside it.
[[nodiscard]] inline checkpoint open_indexed(
    const std::filesystem::path& path, const std::filesystem::path& index_path, index_check how)
{
    const auto directory = directory_of(index_path);
    const auto index_name = index_path.filename().string();
    const auto index = read_index(index_path);
    const bool strict = how == index_check::strict;
    std::vector<safetensors_file> files;
    std::vector<std::string> names, notes, absent;
    std::map<std::string_view, std::size_t> expected;
    for (const auto& [name, shard] : index) { ++expected[shard]; }
    std::error_code ignored;
    for (const auto& [shard, count] : expected) {
        if (!std::filesystem::exists(directory / shard, ignored)) {
            const auto what = message("the shard '", shard, "' of '", index_name, "', with ", count,
                count == 1 ? " tensor" : " tensors", ", is not there");
            if (strict) {
                raise<io_error>(error_code::file_not_found,
                    message(what, ": fetch it, or go on without it (index_check::lenient; the tool: --index lenient)"),
                    path.string());
            }
            notes.push_back(message("'", path.string(), "': ", what));
            for (const auto& [name, where] : index) {
                if (where == shard) { absent.push_back(name); }
            }
            continue;
        }
        auto& file = files.emplace_back(open_weights(directory / shard, notes));
        names.emplace_back(shard);
        std::map<std::string_view, bool> present;
        for (const auto& entry : file.entries()) {
            const auto place = index.find(entry.name);
            present[entry.name] = true;
            if (place != index.end() && place->second == shard) { continue; }
            const auto what = message("holds tensor '", entry.name, "', which '", index_name, "' ",
                place == index.end() ? std::string("does not list") : "places in '" + place->second + "'");
            if (strict) {
                raise<format_error>(error_code::file_tensors,
                    what + " (index_check::lenient goes on; in the tool, --index lenient)", file.path().string());
            }
            notes.push_back(message("'", file.path().string(), "' ", what,
                place == index.end() ? ": it is taken" : ": the one there is taken"));
        }
        for (const auto& [name, where] : index) {
            if (where != shard || present.contains(name)) { continue; }
            const auto what = message("lacks tensor '", name, "', which '", index_name, "' places there");
            if (strict) {
                raise<format_error>(error_code::file_tensors,
                    what + " (index_check::lenient goes on; in the tool, --index lenient)", file.path().string());
            }
            notes.push_back(message("'", file.path().string(), "' ", what));
            absent.push_back(name);
        }
    }
    for (const auto& shard : shards_beside(directory, expected)) {
        const auto what = message("does not list the shard '", shard, "' of the same set, which lies beside it");
        if (strict) {
            raise<format_error>(error_code::file_tensors,
                message(what,
                    ": fetch the index again, or take its tensors too (index_check::lenient; the tool: "
                    "--index lenient)"),
                index_path.string());
        }
        notes.push_back(message("'", index_path.string(), "' ", what, ": its tensors are taken"));
        files.push_back(open_weights(directory / shard, notes));
        names.push_back(shard);
    }
    const auto take = [&](std::size_t f, const safetensors_entry& entry) {
        const auto place = index.find(entry.name);
        return place == index.end() || place->second == names[f];
    };
    return {path, std::move(files), take, std::move(notes), std::move(absent)};
}

} // namespace detail

/// The hints of the configuration beside a model, or of ModelOpt's `hf_quant_config.json` where that says nothing.
[[nodiscard]] inline quantised_layers::hint_source hints_beside(const std::filesystem::path& model)
{
    return [model] {
        std::error_code unknown;
        const auto folder = std::filesystem::is_directory(model, unknown) ? model : detail::directory_of(model);
        auto hints = read_quantisation_hints(folder / "config.json");
        return hints.file.empty() ? read_quantisation_hints(folder / "hf_quant_config.json") : hints;
    };
}

/// Opens a model: a safetensors file; an index of shards (any `*.safetensors.index.json`); or a directory. Of what a
/// directory holds, the first of these is the model: `model.safetensors`; `model.safetensors.index.json`; diffusers'
/// `diffusion_pytorch_model` in the same two ways; the only index; a whole set of shards without one (with a note); the
/// only .safetensors file that is neither a delta nor an adapter; where there are none, `pytorch_model.bin` or its
/// index, diffusers', and a whole set of such shards. PyTorch's files are read as formats/pytorch.hpp says, whatever
/// they are called. An index is an allowlist: shards hold exactly the tensors that it gives them, unless `how` is
/// lenient. Quantised layers are tensors of numbers in model() where their scheme is read, and are found in
/// layers()->unread() where it is not. Throws io_error, format_error. Cost: O(headers), and the scales of quantised
/// layers.
///
///     const auto base = taskvec::open_model("base");
///     for (const auto& [name, tensor] : base.model()) { … }
[[nodiscard]] checkpoint open_model(const std::filesystem::path& path, index_check how = index_check::strict);

namespace detail {
[[nodiscard]] inline checkpoint open_stored(const std::filesystem::path& path, index_check how)
{
    std::error_code ignored;
    std::vector<safetensors_file> files;
    const auto single = [&](const std::filesystem::path& file, std::vector<std::string> notes = {}) -> checkpoint {
        files.push_back(detail::open_weights(file, notes));
        return {path, std::move(files), {}, std::move(notes)};
    };
    if (!std::filesystem::is_directory(path, ignored)) {
        const auto name = path.filename().string();
        if (is_index_name(name) || is_pytorch_index_name(name)) { return detail::open_indexed(path, path, how); }
        std::vector<std::string> notes;
        if (const auto parts = parse_shard_name(name); parts && parts->count > 1) {
            notes.push_back(message("'", path.string(), "' is shard ", parts->number, " of ", parts->count,
                ": its directory or its index names the whole model"));
        }
        return single(path, std::move(notes));
    }
    const auto has = [&](std::string_view name) { return std::filesystem::exists(path / name, ignored); };
    for (const std::string_view stem : model_stems) {
        const std::string file = std::string(stem) + ".safetensors", index = file + ".index.json";
        if (has(file)) { return single(path / file); }
        if (has(index)) { return detail::open_indexed(path, path / index, how); }
    }
    const detail::model_directory found(path);
    if (found.indexes.size() == 1) { return detail::open_indexed(path, path / found.indexes.front(), how); }
    if (found.indexes.size() > 1) {
        raise<io_error>(error_code::model_not_found,
            message("holds several indexes (", detail::quoted_list(found.indexes),
                "): name the one that is meant, by its path"),
            path.string());
    }
    using shard_sets = std::map<std::pair<std::string, std::size_t>, std::vector<std::string>>;
    const auto whole_set = [&](const shard_sets& sets) -> checkpoint {
        const auto& [key, names] = *sets.begin();
        if (names.size() != key.second) {
            raise<io_error>(error_code::file_not_found,
                message("holds ", names.size(), " of ", key.second, " shards (", detail::quoted_list(names),
                    ") and no index: fetch the others"),
                path.string());
        }
        std::vector<std::string> notes{
            message("'", path.string(), "' holds no index: all ", names.size(), " shards are taken")};
        for (const auto& name : names) { files.push_back(detail::open_weights(path / name, notes)); }
        return {path, std::move(files), {}, std::move(notes)};
    };
    shard_sets sets; // shards by stem, rest and count
    std::vector<std::string> whole;
    for (const auto& name : found.weights) {
        if (const auto parts = parse_shard_name(name)) {
            sets[{parts->stem + " " + parts->rest, parts->count}].push_back(name);
        }
        else if (!name.ends_with(".delta.safetensors") && name != "adapter_model.safetensors") {
            whole.push_back(name);
        }
    }
    if (sets.size() == 1 && whole.empty()) { return whole_set(sets); }
    if (whole.size() == 1 && sets.empty()) { return single(path / whole.front()); }
    if (whole.empty() && sets.empty()) {
        for (const std::string_view stem : {"pytorch_model", "diffusion_pytorch_model"}) {
            const std::string file = std::string(stem) + ".bin", index = file + ".index.json";
            if (has(file)) { return single(path / file); }
            if (has(index)) { return detail::open_indexed(path, path / index, how); }
        }
        for (const auto& name : found.others) {
            if (const auto parts = parse_shard_name(name, ".bin")) {
                sets[{parts->stem + " " + parts->rest, parts->count}].push_back(name);
            }
        }
        if (sets.size() == 1) { return whole_set(sets); }
        if (const auto file = detail::only_pytorch_file(path, found.others); sets.empty() && file) {
            return single(path / *file,
                {message("'", path.string(), "' holds no safetensors file: '", *file, "' is taken, its only weights")});
        }
    }
    detail::refuse_directory(path, found);
}
} // namespace detail

inline checkpoint open_model(const std::filesystem::path& path, index_check how)
{
    auto model = detail::open_stored(path, how);
    model.read_layers([&] {
        auto hints = hints_beside(path)();
        hints.absent = model.absent();
        const auto formats = model.metadata().find(std::string(comfy_metadata_key));
        if (formats != model.metadata().end()) { hints.formats = detail::comfy_formats(formats->second); }
        return hints;
    });
    return model;
}

/// How a model is split into shards: for each tensor its shard, tensors taken in name order, a new shard begun when the
/// next tensor would take the current one above `shard_size` bytes of data (a larger tensor has a shard of its own).
struct shard_plan {
    std::vector<std::size_t> shard_of; ///< for each spec
    std::size_t shards = 0; ///< how many there are
    std::uint64_t total_bytes = 0; ///< of all tensors
};
/// Splits tensors into shards of at most `shard_size` bytes, as shard_plan says.
[[nodiscard]] inline shard_plan plan_shards(const std::vector<tensor_spec>& specs, std::uint64_t shard_size)
{
    if (shard_size == 0) {
        raise<invalid_argument>(error_code::parameter_out_of_range, "a shard size of 0 bytes; expected at least 1");
    }
    std::vector<std::size_t> order(specs.size());
    for (std::size_t i = 0; i < order.size(); ++i) { order[i] = i; }
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return specs[a].name < specs[b].name; });
    shard_plan plan;
    plan.shard_of.resize(specs.size());
    plan.shards = 1;
    std::uint64_t held = 0;
    for (const auto index : order) {
        const std::uint64_t bytes = specs[index].bytes();
        if (held && bytes > shard_size - std::min(held, shard_size)) {
            ++plan.shards;
            held = 0;
        }
        plan.shard_of[index] = plan.shards - 1;
        held += bytes;
        plan.total_bytes += bytes;
    }
    return plan;
}

namespace detail {
/// The tensors of each shard. `place` receives the place of each tensor in its shard.
[[nodiscard]] inline std::vector<std::vector<tensor_spec>> tensors_of_shards(
    const shard_plan& plan, const std::vector<tensor_spec>& specs, std::vector<std::size_t>& place)
{
    std::vector<std::vector<tensor_spec>> parts(plan.shards);
    place.resize(specs.size());
    for (std::size_t i = 0; i < specs.size(); ++i) {
        auto& part = parts[plan.shard_of[i]];
        place[i] = part.size();
        part.push_back(specs[i]);
    }
    return parts;
}
[[nodiscard]] inline std::string lines_of(const std::vector<std::string>& names)
{
    std::string text;
    for (const auto& name : names) { text += name + '\n'; }
    return text;
}
} // namespace detail

/// The files of the model that a directory holds, as far as its index can be read; PyTorch's are not looked for.
/// Throws format_error for an index that cannot be read.
[[nodiscard]] inline std::vector<std::string> model_files_in(const std::filesystem::path& directory)
{
    std::vector<std::string> result;
    std::error_code ignored;
    for (const std::string_view stem : model_stems) {
        const std::string single = std::string(stem) + ".safetensors", index = single + ".index.json";
        if (std::filesystem::exists(directory / single, ignored)) { result.push_back(single); }
        if (!std::filesystem::exists(directory / index, ignored)) { continue; }
        for (const auto& [name, shard] : read_index(directory / index)) {
            if (std::find(result.begin(), result.end(), shard) == result.end()) { result.push_back(shard); }
        }
        result.push_back(index);
    }
    return result;
}

/// The shards that a killed writer gave their names in a directory before their index had its own: what it noted in the
/// lock, less what an index of the directory names by now. Throws format_error for an index that cannot be read.
[[nodiscard]] inline std::vector<std::string> orphan_shards(
    const std::filesystem::path& directory, const directory_lock& lock)
{
    std::vector<std::string> result;
    const std::string text = lock.noted();
    if (text.empty()) { return result; }
    const auto present = model_files_in(directory);
    for (std::size_t at = 0, end = 0; (end = text.find('\n', at)) != text.npos; at = end + 1) {
        auto name = text.substr(at, end - at);
        const bool of_a_model = std::any_of(std::begin(model_stems), std::end(model_stems),
                                    [&](std::string_view stem) { return name.starts_with(std::string(stem) + "-"); })
            && name.ends_with(".safetensors") && name.find('/') == name.npos;
        if (of_a_model && std::find(present.begin(), present.end(), name) == present.end()) {
            result.push_back(std::move(name));
        }
    }
    return result;
}

/// Writes a checkpoint directory: `model-00001-of-000NN.safetensors` … and their index, or `model.safetensors` when one
/// shard is enough. A directory that does not exist appears whole or not at all; in one that does, other files are left
/// alone.
///
/// All shards are complete and on disk under temporary names before the first takes its own; the index (or the single
/// file) takes its name last, and is what decides which model the directory holds. Where a shard's name is taken, by
/// an earlier model in the same directory, the new one is called `model-00001-of-000NN-2.safetensors` and so on, so a
/// crash at any moment leaves the earlier model whole or the new one. Once the new one stands, the earlier one's files
/// are removed, and where a writer is killed before, its own are by the next. As many files are open as are written to
/// at once. One writer at a time has an existing directory: a second one throws io_error (see directory_lock).
///
///     taskvec::sharded_writer out("merged", specs, 5'000'000'000);
///     out.write(index, offset, data, size);
///     out.commit();
class sharded_writer final : public tensor_sink {
public:
    /// `existing`: whether a directory that is there is exchanged for one with the new files and all others, so that
    /// what else is written to folder() changes with them. `finished`: where all shards lie already, in order, for
    /// instance by resumable_shards; then nothing is to be written. `stem`: one of model_stems, for the names.
    sharded_writer(std::filesystem::path directory, const std::vector<tensor_spec>& specs, std::uint64_t shard_size,
        const metadata_map& metadata = {}, durability mode = durability::synchronised,
        existing_directory existing = existing_directory::fill, const std::vector<std::filesystem::path>& finished = {},
        std::string_view stem = model_stems[0])
        : directory_(std::move(directory))
        , stem_(stem)
        , mode_(mode)
        , plan_(plan_shards(specs, shard_size))
    {
        const auto parts = detail::tensors_of_shards(plan_, specs, place_);
        for (const auto& part : parts) {
            (void)layout_safetensors(part, metadata);
        } // whatever is wrong with the specs is wrong before a directory appears
        (void)present_files(); // an index that cannot be read is refused before anything is written
        folder_.emplace(directory_, mode, existing); // from here on nobody else takes names in the directory
        old_ = present_files();
        if (const auto* const lock = folder_->lock()) {
            for (const auto& name : orphan_shards(directory_, *lock)) {
                detail::system::remove_file(directory_ / name);
            }
        }
        const std::size_t generation = plan_.shards == 1 ? 1 : free_generation();
        for (std::size_t i = 0; i < parts.size(); ++i) {
            names_.push_back(plan_.shards == 1 ? single_name() : shard_name(i, generation));
        }
        for (std::size_t i = 0; i < parts.size(); ++i) {
            auto path = folder_->path() / names_[i];
            writers_.push_back(finished.empty()
                    ? std::make_unique<safetensors_writer>(std::move(path), parts[i], metadata, mode)
                    : std::make_unique<safetensors_writer>(std::move(path), parts[i], metadata, mode, finished.at(i)));
            if (parts.size() > 1) { writers_.back()->open_on_demand(); }
        }
        if (plan_.shards > 1) {
            std::string json = "{\n  \"metadata\": {\n    \"total_size\": " + std::to_string(plan_.total_bytes)
                + "\n  },\n  \"weight_map\": {";
            std::map<std::string_view, std::size_t> by_name;
            for (std::size_t i = 0; i < specs.size(); ++i) { by_name[specs[i].name] = plan_.shard_of[i]; }
            if (by_name.size() != specs.size()) {
                raise<invalid_argument>(
                    error_code::tensor_repeated, "a tensor's name occurs twice in the model to be written");
            }
            for (const auto& [name, shard] : by_name) {
                json +=
                    (json.back() == '{' ? "\n    " : ",\n    ") + json_string(name) + ": " + json_string(names_[shard]);
            }
            json += "\n  }\n}\n";
            index_ = std::make_unique<atomic_file>(folder_->path() / index_name(), json.size(), mode);
            index_->write(0, json.data(), json.size());
        }
    }
    sharded_writer(const sharded_writer&) = delete;
    sharded_writer& operator=(const sharded_writer&) = delete;
    ~sharded_writer() override
    {
        // Shards that took their names before a failure belong to no index.
        for (const auto& path : unlisted_) {
            detail::system::remove_file(path);
            detail::temporaries::drop(path);
        }
    }

    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        if (index >= place_.size()) {
            raise<invalid_argument>(
                error_code::index_out_of_range, message("a write to tensor ", index, " of ", place_.size()));
        }
        writers_[plan_.shard_of[index]]->write(place_[index], offset, data, size);
    }

    /// Forces all files to disk, so that commit() only renames.
    void finish()
    {
        for (auto& writer : writers_) { writer->finish(); }
        if (index_) { index_->finish(); }
    }
    /// Gives the files their names; see above for the order.
    void commit()
    {
        finish();
        // Once the index, or the single file, has its name nothing may fail, memory included.
        const bool in_place = folder_->made().empty();
        std::vector<std::string> obsolete;
        for (const auto& name : old_) {
            // An index that somebody else wrote may name any file: only what is called a model's is removed.
            const bool of_a_model = is_index_name(name) || name.ends_with(".safetensors");
            if (of_a_model && std::find(names_.begin(), names_.end(), name) == names_.end()
                && !(index_ && name == index_name())) {
                obsolete.push_back(name);
            }
        }
        std::vector<std::filesystem::path> superseded;
        for (const auto& name : obsolete) { superseded.push_back(directory_ / name); }
        if (index_ && in_place) {
            for (const auto& writer : writers_) { unlisted_.push_back(writer->target()); }
            if (auto* const lock = folder_->lock()) {
                lock->note(detail::lines_of(names_));
                // Also after a power cut the lock is there before the first of the names.
                if (mode_ == durability::synchronised) { detail::synchronise_directory(folder_->path()); }
            }
            for (const auto& path : unlisted_) { detail::temporaries::add(path); }
        }
        for (auto& writer : writers_) { writer->commit(false); }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(folder_->path()); }
        if (index_) { index_->commit(); }
        for (const auto& path : unlisted_) { detail::temporaries::drop(path); }
        unlisted_.clear();
        folder_->commit(obsolete);
        if (!in_place) { return; }
        for (const auto& path : superseded) { detail::system::remove_file(path); }
        // `model.safetensors` comes before an index when a directory is opened, and both before diffusers' files: with
        // them gone, the new model takes effect.
        for (const auto& name : opened_before()) {
            if (detail::system::status status; detail::system::look_at_link(directory_ / name, status)) {
                raise<io_error>(error_code::system_refused,
                    "is an earlier model's and cannot be removed: the new model lies beside it, whole, and takes "
                    "effect once this file is gone",
                    (directory_ / name).string());
            }
        }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(directory_); }
    }

    /// Where the files are written until commit(): for what is to lie beside them.
    [[nodiscard]] const std::filesystem::path& folder() const noexcept { return folder_->path(); }
    /// The files' names, in shard order.
    [[nodiscard]] const std::vector<std::string>& names() const noexcept { return names_; }
    /// The shards' temporary names, for whoever reads them back between finish() and commit().
    [[nodiscard]] std::vector<std::filesystem::path> shard_temporaries() const
    {
        std::vector<std::filesystem::path> result;
        for (const auto& writer : writers_) { result.push_back(writer->temporary()); }
        return result;
    }
    /// All temporary files, and before them the directories that were made for them, for whoever must remove them when
    /// no destructor can run.
    [[nodiscard]] std::vector<std::filesystem::path> temporaries() const
    {
        auto result = folder_->made();
        if (auto lock = folder_->lock_file(); !lock.empty()) { result.push_back(std::move(lock)); }
        const auto shards = shard_temporaries();
        result.insert(result.end(), shards.begin(), shards.end());
        if (index_) { result.push_back(index_->temporary()); }
        return result;
    }
    /// Bytes of all shards together.
    [[nodiscard]] std::uint64_t file_size() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& writer : writers_) { total += writer->file_size(); }
        return total;
    }

private:
    [[nodiscard]] std::string shard_name(std::size_t index, std::size_t generation) const
    {
        const auto padded = [](std::size_t number) {
            const auto digits = std::to_string(number);
            return std::string(digits.size() < 5 ? 5 - digits.size() : 0, '0') + digits;
        };
        return stem_ + "-" + padded(index + 1) + "-of-" + padded(plan_.shards)
            + (generation > 1 ? "-" + std::to_string(generation) : "") + ".safetensors";
    }
    /// The first generation none of whose shard names is taken.
    [[nodiscard]] std::size_t free_generation() const
    {
        std::error_code ignored;
        for (std::size_t generation = 1;; ++generation) {
            bool taken = false;
            for (std::size_t i = 0; i < plan_.shards && !taken; ++i) {
                taken = std::filesystem::exists(directory_ / shard_name(i, generation), ignored);
            }
            if (!taken) { return generation; }
        }
    }
    [[nodiscard]] std::vector<std::string> present_files() const { return model_files_in(directory_); }
    [[nodiscard]] std::string single_name() const { return stem_ + ".safetensors"; }
    [[nodiscard]] std::string index_name() const { return single_name() + ".index.json"; }
    /// What open_model() would take in place of what is written here.
    [[nodiscard]] std::vector<std::string> opened_before() const
    {
        std::vector<std::string> names;
        for (const std::string_view stem : model_stems) {
            const std::string single = std::string(stem) + ".safetensors";
            if (stem == stem_) {
                if (index_) { names.push_back(single); }
                break;
            }
            names.push_back(single);
            names.push_back(single + ".index.json");
        }
        return names;
    }

    std::filesystem::path directory_;
    std::string stem_;
    std::optional<output_directory> folder_; // before the files in it, so that it outlives them
    durability mode_;
    shard_plan plan_;
    std::vector<std::size_t> place_; // of each tensor within its shard
    std::vector<std::string> names_, old_; // the new files, and those of the model that they replace
    std::vector<std::filesystem::path> unlisted_; // shards with their names whose index has not taken its own
    std::vector<std::unique_ptr<safetensors_writer>> writers_;
    std::unique_ptr<atomic_file> index_;
};

} // namespace taskvec::inline TASKVEC_ABI
