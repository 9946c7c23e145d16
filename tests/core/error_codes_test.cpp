// The codes of errors: the table in core/error.hpp, docs/errors.md and every place that raises say the same.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/error.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

using namespace taskvec;

namespace {

const std::filesystem::path project = std::filesystem::path(TASKVEC_TEST_DIR).parent_path();

std::string text_of(const std::filesystem::path& path)
{
    std::ifstream in(path, std::ios::binary);
    REQUIRE(in);
    std::ostringstream text;
    text << in.rdbuf();
    return text.str();
}

bool in_word(char c)
{
    return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_';
}

std::string word_at(std::string_view text, std::size_t at)
{
    std::size_t end = at;
    while (end < text.size() && in_word(text[end])) { ++end; }
    return std::string(text.substr(at, end - at));
}

/// The enumerator of an entry: its word with underscores.
std::string name_of(const error_code_entry& entry)
{
    std::string name(entry.word);
    std::replace(name.begin(), name.end(), '-', '_');
    return name;
}

const error_code_entry* entry_called(const std::string& name)
{
    const auto* const found = std::find_if(
        std::begin(error_codes), std::end(error_codes), [&](const auto& entry) { return name_of(entry) == name; });
    return found == std::end(error_codes) ? nullptr : found;
}

/// Calls see(path, text) for every source file below `folders`.
template <class See>
void for_each_source(std::initializer_list<const char*> folders, See&& see)
{
    for (const char* folder : folders) {
        for (const auto& file : std::filesystem::recursive_directory_iterator(project / folder)) {
            const auto kind = file.path().extension();
            if (kind == ".hpp" || kind == ".cpp" || kind == ".cu") { see(file.path(), text_of(file.path())); }
        }
    }
}

constexpr std::pair<error_kind, std::string_view> kinds[] = {
    {error_kind::invalid_argument, "invalid_argument"},
    {error_kind::shape_mismatch, "shape_mismatch"},
    {error_kind::dtype_mismatch, "dtype_mismatch"},
    {error_kind::nonfinite, "nonfinite"},
    {error_kind::format_error, "format_error"},
    {error_kind::io_error, "io_error"},
    {error_kind::backend_error, "backend_error"},
    {error_kind::cancelled, "cancelled"},
};

std::string_view kind_name(error_kind kind)
{
    for (const auto& [known, name] : kinds) {
        if (known == kind) { return name; }
    }
    return {};
}

} // namespace

TEST_CASE("codes ascend, words are unique kebab-case, and the hundreds are the kinds")
{
    std::set<std::string_view> words;
    unsigned last = 0;
    for (const auto& entry : error_codes) {
        CAPTURE(entry.word);
        const auto number = static_cast<unsigned>(entry.code);
        CHECK(number > last);
        last = number;
        CHECK(words.insert(entry.word).second);
        CHECK(std::all_of(
            entry.word.begin(), entry.word.end(), [](char c) { return (c >= 'a' && c <= 'z') || c == '-'; }));
        CHECK(number / 100 == static_cast<unsigned>(entry.kind) + 1);
        CHECK(to_string(entry.code) == entry.word);
    }
    CHECK(to_string(static_cast<error_code>(10001)) == "user-defined");
    CHECK_FALSE(words.contains("user-defined"));
}

TEST_CASE("codes that were given once keep their number and their word")
{
    // A few of each kind, written out: whoever renumbers meets them here.
    CHECK(static_cast<int>(error_code::tensor_missing) == 101);
    CHECK(static_cast<int>(error_code::density_out_of_range) == 117);
    CHECK(static_cast<int>(error_code::output_path) == 143);
    CHECK(static_cast<int>(error_code::tensor_shape) == 201);
    CHECK(static_cast<int>(error_code::dtype_unsupported) == 301);
    CHECK(static_cast<int>(error_code::not_finite) == 401);
    CHECK(static_cast<int>(error_code::json_syntax) == 501);
    CHECK(static_cast<int>(error_code::file_truncated) == 506);
    CHECK(static_cast<int>(error_code::file_not_found) == 601);
    CHECK(static_cast<int>(error_code::out_of_memory) == 701);
    CHECK(static_cast<int>(error_code::cancelled) == 801);
    CHECK(to_string(error_code::density_out_of_range) == "density-out-of-range");
}

