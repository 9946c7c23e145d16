// LoRA adapters in memory: the low-rank update of one weight, and an adapter as updates by module name.
// Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, "LoRA: low-rank adaptation of large language models" (2021).
// SPDX-License-Identifier: Apache-2.0
//
// The one LoRA type: what PEFT's files are read into, what algorithms on adapters take and return, and what the layers
// of jvp/ are made from and give back. It needs no Eigen; jvp/lora_layer.hpp sees its factors as Eigen matrices.
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/matrix.hpp>
#include <taskvec/fwd.hpp>
#include <taskvec/linalg/factor_pair.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <string>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI {

/// The update ΔW = scaling·b·a of one weight matrix (out×in), held by PEFT's factors: b is lora_B (out×r), a is lora_A
/// (r×in), both row-major, scaling is α/r or α/√r. In the papers' symbols A = scaling·b and B = aᵀ.
///
///     lora_update<float> update{.b = b, .a = a, .scaling = 2};
template <arithmetic_element T, memory_space S>
struct lora_update {
    matrix<T, S> b; ///< lora_B, out×r
    matrix<T, S> a; ///< lora_A, r×in
    double scaling = 1; ///< of b·a: α/r, or α/√r where rsLoRA is asked for

    /// Rows of ΔW.
    [[nodiscard]] std::size_t out() const noexcept { return b.rows(); }
    /// Columns of ΔW.
    [[nodiscard]] std::size_t in() const noexcept { return a.cols(); }
    /// r, the rank that the factors have room for.
    [[nodiscard]] std::size_t rank() const noexcept { return a.rows(); }
    /// weight·ΔW as factors, left = b and right = aᵀ. Refers to this update.
    [[nodiscard]] factor_pair<T, S> factors(double weight = 1, std::string_view name = {}) const&
    {
        return {.left = b.view(), .right = a.view().transposed(), .weight = weight * scaling, .name = name};
    }
    void factors(double weight = 1, std::string_view name = {}) const&& = delete; // its views would dangle
};

/// An adapter: updates by the name of the module that they belong to, in the order of the names' bytes.
template <arithmetic_element T, memory_space S = memory_space::host>
using lora_adapter = std::map<std::string, lora_update<T, S>>;

/// Throws shape_mismatch where b and a do not make a product, nonfinite_error for a scaling that is not finite.
template <arithmetic_element T, memory_space S>
void check_update(const lora_update<T, S>& update, std::string_view name)
{
    if (update.b.cols() != update.a.rows()) {
        raise<shape_mismatch>(error_code::factor_rank,
            message("'", name, "': lora_B is ", update.b.rows(), "×", update.b.cols(), " and lora_A ", update.a.rows(),
                "×", update.a.cols(), "; their ranks differ"));
    }
    if (!std::isfinite(update.scaling)) {
        raise<nonfinite_error>(error_code::scaling_not_finite, message("'", name, "': its scaling is not finite"));
    }
}

/// True for two scalings that are one number but for rounding: α/√r, say, and the same written as α'/r.
[[nodiscard]] inline bool same_scaling(double a, double b) noexcept
{
    return std::abs(a - b) <= 1e-12 * std::max(std::abs(a), std::abs(b));
}

} // namespace taskvec::inline TASKVEC_ABI
