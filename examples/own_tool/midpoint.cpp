// --method midpoint: the method of ../midpoint.hpp in a build of the command line tool of one's own. This file and
// taskvec::tool_main are all that it takes; flags, help, notes and reports come from the table of its options.
// SPDX-License-Identifier: Apache-2.0
#include "../midpoint.hpp"

#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<example::midpoint_options> entry(
    "midpoint", "base + lambda * the midpoint of the smallest and the largest task vector", 1000);

} // namespace
