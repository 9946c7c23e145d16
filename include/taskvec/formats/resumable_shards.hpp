// Shards that stay when whoever writes them is killed, so that the next one goes on with the rest.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/checkpoint.hpp>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <system_error>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A sink whose shards take their names in a directory as each is complete, and are not wanted again by a later sink
/// over the same directory. That all of them are of one model is for the caller to see to. A sharded_writer takes the
/// finished shards into a checkpoint. Throws io_error; format_error for a shard that holds other tensors. Cost: that of
/// a sharded_writer; the space of the model twice where the file system has no hard links.
///
///     resumable_shards shards("work", specs, 5'000'000'000, metadata);
///     merge(cpu{}, options, models, shards);
///     sharded_writer out("merged", specs, 5'000'000'000, metadata, durability::synchronised,
///         existing_directory::exchange, shards.finish());
///     out.commit();
class resumable_shards final : public tensor_sink {
public:
    /// Opens the shards that are there, and begins the others. Throws io_error, format_error, invalid_argument.
    resumable_shards(std::filesystem::path directory, const std::vector<tensor_spec>& specs, std::uint64_t shard_size,
        const metadata_map& metadata = {}, durability mode = durability::synchronised)
        : directory_(std::move(directory))
        , plan_(plan_shards(specs, shard_size))
    {
        const auto parts = detail::tensors_of_shards(plan_, specs, place_);
        std::error_code ignored;
        for (std::size_t s = 0; s < parts.size(); ++s) {
            auto& made = *shards_.emplace_back(std::make_unique<shard>());
            made.path = directory_ / message("shard-", s + 1, "-of-", parts.size(), ".safetensors");
            for (const auto& spec : parts[s]) { made.left += spec.bytes(); }
            if (std::filesystem::exists(made.path, ignored)) {
                if (!is_laid_out(made.path, layout_safetensors(parts[s], metadata))) {
                    raise<format_error>(error_code::file_tensors,
                        "holds other tensors than are to be written: it belongs to another model", made.path.string());
                }
                made.done = true;
                ++found_;
                continue;
            }
            made.writer = std::make_unique<safetensors_writer>(made.path, parts[s], metadata, mode);
            made.writer->open_on_demand();
            if (made.left == 0) { complete(made); }
        }
    }

    [[nodiscard]] bool rewritable() const override { return false; }
    [[nodiscard]] bool wants(std::size_t index) const override { return !shards_[plan_.shard_of[index]]->done; }
    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        shard& to = *shards_[plan_.shard_of[index]];
        // An earlier run wrote the shard; or nothing is to be written, perhaps to a shard that is whole already.
        if (!to.writer || size == 0) { return; }
        to.writer->write(place_[index], offset, data, size);
        if (to.left.fetch_sub(size, std::memory_order_acq_rel) == size) { complete(to); }
    }

    /// How many shards there were when this began.
    [[nodiscard]] std::size_t found() const noexcept { return found_; }
    /// How many the model has.
    [[nodiscard]] std::size_t count() const noexcept { return shards_.size(); }
    /// The shards in order, all of them complete. Throws invalid_argument where one is not.
    [[nodiscard]] std::vector<std::filesystem::path> finish() const
    {
        std::vector<std::filesystem::path> result;
        for (const auto& one : shards_) {
            if (!one->done) {
                raise<invalid_argument>(error_code::call_order,
                    message("'", one->path.string(), "' is incomplete: ", one->left.load(), " bytes were not written"));
            }
            result.push_back(one->path);
        }
        return result;
    }

private:
    struct shard {
        std::filesystem::path path;
        std::unique_ptr<safetensors_writer> writer; ///< none where an earlier run wrote it
        std::atomic<std::uint64_t> left{0}; ///< bytes
        std::atomic<bool> done{false};
    };
    static void complete(shard& one)
    {
        one.writer->commit();
        one.done = true;
    }

    std::filesystem::path directory_;
    shard_plan plan_;
    std::vector<std::size_t> place_; ///< of each spec in its shard
    std::vector<std::unique_ptr<shard>> shards_;
    std::size_t found_ = 0;
};

} // namespace taskvec::inline TASKVEC_ABI
