// taskvec methods: the merge methods and their options, from their tables.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"
#include "pruning.hpp"
#include "words.hpp"

#include <memory>

namespace {

struct list_methods_settings {
    std::string method;
    bool markdown = false;
};

/// "`--t X`", "`--unclamped`".
std::string flag_of(const taskvec::option_description& option)
{
    if (option.kind == taskvec::option_kind::truth) {
        return "--" + (option.negated.empty() ? option.name : option.negated);
    }
    return "--" + option.name + " " + option.unit;
}

std::string meaning_of(const taskvec::option_description& option)
{
    return option.negated.empty() ? option.meaning : "do not " + option.meaning;
}

std::string default_of(const taskvec::option_description& option)
{
    return option.kind == taskvec::option_kind::truth ? "off" : option.initial;
}

std::string values_of(const taskvec::option_description& option)
{
    if (option.kind == taskvec::option_kind::truth) { return ""; }
    if (option.words.empty()) { return option.expected; }
    std::string text;
    for (const auto& word : option.words) { text += (text.empty() ? "" : ", ") + word; }
    return text;
}

/// A line without the breaks that the help has in it.
std::string one_line(const std::string& text)
{
    std::string line;
    for (const char c : text) {
        const bool space = c == ' ' || c == '\n';
        if (!space || line.empty() || line.back() != ' ') { line += space ? ' ' : c; }
    }
    return line;
}

struct page {
    std::string name, line;
    bool needs_base = true, weighted = true;
    std::vector<taskvec::option_description> options;
    std::vector<tool::list_option> lists;
    std::vector<std::string> aliases{};
};

/// " `--method linear` is the same.": nothing where there is no other name.
std::string aliases_of(const page& one, const std::string& quote)
{
    std::string text;
    for (const auto& alias : one.aliases) { text += (text.empty() ? "" : ", ") + quote + "--method " + alias + quote; }
    return text.empty() ? text : " The same: " + text + ".";
}

std::string markdown_of(const page& one)
{
    std::string text = "\n## " + one.name + "\n\n" + one_line(one.line) + "." + aliases_of(one, "`") + "\n";
    if (one.options.empty() && one.lists.empty()) { return text; }
    std::string rows;
    for (const auto& option : one.options) {
        if (option.per_task) { continue; }
        rows += "| `" + flag_of(option) + "` | " + meaning_of(option) + " | " + values_of(option) + " | "
            + default_of(option) + " |\n";
    }
    for (const auto& list : one.lists) {
        rows += "| `--" + list.name + " " + list.unit + "` | " + list.help + " | | |\n";
    }
    return rows.empty() ? text : text + "\n| option | | values | default |\n|---|---|---|---|\n" + rows;
}

std::string plain_of(const page& one)
{
    const auto aliases = aliases_of(one, "");
    std::string text = one.name + ": " + one_line(one.line) + (aliases.empty() ? "" : "." + aliases) + "\n";
    for (const auto& option : one.options) {
        if (option.per_task) { continue; }
        const auto values = values_of(option);
        text += "  " + flag_of(option) + "  " + meaning_of(option) + (values.empty() ? "" : " (" + values + ")")
            + ", default " + default_of(option) + "\n";
    }
    for (const auto& list : one.lists) { text += "  --" + list.name + " " + list.unit + "  " + list.help + "\n"; }
    return text;
}

std::vector<page> pages()
{
    std::vector<page> list;
    for (const auto& entry : tool::all_methods()) {
        list.push_back(
            {entry.name, entry.line, entry.needs_base, entry.weighted, entry.options, entry.lists, entry.aliases});
    }
    return list;
}

void list_methods(const list_methods_settings& given)
{
    std::string text;
    const auto* const chosen = tool::method_named(given.method);
    for (const auto& one : pages()) {
        if (!given.method.empty() && (!chosen || one.name != chosen->name)) { continue; }
        text += given.markdown ? markdown_of(one) : (text.empty() ? "" : "\n") + plain_of(one);
    }
    if (text.empty()) { throw tool::usage_error("'" + given.method + "' is none of the methods"); }
    if (given.markdown && given.method.empty()) {
        const auto pruning = tool::pruning_table();
        text =
            "# Methods and their options\n\n"
            "Made by `taskvec methods --markdown` from the tables beside the options structs; the suite compares the "
            "two.\nset_option() in C++ takes the same names, without the hyphens before them.\n"
            + text + "\n# Pruning\n"
            + markdown_of({pruning.name,
                "the largest entries of a task vector (Post-Pruning), also the second half of "
                "peru-fft",
                true, false, pruning.options, {}});
    }
    tool::print(text);
}

const tool::register_verb list_methods_verb(
    120, "methods", "List the merge methods and their options", [](tool::command& verb) {
        const auto given = std::make_shared<list_methods_settings>();
        verb.text("--method", given->method, "METHOD", "Only this one");
        verb.flag("--markdown", given->markdown, "As a page of documentation");
        verb.footer("Example:\n  taskvec methods --method ties");
        verb.action([given] { list_methods(*given); });
    });

} // namespace
