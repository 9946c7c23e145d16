// Decompositions in f32.
// SPDX-License-Identifier: Apache-2.0
#include "decompose_as.hpp"

taskvec::svd_result<float> tool::decompose::operator()(const taskvec::cpu& policy, taskvec::matrix_view<const float> a,
    const taskvec::rank_choice& choice, std::string_view name) const
{
    return decompose_as<float>(*this, policy, a, choice, name);
}

template taskvec::adapter_result<float> taskvec::peru_lora<float>(
    const taskvec::cpu&, const taskvec::lora_adapter<float>&, const taskvec::peru_lora_options&);
template taskvec::adapter_result<float> taskvec::merge_linear<float>(
    const taskvec::cpu&, std::span<const taskvec::lora_adapter<float>>, const taskvec::linear_merge_options&);
