// SCE: select the entries in which task vectors differ most, calculate a weight for each task, erase minority signs.
// Wan et al., "FuseChat: knowledge fusion of chat models" (arXiv 2408.07990). SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/keep/l1_factors.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/select/top_k.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor:
///   1. select: of the m entries whose variance over the task vectors is not 0 the floor(density·m) with the largest
///      take part, lowest index first among equals; at density 1 all entries do;
///   2. calculate: wt = mean(τt²) over the tensor with the others as 0, divided by Σ wt; where that sum is below
///      `least_weight`, or 0, all tasks weigh the same;
///   3. erase: an entry's sign is that of Σ τt (plus for 0), and tasks of another sign, or 0, are left out there.
///
/// θ* = θ0 + Σ wt·τt / Σ wt over the tasks that are left (a divisor is at least `least_weight`). Variances, of the task
/// vectors less the first, products, sums and quotients round in f32 (f64 for f64) in task order, sums of squares are
/// f64 sums of a fixed shape: bit-exact for any threads and blocks. Errors: invalid_argument (density, least_weight).
/// Cost: three reads of the models, and room for the variances of the largest tensor twice. On the CPU.
///
///     merge(cpu{}, sce_options{.density = 0.1}, base, tasks, out);
struct sce_options {
    double density = 0.1;
    double least_weight = 0.0;

    /// mergekit's: everything is selected where no density is given, and weights have a floor.
    [[nodiscard]] static sce_options as_in_mergekit() { return {.density = 1.0, .least_weight = 1e-6}; }
};

template <>
struct options_of<sce_options> {
    static constexpr option_table table{
        option_row("density", &sce_options::density, "share of entries kept", share_details(common_densities)),
        option_row("least-weight", &sce_options::least_weight,
            "below this sum of mean squares all tasks weigh the same; also the least divisor", {.at_least = 0})};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{option_preset<sce_options>{"paper", "the paper", [] { return sce_options{}; }},
        option_preset<sce_options>{"mergekit", "mergekit", &sce_options::as_in_mergekit}};
};

namespace detail {

/// The variance over the task vectors of an entry; exactly 0 where they are equal.
template <class Pack, class Delta>
[[nodiscard]] TASKVEC_INLINE Pack variance_of(std::size_t tasks, const Delta& delta)
{
    using number = typename Pack::value_type;
    const Pack first = delta(std::size_t{0});
    const number count = static_cast<number>(tasks);
    Pack mean{}, sum{};
    for (std::size_t t = 1; t < tasks; ++t) { mean = mean + (delta(t) - first); }
    mean = mean / count;
    for (std::size_t t = 0; t < tasks; ++t) {
        const Pack away = (delta(t) - first) - mean;
        sum = sum + away * away;
    }
    return sum / count;
}

} // namespace detail

/// Selection, weights and erasure of one tensor.
template <arithmetic_element A>
struct sce_body {
    static constexpr bool watches = false;
    top_k_threshold<A> selected; ///< on variances
    const A* weights; ///< of each task
    A least; ///< the least divisor

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        const auto takes_part =
            materialised(mask_of(in, in.tasks(), [&](std::size_t t) TASKVEC_BODY { return in.delta(t); }));
        const pack sum = in.sum_of([&](std::size_t t) TASKVEC_BODY { return where(takes_part, in.delta(t)); });
        const pack sign = select(sum >= 0, filled<pack>(1), filled<pack>(-1));
        pack total{}, divisor{};
        in.each([&](std::size_t t) TASKVEC_BODY {
            const pack x = where(takes_part, in.delta(t));
            const auto agrees = x * sign > 0;
            total = total + where(agrees, weights[t] * x);
            divisor = divisor + where(agrees, filled<pack>(weights[t]));
            if (in.counts_tasks()) {
                in.count_of(0, t, x != 0);
                in.count_of(1, t, (x != 0) & ~agrees);
            }
        });
        return in.base() + total / select(divisor < least, filled<pack>(least), divisor);
    }
    /// Which entries are selected.
    template <class In, class Delta>
    [[nodiscard]] TASKVEC_INLINE typename In::mask mask_of(const In& in, std::size_t tasks, const Delta& delta) const
    {
        const auto bits = magnitude_of(detail::variance_of<typename In::pack>(tasks, delta));
        const auto magnitude = static_cast<signed_word<A>>(selected.magnitude);
        const signed_word<A> below = in.before(selected.equal_end) ? magnitude - 1 : magnitude;
        return bits > filled_words<typename In::words>(below);
    }
    [[nodiscard]] std::uint64_t constant_until(std::uint64_t place, std::uint64_t end) const noexcept
    {
        return selected.equal_end > place ? std::min(end, selected.equal_end) : end;
    }
};

template <>
class method<sce_options> : public elementwise_method {
public:
    static constexpr bool on_device = false; // variances are ranked on the CPU
    static constexpr bool in_place = false;
    static constexpr std::size_t task_slots = 2;

