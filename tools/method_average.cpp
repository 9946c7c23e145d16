// --method average.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/average.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::average_options> average(
    "average", "weighted mean of the models; needs no --base", 10, {.needs_base = false, .aliases = {"linear"}});

} // namespace
