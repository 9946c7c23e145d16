// What the tool writes: places that are claimed before any work, models, and files of JSON or text.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/sink.hpp>
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/quantising_sink.hpp>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace tool {

namespace fs = std::filesystem;

struct run_options;

/// What an option's path becomes: a file beside the models, a model (which may replace one that is read), a directory.
enum class output_kind { file, model, directory };
/// Where a path leads that is no plain file: a descriptor of this process (/dev/stdout, a link to /proc/self/fd/1), or
/// a device, pipe or socket. Links are followed one by one, since the last one of these is a plain file at times.
struct special_place {
    enum { none, descriptor, device } kind = none;
    int number = -1; ///< of a descriptor
    std::string words; ///< "standard output", "a pipe", …
};
[[nodiscard]] special_place special_place_of(const fs::path& path);
/// Checks a place that `option` asks to write to, before any work: that it has a name, that it can be created or
/// replaced, that no other option asks for it, and that only a model replaces one of the files that are read. Throws
/// usage_error, io_error, invalid_argument.
void claim_output(const fs::path& path, const std::string& option, output_kind kind = output_kind::file);
/// Notes a file of tensors that is called as if it were of another format.
void note_ending(const run_options& options, const fs::path& path);
/// claim_output() for --report, where it was given; then notes what dead runs left beside what was claimed.
void claim_report(const run_options& options);
/// What killed runs left in a directory: temporary files and directories whose process this machine no longer has, and
/// that nobody has locked. `nothing_made`: by this process, so that what has its number is another's, of a container.
[[nodiscard]] std::vector<fs::path> left_overs(
    const fs::path& directory, std::error_code& failure, bool nothing_made = false);
/// Notes what dead runs left beside an output, or in it, and how it goes.
void note_left_overs(const run_options& options, const fs::path& output);

/// A file whose commit() can be taken back: what it replaces keeps a second name until this object goes.
class revocable_file {
public:
    explicit revocable_file(const fs::path& path, std::uint64_t size = 0);
    revocable_file(const revocable_file&) = delete;
    revocable_file& operator=(const revocable_file&) = delete;
    ~revocable_file();
    void write(std::string_view content) { file_.write(0, content.data(), content.size()); }
    void finish() { file_.finish(); }
    void commit();
    void revert() noexcept;

private:
    taskvec::atomic_file file_;
    fs::path kept_; ///< the second name that is to be
    fs::path replaced_; ///< the second name, where the system has such links
    bool new_ = false; ///< nothing was replaced
};

/// What the files of a model are called by: transformers' or diffusers' word.
[[nodiscard]] std::string_view stem_of(const taskvec::checkpoint& model);

/// The directory of a model that is being written, for what lies beside its weights.
class model_folder {
public:
    model_folder() = default;
    model_folder(const model_folder&) = delete;
    model_folder& operator=(const model_folder&) = delete;
    virtual ~model_folder() = default;
    /// Where its files are written, under its temporary name where it is new; empty where there is none.
    [[nodiscard]] virtual const fs::path& folder() const = 0;
    /// What folder() will be called.
    [[nodiscard]] virtual const fs::path& place() const = 0;
    /// A file beside the weights, by its name below the directory; it takes its name with them.
    virtual void add_file(const std::string& name, std::string_view content) = 0;
    /// The same of content that is made while the weights go to disk, on another thread.
    virtual void add_file(const std::string& name, std::function<std::string()> make) = 0;
};

/// A model that is being written: a file, a directory (`DIR/model.safetensors`), or a directory of shards.
class model_output : public model_folder {
public:
    /// `like`: whose metadata the result has, and whose names of files (diffusers'), in a directory.
    /// `plan`: what the file holds of the tensors that sink() is given; it is kept by reference. `shard_size`: empty
    /// for one file. `directory`: whether that goes to a directory of the path's name. `finished`: the shards, where
    /// they lie already; then nothing goes to sink().
    model_output(fs::path path, const taskvec::quantised_outputs& plan, const taskvec::checkpoint& like,
        const std::string& shard_size, bool directory = false, const std::vector<fs::path>& finished = {});
    /// Empty for a file.
    [[nodiscard]] const fs::path& folder() const override { return folder_; }
    /// Makes `folder`, which will be called `place`, the one for add_file(), of a model that is a file in it.
    void set_folder(const fs::path& folder, const fs::path& place)
    {
        folder_ = folder;
        place_ = place;
    }
    [[nodiscard]] const fs::path& place() const override { return place_.empty() ? path_ : place_; }
    void add_file(const std::string& name, std::string_view content) override;
    /// `make` runs while finish() waits for the disk.
    void add_file(const std::string& name, std::function<std::string()> make) override;
    [[nodiscard]] taskvec::tensor_sink& sink();
    /// Forces the bytes to disk; the files still have temporary names.
    void finish();
    /// The finished model, read back under its temporary names. `like`: the model by whose configuration layers are
    /// quantised.
    [[nodiscard]] taskvec::checkpoint reopen(const taskvec::checkpoint& like) const;
    void commit();
    [[nodiscard]] std::uint64_t file_size() const;
    [[nodiscard]] const fs::path& path() const { return path_; }
    /// Numbers that became the largest of their fp8, once finish() is done.
    [[nodiscard]] std::uint64_t saturated() const { return saturated_; }

private:
    fs::path path_, folder_, place_;
    std::uint64_t saturated_ = 0;
    std::vector<std::unique_ptr<revocable_file>> beside_;
    std::vector<std::pair<std::string, std::function<std::string()>>> made_late_;
    std::unique_ptr<taskvec::safetensors_writer> file_;
    std::unique_ptr<taskvec::sharded_writer> shards_;
    std::unique_ptr<taskvec::quantising_sink> quantising_;
};

/// A file of text that is created at once, so that a path that cannot be written is known early, filled at the end, and
/// named when all else has gone well. No path: nothing is written. What is no plain file (a terminal, a pipe,
/// /dev/null, a link to standard output) is written to when all else has gone well.
class text_output {
public:
    explicit text_output(const std::string& path);
    [[nodiscard]] bool wanted() const { return file_ != nullptr || place_.kind != special_place::none; }
    void finish_text(std::string_view text);
    void commit();
    /// Gives back what commit() replaced, where that was a plain file: for outputs that belong together, of which a
    /// later one fails.
    void revert() noexcept;

private:
    std::string path_, text_;
    special_place place_;
    std::unique_ptr<revocable_file> file_;
};

} // namespace tool
