// An optimiser that does not take the problem and the objective is refused at the call, by the concept's name.
// SPDX-License-Identifier: Apache-2.0
// error: lorahub_optimizer
#include <taskvec/search/lorahub.hpp>

#if defined(TASKVEC_FAULT)
struct optimizer {
    void operator()(double) const;
};
#else
struct optimizer {
    void operator()(const taskvec::lorahub_problem&, const taskvec::lorahub_objective&) const;
};
#endif

double f(const std::vector<float>& base, const std::vector<std::vector<float>>& tasks, std::vector<float>& out)
{
    const auto loss = [](taskvec::host_view<const float> theta) { return static_cast<double>(theta[0]); };
    return taskvec::lorahub(taskvec::cpu{}, {}, base, tasks, out, loss, optimizer{}).best.loss;
}
