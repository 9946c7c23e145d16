// --method multi-slerp.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/multi_slerp.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::multi_slerp_options> multi_slerp("multi-slerp",
    "mean direction of the tasks at their mean length, or with --base of their task vectors", 84,
    {.needs_base = false, .aliases = {"multislerp"}});

} // namespace
