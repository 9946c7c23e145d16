// What the tool writes: places that are claimed before any work, models, and files of JSON or text.
// SPDX-License-Identifier: Apache-2.0
#include "outputs.hpp"

#include "arguments.hpp"
#include "runner.hpp"

#include <taskvec/formats/checkpoint.hpp>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include <unistd.h>

namespace tool {

namespace {

/// What --out and its like have named so far.
std::vector<std::pair<fs::path, std::string>>& claimed()
{
    static std::vector<std::pair<fs::path, std::string>> list;
    return list;
}

[[noreturn]] void refuse(const fs::path& path, const std::string& what, int code)
{
    taskvec::raise<taskvec::io_error>(
        taskvec::system_error_code(code), taskvec::message(what, ": ", std::strerror(code)), path.string(), code);
}

} // namespace

void claim_output(const fs::path& path, const std::string& option, output_kind kind)
{
    if (path.empty()) { throw usage_error(option + " is empty; expected a path"); }
    if (kind == output_kind::model && !path.has_filename()) { kind = output_kind::directory; }
    const auto place = place_of(path);
    for (const auto& [other, owner] : claimed()) {
        if (other == place) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::output_path,
                taskvec::message(
                    option, " '", path.string(), "' is also what ", owner, " asks for: give each its own"));
        }
    }
    const auto& inputs = opened_places();
    if (kind == output_kind::file && std::find(inputs.begin(), inputs.end(), place) != inputs.end()) {
        taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::output_path,
            taskvec::message(option, " '", path.string(),
                "' is one of the files that are read, and only a model may replace it: choose another path"));
    }
    claimed().emplace_back(place, option);
    std::error_code ignored;
    const auto status = fs::status(path, ignored);
    if (fs::exists(status)) {
        const bool fits = kind == output_kind::directory ? fs::is_directory(status)
            : kind == output_kind::model                 ? fs::is_directory(status) || fs::is_regular_file(status)
                                                         : fs::is_regular_file(status);
        if (!fits) {
            taskvec::raise<taskvec::io_error>(taskvec::error_code::file_kind,
                kind == output_kind::directory ? "exists and is not a directory; choose another output"
                                               : "exists and is not a regular file; choose another output",
                path.string(), kind == output_kind::directory ? ENOTDIR : EEXIST);
        }
        if (::access(path.c_str(), W_OK) != 0) { refuse(path, "exists and may not be written", errno); }
        if (fs::is_directory(status)) { return; }
    }
    auto folder = place.parent_path();
    while (kind == output_kind::directory && !fs::exists(folder, ignored) && folder.has_relative_path()) {
        folder = folder.parent_path();
    }
    if (::access(folder.c_str(), W_OK | X_OK) != 0 || !fs::is_directory(folder, ignored)) {
        refuse(path, "cannot create a file in directory '" + folder.string() + "'",
            fs::exists(folder, ignored) && !fs::is_directory(folder, ignored) ? ENOTDIR : errno);
    }
}

void claim_report(const run_options& options)
{
    if (!options.report.empty()) { claim_output(options.report, "--report"); }
}

model_output::model_output(fs::path path, const std::vector<taskvec::tensor_spec>& specs,
    const taskvec::metadata_map& metadata, const std::string& shard_size)
    : path_(std::move(path))
{
    std::error_code ignored;
    if (!shard_size.empty()) {
        shards_ =
            std::make_unique<taskvec::sharded_writer>(path_, specs, parse_size(shard_size, "--shard-size"), metadata);
    }
    else if (!path_.has_filename() || fs::is_directory(path_, ignored)) {
        shards_ = std::make_unique<taskvec::sharded_writer>(
            path_, specs, std::numeric_limits<std::uint64_t>::max(), metadata);
    }
    else {
        file_ = std::make_unique<taskvec::safetensors_writer>(path_, specs, metadata);
        guard_temporary(file_->temporary());
        return;
    }
    for (const auto& temporary : shards_->temporaries()) { guard_temporary(temporary); }
}

taskvec::tensor_sink& model_output::sink()
{
    if (file_) { return *file_; }
    return *shards_;
}

void model_output::finish()
{
    file_ ? file_->finish() : shards_->finish();
}

taskvec::checkpoint model_output::reopen() const
{
    std::vector<taskvec::safetensors_file> files;
    if (file_) { files.emplace_back(file_->temporary()); }
    else {
        for (const auto& temporary : shards_->shard_temporaries()) { files.emplace_back(temporary); }
    }
    return {path_, std::move(files)};
}

void model_output::commit()
{
    file_ ? file_->commit() : shards_->commit();
}

std::uint64_t model_output::file_size() const
{
    return file_ ? file_->file_size() : shards_->file_size();
}

text_output::text_output(const std::string& path)
{
    if (path.empty()) { return; }
    file_ = std::make_unique<taskvec::atomic_file>(path);
    guard_temporary(file_->temporary());
}

void text_output::finish_text(std::string_view text)
{
    if (!file_) { return; }
    file_->write(0, text.data(), text.size());
    file_->finish();
}

void text_output::commit()
{
    if (file_) { file_->commit(); }
}

} // namespace tool
