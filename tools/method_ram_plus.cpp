// --method ram-plus.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/ram.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::ram_plus_options> ram_plus(
    "ram-plus", "ram, with the entries that one task changes alone raised by up to --r ({r}) * --alpha ({alpha})", 95);

} // namespace
