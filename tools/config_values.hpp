// Values of a configuration in YAML: what mergekit reads them as, and where they stand.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>

#include <yaml-cpp/yaml.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace tool::configuration {

/// Where a value stands, and what is wrong with it.
class place {
public:
    explicit place(std::string file)
        : file_(std::move(file))
    { }
    [[nodiscard]] std::string of(const YAML::Mark& mark) const
    {
        return mark.is_null() ? file_ : taskvec::message(file_, ':', mark.line + 1, ':', mark.column + 1);
    }
    [[nodiscard]] std::string of(const YAML::Node& node) const { return of(node.Mark()); }
    [[noreturn]] void fail(const YAML::Node& node, const std::string& what,
        taskvec::error_code code = taskvec::error_code::option_value) const
    {
        taskvec::raise<taskvec::invalid_argument>(code, of(node) + ": " + what);
    }

private:
    std::string file_;
};

/// What a sentence has room for, and can be printed.
[[nodiscard]] std::string shown(const std::string& text);
/// "a mapping", "a list", "nothing", or the word in quotes.
[[nodiscard]] std::string kind_of(const YAML::Node& node);
/// The end of a sentence about a word that is none of these: which of them may have been meant.
[[nodiscard]] std::string meant(const std::string& word, const std::vector<std::string>& known);

/// A mapping with its keys checked.
class mapping {
public:
    mapping(const place& where, const YAML::Node& node, const std::string& what);
    mapping(const place& where, const YAML::Node& node, const std::string& what, const std::vector<std::string>& known);
    struct entry {
        std::string name;
        YAML::Node key, value;
    };
    [[nodiscard]] const std::vector<entry>& entries() const { return entries_; }
    /// Nothing where the key is not there, or empty.
    [[nodiscard]] std::optional<entry> find(const std::string& name) const
    {
        for (const auto& one : entries_) {
            if (one.name == name && !one.value.IsNull()) { return one; }
        }
        return std::nullopt;
    }
    [[nodiscard]] const YAML::Node& node() const { return node_; }

private:
    /// The entries of a mapping, and behind them those of mappings that it takes over (`<<: *other`), which have no say
    /// where a key stands already: what is taken over again adds nothing.
    void add(const place& where, const YAML::Node& node, const std::string& what, std::set<std::string>& seen,
        std::size_t depth);

    YAML::Node node_;
    std::vector<entry> entries_;
    std::set<int> taken_; ///< where mappings begin that are in it
    std::size_t others_ = 0; ///< that are named
};

/// Mappings that aliases may give to many: each is read once. Those that stand in no file are alike.
class mappings {
public:
    const mapping& at(const place& where, const YAML::Node& node, const std::string& what,
        const std::vector<std::string>& known = {});

private:
    std::map<std::pair<std::string, int>, mapping> read_; ///< by what they are, too
};

/// One word, without a NUL.
[[nodiscard]] std::string scalar_of(const place& where, const YAML::Node& node, const std::string& what);
/// A number as YAML 1.1 has it, which mergekit reads: `0x10`, `0b11`, and `010`, which is 8, where it is no text (in
/// quotes, a block, `!!str`); `_` between digits. Nothing for other texts.
[[nodiscard]] std::optional<double> parse_number(const YAML::Node& node);
[[nodiscard]] double number_of(const place& where, const YAML::Node& node, const std::string& what);
/// A whole number from 0 to `most`.
[[nodiscard]] std::uint64_t whole_of(
    const place& where, const YAML::Node& node, const std::string& what, std::uint64_t most);
/// A truth as YAML 1.1 has it. Nothing for other texts.
[[nodiscard]] std::optional<bool> parse_truth(const YAML::Node& node);
/// A number, or a truth, which is 1 or 0.
[[nodiscard]] double number_or_truth_of(const place& where, const YAML::Node& node, const std::string& what);
/// A truth, or a number, which is one unless it is 0.
[[nodiscard]] bool truth_of(const place& where, const YAML::Node& node, const std::string& what);

/// A value of a parameter.
struct setting {
    std::string filter; ///< what occurs in the tensor's name; empty: any
    YAML::Node value; ///< a scalar or a list of scalars
};
/// The values of a parameter; the first that matches a tensor counts.
[[nodiscard]] std::vector<setting> settings_of(const place& where, const YAML::Node& node, const std::string& name);
/// The value, or all of the list.
[[nodiscard]] std::vector<YAML::Node> scalars_of(const YAML::Node& value);
/// The pattern of a filter: what occurs where the text does.
[[nodiscard]] std::string escaped(const std::string& text);

} // namespace tool::configuration
