// taskvec clean: removes what killed runs left in a directory.
// SPDX-License-Identifier: Apache-2.0
#include "command.hpp"
#include "outputs.hpp"
#include "words.hpp"

#include <taskvec/formats/checkpoint.hpp>

#include <memory>
#include <system_error>

namespace {

struct clean_settings {
    std::string directory;
    bool dry_run = false;
};

void clean(const clean_settings& given)
{
    const tool::fs::path directory = given.directory;
    std::error_code failure;
    const auto found = tool::left_overs(directory, failure, true);
    if (failure) {
        taskvec::raise<taskvec::io_error>(taskvec::system_error_code(failure.value()),
            taskvec::message("cannot be read as a directory: ", failure.message()), given.directory, failure.value());
    }
    const auto lock_file = directory / ".taskvec-lock";
    const bool locked = tool::fs::exists(lock_file, failure);
    taskvec::directory_lock lock(directory);
    if (given.dry_run && locked) { lock.keep(); }
    std::string text;
    // What was put aside for files that never came returns before anything goes.
    if (!given.dry_run) {
        for (const auto& name : taskvec::finish_replacements(directory, lock)) {
            text += "brought back '" + tool::printable((directory / name).string()) + "'\n";
        }
    }
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
    for (const auto& name : taskvec::orphan_shards(directory, lock)) {
        const auto path = directory / name;
        text += (given.dry_run ? "would remove '" : "removed '") + tool::printable(path.string()) + "'\n";
        if (!given.dry_run) { tool::fs::remove(path, failure); }
    }
    if (locked) { // by nobody: this one was had
        text += (given.dry_run ? "would remove '" : "removed '") + tool::printable(lock_file.string()) + "'\n";
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
