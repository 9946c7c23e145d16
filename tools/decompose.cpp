// SPDX-License-Identifier: Apache-2.0
#include "decompose.hpp"

#include <taskvec/linalg/randomized_svd.hpp>
#include <taskvec/linalg/truncated_svd.hpp>

namespace tool {
namespace {

template <class T>
[[nodiscard]] taskvec::svd_result<T> decompose_as(const decompose& d, const taskvec::cpu& policy,
    taskvec::matrix_view<const T> a, const taskvec::rank_choice& choice, std::string_view name)
{
    if (d.how == decompose::way::not_at_all) {
        taskvec::svd_result<T> nothing;
        nothing.u = taskvec::matrix<T>(a.rows(), 0);
        nothing.v = taskvec::matrix<T>(a.cols(), 0);
        return nothing;
    }
    if (d.kept) {
        if (auto found = d.kept->next<T>(a.rows(), a.cols())) { return std::move(*found); }
    }
    auto made = d.how == decompose::way::exactly
        ? taskvec::decompose_exactly{}(policy, a, choice, name)
        : taskvec::decompose_randomized{.seed = d.seed}(policy, a, choice, name);
    if (d.kept) { d.kept->keep(made); }
    return made;
}

} // namespace

taskvec::svd_result<float> decompose::operator()(const taskvec::cpu& policy, taskvec::matrix_view<const float> a,
    const taskvec::rank_choice& choice, std::string_view name) const
{
    return decompose_as<float>(*this, policy, a, choice, name);
}

taskvec::svd_result<double> decompose::operator()(const taskvec::cpu& policy, taskvec::matrix_view<const double> a,
    const taskvec::rank_choice& choice, std::string_view name) const
{
    return decompose_as<double>(*this, policy, a, choice, name);
}

} // namespace tool
