// What a power cut may leave of a run, worked out from the list of its calls that tests/tools/faults/shim.cpp writes.
//
// The model is POSIX's, with renames that are whole: bytes of a file are on the disk once it has been forced there, and
// until then may read as zeros; a name in a directory (made, renamed, exchanged, linked, removed) is there once its
// directory has been forced to the disk, and until then may be there or not, whatever became of the names before it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "run_tool.hpp"

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <sys/stat.h>

namespace tools_test {

using disk_tree = std::map<std::string, std::string>; ///< what lies on a disk, by path; directories are "directory"

class power_loss {
public:
    /// The disk before the run: all that lies in a folder, forced there.
    explicit power_loss(const std::filesystem::path& folder)
        : top_(folder.lexically_normal().string())
    {
        read_directory(folder);
        live_ = entries_;
    }

    /// Goes through the calls of a run, and shows each tree that a cut after any of them may leave, once. Returns how
    /// many there were. `most`: names that may be waiting at once, of which each may or may not be there.
    std::size_t each_cut(
        const std::filesystem::path& trace, std::size_t most, const std::function<void(const disk_tree&)>& show)
    {
        std::ifstream calls(trace / "calls");
        std::set<std::string> seen;
        std::size_t count = 0;
        for (std::string line; std::getline(calls, line);) {
            std::istringstream words(line);
            std::string what, first, second, number, snapshot;
            std::getline(words, what, '\t');
            std::getline(words, first, '\t');
            std::getline(words, second, '\t');
            std::getline(words, number, '\t');
            std::getline(words, snapshot, '\t');
            if (!follow(what, inside(first), inside(second), std::stoul(number), trace / snapshot)) { continue; }
            REQUIRE(waiting_.size() <= most);
            for (std::size_t taken = 0; taken < (std::size_t{1} << waiting_.size()); ++taken) {
                auto names = entries_;
                for (std::size_t i = 0; i < waiting_.size(); ++i) {
                    if ((taken >> i & 1) != 0) { waiting_[i].apply(names); }
                }
                for (const bool zeros : {false, true}) {
                    std::string key;
                    describe(names, 0, zeros, "", key);
                    if (!seen.insert(key).second) { continue; }
                    disk_tree tree;
                    build(names, 0, zeros, "", tree);
                    show(tree);
                    ++count;
                }
            }
        }
        return count;
    }

private:
    struct node {
        bool directory = false, forced = true;
        std::string content{};
    };
    using names_of = std::map<std::string, std::size_t>; ///< the node of each name; 0, which is the folder: none
    using names_map = std::map<std::size_t, names_of>; ///< of each directory
    struct change {
        std::size_t directory = 0;
        std::string name{};
        std::size_t from = 0, to = 0; ///< a removal only takes away what is meant
    };
    struct step { ///< all of it or nothing
        std::vector<change> changes{};
        void apply(names_map& names) const
        {
            for (const auto& one : changes) {
                auto& list = names[one.directory];
                if (one.to != 0) { list[one.name] = one.to; }
                else if (const auto place = list.find(one.name); place != list.end() && place->second == one.from) {
                    list.erase(place);
                }
            }
        }
        [[nodiscard]] bool touches(std::size_t directory) const
        {
            for (const auto& one : changes) {
                if (one.directory == directory) { return true; }
            }
            return false;
        }
    };

