// What the tool writes: places that are claimed before any work, models, and files of JSON or text.
// SPDX-License-Identifier: Apache-2.0
#include "outputs.hpp"

#include "arguments.hpp"
#include "models.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <taskvec/formats/checkpoint.hpp>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <future>
#include <limits>
#include <set>
#include <utility>

#include <fcntl.h>
#include <poll.h>
#include <sys/file.h>
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

/// Refuses a link that leads nowhere: what is renamed onto it would take its place.
void check_link(const fs::path& path)
{
    std::error_code unknown;
    const auto link = path.has_filename() ? path : path.parent_path(); // "DIR/" is DIR
    if (!fs::is_symlink(fs::symlink_status(link, unknown)) || fs::exists(link, unknown)) { return; }
    taskvec::raise<taskvec::io_error>(taskvec::error_code::file_not_found,
        taskvec::message("is a link to '", fs::read_symlink(link, unknown).string(),
            "', which is not there: mend the link (a disk that is not mounted?), or name another path"),
        link.string(), ENOENT);
}

} // namespace

special_place special_place_of(const fs::path& path)
{
    std::error_code failure;
    auto at = fs::absolute(path, failure);
    for (int links = 0; links < 40; ++links) {
        const auto text = at.lexically_normal().string();
        const auto name = at.filename().string();
        if ((text.starts_with("/proc/") && text.find("/fd/") != text.npos) || text.starts_with("/dev/fd/")) {
            special_place found{special_place::descriptor, -1, "descriptor " + name};
            if (!name.empty() && name.find_first_not_of("0123456789") == name.npos && name.size() < 9) {
                found.number = std::stoi(name);
            }
            if (found.number == 1) { found.words = "standard output"; }
            if (found.number == 2) { found.words = "standard error"; }
            return found;
        }
        const auto status = fs::symlink_status(at, failure);
        if (fs::is_symlink(status)) {
            const auto to = fs::read_symlink(at, failure);
            if (failure) { return {}; }
            at = to.is_absolute() ? to : at.parent_path() / to;
            continue;
        }
        switch (status.type()) {
        case fs::file_type::character: return {special_place::device, -1, "a terminal or device"};
        case fs::file_type::block: return {special_place::device, -1, "a disk"};
        case fs::file_type::fifo: return {special_place::device, -1, "a pipe"};
        case fs::file_type::socket: return {special_place::device, -1, "a socket"};
        default: return {};
        }
    }
    return {};
}

