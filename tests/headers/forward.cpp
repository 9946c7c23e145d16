// A program's header that names the library's types by fwd.hpp alone, and then a source file that uses them.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/fwd.hpp>

#if defined(EIGEN_WORLD_VERSION)
#error "fwd.hpp includes Eigen"
#endif

namespace program {
class pipeline {
public:
    taskvec::lora_update<float> update(const taskvec::cpu& policy) const;
    taskvec::svd_result<double> decompose(taskvec::matrix_view<const double> weight, taskvec::rank_choice rank) const;
    void merge(
        taskvec::host_view<const taskvec::bf16> base, const taskvec::ties_options& options, taskvec::scope where);
    double slope(const taskvec::linearized<int (*)(int), double>& f, taskvec::dual<taskvec::dual<float>> x) const;

    taskvec::matrix<double>* scratch = nullptr;
    const taskvec::const_model_ref* model = nullptr;
    taskvec::adapter_result<float, taskvec::memory_space::device>* on_device = nullptr;
    taskvec::kept_sum_body<float>* body = nullptr;
    taskvec::tensor_sink* sink = nullptr;
};
} // namespace program

#include <taskvec/taskvec.hpp>

namespace program {
taskvec::lora_update<float> pipeline::update(const taskvec::cpu& policy) const
{
    return {.b = {}, .a = {}, .scaling = static_cast<double>(policy.threads)};
}
taskvec::svd_result<double> pipeline::decompose(
    taskvec::matrix_view<const double> weight, taskvec::rank_choice rank) const
{
    return taskvec::randomized_svd(taskvec::cpu{}, weight, {.rank = rank.rank});
}
void pipeline::merge(
    taskvec::host_view<const taskvec::bf16> base, const taskvec::ties_options& options, taskvec::scope where)
{
    if (options.scope == where && !base.empty()) { scratch->view()(0, 0) = static_cast<double>(base[0]); }
}
} // namespace program

#include <taskvec/fwd.hpp>
