// --method breadcrumbs-ties.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/breadcrumbs.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::breadcrumbs_ties_options> breadcrumbs_ties(
    "breadcrumbs-ties", "drop the top --gamma ({gamma}) and the smallest entries, then as ties without its trim", 54);

} // namespace