void claim_output(const fs::path& path, const std::string& option, output_kind kind)
{
    if (path.empty()) { throw usage_error(option + " is empty; expected a path"); }
    if (const auto special = special_place_of(path); special.kind != special_place::none) {
        const bool text = option != "--out" && kind == output_kind::file;
        if (!text || special.words == "a disk" || special.words == "a socket") {
            taskvec::raise<taskvec::io_error>(taskvec::error_code::file_kind,
                taskvec::message("leads to ", special.words, " and is not a regular file; ",
                    text ? "choose another output"
                         : "what is written there takes its name when it is whole: name a file"),
                path.string(), EEXIST);
        }
        return;
    }
    check_link(path);
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

void note_ending(const run_options& options, const fs::path& path)
{
    const auto ending = path.extension();
    for (const std::string_view other : {".pt", ".pth", ".bin", ".ckpt", ".gguf", ".h5", ".npz", ".onnx", ".msgpack"}) {
        if (ending == other) {
            note(options, in_quotes(path) + " is written as safetensors, whatever its name ends in");
        }
    }
}

void claim_report(const run_options& options)
{
    const auto outputs = claimed(); // a report is small
    if (!options.report.empty()) { claim_output(options.report, "--report"); }
    for (const auto& output : outputs) { note_left_overs(options, output.first); }
}

namespace {
/// Whether a temporary name has the number of this process.
bool is_own_temporary(std::string_view name)
{
    return name.starts_with(taskvec::message(".taskvec-", ::getpid(), '-')) && name.ends_with(".tmp");
}
} // namespace

std::vector<fs::path> left_overs(const fs::path& directory, std::error_code& failure, bool nothing_made)
{
    std::vector<fs::path> found;
    failure.clear();
    for (fs::directory_iterator it(directory, failure), end; !failure && it != end; it.increment(failure)) {
        const auto name = it->path().filename().string();
        const bool dead = taskvec::is_left_over(name) || (nothing_made && is_own_temporary(name));
        if (dead && !taskvec::is_in_use(it->path())) { found.push_back(it->path()); }
    }
    std::sort(found.begin(), found.end());
    return found;
}

void note_left_overs(const run_options& options, const fs::path& output)
{
    std::error_code ignored;
    const auto place = fs::absolute(output, ignored);
    for (const auto& folder : {place.parent_path(), place}) {
        if (!fs::is_directory(folder, ignored)) { continue; }
        const auto found = left_overs(folder, ignored);
        if (found.empty()) { continue; }
        note(options,
            taskvec::message("'", folder.string(), "' holds ", counted(found.size(), "temporary file"),
                " of killed runs: 'taskvec clean ", shell_word(folder.string()), "' removes what they left"));
    }
}

revocable_file::revocable_file(const fs::path& path, std::uint64_t size)
    : file_(path, size)
{ }

revocable_file::~revocable_file()
{
    if (!replaced_.empty()) { ::unlink(replaced_.c_str()); }
    if (!kept_.empty()) {
        release_temporary(kept_);
        release_temporary(file_.target());
    }
}

void revocable_file::commit()
{
    kept_ = fs::path(file_.temporary()).replace_extension(".old.tmp");
    auto kept = kept_;
    if (::link(file_.target().c_str(), kept.c_str()) == 0) {
        replaced_ = std::move(kept);
        guard_replaced(file_.target(), replaced_);
    }
    else {
        new_ = errno == ENOENT;
        if (new_) { guard_new_output(file_.target()); }
    }
    file_.commit();
}

void revocable_file::revert() noexcept
{
    if (!file_.temporary().empty()) { return; } // it never took its name
    if (new_) { ::unlink(file_.target().c_str()); }
    else if (!replaced_.empty() && ::rename(replaced_.c_str(), file_.target().c_str()) == 0) {
        replaced_.clear();
    }
}

names_held::names_held(int) { }

names_held::names_held()
    : names_held(0) // what throws from here on is cleared up by the destructor
{
    std::set<fs::path> folders; // in one order, so that no two wait for each other
    std::error_code ignored;
    for (const auto& [place, option] : claimed()) {
        auto folder = place.parent_path();
        while (!fs::exists(folder, ignored) && folder.has_relative_path()) { folder = folder.parent_path(); }
        folders.insert(std::move(folder));
    }
    directories_.reserve(folders.size());
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    for (const auto& folder : folders) {
        const int directory = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        if (directory < 0) { continue; }
        directories_.push_back(directory);
        while (::flock(directory, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
            if (was_interrupted()) { taskvec::raise<taskvec::cancelled>(taskvec::error_code::cancelled); }
            if (std::chrono::steady_clock::now() > end) {
                refuse(folder, "another process has been giving files their names there for ten seconds", EWOULDBLOCK);
            }
            ::poll(nullptr, 0, 10);
        }
    }
}

names_held::~names_held()
{
    for (const int directory : directories_) { ::close(directory); }
}

std::string_view stem_of(const taskvec::checkpoint& model)
{
    for (const auto& file : model.files()) {
        for (const auto stem : taskvec::model_stems) {
            if (file.path().filename().string().starts_with(stem)) { return stem; }
        }
    }
    return taskvec::model_stems[0];
}

model_output::model_output(fs::path path, const taskvec::quantised_outputs& plan, const taskvec::checkpoint& like,
    const std::string& shard_size, bool directory, const std::vector<fs::path>& finished)
    : path_(std::move(path))
{
    std::error_code ignored;
    const auto& specs = plan.specs;
    const auto metadata = metadata_of(like.metadata(), specs);
    const auto stem = stem_of(like);
    const auto place_sink = [&] {
        if (plan.plain()) { return; }
        taskvec::tensor_sink& file = file_ ? static_cast<taskvec::tensor_sink&>(*file_) : *shards_;
        const auto beside = file_ ? file_->temporary().parent_path() : shards_->folder();
        quantising_ = std::make_unique<taskvec::quantising_sink>(plan, file, beside);
    };
    if (!shard_size.empty()) {
        shards_ = std::make_unique<taskvec::sharded_writer>(path_, specs, parse_size(shard_size, "--shard-size"),
            metadata, taskvec::durability::synchronised, taskvec::existing_directory::exchange, finished, stem);
    }
    else if (directory || !path_.has_filename() || fs::is_directory(path_, ignored)) {
        shards_ = std::make_unique<taskvec::sharded_writer>(path_, specs, std::numeric_limits<std::uint64_t>::max(),
            metadata, taskvec::durability::synchronised, taskvec::existing_directory::exchange, std::vector<fs::path>(),
            stem);
    }
    else {
        file_ = std::make_unique<taskvec::safetensors_writer>(path_, specs, metadata);
        place_sink();
        return;
    }
    place_sink();
    folder_ = shards_->folder();
}

void model_output::add_file(const std::string& name, std::string_view content)
{
    const auto path = folder_ / name;
    std::error_code failure;
    fs::create_directories(path.parent_path(), failure);
    auto file = std::make_unique<revocable_file>(path, content.size());
    file->write(content);
    file->finish();
    beside_.push_back(std::move(file));
}

void model_output::add_file(const std::string& name, std::function<std::string()> make)
{
    made_late_.emplace_back(name, std::move(make));
}

taskvec::tensor_sink& model_output::sink()
{
    if (quantising_) { return *quantising_; }
    if (file_) { return *file_; }
    return *shards_;
}

void model_output::finish()
{
    if (const auto quantising = std::exchange(quantising_, nullptr)) {
        quantising->finish();
        saturated_ = quantising->saturated();
    }
    std::vector<std::pair<std::string, std::future<std::string>>> late;
    for (auto& [name, make] : std::exchange(made_late_, {})) {
        late.emplace_back(name, std::async(std::launch::async, std::move(make)));
    }
    file_ ? file_->finish() : shards_->finish();
    for (auto& [name, content] : late) { add_file(name, std::string_view(content.get())); }
}

taskvec::checkpoint model_output::reopen(const taskvec::checkpoint& like) const
{
    std::vector<taskvec::safetensors_file> files;
    if (file_) { files.emplace_back(file_->temporary()); }
    else {
        for (const auto& temporary : shards_->shard_temporaries()) { files.emplace_back(temporary); }
    }
    taskvec::checkpoint model(path_, std::move(files));
    model.read_layers(
        [hints = like.layers() ? like.layers()->hints() : taskvec::quantisation_hints()] { return hints; });
    return model;
}

void model_output::commit()
{
    try {
        for (auto& file : beside_) { file->commit(); } // the weights come last: they decide what the directory holds
        file_ ? file_->commit() : shards_->commit();
    }
    catch (...) {
        for (auto& file : beside_) { file->revert(); }
        throw;
    }
}

std::uint64_t model_output::file_size() const
{
    return file_ ? file_->file_size() : shards_->file_size();
}

text_output::text_output(const std::string& path)
    : path_(path)
{
    if (path.empty()) { return; }
    place_ = special_place_of(path);
    if (place_.kind != special_place::none) { return; }
    check_link(path);
    file_ = std::make_unique<revocable_file>(path);
}

void text_output::finish_text(std::string_view text)
{
    text_ = std::string(text);
    if (!file_) { return; }
    file_->write(text);
    file_->finish();
}

void text_output::commit()
{
    if (file_) { file_->commit(); }
    if (place_.kind == special_place::none) { return; }
    // A descriptor is written to where it stands: opened anew it would begin at the top of its file.
    const bool own = place_.kind == special_place::descriptor && place_.number >= 0;
    const int to = own ? place_.number : ::open(path_.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC | O_NOCTTY);
    if (own && to == 1) { std::fflush(stdout); }
    int code = to < 0 ? errno : 0;
    std::string_view left = text_;
    while (!code && !left.empty()) {
        const auto written = ::write(to, left.data(), left.size());
        if (written < 0 && errno == EINTR) { continue; }
        if (written <= 0) { code = written < 0 ? errno : ENOSPC; }
        else {
            left.remove_prefix(static_cast<std::size_t>(written));
        }
    }
    if (!own && to >= 0) { ::close(to); }
    if (code) { refuse(path_, "cannot write", code); }
}

void text_output::revert() noexcept
{
    if (file_) { file_->revert(); }
}

} // namespace tool
