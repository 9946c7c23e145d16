// taskvec clean: removes what killed runs left in a directory.
// SPDX-License-Identifier: Apache-2.0
#include "command.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <taskvec/formats/checkpoint.hpp>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <csignal>
#include <memory>
#include <string_view>
#include <system_error>

namespace {

struct clean_settings {
    std::string directory;
    bool dry_run = false;
};

/// Whether a name is that of a temporary file or directory whose process is no more.
bool is_left_over(std::string_view name)
{
    constexpr std::string_view prefix = ".taskvec-";
    if (!name.starts_with(prefix) || !name.ends_with(".tmp")) { return false; }
    name.remove_prefix(prefix.size());
    int process = 0;
    const auto [end, failure] = std::from_chars(name.data(), name.data() + name.size(), process);
    return failure == std::errc{} && process > 0 && *end == '-' && ::kill(process, 0) != 0 && errno == ESRCH;
}

void clean(const clean_settings& given)
{
    const tool::fs::path directory = given.directory;
    std::error_code failure;
    std::vector<tool::fs::path> found;
    for (tool::fs::directory_iterator it(directory, failure), end; !failure && it != end; it.increment(failure)) {
        if (is_left_over(it->path().filename().string())) { found.push_back(it->path()); }
    }
    if (failure) {
        taskvec::raise<taskvec::io_error>(taskvec::system_error_code(failure.value()),
            taskvec::message("cannot be read as a directory: ", failure.message()), given.directory, failure.value());
    }
    std::sort(found.begin(), found.end());
    std::string text;
    for (const auto& path : found) {
        text += (given.dry_run ? "would remove '" : "removed '") + tool::printable(path.string()) + "'\n";
        if (given.dry_run) { continue; }
        tool::fs::remove_all(path, failure);
        if (failure) {
            taskvec::raise<taskvec::io_error>(taskvec::system_error_code(failure.value()),
                taskvec::message("cannot be removed: ", failure.message()), path.string(), failure.value());
        }
    }
    // What a writer of shards left: those that no index names, and its lock.
    const bool locked = tool::fs::exists(directory / ".taskvec-lock", failure);
    taskvec::directory_lock lock(directory);
    if (given.dry_run && locked) { lock.keep(); }
    for (const auto& name : taskvec::orphan_shards(directory, lock)) {
        const auto path = directory / name;
        text += (given.dry_run ? "would remove '" : "removed '") + tool::printable(path.string()) + "'\n";
        if (!given.dry_run) { tool::fs::remove(path, failure); }
    }
    tool::print(text.empty() ? "nothing of a dead run lies in '" + tool::printable(given.directory) + "'\n" : text);
}

const tool::register_verb clean_verb(
    140, "clean", "Remove the temporary files that killed runs left in a directory", [](tool::command& verb) {
        const auto given = std::make_shared<clean_settings>();
        verb.positional("DIR", given->directory, "Where to look; not in the directories below");
        verb.flag("--dry-run", given->dry_run, "Only say what would be removed");
        verb.footer("Only what is called .taskvec-PROCESS-….tmp is removed, where this machine has no such process "
                    "any more: not for a\ndirectory that other machines are writing to.\n\nExample:\n"
                    "  taskvec clean merged --dry-run");
        verb.action([given] { clean(*given); });
    });

} // namespace
