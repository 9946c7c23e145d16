// The command line, by CLI11: the one file that knows it.
// SPDX-License-Identifier: Apache-2.0
#include "command.hpp"

#include "arguments.hpp"
#include "build_facts.hpp"
#include "runner.hpp"
#include "words.hpp"

#include <taskvec/core/config.hpp>
#include <taskvec/core/error.hpp>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>

#include <algorithm>
#include <charconv>
#include <exception>
#include <iostream>
#include <map>
#include <memory>
#include <new>
#include <sstream>
#include <string_view>
#include <system_error>
#include <utility>

namespace tool {

namespace {

struct verb_entry {
    int place;
    const char *name, *help;
    void (*describe)(command&);
};
std::vector<verb_entry>& verbs()
{
    static std::vector<verb_entry> list;
    return list;
}

/// The words of an option, where there are such.
std::map<const CLI::Option*, std::vector<std::string>>& words_of()
{
    static std::map<const CLI::Option*, std::vector<std::string>> words;
    return words;
}

/// Options of other programs that a verb knows.
struct foreign_options {
    std::string whose, page; ///< the latter has all of them
    std::vector<std::pair<std::string, std::string>> options{};
};
std::map<const CLI::App*, foreign_options>& foreign_of()
{
    static std::map<const CLI::App*, foreign_options> all;
    return all;
}

/// What another program means by a word that is no option here, the first of a command line; empty where there is none.
std::string foreign_words(const CLI::App& verb)
{
    const auto place = foreign_of().find(&verb);
    if (place == foreign_of().end()) { return ""; }
    const auto& [whose, page, options] = place->second;
    for (const auto& word : command_words()) {
        auto name = word.substr(0, word.find('='));
        if (verb.get_option_no_throw(name)) { continue; }
        if (name.starts_with("--no-")) { name.erase(2, 3); }
        for (const auto& [theirs, instead] : options) {
            if (theirs == name) {
                return "; " + theirs + " is an option of " + whose + ": " + instead + " (" + page + ")";
            }
        }
    }
    return "";
}

/// CLI11 takes -1 for 2^64-1, and 010 for 8.
CLI::Validator decimal_number()
{
    return CLI::Validator(
        [](std::string& text) {
            std::uint64_t value = 0;
            const auto [end, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
            if (failure != std::errc{} || end != text.data() + text.size()) {
                return "'" + text + "' is not a whole number from 0 to 18446744073709551615";
            }
            text = std::to_string(value);
            return std::string();
        },
        "");
}

/// A path that is given is one: an empty word is a variable of a script that was never set.
bool is_path(const std::string& unit)
{
    for (const std::string_view one : {"MODEL", "FILE", "DIR", "PATH", "ADAPTER", "CONFIG", "WHAT"}) {
        if (unit == one) { return true; }
    }
    return false;
}
void refuse_empty(CLI::Option* option, const std::string& name)
{
    option->check(CLI::Validator(
        [name](std::string& text) {
            if (text.empty()) { throw usage_error(name + " is empty; expected a path"); }
            return std::string();
        },
        ""));
}

CLI::Option* finished(CLI::Option* option, const std::string& unit, presence how = presence::optional)
{
    if (is_path(unit)) { refuse_empty(option, option->get_name()); }
    return option->type_name(unit)->required(how == presence::required);
}

int fail(const std::string& what)
{
    if (!take_last_word()) { return 1; }
    std::cerr << "taskvec: error: " << printable(what) << '\n';
    return 1;
}

/// CLI11 says "--base: At Most 1 required but received 2" of what is given twice.
std::string plain(const std::string& what)
{
    constexpr std::string_view once = ": At Most 1 required but received ";
    const auto at = what.find(once);
    if (at == what.npos) { return what; }
    const auto times = what.substr(at + once.size());
    return what.substr(0, at) + " is given " + (times == "2" ? "twice" : times + " times") + "; expected once";
}

/// What the library says, with its code last in the line: the word to look up in docs/errors.md.
int fail(const std::string& what, taskvec::error_code code)
{
    auto text = what;
    constexpr std::string_view mend = "or for clamping"; // what does that is a flag here
    if (code == taskvec::error_code::rank_out_of_range && text.ends_with(mend)) { text += " (--clamp)"; }
    return fail(taskvec::message(text, " [", taskvec::to_string(code), ']'));
}

/// Help in one style for all verbs: the usage line names the verb, examples keep their line breaks.
class formatter final : public CLI::Formatter {
public:
    formatter() { column_width(30); }
    std::string make_usage(const CLI::App* app, std::string) const override { return "Usage: " + usage_of(app) + "\n"; }
    /// What excludes an option is said in its text: beside the unit it would run into that.
    std::string make_option_opts(const CLI::Option* option) const override
    {
        auto text = CLI::Formatter::make_option_opts(option);
        if (const auto at = text.find(" Excludes:"); at != text.npos) { text.resize(at); }
        return text;
    }
    std::string make_option_desc(const CLI::Option* option) const override
    {
        std::string others;
        for (const auto* other : option->get_excludes()) { others += (others.empty() ? "" : ", ") + other->get_name(); }
        return CLI::Formatter::make_option_desc(option) + (others.empty() ? "" : " (not with " + others + ")");
    }
    static std::string usage_of(const CLI::App* app)
    {
        if (app->get_parent() == nullptr) { return "taskvec VERB [OPTIONS]"; }
        return "taskvec " + app->get_name() + make_required_usage(app) + " [OPTIONS]" + make_positionals_usage(app);
    }

private:
    static std::string make_required_usage(const CLI::App* app)
    {
        std::string text;
        for (const auto* option :
            app->get_options([](const CLI::Option* o) { return o->get_required() && !o->get_positional(); })) {
            text += " " + option->get_name() + " " + option->get_type_name();
        }
        return text;
    }
    static std::string make_positionals_usage(const CLI::App* app)
    {
        std::string text;
        for (const auto* option : app->get_options([](const CLI::Option* o) { return o->get_positional(); })) {
            text += option->get_required() ? " " + option->get_name(true) : " [" + option->get_name(true) + "]";
        }
        return text;
    }
};

/// The words as CLI11 wants them, the last one first: `help VERB` is `VERB --help`.
std::vector<std::string> reversed(int count, const char* const* words)
{
    std::vector<std::string> list(words + 1, words + count);
    if (!list.empty() && list[0] == "help") {
        list.erase(list.begin());
        const bool verb = !list.empty()
            && std::any_of(verbs().begin(), verbs().end(), [&](const verb_entry& one) { return one.name == list[0]; });
        if (list.empty() || verb) { list.emplace_back("--help"); } // what is no verb is said to be none
    }
    std::reverse(list.begin(), list.end());
    return list;
}

} // namespace

void command::text(
    const std::string& flag, std::string& value, const std::string& unit, const std::string& help, presence how)
{
    finished(app_->add_option(flag, value, help), unit, how);
}

void command::texts(const std::string& flag, std::vector<std::string>& values, const std::string& unit,
    const std::string& help, presence how)
{
    finished(app_->add_option(flag, values, help), unit, how)->allow_extra_args(false);
}

void command::positional(const std::string& name, std::string& value, const std::string& help, presence how)
{
    auto* const option = app_->add_option(name, value, help)->required(how == presence::required);
    if (is_path(name)) { refuse_empty(option, name); }
}

void command::word(const std::string& flag, std::string& value, const std::vector<std::string>& words,
    const std::string& unit, const std::string& help, bool any_case, presence how)
{
    auto* option = finished(app_->add_option(flag, value, help), unit, how);
    words_of()[option] = words;
    option->transform(CLI::Validator(
        [words, any_case](std::string& text) {
            std::string list;
            if (any_case) { text = lower_case(text); }
            for (const auto& word : words) {
                if (word == text) { return std::string(); }
                list += (list.empty() ? "" : ", ") + word;
            }
            return "'" + text + "' is not one of: " + list;
        },
        ""));
}

void command::number(const std::string& flag, double& value, const std::string& unit, const std::string& help)
{
    finished(app_->add_option(flag, value, help), unit);
}
void command::number(
    const std::string& flag, std::optional<double>& value, const std::string& unit, const std::string& help)
{
    finished(app_->add_option(flag, value, help), unit);
}

void command::count(const std::string& flag, unsigned& value, const std::string& unit, const std::string& help)
{
    finished(app_->add_option(flag, value, help), unit)->transform(decimal_number());
}
void command::count(const std::string& flag, std::size_t& value, const std::string& unit, const std::string& help)
{
    finished(app_->add_option(flag, value, help), unit)->transform(decimal_number());
}
void command::count(
    const std::string& flag, std::optional<std::size_t>& value, const std::string& unit, const std::string& help)
{
    finished(app_->add_option(flag, value, help), unit)->transform(decimal_number());
}

void command::word_or_flag(const std::string& flag, std::string& value, const std::string& alone,
    const std::vector<std::string>& words, const std::string& unit, const std::string& help)
{
    const auto receive = [&value, flag, alone, words](const std::vector<std::string>& texts) {
        value = texts.empty() || texts[0].empty() ? alone : texts[0];
        if (std::find(words.begin(), words.end(), value) != words.end()) { return; }
        std::string list;
        for (const auto& word : words) { list += (list.empty() ? "" : ", ") + word; }
        throw usage_error(flag + " '" + value + "' is none of " + list);
    };
    auto* option = finished(app_->add_option_function<std::vector<std::string>>(flag, receive, help), unit);
    option->expected(0, 1);
    words_of()[option] = words;
}

void command::flag(const std::string& flag, bool& value, const std::string& help)
{
    app_->add_flag(flag, value, help);
}

void command::take(const std::string& flag, const std::string& unit, const std::string& help,
    std::function<void(const std::string&)> receive, bool repeatable)
{
    if (!repeatable) {
        finished(app_->add_option_function<std::string>(flag, std::move(receive), help), unit);
        return;
    }
    take_all(flag, unit, help, [receive = std::move(receive)](const std::vector<std::string>& texts) {
        for (const auto& text : texts) { receive(text); }
    });
}
void command::take(const std::string& flag, const std::string& help, std::function<void()> receive)
{
    app_->add_flag_callback(flag, std::move(receive), help);
}

void command::take_all(const std::string& flag, const std::string& unit, const std::string& help,
    std::function<void(const std::vector<std::string>&)> receive)
{
    finished(app_->add_option_function<std::vector<std::string>>(flag, std::move(receive), help), unit)
        ->allow_extra_args(false);
}

void command::choices(const std::string& flag, const std::vector<std::string>& words)
{
    words_of()[app_->get_option(flag)] = words;
}

void command::exclude(const std::string& flag, const std::string& other)
{
    app_->get_option(flag)->excludes(app_->get_option(other));
}

void command::foreign(
    const std::string& whose, const std::vector<std::pair<std::string, std::string>>& options, const std::string& page)
{
    foreign_of()[app_] = {whose, page, options};
}

void command::footer(const std::string& text)
{
    app_->footer(text);
}

void command::after_parse(hearer hear)
{
    hearers_->push_back(std::move(hear));
}

void command::action(std::function<void()> run)
{
    app_->callback([app = app_, hearers = hearers_, run = std::move(run)] {
        if (!hearers->empty()) {
            std::vector<std::pair<std::string, std::string>> given;
            std::map<const CLI::Option*, std::size_t> seen;
            for (const auto* option : app->parse_order()) {
                const auto& values = option->results();
                const auto i = seen[option]++;
                given.emplace_back(option->get_name(), i < values.size() ? values[i] : std::string());
            }
            for (const auto& hear : *hearers) { hear(given); }
        }
        run();
    });
}

register_verb::register_verb(int place, const char* name, const char* help, void (*describe)(command&))
{
    verbs().push_back({place, name, help, describe});
}

namespace {

/// The tool's options and verbs.
void describe_tool(CLI::App& app)
{
    app.formatter(std::make_shared<formatter>());
    app.set_version_flag("-v,-V,--version", [] { return version_page(); });
    app.require_subcommand(1);
    app.option_defaults()->always_capture_default(false);
    app.footer("'taskvec VERB --help' explains a verb and gives an example.\n"
               "A MODEL is a .safetensors file, or a directory that holds model.safetensors "
               "or\nmodel.safetensors.index.json.");
    std::sort(
        verbs().begin(), verbs().end(), [](const verb_entry& a, const verb_entry& b) { return a.place < b.place; });
    for (const auto& verb : verbs()) {
        command part(*app.add_subcommand(verb.name, verb.help));
        verb.describe(part);
    }
}

constexpr const char* what_it_is =
    "taskvec: merge, prune and reuse fine-tuned models, straight from their safetensors files.";

verb_page page_of(const CLI::App& app)
{
    verb_page page{app.get_parent() == nullptr ? "" : app.get_name(), app.get_description(), formatter::usage_of(&app),
        app.get_footer(), {}};
    for (const auto* option : app.get_options()) {
        option_page one;
        one.positional = option->get_positional();
        if (one.positional) { one.unit = option->get_name(true); }
        else {
            for (const auto& name : option->get_snames()) { one.names.push_back("-" + name); }
            for (const auto& name : option->get_lnames()) { one.names.push_back("--" + name); }
            if (option->get_type_size() > 0) { one.unit = option->get_type_name(); }
        }
        one.help = option->get_description();
        one.required = option->get_required();
        one.value_optional = option->get_items_expected_min() == 0;
        one.repeatable = option->get_items_expected_max() > 1;
        if (const auto words = words_of().find(option); words != words_of().end()) { one.words = words->second; }
        page.options.push_back(std::move(one));
    }
    return page;
}

} // namespace

std::vector<verb_page> command_pages()
{
    CLI::App app(what_it_is, "taskvec");
    describe_tool(app);
    std::vector<verb_page> pages{page_of(app)};
    for (const auto* verb : app.get_subcommands([](const CLI::App*) { return true; })) {
        pages.push_back(page_of(*verb));
    }
    return pages;
}

int run_command_line(int count, const char* const* words)
{
    CLI::App app(what_it_is, "taskvec");
    // Wrong usage: one line too, with the usage of the verb, as far as one was named.
    const auto misused = [&](const std::string& what) {
        const CLI::App* verb = &app;
        for (const auto* named : app.get_subcommands()) { verb = named; }
        fail(what + " (usage: " + formatter::usage_of(verb) + "; see 'taskvec"
            + (verb == &app ? "" : " " + verb->get_name()) + " --help')");
        return 2;
    };
    command_words().assign(words + 1, words + count);
    auto given = reversed(count, words);
    const std::string first = given.empty() ? "" : given.back();
    try {
        describe_tool(app);
        app.parse(std::move(given));
        return 0;
    }
    catch (const CLI::Success& done) { // --help, --version
        std::ostringstream text;
        (void)app.exit(done, text, text);
        try {
            print(text.str());
            return 0;
        }
        catch (const taskvec::error& failure) {
            return fail(failure.what(), failure.code());
        }
    }
    catch (const CLI::ParseError& wrong) {
        if (const auto named = app.get_subcommands(); !named.empty()) {
            return misused(plain(wrong.what()) + foreign_words(*named.back()));
        }
        const bool word = !first.empty() && first[0] != '-';
        return misused(word ? "'" + first + "' is none of the verbs" : "a verb is required");
    }
    catch (const usage_error& wrong) {
        return misused(wrong.what());
    }
    catch (const taskvec::cancelled&) {
        return fail("interrupted; " + (interrupt_leaves().empty() ? "no output was written" : interrupt_leaves()));
    }
    catch (const std::bad_alloc&) { // what says so takes no memory itself
        if (are_outputs_there()) { return 0; }
        say_plainly("taskvec: error: out of memory: use fewer --threads or a smaller --memory\n");
        return 1;
    }
    catch (const taskvec::error& failure) {
        return fail(failure.what(), failure.code());
    }
    catch (const std::system_error& failure) {
        if (failure.code() == std::errc::resource_unavailable_try_again) {
            return fail("a thread cannot be started: use fewer --threads, or allow more processes (ulimit -u): "
                + std::string(failure.what()));
        }
        return fail(failure.what());
    }
    catch (const std::exception& failure) { // whatever the system throws
        return fail(failure.what());
    }
}

} // namespace tool
