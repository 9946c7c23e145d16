// The contract of a merge method: what one has to say of itself so that merge() runs it, everywhere.
// SPDX-License-Identifier: Apache-2.0
//
// A method is an options struct and, beside it, a specialisation of taskvec::method for it. Anybody's will do: those of
// the library are written on the same contract.
//
//     struct midpoint_options { double lambda = 1; };                     // 1. what a caller may choose
//
//     template <class A>
//     struct midpoint_body {                                             // 3. what becomes of the entries
//         static constexpr bool watches = false;
//         A lambda;
//         template <class In>
//         TASKVEC_INLINE typename In::pack operator()(In& in) const
//         {
//             auto least = in.delta(0), most = in.delta(0);
//             for (std::size_t t = 1; t < in.tasks(); ++t) {
//                 const auto x = in.delta(t);
//                 least = select(x < least, x, least);
//                 most = select(x > most, x, most);
//             }
//             return in.base() + lambda * (0.5f * (least + most));
//         }
//     };
//
//     template <>
//     class taskvec::method<midpoint_options> : public taskvec::elementwise_method {
//     public:
//         template <class Passes>                                        // 2. what it must know before the walk
//         method(Passes&, const midpoint_options& options) : lambda_(options.lambda) { }
//         template <taskvec::arithmetic_element A>
//         midpoint_body<A> body(std::size_t) const { return {static_cast<A>(lambda_)}; }
//     private:
//         double lambda_;
//     };
//
// The constructor checks the options and may ask `passes` for what takes a walk over the models: dot products of every
// tensor, thresholds of top-k, and memory for tables that bodies read (see cpu_passes). body<A>(tensor) is a small
// value for each tensor: trivially copyable, numbers and pointers from passes.keep(). Its call operator works on a pack
// of entries (core/pack.hpp; the interface of `in` is that of kernels::entries): no branches on packs, one result. It
// is compiled for every vector width and, on the gpu policy, as a functor.
//
// What a method may say beside that has a default in elementwise_method. Methods that are not elementwise are row
// methods, with a call for a block of rows, or write everything themselves: row_method and whole_method below.
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/pack.hpp>
#include <taskvec/core/sink.hpp>
#include <taskvec/models/block.hpp>
#include <taskvec/models/companion.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <ranges>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A list of flat views (or what converts to one) of one storage type in P's memory space: one for each task.
template <class Tasks, class P>
concept tasks_of = std::ranges::input_range<const Tasks> && input_of<std::ranges::range_reference_t<const Tasks>, P>;

/// A merge method, by its options. Specialise it (see above); it has no general definition.
template <class Options>
class method;

/// What a merge can say about itself; filled where model_options::statistics asks for it.
struct merge_report {
    /// The norms of one tensor.
    struct tensor_norm {
        std::string name; ///< of the tensor
        double merged = 0; ///< ‖θ*‖ before rounding to storage
        double change = 0; ///< ‖θ* − θ0‖, 0 without a base
    };
    std::vector<std::uint64_t> kept{}; ///< for each task: nonzero entries of its task vector that took part
    std::vector<std::uint64_t> conflicting{}; ///< for each task: those of them whose sign lost the election (TIES)
    std::vector<tensor_norm> norms{}; ///< in the order of tensors
    unsigned walks = 0; ///< how often the models were read from end to end
    std::uint64_t beside = 0; ///< bytes read beside those walks: statistics, and second reads of some tensors
    std::uint64_t saturated = 0; ///< results that became their dtype's largest number (overflow::saturate)

    /// Adds what the merge of other tensors of the same models says of them.
    merge_report& operator+=(const merge_report& other)
    {
        const auto add = [](std::vector<std::uint64_t>& sum, const std::vector<std::uint64_t>& more) {
            if (sum.size() < more.size()) { sum.resize(more.size()); }
            for (std::size_t t = 0; t < more.size(); ++t) { sum[t] += more[t]; }
        };
        add(kept, other.kept);
        add(conflicting, other.conflicting);
        norms.insert(norms.end(), other.norms.begin(), other.norms.end());
        walks = std::max(walks, other.walks);
        beside += other.beside;
        saturated += other.saturated;
        return *this;
    }
};

/// What bodies counted: on a run of entries, a tensor, a model. Tallies of parts add up to that of the whole, whoever
/// walked over the parts and in whatever order.
struct merge_tally {
    static constexpr std::size_t slot_count = 4; ///< counters that a body has
    std::array<std::uint64_t, slot_count> counts{}; ///< by in.count(slot, mask)
    std::pmr::vector<std::uint64_t> of_tasks{}; ///< by in.count_of(slot, task, mask): [slot][task]

    merge_tally() = default;
    /// Counts of tasks will lie in memory of `memory`.
    explicit merge_tally(std::pmr::memory_resource* memory)
        : of_tasks(memory)
    { }

