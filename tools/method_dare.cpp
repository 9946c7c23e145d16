// --method dare.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/dare.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::dare_options> dare("dare",
    "keep entries with probability --density ({density}), rescale, then as task arithmetic", 40,
    {.aliases = {"dare-linear"}});

} // namespace
