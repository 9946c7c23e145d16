// RAM and RAM+: task vectors that are averaged where several act, and kept whole where one does. "Reinforced Agent
// Merging" (arXiv 2601.13572).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/task_rows.hpp>
#include <taskvec/select/thresholds.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = θ0 + Σ τt/c over the tasks that act on an entry, |τt| > epsilon, where c is their number: the mean of those
/// that act. Entries with one task alone keep its change whole. Bit-exact: sums in task order, every quotient and sum
/// rounds in f32 (f64 for f64). Errors: invalid_argument (epsilon). Cost: one read of the models.
///
///     merge(cpu{}, ram_options{.epsilon = 1e-5}, base, tasks, out);
struct ram_options {
    double epsilon = 1e-5;
};

/// RAM, where the entries that one task acts on alone are multiplied by λt = 1 + r·min(ρt, alpha), with ρt the number
/// of entries that task t shares with others divided by the number that it has alone: over the model, as in the paper,
/// or tensor by tensor (mergekit's). Cost: one more read of the models. On the CPU.
///
///     merge(cpu{}, ram_plus_options{.r = 0.1, .alpha = 0.2}, base, tasks, out);
struct ram_plus_options {
    double epsilon = 1e-5;
    double r = 0.1;
    double alpha = 0.2;
    taskvec::scope scope = taskvec::scope::model;

    /// What mergekit's ramplus_tl does.
    [[nodiscard]] static ram_plus_options as_in_mergekit()
    {
        ram_plus_options options;
        options.scope = taskvec::scope::tensor;
        return options;
    }
};

namespace detail {
[[nodiscard]] constexpr option_details epsilon_details()
{
    return {.at_least = 0, .expected = "a magnitude of at least 0, such as 1e-5"};
}
} // namespace detail

template <>
struct options_of<ram_options> {
    static constexpr option_table table{option_row(
        "epsilon", &ram_options::epsilon, "magnitude above which a task acts on an entry", detail::epsilon_details())};
};
template <>
struct options_of<ram_plus_options> {
    static constexpr option_table table{option_row("epsilon", &ram_plus_options::epsilon,
                                            "magnitude above which a task acts on an entry", detail::epsilon_details()),
        option_row("r", &ram_plus_options::r, "how much the share of common entries raises those of one task"),
        option_row("alpha", &ram_plus_options::alpha, "the largest share that counts", {.at_least = 0}),
        option_row("scope", &ram_plus_options::scope, "what shares count over", {.unit = "SCOPE"})};
    static constexpr std::string_view preset_option = "semantics";
    static constexpr std::array presets{
        option_preset<ram_plus_options>{"paper", "the paper", [] { return ram_plus_options{}; }},
        option_preset<ram_plus_options>{"mergekit", "mergekit", &ram_plus_options::as_in_mergekit}};
};

/// θ0 + Σ over the acting tasks of raise[t]·τt where one acts alone, and of τt/c where c do.
template <arithmetic_element A>
struct acting_mean_body {
    static constexpr bool watches = false;
    A epsilon; ///< magnitude above which a task acts
    const A* raise; ///< null: 1 for all

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        using pack = typename In::pack;
        using words = typename In::words;
        const auto acts = [&](const pack& x) TASKVEC_BODY { return from_bits(magnitude_of(x)) > epsilon; };
        words acting{};
        in.each([&](std::size_t t) TASKVEC_BODY {
            const auto acts_here = acts(in.delta(t));
            acting = added_where(acts_here, acting);
            if (in.counts_tasks()) { in.count_of(0, t, acts_here); }
        });
        const auto count = to_numbers(larger(acting, filled_words<words>(1)));
        const auto alone = count == 1;
        const pack sum = in.sum_of([&](std::size_t t) TASKVEC_BODY {
            const pack x = in.delta(t);
            const pack raised = raise ? raise[t] * x : x;
            return where(acts(x), select(alone, raised, x / count));
        });
        return in.base() + sum;
    }
};

template <>
class method<ram_options> : public elementwise_method {
public:
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes&, const ram_options& options)
        : epsilon_(options.epsilon)
    { }
    template <arithmetic_element A>
    [[nodiscard]] acting_mean_body<A> body(std::size_t) const
    {
        return {static_cast<A>(epsilon_), nullptr};
    }