    /// Adds another part's counts, of entries and of tasks.
    merge_tally& operator+=(const merge_tally& other)
    {
        for (std::size_t k = 0; k < slot_count; ++k) { counts[k] += other.counts[k]; }
        if (of_tasks.size() < other.of_tasks.size()) { of_tasks.resize(other.of_tasks.size()); }
        for (std::size_t k = 0; k < other.of_tasks.size(); ++k) { of_tasks[k] += other.of_tasks[k]; }
        return *this;
    }
};

/// What a method says of itself when it says nothing. Derive from it, and hide what is otherwise.
///
/// Beside these a method may have
///   - `static call_vector<aligned_tensor::operand> beside(const Options&, const aligned_models&, memory_space)` (or
///     another list): what in.beside(b) reads, as many for each tensor, in the order of tensors();
///   - `static bool tensor_by_tensor(const Options&)`: whether all that it learns of a tensor comes of that tensor
///     alone, so that some tensors at a time may be prepared and merged, and models larger than memory are read once;
///   - `bool settle(std::span<const merge_tally> of_tensors)`, called once everything is merged: whether something has
///     to be merged again, and then `bool again(std::size_t tensor, const merge_tally& part)`: whether that part has;
///   - `void examine(const Passes&, std::size_t tensor, …)`: see fisher.hpp;
///   - `bool nonfinite_beside(std::size_t tensor, std::uint64_t index) const`: whether what it reads beside the models
///     has NaN or infinity there, which is then no overflow; see sparse_addition.hpp;
///   - where an entry's fate depends on its row: `const row_pieces& pieces()`, what the walk goes over; and for each of
///     them `weigh(row_block<A>&, const tensor_chunk& piece, A* numbers, detail::piece_memory&)`, which makes
///     `row_numbers()` rows of numbers as long as the piece. A body with `reads_beside` sees row b as in.beside(b). CPU
///     only: see della.hpp; unless the body says by `number(b, entry)` what in.beside(b) is on devices: nuslerp.hpp.
struct elementwise_method {
    static constexpr bool needs_base = true; ///< merges without a base do not compile
    static constexpr bool in_place = true; ///< an output may be the memory of an input of the same place: each entry is
                                           ///< read for the last time before it is written
    static constexpr bool on_device = true; ///< runs on taskvec::gpu too
    static constexpr std::size_t task_slots = 0; ///< slots of in.count_of() where statistics are asked for: the first
                                                 ///< is merge_report::kept, the second merge_report::conflicting

    /// How often the constructor read all models.
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
    /// Bytes read beside the models.
    [[nodiscard]] std::uint64_t bytes_beside() const noexcept { return 0; }
};

/// The same of a method that is not elementwise: row_method or whole_method, on the CPU.
struct general_method : elementwise_method {
    static constexpr bool on_device = false;
    static constexpr std::size_t scratch_rows = 0; ///< rows of a block that a row method needs besides its result
};

class cpu_passes; // passes.hpp

namespace detail {

template <class Options>
concept has_method = requires { sizeof(method<Options>); };

template <class Options>
concept has_contract = has_method<Options> && std::derived_from<method<Options>, elementwise_method>;

template <class Options>
concept has_constructor = has_method<Options> && std::constructible_from<method<Options>, cpu_passes&, const Options&>;

template <class Options>
concept has_body =
    has_method<Options> && requires(const method<Options>& m, std::size_t tensor) { m.template body<float>(tensor); };

template <class Options>
concept watching_body = has_body<Options> && requires(const method<Options>& m, std::size_t tensor) {
    { std::remove_cvref_t<decltype(m.template body<float>(tensor))>::watches } -> std::convertible_to<bool>;
};

} // namespace detail

/// An elementwise method: body<A>(tensor) is a value whose call operator merges a pack of entries.
template <class Options>
concept packed_method = detail::watching_body<Options>;

/// A method on rows: method(block, merged, tally) merges an opened block of A into the row `merged`. For what is no
/// body of a few entries, such as scattered additions. CPU only.
template <class Options>
concept row_method = detail::has_method<Options>
    && requires(const method<Options>& m, row_block<float>& rows, float* merged, merge_tally& tally) {
           m(rows, merged, tally);
       };

/// A method that writes all tensors itself, from whole tensors: write(policy, models, out).
template <class Options>
concept whole_method = detail::has_method<Options>
    && requires(const method<Options>& m, const cpu& policy, const aligned_models& models, tensor_sink& out) {
           m.write(policy, models, out);
       };

/// The options of a merge method.
template <class Options>
concept merge_method = detail::has_contract<Options> && detail::has_constructor<Options>
    && (packed_method<Options> || row_method<Options> || whole_method<Options>);

