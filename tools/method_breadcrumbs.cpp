// --method breadcrumbs.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/breadcrumbs.hpp>
#include <taskvec/tool/method.hpp>

namespace {

const tool::register_method<taskvec::breadcrumbs_options> breadcrumbs(
    "breadcrumbs", "drop the top --gamma ({gamma}) and the smallest entries, keep --density ({density}), add up", 52);

} // namespace