    template <class Passes>
    method(Passes& passes, const sce_options& options)
        : tasks_(passes.tasks())
        , least_(options.least_weight)
    {
        static_cast<void>(top_k_count(options.density, 0)); // refuses what is no share
        const auto& models = passes.models();
        single_.resize(models.tensors().size());
        wide_.resize(models.tensors().size());
        if (options.density < 1) {
            walks_ = 2;
            for (std::size_t i = 0; i < models.tensors().size(); ++i) {
                if (models.tensors()[i].wide) { wide_[i] = threshold<double>(passes, i, options.density); }
                else {
                    single_[i] = threshold<float>(passes, i, options.density);
                }
            }
        }
        std::vector<double> weights;
        for (const auto& squares : squares_of(passes)) {
            double total = 0;
            const std::size_t n = models.tensors()[weights.size() / tasks_].size;
            for (const double square : squares) { total += square / static_cast<double>(n); }
            for (const double square : squares) {
                weights.push_back(n == 0 || total == 0 || total < least_ ? 1.0 / static_cast<double>(tasks_)
                                                                         : square / static_cast<double>(n) / total);
            }
        }
        single_weights_ = passes.keep(std::vector<float>(weights.begin(), weights.end()));
        wide_weights_ = passes.keep(std::move(weights));
    }
    template <arithmetic_element A>
    [[nodiscard]] sce_body<A> body(std::size_t tensor) const
    {
        const A least = std::max(static_cast<A>(least_), std::numeric_limits<A>::min());
        if constexpr (std::same_as<A, double>) { return {wide_[tensor], wide_weights_ + tensor * tasks_, least}; }
        else {
            return {single_[tensor], single_weights_ + tensor * tasks_, least};
        }
    }
    [[nodiscard]] unsigned walks() const noexcept { return walks_; }

private:
    /// Calls use(i, x) for the entries of a block, with x(t) those of the task vectors.
    template <arithmetic_element A, class Use>
    void entries_of(row_block<A>& rows, const Use& use) const
    {
        for (std::size_t t = 0; t < tasks_; ++t) { (void)rows.delta(t); }
        for (std::size_t i = 0; i < rows.size(); ++i) {
            use(i, [&](std::size_t t) { return pack<A, 0>{rows.row(t)[i]}; });
        }
    }
    /// The threshold on the variances of a tensor, as bits: a variance that overflows is the largest.
    template <arithmetic_element A, class Passes>
    [[nodiscard]] top_k_threshold<A> threshold(Passes& passes, std::size_t tensor, double density) const
    {
        using bits = bits_type<A>;
        const auto& models = passes.models();
        std::pmr::vector<bits> variances(models.tensors()[tensor].size, memory_of(passes.policy()));
        for_each_block(passes.policy(), models, chunk_range{models.first_chunk(tensor), models.first_chunk(tensor + 1)},
            0, "variances", [&]<class B>(std::size_t, std::size_t, row_block<B>& rows) {
                if constexpr (std::same_as<A, B>) {
                    entries_of<A>(rows, [&](std::size_t i, const auto& x) {
                        variances[static_cast<std::size_t>(rows.offset()) + i] =
                            magnitude_bits(detail::variance_of<pack<A, 0>>(tasks_, x).lanes);
                    });
                }
            });
        const auto differing = static_cast<std::uint64_t>(
            std::count_if(variances.begin(), variances.end(), [](bits x) { return x != 0; }));
        const auto k = static_cast<std::uint64_t>(std::floor(density * static_cast<double>(differing)));
        if (k == 0) { return {static_cast<bits>(~sign_mask<A>), 0}; }
        std::pmr::vector<bits> sorted(variances, memory_of(passes.policy()));
        const auto kth = sorted.begin() + static_cast<std::ptrdiff_t>(k - 1);
        std::nth_element(sorted.begin(), kth, sorted.end(), std::greater<>());
        const bits least = *kth;
        std::uint64_t equals = k
            - static_cast<std::uint64_t>(
                std::count_if(variances.begin(), variances.end(), [&](bits x) { return x > least; }));
        std::uint64_t place = models.tensors()[tensor].position;
        for (std::size_t i = 0; equals > 0; ++i, ++place) { equals -= variances[i] == least ? 1u : 0u; }
        return {least, place};
    }
    /// Σ τt² over what is selected of every tensor.
    template <class Passes>
    [[nodiscard]] std::vector<std::vector<double>> squares_of(Passes& passes) const
    {
        return tensor_sums<storage_of<Passes>>(
            passes.policy(), passes.models(), tasks_, 0, "weights", [&]<class A>(row_block<A>& rows, double* sum) {
                const std::size_t tensor = rows.tensor_index();
                sce_body<A> rule{{}, nullptr, 0};
                if constexpr (std::same_as<A, double>) { rule.selected = wide_[tensor]; }
                else {
                    rule.selected = single_[tensor];
                }
                std::fill_n(sum, tasks_, 0.0);
                entries_of<A>(rows, [&](std::size_t i, const auto& x) {
                    const kernels::ruled_entries<A, 0> entry{rows.position() + i, nullptr};
                    if (!rule.mask_of(entry, tasks_, x).lanes) { return; }
                    for (std::size_t t = 0; t < tasks_; ++t) {
                        sum[t] += static_cast<double>(x(t).lanes) * static_cast<double>(x(t).lanes);
                    }
                });
            });
    }

    std::size_t tasks_;
    double least_;
    unsigned walks_ = 1;
    std::vector<top_k_threshold<float>> single_; // of each tensor; as they stand they keep everything
    std::vector<top_k_threshold<double>> wide_;
    const float* single_weights_ = nullptr;
    const double* wide_weights_ = nullptr;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, sce_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
