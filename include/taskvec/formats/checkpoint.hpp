// Checkpoints: one safetensors file, or a directory of shards with its index, read and written as one model.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/safetensors.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
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
inline constexpr std::string_view index_file_name = "model.safetensors.index.json";

/// A model on disk: the maps of its files, and the tensors in them by name. Move-only; views stay valid when it moves.
class checkpoint {
public:
    checkpoint(std::filesystem::path path, std::vector<safetensors_file> files)
        : path_(std::move(path))
        , files_(std::move(files))
    {
        struct item {
            const safetensors_file* file;
            const safetensors_entry* entry;
        };
        std::vector<item> sorted;
        for (const auto& file : files_) {
            for (const auto& entry : file.entries()) { sorted.push_back({&file, &entry}); }
            metadata_.insert(file.metadata().begin(), file.metadata().end());
            data_bytes_ += file.data_bytes();
        }
        std::sort(
            sorted.begin(), sorted.end(), [](const item& a, const item& b) { return a.entry->name < b.entry->name; });
        for (std::size_t i = 0; i < sorted.size(); ++i) {
            if (i && sorted[i].entry->name == sorted[i - 1].entry->name) {
                raise<format_error>(message("tensor '", sorted[i].entry->name, "' is in this file and in '",
                                        sorted[i - 1].file->path().string(), "'"),
                    sorted[i].file->path().string());
            }
            model_.insert(sorted[i].entry->name, sorted[i].file->tensor(*sorted[i].entry));
        }
    }

    /// What open_model() was given.
    [[nodiscard]] const std::filesystem::path& path() const& noexcept { return path_; }
    [[nodiscard]] std::filesystem::path path() && { return path_; }
    [[nodiscard]] const std::vector<safetensors_file>& files() const& noexcept { return files_; }
    void files() const&& = delete; // name the owner first: its views would dangle
    [[nodiscard]] const const_model_ref& model() const& noexcept { return model_; }
    void model() const&& = delete; // name the owner first: its views would dangle
    /// The files' metadata; of a key in several shards, the first shard's value.
    [[nodiscard]] const metadata_map& metadata() const& noexcept { return metadata_; }
    [[nodiscard]] metadata_map metadata() && { return std::move(metadata_); }
    /// Bytes of all tensors.
    [[nodiscard]] std::uint64_t data_bytes() const noexcept { return data_bytes_; }

private:
    std::filesystem::path path_;
    std::vector<safetensors_file> files_;
    const_model_ref model_;
    metadata_map metadata_;
    std::uint64_t data_bytes_ = 0;
};

