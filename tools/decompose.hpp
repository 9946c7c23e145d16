// The decompositions that the verbs use, compiled once for each precision (decompose_f32.cpp, decompose_f64.cpp),
// because an SVD costs tens of seconds and a gigabyte to compile. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/merge_adapters.hpp>
#include <taskvec/reuse/peru_lora.hpp>

#include <cstdint>
#include <string_view>

namespace tool {

/// How a dense layer is decomposed; a taskvec::decomposition.
struct decompose {
    enum class way {
        exactly,
        randomized,
        not_at_all ///< a dry run: the result has rank 0
    };
    way how = way::exactly;
    std::uint64_t seed = 0;

    [[nodiscard]] taskvec::svd_result<float> operator()(const taskvec::cpu& policy, taskvec::matrix_view<const float> a,
        const taskvec::rank_choice& choice, std::string_view name) const;
    [[nodiscard]] taskvec::svd_result<double> operator()(const taskvec::cpu& policy,
        taskvec::matrix_view<const double> a, const taskvec::rank_choice& choice, std::string_view name) const;
};

} // namespace tool

extern template taskvec::adapter_result<float> taskvec::peru_lora<float>(
    const taskvec::cpu&, const taskvec::lora_adapter<float>&, const taskvec::peru_lora_options&);
extern template taskvec::adapter_result<double> taskvec::peru_lora<double>(
    const taskvec::cpu&, const taskvec::lora_adapter<double>&, const taskvec::peru_lora_options&);
extern template taskvec::adapter_result<float> taskvec::merge_linear<float>(
    const taskvec::cpu&, std::span<const taskvec::lora_adapter<float>>, const taskvec::linear_merge_options&);
extern template taskvec::adapter_result<double> taskvec::merge_linear<double>(
    const taskvec::cpu&, std::span<const taskvec::lora_adapter<double>>, const taskvec::linear_merge_options&);