private:
    double epsilon_;
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Counts for each task the entries of a block on which it acts with others, and those on which it acts alone.
template <arithmetic_element A>
struct acting_tasks {
    static constexpr std::size_t lanes = 64 / sizeof(A);
    A epsilon;
    std::size_t tasks;
    signed_word<A>* counts; ///< `lanes` for each task, with others, then as many alone; their sums count

    template <int bytes, class Deltas>
    TASKVEC_INLINE void at(std::size_t, const Deltas& x) const
    {
        using words = pack_words<A, bytes>;
        words acting{};
        for (std::size_t t = 0; t < tasks; ++t) { acting = added_where(acts(x(t)), acting); }
        const auto several = materialised(acting > 1);
        for (std::size_t t = 0; t < tasks; ++t) {
            const auto here = acts(x(t));
            add(here & several, counts + t * lanes);
            add(here & ~several, counts + (tasks + t) * lanes);
        }
    }

private:
    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE pack_mask<A, bytes> acts(const pack<A, bytes>& x) const noexcept
    {
        return from_bits(magnitude_of(x)) > epsilon;
    }
    template <int bytes>
    static TASKVEC_INLINE void add(const pack_mask<A, bytes>& mask, signed_word<A>* to) noexcept
    {
        pack_words<A, bytes> count;
        std::memcpy(&count, to, sizeof count);
        count = added_where(mask, count);
        std::memcpy(to, &count, sizeof count);
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

template <>
class method<ram_plus_options> : public elementwise_method {
public:
    static constexpr bool on_device = false; // entries are counted on the CPU
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes& passes, const ram_plus_options& options)
        : epsilon_(options.epsilon)
        , tasks_(passes.tasks())
        , raise_(passes, factors(passes, options))
    { }
    /// Whether shares count over tensors.
    [[nodiscard]] static bool tensor_by_tensor(const ram_plus_options& options) noexcept
    {
        return options.scope == scope::tensor;
    }
    template <arithmetic_element A>
    [[nodiscard]] acting_mean_body<A> body(std::size_t tensor) const
    {
        return {static_cast<A>(epsilon_), raise_.get<A>() + tensor * tasks_};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 1; }

private:
    /// λt for every tensor and task.
    template <class Passes>
    [[nodiscard]] static call_vector<double> factors(Passes& passes, const ram_plus_options& options)
    {
        const std::size_t tasks = passes.tasks();
        // For every task the entries that it shares, then those that it has alone: whole numbers, exact in f64.
        auto counts = tensor_sums<storage_of<Passes>>(
            passes.policy(), passes.models(), 2 * tasks, 0, "shares", [&]<class A>(row_block<A>& rows, double* sum) {
                const A epsilon = static_cast<A>(options.epsilon);
                using counter = kernels::acting_tasks<A>;
                std::pmr::vector<signed_word<A>> lanes(2 * tasks * counter::lanes, memory_of(passes.policy()));
                const counter work{epsilon, tasks, lanes.data()};
                detail::over_task_rows(detail::delta_rows(rows), rows.size(), work);
                for (std::size_t k = 0; k < 2 * tasks; ++k) {
                    const auto* const of_lanes = lanes.data() + k * counter::lanes;
                    sum[k] =
                        static_cast<double>(std::accumulate(of_lanes, of_lanes + counter::lanes, signed_word<A>{0}));
                }
            });
        if (options.scope == taskvec::scope::model) {
            call_vector<double> total(2 * tasks);
            for (const auto& row : counts) {
                for (std::size_t k = 0; k < total.size(); ++k) { total[k] += row[k]; }
            }
            for (auto& row : counts) { row = total; }
        }
        call_vector<double> all;
        for (const auto& row : counts) {
            for (std::size_t t = 0; t < tasks; ++t) {
                // With nothing alone nothing is raised: the largest share stands for it.
                const double share = row[tasks + t] == 0 ? options.alpha : row[t] / row[tasks + t];
                all.push_back(1 + options.r * std::min(share, options.alpha));
            }
        }
        return all;
    }

    double epsilon_;
    std::size_t tasks_;
    kept_numbers raise_;
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, ram_options)
TASKVEC_COMPILED_MERGES(extern, ram_plus_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
