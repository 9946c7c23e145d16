// Any pattern and name, in two lines, take a bounded time, and a whole match is a match of a part.
// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"

#include <taskvec/formats/name_pattern.hpp>

TASKVEC_FUZZ_TARGET(pattern)
{
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const auto line = std::min(text.find('\n'), size);
    const auto name = text.substr(std::min(line + 1, size));
    fuzz::read([&] {
        const taskvec::name_pattern pattern{std::string(text.substr(0, line))};
        const bool whole = pattern.matches(name);
        fuzz::expect(!whole || pattern.occurs_in(name), "a whole match that is no match of a part");
    });
}
