// What every algorithm on LoRA adapters uses: singular triples as updates, dense updates, norms, reports, and updates
// folded into a weight. The type itself is in adapters/lora.hpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/lora.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/fwd.hpp>
#include <taskvec/linalg/factored_svd.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// On which side σ goes when triples become factors.
enum class sigma_side : std::uint8_t {
    both, ///< b = u·√σ, a = √σ·vᵀ: entries of like size on both sides, which 16-bit storage likes
    left ///< b = u·σ, a = vᵀ
};

template <>
struct enum_words<sigma_side> {
    static constexpr std::array words{
        enum_word<sigma_side>{sigma_side::both, "both"}, enum_word<sigma_side>{sigma_side::left, "left"}};
};

/// The update u·diag(σ)·vᵀ with scaling 1. u is out×q, v in×q.
template <arithmetic_element T>
[[nodiscard]] lora_update<T> to_update(const svd_result<T>& s, sigma_side side = sigma_side::both)
{
    const std::size_t q = s.sigma.size();
    lora_update<T> update{
        matrix<T>(s.u.rows(), q, matrix_order::row_major), matrix<T>(q, s.v.rows(), matrix_order::row_major), 1};
    for (std::size_t k = 0; k < q; ++k) {
        const double left = side == sigma_side::both ? std::sqrt(s.sigma[k]) : s.sigma[k],
                     right = side == sigma_side::both ? left : 1;
        for (std::size_t i = 0; i < s.u.rows(); ++i) {
            update.b(i, k) = static_cast<T>(static_cast<double>(s.u(i, k)) * left);
        }
        for (std::size_t i = 0; i < s.v.rows(); ++i) {
            update.a(k, i) = static_cast<T>(static_cast<double>(s.v(i, k)) * right);
        }
    }
    return update;
}

/// The same in the memory space of the policy.
template <arithmetic_element T>
[[nodiscard]] lora_update<T> to_update(const cpu&, const svd_result<T>& s, sigma_side side)
{
    return to_update(s, side);
}

/// The same update once more.
template <arithmetic_element T>
[[nodiscard]] lora_update<T> copy_update(const cpu&, const lora_update<T>& update)
{
    return update;
}

/// On a device: u and v are scaled there, and turned into row-major factors by writing them to transposed views.
template <arithmetic_element T, linear_algebra_policy P>
    requires(P::space == memory_space::device)
[[nodiscard]] lora_update<T, P::space> to_update(const P& policy, const svd_result<T, P::space>& s, sigma_side side)
{
    const std::size_t q = s.sigma.size();
    std::vector<double> left(s.sigma), right(q, 1.0);
    if (side == sigma_side::both) {
        for (std::size_t k = 0; k < q; ++k) { left[k] = right[k] = std::sqrt(s.sigma[k]); }
    }
    lora_update<T, P::space> update{result_matrix<T>(policy, s.u.rows(), q, matrix_order::row_major),
        result_matrix<T>(policy, q, s.v.rows(), matrix_order::row_major), 1};
    auto scaled = scratch_matrix<T>(policy, s.u.rows(), q);
    scale_columns<T>(policy, s.u.view(), left, scaled.view());
    copy_matrix<T>(policy, scaled.view(), update.b.view());
    scaled = scratch_matrix<T>(policy, s.v.rows(), q);
    scale_columns<T>(policy, s.v.view(), right, scaled.view());
    copy_matrix<T>(policy, scaled.view(), update.a.view().transposed());
    return update;
}
template <arithmetic_element T, linear_algebra_policy P>
    requires(P::space == memory_space::device)
[[nodiscard]] lora_update<T, P::space> copy_update(const P& policy, const lora_update<T, P::space>& update)
{
    lora_update<T, P::space> copy{result_matrix<T>(policy, update.b.rows(), update.b.cols(), update.b.order()),
        result_matrix<T>(policy, update.a.rows(), update.a.cols(), update.a.order()), update.scaling};
    copy_matrix<T>(policy, update.b.view(), copy.b.view());
    copy_matrix<T>(policy, update.a.view(), copy.a.view());
    return copy;
}

