// How the verbs decompose a layer: exactly, by a randomized SVD, or, in a dry run, not at all.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "resume.hpp"

#include <taskvec/core/matrix.hpp>
#include <taskvec/core/policy.hpp>
#include <taskvec/linalg/svd.hpp>

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
    kept_layers* kept = nullptr; ///< what earlier runs made, and where this one's goes (--resume)

    [[nodiscard]] taskvec::svd_result<float> operator()(const taskvec::cpu& policy, taskvec::matrix_view<const float> a,
        const taskvec::rank_choice& choice, std::string_view name) const;
    [[nodiscard]] taskvec::svd_result<double> operator()(const taskvec::cpu& policy,
        taskvec::matrix_view<const double> a, const taskvec::rank_choice& choice, std::string_view name) const;
};

} // namespace tool
