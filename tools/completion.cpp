// taskvec completion: what shells offer for a command line that is being typed, from the tables that --help prints.
// SPDX-License-Identifier: Apache-2.0
#include "arguments.hpp"
#include "command.hpp"
#include "outputs.hpp"
#include "words.hpp"

#include <memory>
#include <string_view>

namespace {

using tool::option_page;
using tool::verb_page;

/// What a value is: one of a few words, a path, or what no shell can know.
enum class value_kind { none, words, directory, path, free };

value_kind kind_of(const option_page& option)
{
    if (option.unit.empty()) { return value_kind::none; }
    if (!option.words.empty()) { return value_kind::words; }
    const std::string_view unit = option.unit;
    if (unit.starts_with("DIR")) { return value_kind::directory; }
    for (const char* path : {"PATH", "FILE", "MODEL", "ADAPTER", "CONFIG"}) {
        if (unit.starts_with(path)) { return value_kind::path; }
    }
    return value_kind::free;
}

std::string joined(const std::vector<std::string>& words, const char* between = " ")
{
    std::string text;
    for (const auto& word : words) { text += (text.empty() ? "" : between) + word; }
    return text;
}

/// The verbs, as a word of a command line.
std::vector<std::string> verb_names(const std::vector<verb_page>& pages)
{
    std::vector<std::string> names;
    for (const auto& page : pages) {
        if (!page.name.empty()) { names.push_back(page.name); }
    }
    return names;
}

/// What stands by itself in a verb's command line, if anything does.
option_page positional_of(const verb_page& page, const std::vector<verb_page>& pages)
{
    for (const auto& option : page.options) {
        if (!option.positional) { continue; }
        option_page one = option;
        if (one.unit == "VERB") { one.words = verb_names(pages); }
        return one;
    }
    return {};
}

constexpr const char* made_by = "# Made by 'taskvec completion' from the tables of the command line.\n"
                                "# SPDX-License-Identifier: Apache-2.0\n";

/// How bash makes a list of values.
std::string bash_values(const option_page& option)
{
    switch (kind_of(option)) {
    case value_kind::words: return "-W '" + joined(option.words) + "'";
    case value_kind::directory: return "-d";
    case value_kind::path: return "-f";
    default: return "";
    }
}

std::string bash(const std::vector<verb_page>& pages)
{
    std::string verbs = joined(verb_names(pages));
    std::string text = std::string(made_by) + R"(
_taskvec_offer()
{
    mapfile -t COMPREPLY < <(compgen "$@" -- "$word")
}

_taskvec()
{
    # Bash takes '=' for the end of a word.
    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} verb=${COMP_WORDS[1]}
    [[ $word == "=" ]] && word=
    [[ $before == "=" && $COMP_CWORD -gt 2 ]] && before=${COMP_WORDS[COMP_CWORD-2]}
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        _taskvec_offer -W 'help )"
        + verbs;
    for (const auto& option : pages[0].options) { text += " " + joined(option.names); }
    text += R"('
        return
    fi
    case $verb in
        help)
            ((COMP_CWORD == 2)) && _taskvec_offer -W ')"
        + verbs + "'\n            return ;;\n";
    for (const auto& page : pages) {
        if (page.name.empty()) { continue; }
        text += "        " + page.name + ")\n            case $before in\n";
        std::string flags;
        for (const auto& option : page.options) {
            if (option.positional) { continue; }
            flags += (flags.empty() ? "" : " ") + joined(option.names);
            if (kind_of(option) == value_kind::none || option.value_optional) { continue; }
            const auto values = bash_values(option);
            text += "                " + joined(option.names, " | ") + ") "
                + (values.empty() ? "" : "_taskvec_offer " + values + "; ") + "return ;;\n";
        }
        text += "            esac\n            if [[ $word == -* ]]; then _taskvec_offer -W '" + flags + "'\n";
        const auto by_itself = bash_values(positional_of(page, pages));
        text += "            else _taskvec_offer " + (by_itself.empty() ? "-W '" + flags + "'" : by_itself)
            + "\n            fi ;;\n";
    }
    return text + R"(    esac
    # A folder's name goes on; a word is done.
    [[ ${#COMPREPLY[@]} -eq 1 && -d ${COMPREPLY[0]} ]] && { COMPREPLY[0]+=/; compopt -o nospace 2>/dev/null; }
    return 0
}
complete -F _taskvec taskvec
)";
}

/// Text between single quotes; inside _arguments brackets and colons have a meaning.
std::string zsh_text(const std::string& text, bool of_argument = true)
{
    std::string result;
    for (const char c : text) {
        if (c == '\'') { result += "'\\''"; }
        else if (c == '\\' || (of_argument && (c == '[' || c == ']')) || c == ':') {
            result += std::string("\\") + c;
        }
        else {
            result += c == '\n' ? ' ' : c;
        }
    }
    return result;
}

std::string zsh_action(const option_page& option)
{
    switch (kind_of(option)) {
    case value_kind::words: return "(" + joined(option.words) + ")";
    case value_kind::directory: return "_files -/";
    case value_kind::path: return "_files";
    default: return "";
    }
}

std::string zsh_option(const option_page& option)
{
    std::string text, names;
    for (const auto& name : option.names) { names += (names.empty() ? "" : ",") + name; }
    std::string rest = "[" + zsh_text(option.help) + "]";
    if (kind_of(option) != value_kind::none) {
        rest += std::string(option.value_optional ? "::" : ":") + zsh_text(option.unit) + ":"
            + (option.value_optional ? "" : zsh_action(option));
    }
    for (const auto& name : option.names) {
        text += " \\\n                '" + std::string(option.repeatable ? "*" : "") + name + rest + "'";
    }
    return text;
}

std::string zsh(const std::vector<verb_page>& pages)
{
    std::string text = "#compdef taskvec\n" + std::string(made_by) + R"(
_taskvec()
{
    local -a verbs
    verbs=(
)";
    for (const auto& page : pages) {
        if (page.name.empty()) { continue; }
        text += "        '" + page.name + ":" + zsh_text(page.help, false) + "'\n";
    }
    text += R"(        'help:Explain a verb'
    )
    if ((CURRENT == 2)); then
        _describe -t verbs 'verb' verbs
        _arguments)";
    for (const auto& option : pages[0].options) { text += zsh_option(option); }
    text += R"(
        return
    fi
    local verb=$words[2]
    shift words
    ((CURRENT--))
    case $verb in
        help) ((CURRENT == 2)) && _describe -t verbs 'verb' verbs ;;
)";
    for (const auto& page : pages) {
        if (page.name.empty()) { continue; }
        text += "        " + page.name + ")\n            _arguments";
        for (const auto& option : page.options) {
            if (!option.positional) { text += zsh_option(option); }
        }
        const auto one = positional_of(page, pages);
        if (!one.unit.empty()) {
            text += " \\\n                '1:" + zsh_text(one.unit) + ":"
                + (one.words.empty() ? zsh_action(one) : "(" + joined(one.words) + ")") + "'";
        }
        text += " ;;\n";
    }
    return text + R"(    esac
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _taskvec "$@"; else compdef _taskvec taskvec; fi
)";
}