/// Stacked factors as an update with scaling 1, exactly.
template <arithmetic_element T>
[[nodiscard]] lora_update<T> to_update(const stacked_factors<T>& sum)
{
    lora_update<T> update{matrix<T>(sum.left.rows(), sum.left.cols(), matrix_order::row_major),
        matrix<T>(sum.right.cols(), sum.right.rows(), matrix_order::row_major), 1};
    for (std::size_t k = 0; k < sum.left.cols(); ++k) {
        for (std::size_t i = 0; i < sum.left.rows(); ++i) { update.b(i, k) = sum.left(i, k); }
        for (std::size_t i = 0; i < sum.right.rows(); ++i) { update.a(k, i) = sum.right(i, k); }
    }
    return update;
}

/// out = weight·ΔW, dense (out×in, either order). Cost: 2·out·in·r flops.
template <arithmetic_element T>
void densify(
    const cpu& policy, const lora_update<T>& update, std::type_identity_t<matrix_view<T>> out, double weight = 1)
{
    gemm<T>(policy, static_cast<T>(weight * update.scaling), update.b.view(), update.a.view(), T(0), out);
}

/// ‖ΔW‖²_F from the factors: Σ (bᵀb)∘(a·aᵀ) in f64, times scaling². Cost: (out + in)·r² flops.
template <arithmetic_element T>
[[nodiscard]] double squared_norm(const cpu& policy, const lora_update<T>& update)
{
    const std::size_t r = update.rank();
    if (r == 0 || update.out() == 0 || update.in() == 0) { return 0; }
    auto left = scratch_matrix<double>(policy, r, r), right = scratch_matrix<double>(policy, r, r);
    detail::gram<T>(update.b.view(), left, memory_of(policy));
    detail::gram<T>(update.a.view().transposed(), right, memory_of(policy));
    double sum = 0;
    for (std::size_t i = 0; i < r * r; ++i) { sum += left.data()[i] * right.data()[i]; }
    return (sum < 0 ? 0 : sum) * update.scaling * update.scaling; // NaN stays NaN
}

/// What an algorithm on adapters did to one layer.
struct layer_report {
    std::string name{}; ///< of the module
    std::size_t out = 0, in = 0; ///< shape of ΔW
    std::size_t rank_before = 0; ///< of the adapter, or of all stacked ones together; 0 where the update was dense
    std::size_t rank = 0; ///< what is stored now
    bool whole = false; ///< nothing was cut off: the update is exact
    double squared_norm = 0; ///< ‖ΔW‖²_F before
    double squared_error = 0; ///< ‖ΔW − what is stored‖²_F, before rounding to a storage type

    /// ‖ΔW − what is stored‖_F / ‖ΔW‖_F; 0 for a zero update.
    [[nodiscard]] double relative_error() const noexcept
    {
        return squared_norm > 0 ? std::sqrt(squared_error / squared_norm) : 0;
    }
    /// The share of ‖ΔW‖²_F that is stored, 1 − squared_error / squared_norm; 1 for a zero update.
    [[nodiscard]] double energy() const noexcept { return squared_norm > 0 ? 1 - squared_error / squared_norm : 1; }
    /// Numbers stored: rank·(out + in + 1) with the singular values, rank·(out + in) for a layer that was kept whole.
    [[nodiscard]] std::uint64_t parameters() const noexcept
    {
        return std::uint64_t{rank} * (out + in + (whole ? 0 : 1));
    }
};

/// A new adapter, and what was done for it layer by layer.
template <arithmetic_element T, memory_space S>
struct adapter_result {
    lora_adapter<T, S> adapter; ///< by module
    std::vector<layer_report> layers; ///< in name order

    /// Relative error over all layers together.
    [[nodiscard]] double relative_error() const noexcept
    {
        double norm = 0, error = 0;
        for (const auto& layer : layers) {
            norm += layer.squared_norm;
            error += layer.squared_error;
        }
        return norm > 0 ? std::sqrt(error / norm) : 0;
    }
    /// Numbers stored, over all layers.
    [[nodiscard]] std::uint64_t parameters() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& layer : layers) { total += layer.parameters(); }
        return total;
    }
};

/// A way to decompose a dense matrix: randomized (decompose_randomized, in linalg/randomized_svd.hpp) or exact
/// (decompose_exactly, in linalg/truncated_svd.hpp, which alone pays for compiling a large SVD). u and v of these two
/// lie in memory of the policy's resource: the algorithm that asks makes factors of them.
template <class D, class T>
concept decomposition = arithmetic_element<T>
    && requires(const D& decompose, const cpu& policy, matrix_view<const T> a, const rank_choice& choice) {
           { decompose(policy, a, choice, std::string_view{}) } -> std::convertible_to<svd_result<T>>;
       };