    std::size_t add(unsigned long number, node one)
    {
        nodes_.push_back(std::move(one));
        by_number_[number] = nodes_.size() - 1;
        return nodes_.size() - 1;
    }
    void read_directory(const std::filesystem::path& path)
    {
        const auto number = [](const std::filesystem::path& place) {
            struct stat status{};
            REQUIRE(::stat(place.c_str(), &status) == 0);
            return static_cast<unsigned long>(status.st_ino);
        };
        const auto self = add(number(path), {true});
        auto& names = entries_[self];
        for (const auto& entry : std::filesystem::directory_iterator(path)) {
            const auto name = entry.path().filename().string();
            if (entry.is_directory()) {
                names[name] = nodes_.size();
                read_directory(entry.path());
            }
            else {
                names[name] = add(number(entry.path()), {false, true, slurp(entry.path())});
            }
        }
    }
    /// Below the folder; empty for what lies elsewhere.
    [[nodiscard]] std::string inside(const std::string& path) const
    {
        const auto normal = std::filesystem::path(path).lexically_normal().string();
        return normal.starts_with(top_ + "/") ? normal.substr(top_.size() + 1) : std::string();
    }
    struct spot {
        std::size_t directory = 0;
        std::string name{};
        std::size_t node = 0;
    };
    [[nodiscard]] spot find(const std::string& path)
    {
        spot at;
        std::istringstream parts(path);
        std::vector<std::string> names;
        for (std::string part; std::getline(parts, part, '/');) { names.push_back(part); }
        for (std::size_t i = 0; i < names.size(); ++i) {
            const auto& list = live_[at.directory];
            const auto found = list.find(names[i]);
            at.node = found == list.end() ? 0 : found->second;
            if (i + 1 < names.size()) {
                REQUIRE(at.node != 0);
                at.directory = at.node;
            }
            at.name = names[i];
        }
        return at;
    }
    bool begin(step one)
    {
        one.apply(live_);
        // Whether a temporary name of a file is there makes no difference to anybody: it is there at once.
        bool matters = false;
        for (const auto& part : one.changes) {
            const auto file = part.to != 0 ? part.to : part.from;
            matters = matters || nodes_[file].directory || !part.name.starts_with(".taskvec-");
        }
        if (matters) { waiting_.push_back(std::move(one)); }
        else {
            one.apply(entries_);
        }
        return matters;
    }
    /// Returns whether a cut may leave something else from now on.
    bool follow(const std::string& what, const std::string& first, const std::string& second, unsigned long number,
        const std::filesystem::path& snapshot)
    {
        if (what == "write" || what == "force") {
            const auto found = by_number_.find(number);
            if (found == by_number_.end()) { return false; } // a file elsewhere
            auto& one = nodes_[found->second];
            if (what == "write") { return std::exchange(one.forced, false); }
            if (!one.directory) {
                one.content = slurp(snapshot);
                one.forced = true;
            }
            else {
                std::vector<step> rest;
                for (auto& waits : waiting_) {
                    if (waits.touches(found->second)) { waits.apply(entries_); }
                    else {
                        rest.push_back(std::move(waits));
                    }
                }
                waiting_ = std::move(rest);
            }
            return true;
        }
        if (first.empty()) { return false; }
        const auto from = find(first);
        if (what == "create" || what == "mkdir") {
            return begin({{{from.directory, from.name, 0, add(number, {what == "mkdir", what == "mkdir"})}}});
        }
        if (what == "unlink" || what == "rmdir") { return begin({{{from.directory, from.name, from.node, 0}}}); }
        const auto to = find(second);
        if (what == "link") { return begin({{{to.directory, to.name, 0, from.node}}}); }
        if (what == "exchange") {
            return begin({{{from.directory, from.name, 0, to.node}, {to.directory, to.name, 0, from.node}}});
        }
        if (from.node == to.node) { return false; }
        return begin({{{from.directory, from.name, from.node, 0}, {to.directory, to.name, 0, from.node}}});
    }
    void describe(
        const names_map& names, std::size_t directory, bool zeros, const std::string& at, std::string& text) const
    {
        const auto list = names.find(directory);
        if (list == names.end()) { return; }
        for (const auto& [name, one] : list->second) {
            text += at + name + ' ' + std::to_string(one)
                + (nodes_[one].forced ? nodes_[one].directory ? "d" : "f" + std::to_string(nodes_[one].content.size())
                        : zeros ? "z"
                                      : "p")
                + '\n';
            if (nodes_[one].directory) { describe(names, one, zeros, at + name + '/', text); }
        }
    }
    void build(const names_map& names, std::size_t directory, bool zeros, const std::string& at, disk_tree& tree) const
    {
        const auto list = names.find(directory);
        if (list == names.end()) { return; }
        for (const auto& [name, one] : list->second) {
            const auto& file = nodes_[one];
            tree[at + name] = file.directory ? "directory"
                : file.forced                ? file.content
                : zeros                      ? std::string(64, '\0')
                                             : "half of " + file.content;
            if (file.directory) { build(names, one, zeros, at + name + '/', tree); }
        }
    }

    std::string top_;
    std::vector<node> nodes_; // the folder first
    std::map<unsigned long, std::size_t> by_number_; // by the system's number of a file
    names_map entries_, live_; // on the disk for certain, and as the run sees them
    std::vector<step> waiting_;
};

} // namespace tools_test