/// Refuses a shard name that could lead out of the checkpoint's directory.
inline void check_shard_name(std::string_view shard, std::string_view index)
{
    if (shard.empty() || shard == "." || shard.find('/') != shard.npos || shard.find('\\') != shard.npos
        || shard.find("..") != shard.npos || shard.find('\0') != shard.npos) {
        raise<format_error>(message("names the shard '", shard,
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
        raise<format_error>("has no object 'weight_map'; an index maps each tensor's name to its shard", file);
    }
    std::map<std::string, std::string> result;
    for (const auto& [name, shard] : json["weight_map"].items()) {
        if (!shard.is_string()) {
            raise<format_error>(message("maps tensor '", name, "' to something that is not a string"), file);
        }
        const auto& text = shard.get_ref<const std::string&>();
        check_shard_name(text, file);
        result.emplace(name, text);
    }
    return result;
}

/// Opens a model: a safetensors file, or a directory that holds `model.safetensors` (taken when both are there) or
/// `model.safetensors.index.json`. The index is an allowlist: shards hold exactly the tensors that it gives them.
/// Throws io_error, format_error. Cost: O(headers).
///
///     const auto base = taskvec::open_model("base");
///     for (const auto& [name, tensor] : base.model()) { … }
[[nodiscard]] inline checkpoint open_model(const std::filesystem::path& path)
{
    std::error_code ignored;
    std::vector<safetensors_file> files;
    if (!std::filesystem::is_directory(path, ignored)) {
        files.emplace_back(path);
        return {path, std::move(files)};
    }
    if (const auto single = path / single_file_name; std::filesystem::exists(single, ignored)) {
        files.emplace_back(single);
        return {path, std::move(files)};
    }
    const auto index_path = path / index_file_name;
    if (!std::filesystem::exists(index_path, ignored)) {
        raise<io_error>(message("holds neither '", single_file_name, "' nor '", index_file_name,
                            "'; name a checkpoint directory or a .safetensors file"),
            path.string());
    }
    const auto index = read_index(index_path);
    std::map<std::string_view, std::size_t> expected;
    for (const auto& [name, shard] : index) { ++expected[shard]; }
    for (const auto& [shard, count] : expected) {
        auto& file = files.emplace_back(path / shard);
        for (const auto& entry : file.entries()) {
            const auto place = index.find(entry.name);
            if (place == index.end() || place->second != shard) {
                raise<format_error>(
                    message("holds tensor '", entry.name, "', which '", index_file_name, "' ",
                        place == index.end() ? std::string("does not list") : "places in '" + place->second + "'"),
                    file.path().string());
            }
        }
        if (file.entries().size() == count) { continue; }
        std::map<std::string_view, bool> present;
        for (const auto& entry : file.entries()) { present[entry.name] = true; }
        for (const auto& [name, where] : index) {
            if (where == shard && !present.contains(name)) {
                raise<format_error>(message("lacks tensor '", name, "', which '", index_file_name, "' places there"),
                    file.path().string());
            }
        }
    }
    return {path, std::move(files)};
}

/// How a model is split into shards: for each tensor its shard, tensors taken in name order, a new shard begun when the
/// next tensor would take the current one above `shard_size` bytes of data (a larger tensor has a shard of its own).
struct shard_plan {
    std::vector<std::size_t> shard_of; ///< for each spec
    std::size_t shards = 0;
    std::uint64_t total_bytes = 0;
};
[[nodiscard]] inline shard_plan plan_shards(const std::vector<tensor_spec>& specs, std::uint64_t shard_size)
{
    if (shard_size == 0) { raise<invalid_argument>("a shard size of 0 bytes; expected at least 1"); }
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

/// Writes a checkpoint directory: `model-00001-of-000NN.safetensors` … and their index, or `model.safetensors` when one
/// shard is enough. A directory that does not exist appears whole or not at all; in one that does, other files are left
/// alone.
///
/// All shards are complete and on disk under temporary names before the first takes its own; the index (or the single
/// file) takes its name last, and is what decides which model the directory holds. Where a shard's name is taken, by
/// an earlier model in the same directory, the new one is called `model-00001-of-000NN-2.safetensors` and so on, so a
/// crash at any moment leaves the earlier model whole or the new one. Once the new one stands, the earlier one's files
/// are removed.
///
///     taskvec::sharded_writer out("merged", specs, 5'000'000'000);
///     out.write(index, offset, data, size);
///     out.commit();
class sharded_writer final : public tensor_sink {
public:
    sharded_writer(std::filesystem::path directory, const std::vector<tensor_spec>& specs, std::uint64_t shard_size,
        const metadata_map& metadata = {}, durability mode = durability::synchronised)
        : directory_(std::move(directory))
        , mode_(mode)
        , plan_(plan_shards(specs, shard_size))
        , place_(specs.size())
    {
        std::vector<std::vector<tensor_spec>> parts(plan_.shards);
        for (std::size_t i = 0; i < specs.size(); ++i) {
            auto& part = parts[plan_.shard_of[i]];
            place_[i] = part.size();
            part.push_back(specs[i]);
        }
        for (const auto& part : parts) {
            (void)layout_safetensors(part, metadata);
        } // whatever is wrong with the specs is wrong before a directory appears
        old_ = present_files(); // an index that cannot be read is refused before anything is written
        folder_.emplace(directory_, mode);
        const std::size_t generation = plan_.shards == 1 ? 1 : free_generation();
        for (std::size_t i = 0; i < parts.size(); ++i) {
            names_.push_back(plan_.shards == 1 ? std::string(single_file_name) : shard_name(i, generation));
        }
        for (std::size_t i = 0; i < parts.size(); ++i) {
            writers_.push_back(
                std::make_unique<safetensors_writer>(folder_->path() / names_[i], parts[i], metadata, mode));
        }
        if (plan_.shards > 1) {
            std::string json = "{\n  \"metadata\": {\n    \"total_size\": " + std::to_string(plan_.total_bytes)
                + "\n  },\n  \"weight_map\": {";
            std::map<std::string_view, std::size_t> by_name;
            for (std::size_t i = 0; i < specs.size(); ++i) { by_name[specs[i].name] = plan_.shard_of[i]; }
            if (by_name.size() != specs.size()) {
                raise<invalid_argument>("a tensor's name occurs twice in the model to be written");
            }
            for (const auto& [name, shard] : by_name) {
                json +=
                    (json.back() == '{' ? "\n    " : ",\n    ") + json_string(name) + ": " + json_string(names_[shard]);
            }
            json += "\n  }\n}\n";
            index_ = std::make_unique<atomic_file>(folder_->path() / index_file_name, json.size(), mode);
            index_->write(0, json.data(), json.size());
        }
    }
    sharded_writer(const sharded_writer&) = delete;
    sharded_writer& operator=(const sharded_writer&) = delete;
    ~sharded_writer() override = default;

    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        if (index >= place_.size()) {
            raise<invalid_argument>(message("a write to tensor ", index, " of ", place_.size()));
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
        for (auto& writer : writers_) { writer->commit(false); }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(folder_->path()); }
        if (index_) { index_->commit(); }
        folder_->commit();
        // `model.safetensors` comes before an index when a directory is opened: with it gone, a new index takes effect.
        std::error_code ignored;
        for (const auto& name : old_) {
            // An index that somebody else wrote may name any file: only what is called a model's is removed.
            const bool of_a_model = name == index_file_name || name.ends_with(".safetensors");
            if (of_a_model && std::find(names_.begin(), names_.end(), name) == names_.end()
                && !(index_ && name == index_file_name)) {
                std::filesystem::remove(directory_ / name, ignored);
            }
        }
        if (mode_ == durability::synchronised) { detail::synchronise_directory(directory_); }
    }

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
        const auto shards = shard_temporaries();
        result.insert(result.end(), shards.begin(), shards.end());
        if (index_) { result.push_back(index_->temporary()); }
        return result;
    }
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
        return "model-" + padded(index + 1) + "-of-" + padded(plan_.shards)
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
    /// The files of the model that the directory holds now, as far as its index can be read.
    [[nodiscard]] std::vector<std::string> present_files() const
    {
        std::vector<std::string> result;
        std::error_code ignored;
        if (std::filesystem::exists(directory_ / single_file_name, ignored)) { result.emplace_back(single_file_name); }
        const auto index_path = directory_ / index_file_name;
        if (!std::filesystem::exists(index_path, ignored)) { return result; }
        for (const auto& [name, shard] : read_index(index_path)) {
            if (std::find(result.begin(), result.end(), shard) == result.end()) { result.push_back(shard); }
        }
        result.emplace_back(index_file_name);
        return result;
    }
    std::filesystem::path directory_;
    std::optional<output_directory> folder_; // before the files in it, so that it outlives them
    durability mode_;
    shard_plan plan_;
    std::vector<std::size_t> place_; // of each tensor within its shard
    std::vector<std::string> names_, old_; // the new files, and those of the model that they replace
    std::vector<std::unique_ptr<safetensors_writer>> writers_;
    std::unique_ptr<atomic_file> index_;
};

} // namespace taskvec::inline TASKVEC_ABI
