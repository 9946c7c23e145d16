// Linear combinations with factors of their own for every tensor, found from the dot products of its models: what
// NuSLERP, Multi-SLERP and the Karcher mean come to.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/methods/passes.hpp>
#include <taskvec/methods/vector_factors.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

namespace kernels {

/// Σ factor(t)·θt, or θ0 + Σ factor(t)·τt: +0 first, then in task order; every product and sum rounds.
template <class In, class Factor>
[[nodiscard]] TASKVEC_INLINE typename In::pack combined(In& in, bool on_base, const Factor& factor)
{
    if (on_base) {
        const auto sum = in.sum_of([&](std::size_t t) TASKVEC_BODY { return factor(t) * in.delta(t); });
        in.watch(sum);
        return in.base() + sum;
    }
    const auto sum = in.sum_of([&](std::size_t t) TASKVEC_BODY { return factor(t) * in.task(t); });
    in.watch(sum);
    return sum;
}

} // namespace kernels

/// Σ weights[t]·θt, or θ0 + Σ weights[t]·τt.
template <arithmetic_element A>
struct combination_body {
    static constexpr bool watches = true;
    const A* weights; ///< of each task
    bool on_base; ///< of τt on θ0, and not of θt

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        return kernels::combined(in, on_base, [&](std::size_t t) TASKVEC_BODY { return weights[t]; });
    }
};

/// The same with weights that rows or columns of a tensor have of their own.
template <arithmetic_element A>
struct vector_combination_body : detail::factors_of_vectors<A> {
    static constexpr bool watches = true;
    bool on_base; ///< of τt on θ0, and not of θt

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        return kernels::combined(in, on_base, [&](std::size_t t) TASKVEC_BODY { return in.beside(t); });
    }
};

namespace detail {

/// All dot products of the vectors of one tensor.
class gram_matrix {
public:
    /// From the dots of i and j ≤ i, in that order.
    gram_matrix(std::size_t count, call_vector<double> dots)
        : count_(count)
        , dots_(std::move(dots))
    { }
    [[nodiscard]] std::size_t count() const noexcept { return count_; }
    [[nodiscard]] double operator()(std::size_t i, std::size_t j) const noexcept
    {
        return i < j ? dots_[j * (j + 1) / 2 + i] : dots_[i * (i + 1) / 2 + j];
    }
    [[nodiscard]] double norm(std::size_t i) const noexcept { return std::sqrt((*this)(i, i)); }
    /// The dot product of vector i with Σ factors[j]·(vector j).
    [[nodiscard]] double dot(std::size_t i, std::span<const double> factors) const noexcept
    {
        double sum = 0;
        for (std::size_t j = 0; j < count_; ++j) { sum += factors[j] * (*this)(i, j); }
        return sum;
    }
    /// ‖Σ factors[j]·(vector j)‖.
    [[nodiscard]] double norm(std::span<const double> factors) const noexcept
    {
        double sum = 0;
        for (std::size_t i = 0; i < count_; ++i) { sum += factors[i] * dot(i, factors); }
        return std::sqrt(sum > 0 ? sum : 0.0); // below 0 lies rounding
    }

private:
    std::size_t count_;
    call_vector<double> dots_;
};

/// The dot products of the tasks of every tensor, or, on a base, of their task vectors. One read of the models.
template <class Passes>
[[nodiscard]] call_vector<gram_matrix> gram_matrices(Passes& passes, bool on_base, std::string_view phase)
{
    const auto tasks = static_cast<std::uint32_t>(passes.tasks());
    call_vector<operand_pair> pairs;
    for (std::uint32_t i = 0; i < tasks; ++i) {
        for (std::uint32_t j = 0; j <= i; ++j) { pairs.push_back({1 + i, 1 + j}); }
    }
    call_vector<gram_matrix> matrices;
    for (auto& sums : tensor_dots(passes, pairs, on_base, phase)) { matrices.emplace_back(tasks, std::move(sums)); }
    return matrices;
}

} // namespace detail

/// A method that combines the models of every tensor by factors of its own, which come from their dot products: derive
/// from it, and say in the constructor what the factors of a tensor are. Needs no base. Cost: two reads of the models.
class combination_method : public elementwise_method {
public:
    static constexpr bool needs_base = false;

    /// Dot products are those of a tensor.
    template <class Options>
    [[nodiscard]] static bool tensor_by_tensor(const Options&) noexcept
    {
        return true;
    }
    template <arithmetic_element A>
    [[nodiscard]] combination_body<A> body(std::size_t tensor) const
    {
        return {factors_.get<A>() + tensor * tasks_, on_base_};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 1; }

protected:
    /// factors_of(dots, tensor) gives one factor for each task. Not `whole`: the models are not read, and there is no
    /// body.
    template <class Passes, class Rule>
    combination_method(Passes& passes, bool on_base, const Rule& factors_of, bool whole = true)
        : factors_(passes, whole ? all_factors(passes, on_base, factors_of) : call_vector<double>())
        , tasks_(passes.tasks())
        , on_base_(on_base)
    { }
    /// Whether task vectors are combined on a base, and not tasks.
    [[nodiscard]] bool on_base() const noexcept { return on_base_; }

private:
    template <class Passes, class Rule>
    [[nodiscard]] static call_vector<double> all_factors(Passes& passes, bool on_base, const Rule& factors_of)
    {
        call_vector<double> all;
        std::size_t tensor = 0;
        for (const auto& dots : detail::gram_matrices(passes, on_base, "angles")) {
            const auto factors = factors_of(dots, tensor++);
            all.insert(all.end(), factors.begin(), factors.end());
        }
        return all;
    }

    kept_numbers factors_;
    std::size_t tasks_;
    bool on_base_;
};

} // namespace taskvec::inline TASKVEC_ABI
