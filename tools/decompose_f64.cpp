// Decompositions in f64.
// SPDX-License-Identifier: Apache-2.0
#include "decompose_as.hpp"

taskvec::svd_result<double> tool::decompose::operator()(const taskvec::cpu& policy,
    taskvec::matrix_view<const double> a, const taskvec::rank_choice& choice, std::string_view name) const
{
    return decompose_as<double>(*this, policy, a, choice, name);
}

template taskvec::adapter_result<double> taskvec::peru_lora<double>(
    const taskvec::cpu&, const taskvec::lora_adapter<double>&, const taskvec::peru_lora_options&);
template taskvec::adapter_result<double> taskvec::merge_linear<double>(
    const taskvec::cpu&, std::span<const taskvec::lora_adapter<double>>, const taskvec::linear_merge_options&);
