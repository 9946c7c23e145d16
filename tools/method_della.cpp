// --method della-linear and della.
// SPDX-License-Identifier: Apache-2.0
#include "methods.hpp"

#include <taskvec/methods/della.hpp>

namespace {

/// Whether density and epsilon go together, where they are the same for all tasks and tensors.
template <class Options>
void check_spread(const tool::merge_request& request)
{
    if (!request.of_tasks.empty()) { return; }
    for (const auto& value : request.options) {
        if (value.by_tensor) { return; }
    }
    Options options;
    tool::apply_options(options, request.options);
    tool::check_usage([&] { taskvec::keep_ranked::check(options.density, options.epsilon); });
}

const tool::register_method<taskvec::della_linear_options> della_linear("della-linear",
    "keep entries with a probability that grows with their rank in the row, --density ({density}) +- --epsilon "
    "({epsilon}), then as task arithmetic",
    56, {.check = &check_spread<taskvec::della_linear_options>});

const tool::register_method<taskvec::della_options> della("della",
    "keep entries with a probability that grows with their rank in the row, --density ({density}) +- --epsilon "
    "({epsilon}), then as ties without its trim",
    57, {.check = &check_spread<taskvec::della_options>});

} // namespace
