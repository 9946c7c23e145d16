// SCE: select the entries in which task vectors differ most, calculate a weight for each task, erase minority signs.
// Wan et al., "FuseChat: knowledge fusion of chat models" (arXiv 2408.07990).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/task_rows.hpp>
#include <taskvec/select/top_k.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
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

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// The variances of a block's entries.
template <arithmetic_element A>
struct entry_variances {
    std::size_t tasks;
    A* out;

    template <int bytes, class Deltas>
    TASKVEC_INLINE void at(std::size_t i, const Deltas& x)
    {
        const auto variance = from_bits(magnitude_of(taskvec::detail::variance_of<pack<A, bytes>>(tasks, x)));
        store_row<A>(variance, out + i);
    }
};

/// Rows of task vectors with what is not selected as 0.
template <arithmetic_element A>
struct selected_entries {
    const sce_body<A>& rule;
    std::size_t tasks;
    std::uint64_t place; ///< of the first entry
    A* out; ///< rows, block_size apart

    template <int bytes, class Deltas>
    TASKVEC_INLINE void at(std::size_t i, const Deltas& x)
    {
        const auto selected = materialised(rule.mask_of(ruled_entries<A, bytes>{place + i, nullptr}, tasks, x));
        for (std::size_t t = 0; t < tasks; ++t) { store_row<A>(where(selected, x(t)), out + t * block_size + i); }
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

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
        call_vector<double> weights;
        for (const auto& squares : squares_of(passes)) {
            double total = 0;
            const std::size_t n = models.tensors()[weights.size() / tasks_].size;
            for (const double square : squares) { total += square / static_cast<double>(n); }
            for (const double square : squares) {
                weights.push_back(n == 0 || total == 0 || total < least_ ? 1.0 / static_cast<double>(tasks_)
                                                                         : square / static_cast<double>(n) / total);
            }
        }
        single_weights_ = passes.keep(call_vector<float>(weights.begin(), weights.end()));
        wide_weights_ = passes.keep(std::move(weights));
    }
    /// Variances and weights are those of a tensor.
    [[nodiscard]] static bool tensor_by_tensor(const sce_options&) noexcept { return true; }
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
    /// The threshold on the variances of a tensor, as bits: a variance that overflows is the largest.
    template <arithmetic_element A, class Passes>
    [[nodiscard]] top_k_threshold<A> threshold(Passes& passes, std::size_t tensor, double density) const
    {
        const auto& models = passes.models();
        const cpu& policy = passes.policy();
        const std::size_t size = models.tensors()[tensor].size;
        std::pmr::vector<A> variances(size, memory_of(policy));
        for_each_block(policy, models, chunk_range{models.first_chunk(tensor), models.first_chunk(tensor + 1)}, 0,
            "variances", [&]<class B>(std::size_t, std::size_t, row_block<B>& rows) {
                if constexpr (std::same_as<A, B>) {
                    kernels::entry_variances<A> work{tasks_, variances.data() + rows.offset()};
                    detail::over_task_rows(detail::delta_rows(rows), rows.size(), work);
                }
            });
        const auto differing = static_cast<std::uint64_t>(size)
            - static_cast<std::uint64_t>(std::count(variances.begin(), variances.end(), A{0}));
        const auto k = static_cast<std::uint64_t>(std::floor(density * static_cast<double>(differing)));
        if (k == 0) { return {static_cast<bits_type<A>>(~sign_mask<A>), 0}; }
        model_options how;
        how.on_nonfinite = nonfinite::propagate;
        const const_model_ref all = detail::flat_model(host_view<const A>(variances.data(), size));
        const aligned_models ranked(nullptr, {&all, 1}, how);
        auto found = top_k_thresholds<A, storage_list<A>>(policy, ranked, all_chunks(ranked), std::array{k})[0];
        if (found.equal_end <= size) { found.equal_end += models.tensors()[tensor].position; }
        return found;
    }
    /// Σ τt² over what is selected of every tensor.
    template <class Passes>
    [[nodiscard]] call_vector<call_vector<double>> squares_of(Passes& passes) const
    {
        return tensor_sums<storage_of<Passes>>(
            passes.policy(), passes.models(), tasks_, tasks_, "weights", [&]<class A>(row_block<A>& rows, double* sum) {
                const sce_body<A> rule = body_of<A>(rows.tensor_index());
                const A* selected = detail::delta_rows(rows);
                if (walks_ > 1) {
                    kernels::selected_entries<A> work{rule, tasks_, rows.position(), rows.scratch(0)};
                    std::size_t at = 0;
                    while (at < rows.size()) {
                        const auto end = rule.constant_until(rows.position() + at, rows.position() + rows.size());
                        const auto until = static_cast<std::size_t>(end - rows.position());
                        work.place = rows.position() + at;
                        work.out = rows.scratch(0) + at;
                        detail::over_task_rows(selected + at, until - at, work);
                        at = until;
                    }
                    selected = rows.scratch(0);
                }
                for (std::size_t t = 0; t < tasks_; ++t) {
                    const A* const x = selected + t * block_size;
                    sum[t] = kernels::dot(x, x, rows.size());
                }
            });
    }
    /// What selects, without weights.
    template <arithmetic_element A>
    [[nodiscard]] sce_body<A> body_of(std::size_t tensor) const
    {
        if constexpr (std::same_as<A, double>) { return {wide_[tensor], nullptr, 0}; }
        else {
            return {single_[tensor], nullptr, 0};
        }
    }

    std::size_t tasks_;
    double least_;
    unsigned walks_ = 1;
    call_vector<top_k_threshold<float>> single_; // of each tensor; as they stand they keep everything
    call_vector<top_k_threshold<double>> wide_;
    const float* single_weights_ = nullptr;
    const double* wide_weights_ = nullptr;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, sce_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