namespace detail {

/// Says what is missing of a method, in a sentence.
template <class Options>
consteval bool check_method()
{
    static_assert(has_method<Options>,
        "these are not the options of a merge method: include the method's header, or specialise taskvec::method for "
        "them (see taskvec/methods/method.hpp)");
    if constexpr (has_method<Options>) {
        static_assert(has_contract<Options>,
            "a merge method derives from taskvec::elementwise_method, or general_method, and hides what is otherwise");
        static_assert(has_constructor<Options>,
            "a merge method has a constructor: template <class Passes> method(Passes& passes, const Options& options)");
        static_assert(has_body<Options> || row_method<Options> || whole_method<Options>,
            "a merge method has a body: template <arithmetic_element A> auto body(std::size_t tensor) const; or, where "
            "it is not elementwise, a call operator for a block of rows, or write(policy, models, out)");
        static_assert(!has_body<Options> || watching_body<Options>,
            "the body of a merge method says whether it hands NaN and infinity to in.watch(): static constexpr bool "
            "watches = false, where each input is to be looked at for them");
    }
    return true;
}

/// "1 of 'a', -1 of 'b'": which weights tasks have, for messages.
[[nodiscard]] TASKVEC_COLD inline std::string weights_text(
    std::span<const double> weights, const aligned_models& models)
{
    constexpr std::size_t most = 8;
    std::string text;
    for (std::size_t t = 0; t < std::min(most, weights.size()); ++t) {
        text += message(t == 0 ? "" : ", ", weights[t], " of ", models.label(t));
    }
    return weights.size() > most ? text + " …" : text;
}

/// What a sum over tasks is divided by: Σ weights in the arithmetic type, in task order; 1 where it is not
/// `normalized`.
class weight_divisor {
public:
    /// Weights of the tasks of `models`. Errors: invalid_argument where they sum to 0.
    weight_divisor(std::span<const double> weights, bool normalized, const aligned_models& models)
    {
        if (!normalized) { return; }
        single_ = 0;
        wide_ = 0;
        for (const double weight : weights) {
            single_ += static_cast<float>(weight);
            wide_ += weight;
        }
        if (single_ == 0 || wide_ == 0) {
            raise<invalid_argument>(error_code::weights_sum_zero,
                message("the weights sum to 0 (", weights_text(weights, models),
                    "), and nothing can be divided by that: change one of them, or do not normalize"));
        }
    }
    template <arithmetic_element A>
    [[nodiscard]] A get() const noexcept
    {
        if constexpr (std::same_as<A, double>) { return wide_; }
        else {
            return single_;
        }
    }

private:
    float single_ = 1;
    double wide_ = 1;
};

inline constexpr std::string_view no_negative_weights =
    "this method has no meaning for negative weights; give 0 or more";

/// task_weights() of tasks that label(t) names. `refusal`: why negative weights are refused; empty where they are not.
template <class Label>
[[nodiscard]] call_vector<double> labelled_weights(
    std::span<const double> weights, std::size_t tasks, const Label& label, std::string_view refusal)
{
    if (weights.empty()) { return call_vector<double>(tasks, 1.0); }
    if (weights.size() != tasks) {
        raise<invalid_argument>(
            error_code::list_length, message(weights.size(), " weights for ", tasks, " tasks: give one each, or none"));
    }
    for (std::size_t t = 0; t < tasks; ++t) {
        if (!std::isfinite(weights[t])) {
            raise<invalid_argument>(error_code::parameter_not_finite,
                message("the weight of ", label(t), " is ", weights[t], ": give a finite number"));
        }
        if (!refusal.empty() && weights[t] < 0) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message("the weight of ", label(t), " is ", weights[t], ": ", refusal));
        }
    }
    return {weights.begin(), weights.end()};
}

} // namespace detail

/// The weights of the tasks of models, one for each: those given, or 1 for all where none are. A method's constructor
/// checks its list with this. Errors: invalid_argument, naming the task (another number of them; not finite; negative
/// where that means nothing).
///
///     const auto weights = task_weights(options.weights, passes.models());
[[nodiscard]] inline call_vector<double> task_weights(
    std::span<const double> weights, const aligned_models& models, bool negative_allowed = true)
{
    return detail::labelled_weights(
        weights, models.task_count(), [&](std::size_t t) { return models.label(t); },
        negative_allowed ? std::string_view() : detail::no_negative_weights);
}

/// The same for a number of tasks, which are "task 1", "task 2", … in messages.
[[nodiscard]] inline call_vector<double> task_weights(
    std::span<const double> weights, std::size_t tasks, bool negative_allowed = true)
{
    return detail::labelled_weights(
        weights, tasks, [](std::size_t t) { return message("task ", t + 1); },
        negative_allowed ? std::string_view() : detail::no_negative_weights);
}

} // namespace taskvec::inline TASKVEC_ABI
