// A view of a temporary vector would dangle.
// SPDX-License-Identifier: Apache-2.0
// error: outlives_the_expression
#include <taskvec/core/view.hpp>

#include <vector>

std::size_t f()
{
#if defined(TASKVEC_FAULT)
    const auto view = taskvec::as_view(std::vector<float>(3));
#else
    std::vector<float> owner(3);
    const auto view = taskvec::as_view(owner);
#endif
    return view.size();
}
