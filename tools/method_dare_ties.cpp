// --method dare-ties.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/dare.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::dare_ties_options> dare_ties(
    "dare-ties", "keep entries with probability --density ({density}), rescale, then as ties without its trim", 50);

} // namespace
