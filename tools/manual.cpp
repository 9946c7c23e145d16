// taskvec manual: the man pages, from the tables that --help prints.
// SPDX-License-Identifier: Apache-2.0
#include "arguments.hpp"
#include "command.hpp"
#include "outputs.hpp"
#include "words.hpp"

#include <algorithm>
#include <memory>
#include <sstream>
#include <string_view>
#include <vector>

namespace {

using tool::option_page;
using tool::verb_page;

/// Text that troff prints as it is: hyphens that can be searched for, and no line that starts a request.
std::string plain(std::string_view text)
{
    std::string result;
    bool line_start = true;
    for (const char c : text) {
        if (line_start && (c == '.' || c == '\'')) { result += "\\&"; }
        switch (c) {
        case '\\': result += "\\e"; break;
        case '-': result += "\\-"; break;
        case '^': result += "\\(ha"; break;
        case '~': result += "\\(ti"; break;
        case '`': result += "\\(ga"; break;
        case '\'': result += line_start ? "'" : "\\(aq"; break;
        default: result += c;
        }
        line_start = c == '\n';
    }
    return result;
}

std::string page_name(const verb_page& page)
{
    return page.name.empty() ? "taskvec" : "taskvec-" + page.name;
}

std::string upper(std::string text)
{
    std::transform(text.begin(), text.end(), text.begin(),
        [](char c) { return static_cast<char>(c >= 'a' && c <= 'z' ? c - 'a' + 'A' : c); });
    return text;
}

/// A paragraph with a hanging tag: the option's names in bold, its value in italics.
std::string option_of(const option_page& option)
{
    std::string text = ".TP\n";
    for (const auto& name : option.names) {
        text += (&name == option.names.data() ? "" : ", ") + ("\\fB" + plain(name) + "\\fR");
    }
    if (!option.unit.empty()) {
        text += (option.names.empty() ? "" : " ") + ("\\fI" + plain(option.unit) + "\\fR");
        if (option.repeatable) { text += " ..."; }
    }
    text += "\n" + plain(option.help);
    if (option.required && !option.positional) { text += " (required)"; }
    return text + "\n";
}

/// What follows the options in the help, its lines as they are. "Methods:" and "Example:" become sections.
std::string sections_of(const std::string& footer)
{
    std::string text;
    bool inside = false;
    const auto open = [&] {
        if (!inside) { text += ".nf\n"; }
        inside = true;
    };
    const auto close = [&] {
        if (inside) { text += ".fi\n"; }
        inside = false;
    };
    std::istringstream lines(footer);
    std::string line;
    bool titled = false;
    while (std::getline(lines, line)) {
        if (line.empty()) { continue; }
        if (line[0] != ' ' && line.back() == ':' && line.find(' ') == line.npos) {
            close();
            text += ".SH " + upper(line.substr(0, line.size() - 1)) + "\n";
            titled = true;
        }
        else {
            if (!titled) { text += ".SH NOTES\n"; }
            titled = true;
            open();
            text += plain(line) + "\n";
        }
    }
    close();
    return text;
}

std::string manual_of(const verb_page& page, const std::vector<verb_page>& all)
{
    const std::string name = page_name(page);
    std::string help = page.help;
    if (page.name.empty()) { help = help.substr(help.find(": ") + 2); }
    else {
        help[0] = static_cast<char>(help[0] >= 'A' && help[0] <= 'Z' ? help[0] - 'A' + 'a' : help[0]);
    }
    if (help.ends_with('.')) { help.pop_back(); }
    std::string text = ".\\\" Made by 'taskvec manual' from the tables of the command line. SPDX-License-Identifier: "
                       "Apache-2.0\n.TH \""
        + plain(upper(name)) + "\" 1 \"\" \"taskvec " + tool::tool_version() + "\" \"User Commands\"\n";
    text += ".ad l\n.nh\n.SH NAME\n" + plain(name) + " \\- " + plain(help) + "\n.SH SYNOPSIS\n.B " + plain(page.usage)
        + "\n";
    text += ".SH OPTIONS\n";
    for (const bool positional : {true, false}) {
        for (const auto& option : page.options) {
            if (option.positional == positional) { text += option_of(option); }
        }
    }
    if (page.name.empty()) {
        text += ".SH VERBS\n";
        for (const auto& verb : all) {
            if (!verb.name.empty()) { text += ".TP\n\\fB" + plain(verb.name) + "\\fR\n" + plain(verb.help) + "\n"; }
        }
    }
    text += sections_of(page.footer);
    text += ".SH EXIT STATUS\n.TP\n0\nDone.\n.TP\n1\nThe input or the environment is at fault. Standard error says "
            "what, in one line, and no output file is created or changed.\n.TP\n2\nWrong usage.\n";
    std::string also;
    for (const auto& other : all) {
        // The tool's own page names every verb, a verb's page the tool.
        if (other.name.empty() == page.name.empty()) { continue; }
        also += (also.empty() ? "" : " ,\n") + (".BR " + plain(page_name(other)) + " (1)");
    }
    return text + ".SH SEE ALSO\n" + also + "\n";
}

struct manual_settings {
    std::string verb, out;
};

void manual(const manual_settings& given)
{
    const auto pages = tool::command_pages();
    const auto wanted = [&](const verb_page& page) { return given.verb == page.name; };
    if (std::none_of(pages.begin(), pages.end(), wanted)) {
        throw tool::usage_error("'" + given.verb + "' is none of the verbs");
    }
    if (given.out.empty()) {
        tool::print(manual_of(*std::find_if(pages.begin(), pages.end(), wanted), pages));
        return;
    }
    if (!given.verb.empty()) { throw tool::usage_error("--out takes all pages: leave '" + given.verb + "' out"); }
    std::error_code failure;
    tool::fs::create_directories(given.out, failure);
    if (failure) {
        taskvec::raise<taskvec::io_error>(taskvec::system_error_code(failure.value()),
            taskvec::message("cannot be created as a directory: ", failure.message()), given.out, failure.value());
    }
    struct {
        std::vector<std::unique_ptr<tool::text_output>> all;
        void commit()
        {
            for (const auto& file : all) { file->commit(); }
        }
        void revert() noexcept
        {
            for (const auto& file : all) { file->revert(); }
        }
    } files;
    for (const auto& page : pages) {
        const auto place = tool::fs::path(given.out) / (page_name(page) + ".1");
        files.all.push_back(std::make_unique<tool::text_output>(place.string()));
        files.all.back()->finish_text(manual_of(page, pages));
    }
    tool::conclude(
        "wrote " + tool::counted(pages.size(), "page") + " to '" + tool::printable(given.out) + "'\n", files);
}

const tool::register_verb manual_verb(
    140, "manual", "Print the man page of the tool or of a verb", [](tool::command& verb) {
        const auto given = std::make_shared<manual_settings>();
        verb.positional("VERB", given->verb, "Whose page to print (default: the tool's own)", tool::presence::optional);
        verb.text("--out", given->out, "DIR", "Write all pages there, as taskvec.1, taskvec-merge.1, …");
        verb.footer("Example:\n  taskvec manual merge | man -l -");
        verb.action([given] { manual(*given); });
    });

} // namespace
