// The documents of a configuration, merged one after another.
// SPDX-License-Identifier: Apache-2.0
#include "config_document.hpp"

#include "scoring.hpp"
#include "words.hpp"

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <memory>
#include <optional>
#include <set>

namespace tool {

namespace configuration {

namespace {

/// The documents of a file.
std::vector<YAML::Node> load(const std::string& config)
{
    const place where(config);
    constexpr std::size_t most = 1 << 20;
    std::error_code ignored;
    if (fs::is_directory(config, ignored)) {
        taskvec::raise<taskvec::io_error>(taskvec::error_code::file_kind,
            "'" + config + "' is a directory; expected a configuration such as config.yml", config);
    }
    std::ifstream file(config, std::ios::binary);
    if (!file) {
        taskvec::raise<taskvec::io_error>(taskvec::error_code::file_not_found,
            "'" + config + "' cannot be read; expected a configuration such as config.yml", config);
    }
    std::string text(most + 1, '\0');
    file.read(text.data(), static_cast<std::streamsize>(text.size()));
    text.resize(static_cast<std::size_t>(file.gcount()));
    if (text.size() > most) {
        taskvec::raise<taskvec::format_error>(
            taskvec::error_code::file_too_large, "'" + config + "' has more than 1 MiB; a configuration is a page", "");
    }
    std::vector<YAML::Node> documents;
    try {
        documents = YAML::LoadAll(text);
    }
    catch (const YAML::Exception& wrong) {
        taskvec::raise<taskvec::format_error>(
            taskvec::error_code::json_syntax, where.of(wrong.mark) + ": this is no YAML: " + wrong.msg, "");
    }
    if (documents.empty() || documents.front().IsNull()) {
        taskvec::raise<taskvec::invalid_argument>(
            taskvec::error_code::option_value, "'" + config + "' is empty; expected merge_method, models and so on");
    }
    constexpr std::size_t many = 100;
    if (documents.size() > many) {
        where.fail(documents[many], taskvec::message("there are more than ", many, " documents"));
    }
    return documents;
}

/// Names of the results of documents; the one whose result goes to --out has none.
std::vector<std::string> names_of_stages(const run_settings& given, const std::vector<YAML::Node>& documents)
{
    const place where(given.config);
    std::vector<std::string> names;
    if (documents.size() == 1) { return {""}; } // a configuration by itself may have a name
    std::optional<YAML::Node> unnamed, last_key;
    for (const auto& document : documents) {
        const mapping top(where, document, "a configuration");
        const auto name = top.find("name");
        if (!name) {
            if (unnamed) {
                where.fail(*unnamed,
                    "'name' is missing, by which another document takes this one's result; the one of "
                        + where.of(document) + " has none either, and one alone goes to --out");
            }
            unnamed.emplace(document);
            names.emplace_back();
            continue;
        }
        last_key.emplace(name->key);
        const auto word = scalar_of(where, name->value, "name");
        if (word.empty() || word.size() > 100 || word.starts_with('.')
            || word.find_first_of(std::string_view("/\\\0", 3)) != word.npos) {
            where.fail(name->value, "name is '" + shown(word) + "'; expected a word without slashes");
        }
        if (std::count(names.begin(), names.end(), word)) {
            where.fail(name->value, "'" + shown(word) + "' is the name of two documents");
        }
        names.push_back(word);
    }
    if (!unnamed) {
        where.fail(*last_key, "every document has a 'name'; expected one without, whose result goes to --out");
    }
    return names;
}

/// Which document is merged when: each after those whose results it takes, else as they stand, the one for --out last.
std::vector<std::size_t> order_of(
    const place& where, const std::vector<std::string>& names, const std::vector<stages_named>& needs)
{
    std::vector<std::size_t> order;
    std::set<std::string> made;
    const auto ready = [&](std::size_t d) {
        return std::all_of(needs[d].begin(), needs[d].end(), [&](const auto& one) { return made.contains(one.first); });
    };
    while (order.size() + 1 < names.size()) {
        std::size_t next = 0;
        while (next < names.size() && (names[next].empty() || made.contains(names[next]) || !ready(next))) { ++next; }
        if (next < names.size()) {
            order.push_back(next);
            made.insert(names[next]);
            continue;
        }
        // Whichever is left needs another that is left: following them comes back to one.
        std::vector<std::size_t> path;
        std::size_t at = 0;
        while (names[at].empty() || made.contains(names[at])) { ++at; }
        const auto needed = [&](std::size_t d) {
            return std::find_if(
                needs[d].begin(), needs[d].end(), [&](const auto& one) { return !made.contains(one.first); });
        };
        while (!std::count(path.begin(), path.end(), at)) {
            path.push_back(at);
            const auto& name = needed(at)->first;
            at = static_cast<std::size_t>(std::find(names.begin(), names.end(), name) - names.begin());
        }
        std::string circle = "'" + names[at] + "'";
        for (auto d = std::find(path.begin(), path.end(), at); d != path.end(); ++d) {
            circle += " takes '" + needed(*d)->first + "'";
            if (d + 1 != path.end()) { circle += ", which"; }
        }
        where.fail(needed(at)->second, "documents wait for each other: " + circle);
    }
    order.push_back(static_cast<std::size_t>(std::find(names.begin(), names.end(), "") - names.begin()));
    return order;
}

/// Merges in stages. The result of a document that others take is worked out while they read it; of what cannot be so,
/// it lies beside the output until that is made. What the former look like, and what all look like that are explained,
/// lies there, or where temporary files do.
void run_stages(run_settings& given, const std::vector<YAML::Node>& documents, const std::vector<std::string>& names)
{
    if (!given.request.resume.directory.empty()) {
        throw usage_error("--resume is for one merge, and '" + given.config
            + "' has several documents, whose results between are new files each time");
    }
    if (given.request.run.dry_run && !given.explain) {
        throw usage_error("--dry-run looks at one merge, and '" + given.config
            + "' has several documents: --explain looks at all of them, or give one of them in a file of its own");
    }
    const auto last =
        fs::path(given.request.out.ends_with('/') ? given.request.out.substr(0, given.request.out.size() - 1)
                                                  : given.request.out);
    const scratch_directory scratch(given.explain ? fs::temp_directory_path()
            : last.has_parent_path()              ? last.parent_path()
                                                  : fs::path("."));
    stages all, made;
    for (const auto& name : names) {
        if (!name.empty()) { all[name] = scratch.path() / name; }
    }
    std::vector<stages_named> needs;
    for (const auto& document : documents) { // what is wrong anywhere is said before any work
        auto trial = given;
        trial.request.run.quiet = true;
        needs.push_back(read_document(trial, document, all, false));
    }
    std::map<std::string, std::shared_ptr<const taskvec::const_model_ref>> unstored;
    for (const auto d : order_of(place(given.config), names, needs)) {
        auto stage = given;
        stage.request.unstored = unstored;
        (void)read_document(stage, documents[d], made, true);
        std::string fate;
        const auto why = names[d].empty() ? "" : why_stored(stage.request);
        if (!names[d].empty()) {
            fate = why.empty() ? "is worked out while it is read" : "is stored until the last merge is done: " + why;
            made[names[d]] = all[names[d]];
            stage.request.out = all[names[d]].string();
            stage.request.run.report.clear();
        }
        stage.request.out += stage.request.out.ends_with('/') ? "" : "/";
        for (const auto& [name, path] : made) {
            stage.request.called[path.string()] = stage.request.called[path.string() + "/"] = name;
        }
        const auto mark = static_cast<unsigned char>(made.size());
        if (given.explain) {
            explain_merge(stage.request, fate);
            if (names[d].empty()) { continue; }
            stage.request.run.quiet = true; // all is said
            outline_merge(stage.request, all[names[d]], mark);
            continue;
        }
        if (!fate.empty()) { note(stage.request.run, "'" + names[d] + "' " + fate); }
        if (names[d].empty() || !why.empty()) { run_merge(stage.request); }
        else {
            unstored[all[names[d]].string()] = merge_unstored(stage.request, all[names[d]], mark);
        }
    }
}

} // namespace

} // namespace configuration

void run_config(run_settings& given)
{
    using namespace configuration;
    const auto documents = load(given.config);
    const auto names = names_of_stages(given, documents);
    if (names.size() > 1) {
        run_stages(given, documents, names);
        return;
    }
    (void)read_document(given, documents.front(), {}, true);
    auto& out = given.request.out;
    if (!out.ends_with('/')) { out += '/'; }
    with_place(given, [&] { given.explain ? explain_merge(given.request) : run_merge(given.request); });
}

} // namespace tool
