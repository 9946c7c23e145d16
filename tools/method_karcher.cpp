// --method karcher.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/karcher.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::karcher_options> karcher("karcher",
    "Karcher mean of the models' directions at their mean length; needs no --base", 86, {.needs_base = false});

} // namespace
