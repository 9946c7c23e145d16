// What the tool writes: places that are claimed before any work, models, and files of JSON or text.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/sink.hpp>
#include <taskvec/formats/checkpoint.hpp>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

namespace fs = std::filesystem;

struct run_options;

/// What an option's path becomes: a file beside the models, a model (which may replace one that is read), a directory.
enum class output_kind { file, model, directory };
/// Checks a place that `option` asks to write to, before any work: that it has a name, that it can be created or
/// replaced, that no other option asks for it, and that only a model replaces one of the files that are read. Throws
/// usage_error, io_error, invalid_argument.
void claim_output(const fs::path& path, const std::string& option, output_kind kind = output_kind::file);
/// claim_output() for --report, where it was given.
void claim_report(const run_options& options);

/// A model that is being written: a file, a directory (`DIR/model.safetensors`), or a directory of shards.
class model_output {
public:
    /// `shard_size`: empty for one file.
    model_output(fs::path path, const std::vector<taskvec::tensor_spec>& specs, const taskvec::metadata_map& metadata,
        const std::string& shard_size);
    [[nodiscard]] taskvec::tensor_sink& sink();
    /// Forces the bytes to disk; the files still have temporary names.
    void finish();
    /// The finished model, read back under its temporary names.
    [[nodiscard]] taskvec::checkpoint reopen() const;
    void commit();
    [[nodiscard]] std::uint64_t file_size() const;
    [[nodiscard]] const fs::path& path() const { return path_; }

private:
    fs::path path_;
    std::unique_ptr<taskvec::safetensors_writer> file_;
    std::unique_ptr<taskvec::sharded_writer> shards_;
};

/// A file of text that is created at once, so that a path that cannot be written is known early, filled at the end, and
/// named when all else has gone well. No path: nothing is written.
class text_output {
public:
    explicit text_output(const std::string& path);
    [[nodiscard]] bool wanted() const { return file_ != nullptr; }
    void finish_text(std::string_view text);
    void commit();

private:
    std::unique_ptr<taskvec::atomic_file> file_;
};

} // namespace tool
