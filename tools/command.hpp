// A verb's part of the command line. Only command.cpp knows the library that parses it.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace CLI {
class App;
}

namespace tool {

enum class presence { optional, required };

/// A verb's options. Each is bound to a variable that outlives the parse. `unit` stands for the value in the help.
class command {
public:
    explicit command(CLI::App& app)
        : app_(&app)
    { }

    void text(const std::string& flag, std::string& value, const std::string& unit, const std::string& help,
        presence how = presence::optional);
    /// Repeatable, one value each.
    void texts(const std::string& flag, std::vector<std::string>& values, const std::string& unit,
        const std::string& help, presence how = presence::optional);
    /// What stands by itself.
    void positional(
        const std::string& name, std::string& value, const std::string& help, presence how = presence::required);
    /// One of a few words. `any_case`: upper case is lowered first.
    void word(const std::string& flag, std::string& value, const std::vector<std::string>& words,
        const std::string& unit, const std::string& help, bool any_case = false, presence how = presence::optional);
    /// One of a few words, or none: the flag alone means `alone`.
    void word_or_flag(const std::string& flag, std::string& value, const std::string& alone,
        const std::vector<std::string>& words, const std::string& unit, const std::string& help);
    void number(const std::string& flag, double& value, const std::string& unit, const std::string& help);
    void number(
        const std::string& flag, std::optional<double>& value, const std::string& unit, const std::string& help);
    /// Digits and nothing else, in base ten.
    void count(const std::string& flag, unsigned& value, const std::string& unit, const std::string& help);
    void count(const std::string& flag, std::size_t& value, const std::string& unit, const std::string& help);
    void count(
        const std::string& flag, std::optional<std::size_t>& value, const std::string& unit, const std::string& help);
    void flag(const std::string& flag, bool& value, const std::string& help);
    /// Hands the text on, where there is one (each, where it may be repeated); the receiver checks it.
    void take(const std::string& flag, const std::string& unit, const std::string& help,
        std::function<void(const std::string&)> receive, bool repeatable = false);
    /// The same for what has no value.
    void take(const std::string& flag, const std::string& help, std::function<void()> receive);
    /// All values of what may be repeated.
    void take_all(const std::string& flag, const std::string& unit, const std::string& help,
        std::function<void(const std::vector<std::string>&)> receive);
    /// The words that an option's receiver accepts, for completions.
    void choices(const std::string& flag, const std::vector<std::string>& words);
    /// Two options that may not both be given.
    void exclude(const std::string& flag, const std::string& other);
    /// Hears, before the verb acts, of all options and values in the order of the command line.
    void after_parse(std::function<void(const std::vector<std::pair<std::string, std::string>>&)> hear);
    /// What another program, `whose`, calls its options, and what to do instead: said where one of them is given here.
    void foreign(const std::string& whose, const std::vector<std::pair<std::string, std::string>>& options,
        const std::string& page);
    /// What follows the options in the help: explanations, an example.
    void footer(const std::string& text);
    /// What the verb does.
    void action(std::function<void()> run);

private:
    using hearer = std::function<void(const std::vector<std::pair<std::string, std::string>>&)>;
    CLI::App* app_;
    std::shared_ptr<std::vector<hearer>> hearers_ = std::make_shared<std::vector<hearer>>();
};

/// A verb adds itself to the command line. Each tools/<verb>.cpp has one, and no other file names it:
///
///     const tool::register_verb verb(40, "apply", "Add a delta to …", [](tool::command& verb) { … });
struct register_verb {
    /// `place`: in the list of verbs.
    register_verb(int place, const char* name, const char* help, void (*describe)(command&));
};

/// What is known of an option: for man pages and completions.
struct option_page {
    std::vector<std::string> names; ///< "-h", "--help"; a positional has none
    std::string unit; ///< what stands for the value, or the positional's name; empty where there is none
    std::string help;
    std::vector<std::string> words; ///< that the value is one of, where there are such
    bool positional = false, required = false, repeatable = false, value_optional = false;
};
/// What is known of a verb, or, with an empty name, of the tool itself.
struct verb_page {
    std::string name, help, usage, footer;
    std::vector<option_page> options;
};
/// The tool itself, then every verb, as --help lists them.
[[nodiscard]] std::vector<verb_page> command_pages();

/// Parses and runs a command line: the exit code.
[[nodiscard]] int run_command_line(int count, const char* const* words);

} // namespace tool
