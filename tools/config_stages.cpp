// The documents of a configuration, merged one after another.
// SPDX-License-Identifier: Apache-2.0
#include "config_document.hpp"
#include "config_results.hpp"
#include "mergekit_words.hpp"

#include "scoring.hpp"
#include "words.hpp"

#include <yaml-cpp/eventhandler.h>

#include <algorithm>
#include <cstddef>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <sstream>
#include <string_view>
#include <utility>

namespace tool {

namespace configuration {

namespace {

std::string read_text(const std::string& config)
{
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
    return text;
}

/// Stops where yaml-cpp would find documents without an end: it makes one of a token that may not stand there, such as
/// a comma, and takes nothing for it. And where lists and mappings stand in each other deeper than it goes.
class first_look final : public YAML::EventHandler {
public:
    explicit first_look(const place& where)
        : where_(where)
    { }
    void OnDocumentStart(const YAML::Mark& mark) override
    {
        if (before_ && *before_ == mark.pos) {
            refuse(mark, "this is no YAML: nothing can begin with what stands here");
        }
        before_ = mark.pos;
    }
    void OnDocumentEnd() override { }
    void OnNull(const YAML::Mark&, YAML::anchor_t) override { }
    void OnAlias(const YAML::Mark&, YAML::anchor_t) override { }
    void OnScalar(const YAML::Mark&, const std::string&, YAML::anchor_t, const std::string&) override { }
    void OnSequenceStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override
    {
        open(mark);
    }
    void OnSequenceEnd() override { --depth_; }
    void OnMapStart(const YAML::Mark& mark, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override
    {
        open(mark);
    }
    void OnMapEnd() override { --depth_; }

private:
    [[noreturn]] void refuse(const YAML::Mark& mark, const std::string& what) const
    {
        taskvec::raise<taskvec::format_error>(taskvec::error_code::json_syntax, where_.of(mark) + ": " + what, "");
    }
    void open(const YAML::Mark& mark)
    {
        constexpr std::size_t most = 50;
        if (++depth_ > most) {
            refuse(mark,
                taskvec::message("more than ", most,
                    " lists and mappings stand in each other here; a "
                    "configuration has less than ten"));
        }
    }

    const place& where_;
    std::size_t depth_ = 0;
    std::optional<int> before_;
};

/// The documents of a file.
std::vector<YAML::Node> load(const std::string& config)
{
    const place where(config);
    const auto text = read_text(config);
    std::vector<YAML::Node> documents;
    try {
        std::istringstream stream(text);
        YAML::Parser parser(stream);
        first_look look(where);
        while (parser.HandleNextDocument(look)) { }
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
    constexpr std::size_t most = 100;
    if (documents.size() > most) {
        where.fail(documents[most], taskvec::message("there are more than ", most, " documents"));
    }
    return documents;
}

/// The `name` of a document, which is none of those before.
std::string name_of_stage(const place& where, const mapping::entry& name, const std::vector<std::string>& others)
{
    auto word = scalar_of(where, name.value, "name");
    if (word.empty() || word.size() > 100 || word.starts_with('.')
        || word.find_first_of(std::string_view("/\\\0", 3)) != word.npos) {
        where.fail(name.value, "name is '" + shown(word) + "'; expected a word without slashes");
    }
    if (std::count(others.begin(), others.end(), word)) {
        where.fail(name.value, "'" + shown(word) + "' is the name of two documents");
    }
    return word;
}

/// Names of the results of several documents; the one whose result goes to --out has none.
std::vector<std::string> names_of_stages(const run_settings& given, const std::vector<YAML::Node>& documents)
{
    const place where(given.config);
    std::vector<std::string> names;
    std::optional<YAML::Node> unnamed, last_key;
    for (const auto& document : documents) {
        const auto name = mapping(where, document, "a configuration").find("name");
        if (!name && unnamed) {
            where.fail(*unnamed,
                "'name' is missing, by which another document takes this one's result; the one of " + where.of(document)
                    + " has none either, and one alone goes to --out");
        }
        if (name) { last_key.emplace(name->key); }
        else {
            unnamed.emplace(document);
        }
        names.push_back(name ? name_of_stage(where, *name, names) : "");
    }
    if (!unnamed) {
        where.fail(*last_key, "every document has a 'name'; expected one without, whose result goes to --out");
    }
    return names;
}

/// Says which documents wait for each other: whichever is left needs another that is left, and following them comes
/// back to one. `left`: the first of them.
[[noreturn]] void refuse_circle(const place& where, const std::vector<std::string>& names,
    const std::vector<stages_named>& needs, const std::set<std::string>& made, std::size_t left)
{
    const auto needed = [&](std::size_t d) {
        return std::find_if(
            needs[d].begin(), needs[d].end(), [&](const auto& one) { return !made.contains(one.first); });
    };
    std::vector<std::size_t> path;
    std::size_t at = left;
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

/// Which document is merged when: each after those whose results it takes, else as they stand, the one for --out last.
std::vector<std::size_t> order_of(
    const place& where, const std::vector<std::string>& names, const std::vector<stages_named>& needs)
{
    std::vector<std::size_t> order;
    std::set<std::string> made;
    const auto is_left = [&](std::size_t d) { return !names[d].empty() && !made.contains(names[d]); };
    const auto is_ready = [&](std::size_t d) {
        return std::all_of(needs[d].begin(), needs[d].end(), [&](const auto& one) { return made.contains(one.first); });
    };
    while (order.size() + 1 < names.size()) {
        std::size_t next = 0;
        while (next < names.size() && !(is_left(next) && is_ready(next))) { ++next; }
        if (next == names.size()) {
            std::size_t left = 0;
            while (!is_left(left)) { ++left; }
            refuse_circle(where, names, needs, made, left);
        }
        order.push_back(next);
        made.insert(names[next]);
    }
    order.push_back(static_cast<std::size_t>(std::find(names.begin(), names.end(), "") - names.begin()));
    return order;
}

/// How often a request reads the model that lies there, each time it reads all of its models.
std::size_t times_taken(const merge_request& request, const std::string& path)
{
    const auto in_view = [&](const model_view& view) {
        return std::any_of(view.begin(), view.end(), [&](const layer_part& part) { return part.path == path; });
    };
    const auto is_it = [&](const std::string& key, const std::string& plain) {
        const auto view = request.views.find(key);
        return view == request.views.end() ? plain == path : in_view(view->second);
    };
    std::size_t times = !request.base.empty() && is_it("", request.base) ? 1 : 0;
    for (const auto& task : parse_tasks(request.tasks)) {
        const auto host = request.adapters.find(task.text);
        const auto& base = host == request.adapters.end() ? task.path.string()
            : host->second.empty()                        ? request.base
                                                          : host->second;
        times += is_it(task.text, base) ? 1 : 0;
    }
    return times;
}

/// What the result of a document was made of: where that is the result of another, what this was made of.
std::vector<ingredient> ingredients_of(const merge_request& request, const std::string& name)
{
    std::vector<ingredient> all;
    std::set<std::string> seen;
    const auto add = [&](const std::string& role, const std::string& path, double weight = 1, bool adapter = false) {
        if (!seen.insert(path).second) { return; }
        const auto place = request.made_of.find(path);
        if (place == request.made_of.end()) { all.push_back({role + " of '" + name + "'", path, weight, adapter}); }
        else {
            all.insert(all.end(), place->second.begin(), place->second.end());
        }
    };
    if (!request.base.empty()) { add("base", request.base); }
    if (!request.base_adapter.empty()) {
        add("adapter on the base", parse_task(request.base_adapter, "an adapter").path.string(), 1, true);
    }
    for (const auto& task : parse_tasks(request.tasks)) {
        const auto host = request.adapters.find(task.text);
        const bool adapter = host != request.adapters.end();
        if (adapter && !host->second.empty()) { add("task", host->second); }
        add(adapter ? "adapter" : "task", task.path.string(), task.weight, adapter);
    }
    for (const auto& [key, view] : request.views) {
        for (const auto& part : view) { add("layers", part.path); }
    }
    return all;
}

/// Where results between lie: beside the output, or where temporary files do when nothing is written.
fs::path folder_of_stages(const run_settings& given)
{
    if (given.explain) { return fs::temp_directory_path(); }
    const auto& out = given.request.out;
    const fs::path last(out.ends_with('/') ? out.substr(0, out.size() - 1) : out);
    return last.has_parent_path() ? last.parent_path() : fs::path(".");
}

/// A merge in stages. The result of a document that others take is worked out while they read it; of what cannot be so,
/// or would be too often, it lies beside the output until that is made. What the former look like, and what all look
/// like that are explained, lies there, or where temporary files do.
class staged_merge {
public:
    /// `names`: of the results of the documents.
    staged_merge(const run_settings& given, const std::vector<YAML::Node>& documents, std::vector<std::string> names)
        : given_(given)
        , documents_(documents)
        , names_(std::move(names))
        , scratch_(folder_of_stages(given))
    { }

    void run()
    {
        stages all;
        for (const auto& name : names_) {
            if (!name.empty()) { all[name] = scratch_.path() / name; }
        }
        std::vector<stages_named> needs;
        std::vector<merge_request> trials;
        for (const auto& document : documents_) { // what is wrong anywhere is said before any work
            auto trial = given_;
            trial.request.run.quiet = true;
            needs.push_back(read_document(trial, document, all, false));
            trials.push_back(std::move(trial.request));
        }
        const auto order = order_of(place(given_.config), names_, needs);
        find_stored(order, needs, trials, all);
        for (const auto d : order) {
            auto stage = given_;
            stage.request.unstored = unstored_;
            stage.request.made_of = made_of_;
            (void)read_document(stage, documents_[d], made_, true);
            with_place(stage, [&] { names_[d].empty() ? merge_last(stage) : merge_between(stage, names_[d]); });
        }
    }

private:
    /// Finds why results are stored. Each is worked out whenever a merge reads it that is itself worked out, or stored:
    /// numbers of which the one multiplies the other, until a result is stored.
    void find_stored(const std::vector<std::size_t>& order, const std::vector<stages_named>& needs,
        const std::vector<merge_request>& trials, const stages& all)
    {
        constexpr std::size_t most = 8;
        std::map<std::string, std::size_t> times;
        for (auto d = order.rbegin(); d != order.rend(); ++d) { // who takes a result stands before it
            const auto& request = trials[*d];
            std::size_t own = 1;
            if (const auto& name = names_[*d]; !name.empty()) {
                auto why = why_stored(request);
                if (why.empty() && times[name] > most) {
                    why = taskvec::message("it would be worked out ", times[name], " times");
                }
                if (why.empty()) { own = times[name]; }
                why_stored_[name] = std::move(why);
            }
            for (const auto& one : needs[*d]) {
                const auto reads = times_taken(request, all.at(one.first).string());
                times[one.first] += reads * (walks_of(request) - 1 + own);
            }
        }
    }

    /// How often a merge reads its models.
    [[nodiscard]] static std::size_t walks_of(const merge_request& request)
    {
        for (const auto& method : mergekit_methods()) {
            if (method.ours == request.method) { return method.walks; }
        }
        return 1;
    }

    void merge_last(run_settings& stage)
    {
        stage.request.out += stage.request.out.ends_with('/') ? "" : "/";
        call_stages(stage.request);
        given_.explain ? explain_merge(stage.request) : run_merge(stage.request);
    }

    void merge_between(run_settings& stage, const std::string& name)
    {
        const auto& why = why_stored_.at(name);
        const auto fate =
            why.empty() ? "is worked out while it is read" : "is stored until the last merge is done: " + why;
        const auto folder = scratch_.path() / name;
        made_[name] = folder;
        made_of_[folder.string()] = ingredients_of(stage.request, name);
        stage.request.out = folder.string() + "/";
        stage.request.run.report.clear();
        call_stages(stage.request);
        const auto mark = static_cast<unsigned char>(made_.size());
        if (given_.explain) {
            explain_merge(stage.request, fate);
            stage.request.run.quiet = true; // all is said
            outline_merge(stage.request, folder, mark);
            return;
        }
        note(stage.request.run, "'" + name + "' " + fate);
        if (why.empty()) {
            unstored_[folder.string()] = as_result_of(name, merge_unstored(stage.request, folder, mark));
        }
        else {
            as_result_of(name, [&] { run_merge(stage.request); });
        }
    }

    /// What lies under the paths of results is called by their names.
    void call_stages(merge_request& request) const
    {
        for (const auto& [name, path] : made_) {
            request.called[path.string()] = request.called[path.string() + "/"] = name;
        }
    }

    const run_settings& given_;
    const std::vector<YAML::Node>& documents_;
    const std::vector<std::string> names_;
    const scratch_directory scratch_;
    stages made_;
    std::map<std::string, std::vector<ingredient>> made_of_; ///< results, by where they lie
    std::map<std::string, std::string> why_stored_; ///< results, by their names; empty: they are not
    std::map<std::string, std::shared_ptr<const taskvec::const_model_ref>> unstored_; ///< by where they would lie
};

/// Throws usage_error for options that are about one merge.
void check_for_stages(const run_settings& given)
{
    if (!given.request.resume.directory.empty()) {
        throw usage_error("--resume is for one merge, and '" + given.config
            + "' has several documents, whose results between are new files each time");
    }
    if (given.request.run.dry_run && !given.explain) {
        throw usage_error("--dry-run looks at one merge, and '" + given.config
            + "' has several documents: --explain looks at all of them, or give one of them in a file of its own");
    }
}

} // namespace

} // namespace configuration

void run_config(run_settings& given)
{
    using namespace configuration;
    const auto documents = load(given.config);
    if (documents.size() > 1) {
        auto names = names_of_stages(given, documents);
        check_for_stages(given);
        staged_merge(given, documents, std::move(names)).run();
        return;
    }
    (void)read_document(given, documents.front(), {}, true); // which may have a name
    auto& out = given.request.out;
    if (!out.ends_with('/')) { out += '/'; }
    with_place(given, [&] { given.explain ? explain_merge(given.request) : run_merge(given.request); });
}

} // namespace tool