TEST_CASE("the code of an errno names what people meet, and leaves the rest to system_code()")
{
    CHECK(system_error_code(ENOENT) == error_code::file_not_found);
    CHECK(system_error_code(EACCES) == error_code::file_access);
    CHECK(system_error_code(ENOSPC) == error_code::disk_full);
    CHECK(system_error_code(ENOTDIR) == error_code::file_kind);
    CHECK(system_error_code(EIO) == error_code::system_refused);
    CHECK(system_error_code(0) == error_code::system_refused);
}

TEST_CASE("every place that raises gives a code of the kind that it throws")
{
    const std::map<std::string, error_kind> thrown{{"invalid_argument", error_kind::invalid_argument},
        {"shape_mismatch", error_kind::shape_mismatch}, {"dtype_mismatch", error_kind::dtype_mismatch},
        {"nonfinite_error", error_kind::nonfinite}, {"format_error", error_kind::format_error},
        {"io_error", error_kind::io_error}, {"backend_error", error_kind::backend_error},
        {"cancelled", error_kind::cancelled}};
    std::size_t seen = 0;
    for_each_source({"include", "tools", "examples", "support"}, [&](const auto& path, const std::string& text) {
        for (std::size_t at = text.find("raise<"); at != text.npos; at = text.find("raise<", at + 1)) {
            std::size_t begin = at + 6;
            if (text.compare(begin, 9, "taskvec::") == 0) { begin += 9; }
            const auto known = thrown.find(word_at(text, begin));
            std::size_t argument = text.find('(', begin) + 1;
            while (std::isspace(static_cast<unsigned char>(text[argument]))) { ++argument; }
            if (text.compare(argument, 9, "taskvec::") == 0) { argument += 9; }
            if (known == thrown.end() || text.compare(argument, 12, "error_code::") != 0) { continue; }
            const auto name = word_at(text, argument + 12);
            const auto line = std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(at), '\n') + 1;
            CAPTURE(path.string());
            CAPTURE(line);
            CAPTURE(name);
            const auto* const entry = entry_called(name);
            REQUIRE(entry != nullptr);
            CHECK(kind_name(entry->kind) == kind_name(known->second));
            ++seen;
        }
    });
    CHECK(seen > 350);
}

TEST_CASE("every code is raised somewhere in the library or its tool")
{
    std::set<std::string> used;
    for_each_source({"include", "tools"}, [&](const auto&, const std::string& text) {
        for (std::size_t at = text.find("error_code::"); at != text.npos; at = text.find("error_code::", at + 1)) {
            const bool of_the_table = at > 0 && text[at - 1] == '{';
            if (!of_the_table) { used.insert(word_at(text, at + 12)); }
        }
    });
    for (const auto& entry : error_codes) {
        CAPTURE(entry.word);
        CHECK(used.contains(name_of(entry)));
    }
}

TEST_CASE("docs/errors.md lists every code once, in order, with its meaning and what to do")
{
    std::istringstream lines(text_of(project / "docs" / "errors.md"));
    std::vector<std::vector<std::string>> rows;
    for (std::string line; std::getline(lines, line);) {
        if (line.size() < 3 || line.compare(0, 2, "| ") != 0 || !std::isdigit(static_cast<unsigned char>(line[2]))) {
            continue;
        }
        std::vector<std::string> cells;
        for (std::size_t at = 2; at < line.size();) {
            const auto end = line.find(" |", at);
            REQUIRE(end != line.npos);
            cells.push_back(line.substr(at, end - at));
            at = end + 3;
        }
        rows.push_back(std::move(cells));
    }
    REQUIRE(rows.size() == std::size(error_codes));
    for (std::size_t i = 0; i < rows.size(); ++i) {
        const auto& entry = error_codes[i];
        const auto& cells = rows[i];
        CAPTURE(entry.word);
        REQUIRE(cells.size() == 5);
        CHECK(cells[0] == std::to_string(static_cast<unsigned>(entry.code)));
        CHECK(cells[1] == "`" + std::string(entry.word) + "`");
        CHECK(cells[2] == "`" + std::string(kind_name(entry.kind)) + "`");
        CHECK_FALSE(cells[3].empty());
        CHECK_FALSE(cells[4].empty());
    }
}
