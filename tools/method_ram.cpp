// --method ram.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/ram.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::ram_options> ram(
    "ram", "base + for each entry the mean of the task vectors above --epsilon ({epsilon})", 94);

} // namespace