/// weight ← round(weight + factor·ΔW) in place: the adapter folded into a base weight. `weight` is out×in in any
/// storage type and either order (an embedding or a transposed layer passes its transposed view); arithmetic in T, one
/// rounding. Folding out again with −factor gives the former weight up to that rounding; folded_update restores it
/// exactly. Throws shape_mismatch. The bits do not depend on threads. Cost: 2·out·in·r flops, one read and write of the
/// weight.
///
///     fold_update(cpu{}, adapter.at("layers.0.q_proj"), weight);
template <arithmetic_element T, storage_element S>
void fold_update(const cpu& policy, const lora_update<T>& update, matrix_view<S> weight, double factor = 1,
    std::string_view name = "the update")
{
    check_update(update, name);
    if (weight.rows() != update.out() || weight.cols() != update.in()) {
        raise<shape_mismatch>(error_code::adapter_shape,
            message("'", name, "': the update is ", update.out(), "×", update.in(), " and the weight ", weight.rows(),
                "×", weight.cols(), "; this adapter belongs to another base"));
    }
    constexpr std::size_t piece = 64;
    const cpu inside = sequential(policy);
    for_each_index(policy, (weight.rows() + piece - 1) / piece, [&](std::size_t index, std::size_t) {
        const std::size_t first = index * piece, count = std::min(piece, weight.rows() - first);
        matrix<T> delta(count, weight.cols(), weight.order(), memory_of(policy));
        gemm<T>(inside, static_cast<T>(factor * update.scaling), update.b.view().block(first, 0, count, update.rank()),
            update.a.view(), T(0), delta.view());
        const bool by_rows = weight.order() == matrix_order::row_major;
        const std::size_t runs = by_rows ? count : weight.cols(), length = by_rows ? weight.cols() : count;
        for (std::size_t k = 0; k < runs; ++k) {
            S* const at = by_rows ? &weight(first + k, 0) : &weight(first, k);
            const T* const add = delta.data() + k * length;
            for (std::size_t i = 0; i < length; ++i) { at[i] = narrow<S>(static_cast<T>(widen<T>(at[i]) + add[i])); }
        }
    });
}

/// An update folded into a weight that can be taken out again bit for bit: it keeps the words that it changed (a copy
/// of the weight, in memory of the policy's resource). Move-only; does nothing on destruction.
///
///     folded_update<float> folded(cpu{}, adapter.at("layers.0.q_proj"), weight);
///     … serve …
///     folded.undo();
template <storage_element S>
class folded_update {
public:
    /// Saves `weight` (out×in, of any storage type) and folds factor·ΔW into it, as fold_update(), whose errors these
    /// are.
    template <arithmetic_element T>
    folded_update(const cpu& policy, const lora_update<T>& update, matrix_view<S> weight, double factor = 1,
        std::string_view name = "the update")
        : weight_(weight)
        , saved_(weight.rows(), weight.cols(), weight.order(), memory_of(policy))
    {
        copy(weight_, saved_.view());
        fold_update(policy, update, weight, factor, name);
    }
    /// A folded update moves: undo() is then the new object's.
    folded_update(folded_update&&) noexcept = default;
    /// The update that was held before stays folded.
    folded_update& operator=(folded_update&&) noexcept = default;

    /// Writes the former words back. A second call changes nothing.
    void undo()
    {
        if (!saved_.empty()) { copy(saved_.view(), weight_); }
        saved_ = {};
    }

private:
    static void copy(matrix_view<const S> from, matrix_view<S> to)
    {
        const bool by_rows = from.order() == matrix_order::row_major;
        const std::size_t runs = by_rows ? from.rows() : from.cols(), length = by_rows ? from.cols() : from.rows();
        for (std::size_t k = 0; k < runs; ++k) {
            std::copy_n(from.data() + k * from.stride(), length, to.data() + k * to.stride());
        }
    }

    matrix_view<S> weight_;
    matrix<S> saved_;
};

} // namespace taskvec::inline TASKVEC_ABI