std::string fish_text(const std::string& text)
{
    std::string result;
    for (const char c : text) {
        if (c == '\'' || c == '\\') { result += '\\'; }
        result += c == '\n' ? ' ' : c;
    }
    return result;
}

std::string fish_option(const option_page& option, const std::string& condition)
{
    std::string text = "complete -c taskvec" + condition;
    for (const auto& name : option.names) {
        text += name.starts_with("--") ? " -l " + name.substr(2) : " -s " + name.substr(1);
    }
    switch (kind_of(option)) {
    case value_kind::none: break;
    case value_kind::words: text += (option.value_optional ? " -a '" : " -x -a '") + joined(option.words) + "'"; break;
    case value_kind::directory: text += " -x -a '(__fish_complete_directories)'"; break;
    case value_kind::path: text += " -r -F"; break;
    case value_kind::free: text += " -x"; break;
    }
    return text + " -d '" + fish_text(option.help) + "'\n";
}

std::string fish(const std::vector<verb_page>& pages)
{
    const std::string none = " -n __fish_use_subcommand";
    std::string text = std::string(made_by) + "complete -c taskvec -f\n";
    for (const auto& page : pages) {
        text += "complete -c taskvec" + none + " -a " + (page.name.empty() ? "help" : page.name) + " -d '"
            + (page.name.empty() ? "Explain a verb" : fish_text(page.help)) + "'\n";
    }
    for (const auto& option : pages[0].options) { text += fish_option(option, none); }
    text += "complete -c taskvec -n '__fish_seen_subcommand_from help' -a '" + joined(verb_names(pages)) + "'\n";
    for (const auto& page : pages) {
        if (page.name.empty()) { continue; }
        const std::string condition = " -n '__fish_seen_subcommand_from " + page.name + "'";
        for (const auto& option : page.options) {
            if (!option.positional) { text += fish_option(option, condition); }
        }
        const auto one = positional_of(page, pages);
        if (!one.words.empty()) { text += "complete -c taskvec" + condition + " -a '" + joined(one.words) + "'\n"; }
        else if (kind_of(one) == value_kind::path) {
            text += "complete -c taskvec" + condition + " -F\n";
        }
        else if (kind_of(one) == value_kind::directory) {
            text += "complete -c taskvec" + condition + " -a '(__fish_complete_directories)'\n";
        }
    }
    return text;
}

struct completion_settings {
    std::string shell, out;
};

const tool::register_verb completion_verb(
    130, "completion", "Print the completions of the command line for a shell", [](tool::command& verb) {
        const auto given = std::make_shared<completion_settings>();
        verb.positional("SHELL", given->shell, "bash, zsh or fish");
        verb.choices("SHELL", {"bash", "zsh", "fish"});
        verb.text("--out", given->out, "FILE", "Write them there");
        verb.footer("An installed package has put them in place already.\n\n"
                    "Example:\n  taskvec completion bash --out ~/.local/share/bash-completion/completions/taskvec");
        verb.action([given] {
            std::string (*write)(const std::vector<verb_page>&) = nullptr;
            if (given->shell == "bash") { write = bash; }
            else if (given->shell == "zsh") {
                write = zsh;
            }
            else if (given->shell == "fish") {
                write = fish;
            }
            else {
                throw tool::usage_error("'" + given->shell + "' is none of bash, zsh, fish");
            }
            const auto text = write(tool::command_pages());
            if (given->out.empty()) { tool::print(text); }
            else {
                tool::text_output file(given->out);
                file.finish_text(text);
                file.commit();
            }
        });
    });

} // namespace
