// What parts of the tool need of the rest, doing nothing: flags are described to nobody.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "../../../tools/command.hpp"

namespace tool {

void command::text(const std::string&, std::string&, const std::string&, const std::string&, presence) { }
void command::texts(const std::string&, std::vector<std::string>&, const std::string&, const std::string&, presence) { }
void command::positional(const std::string&, std::string&, const std::string&, presence) { }
void command::word(const std::string&, std::string&, const std::vector<std::string>&, const std::string&,
    const std::string&, bool, presence)
{ }
void command::flag(const std::string&, bool&, const std::string&) { }
void command::take(
    const std::string&, const std::string&, const std::string&, std::function<void(const std::string&)>, bool)
{ }
void command::after_parse(hearer) { }
void command::action(std::function<void()>) { }
void command::footer(const std::string&) { }
void clear_progress() { }
void check_inputs() { }

} // namespace tool
