// Things with names, in the order of their names.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <algorithm>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Where a thing of that name stands, or would stand, among things (`.name`) in the order of their names.
template <class Things>
[[nodiscard]] auto place_by_name(Things& things, std::string_view name)
{
    return std::lower_bound(things.begin(), things.end(), name,
        [](const auto& thing, std::string_view wanted) { return std::string_view(thing.name) < wanted; });
}

/// The thing of that name among things in the order of their names, or null.
template <class Things>
[[nodiscard]] auto find_by_name(Things& things, std::string_view name) -> decltype(&*things.begin())
{
    const auto place = place_by_name(things, name);
    return place != things.end() && place->name == name ? &*place : nullptr;
}

} // namespace taskvec::inline TASKVEC_ABI::detail
