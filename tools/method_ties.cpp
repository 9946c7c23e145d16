// --method ties.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/ties.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::ties_options> ties(
    "ties", "trim to the top --density ({density}), elect signs, merge what agrees", 30);

} // namespace
