// Thresholds of every task vector of aligned models, over the whole model or tensor by tensor.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/core/parts.hpp>
#include <taskvec/select/top_k.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// Over what the top entries are counted and the majority sign is taken: all tensors together (what the papers mean),
/// or each tensor by itself.
enum class scope : std::uint8_t { model, tensor };

/// Which entries the trim keeps: exactly k, lowest index first among equals; or every entry whose magnitude reaches the
/// (floor(density·n) + 1)-th largest, however many are equal.
enum class trim_rule : std::uint8_t { exact, reach_next };

template <>
struct enum_words<scope> {
    static constexpr std::array words{
        enum_word<scope>{scope::model, "model"}, enum_word<scope>{scope::tensor, "tensor"}};
};
template <>
struct enum_words<trim_rule> {
    static constexpr std::array words{
        enum_word<trim_rule>{trim_rule::exact, "exact"}, enum_word<trim_rule>{trim_rule::reach_next, "reach-next"}};
};

namespace detail {

/// Finds thresholds as trim_thresholds asks for them, on the CPU.
template <class Types = storage_types>
struct top_k_by_sampling {
    const cpu* policy;
    const aligned_models* models;
    std::size_t at_once = 1; ///< how many such searches there are at a time, which share the budget

    template <arithmetic_element A>
    [[nodiscard]] call_vector<top_k_threshold<A>> operator()(
        std::type_identity<A>, tensor_range range, std::span<const std::uint64_t> counts, unsigned* walks) const
    {
        // Half the budget for what a pass collects, for all tasks together.
        const std::size_t capacity =
            std::min(std::size_t{1} << 22, models->options().memory / 2 / (models->task_count() * sizeof(A) * at_once));
        const chunk_range chunks{models->first_chunk(range.first), models->first_chunk(range.last)};
        return found_thresholds<A, Types>(*policy, *models, chunks, counts, capacity, walks);
    }

    /// Calls f(tensor, search) for every tensor, with what searches that tensor: see for_each_part().
    template <class F>
    void for_each_tensor(const F& f) const
    {
        call_vector<std::uint64_t> bytes;
        for (std::size_t i = 0; i < models->tensors().size(); ++i) {
            bytes.push_back(bytes_of(*models, {models->first_chunk(i), models->first_chunk(i + 1)}));
        }
        for_each_part(*policy, "select", bytes, [&](std::size_t i, const cpu& on, std::size_t together) {
            f(i, top_k_by_sampling{&on, models, together});
        });
    }
};

} // namespace detail

/// How many entries of n are kept, for what is no plain share: count(n), or count(n, t) of task t.
template <class Count>
concept entry_count = std::same_as<std::invoke_result_t<const Count&, std::uint64_t>, std::uint64_t>
    || std::same_as<std::invoke_result_t<const Count&, std::uint64_t, std::size_t>, std::uint64_t>;

/// A share of the entries of task vectors: one for all, or one for each task.
class task_shares {
public:
    /// One share for all tasks: a number converts.
    task_shares(double all)
        : all_(all)
    { }
    /// `each`: one for each task, or none for `all`. `what`: "densities", for messages. Errors: invalid_argument where
    /// there are not as many as tasks.
    task_shares(double all, std::span<const double> each, std::size_t tasks, std::string_view what)
        : all_(all)
        , each_(each.begin(), each.end())
    {
        if (!each_.empty() && each_.size() != tasks) {
            raise<invalid_argument>(error_code::list_length,
                message(each_.size(), " ", what, " for ", tasks, " tasks: give one each, or none"));
        }
    }
    /// The share of task t.
    [[nodiscard]] double of(std::size_t t) const { return each_.empty() ? all_ : each_[t]; }

private:
    double all_;
    call_vector<double> each_{};
};

/// Thresholds of every task vector, over the whole model or for each tensor.
class trim_thresholds {
public:
    /// Finds the thresholds of all tasks: about one read of the models. Errors: invalid_argument (a density outside
    /// (0, 1]), nonfinite_error unless it may spread, cancelled.
    template <cpu_policy P> // a template, so that files which do not call it do not compile the search for every type
    trim_thresholds(const P& policy, const aligned_models& models, const task_shares& density, scope over,
        trim_rule rule = trim_rule::exact)
        : trim_thresholds(models, density, over, rule, detail::top_k_by_sampling<>{&policy, &models})
    { }
    /// The same by another search: search(std::type_identity<A>{}, tensors, counts, walks) finds the thresholds that
    /// keep counts[t] entries of task vector t over a range of tensors.
    template <class Search>
    trim_thresholds(
        const aligned_models& models, const task_shares& density, scope over, trim_rule rule, const Search& search)
        : trim_thresholds(storage_types{}, models, density, over, rule, search)
    { }
    /// The same for models that store nothing but the types of a list: no code is made for others.
    template <class... T, class Search>
    trim_thresholds(storage_list<T...>, const aligned_models& models, const task_shares& density, scope over,
        trim_rule rule, const Search& search)
        : trim_thresholds(
              storage_list<T...>{}, models,
              [&density, rule](std::uint64_t n, std::size_t t) {
                  const double share = density.of(t);
                  const std::uint64_t exact = top_k_count(share, n); // refuses what is no share
                  return rule == trim_rule::exact
                      ? exact
                      : std::min(n, static_cast<std::uint64_t>(std::floor(share * static_cast<double>(n))) + 1);
              },
              over, search, rule == trim_rule::reach_next)
    {
        if (!models.tensors().empty()) { return; }
        for (std::size_t t = 0; t < tasks_; ++t) { // a wrong density is one anywhere
            static_cast<void>(top_k_count(density.of(t), 0));
        }
    }
    /// The same for count(n) entries of n, or count(n, t) of task t, the largest; with `equals` all that are as large
    /// as the last of them.
    template <class... T, entry_count Count, class Search>
    trim_thresholds(storage_list<T...>, const aligned_models& models, const Count& count, scope over,
        const Search& search, bool equals = false)
        : per_tensor_(over == scope::tensor)
        , tasks_(models.task_count())
    {
        constexpr bool wide = (std::same_as<arithmetic_type<T>, double> || ...);
        if constexpr (wide) {
            if (models.any_wide()) {
                find<double>(models, count, equals, search, wide_);
                return;
            }
        }
        if constexpr ((std::same_as<arithmetic_type<T>, float> || ...)) {
            find<float>(models, count, equals, search, single_);
        }
    }
    /// The threshold on task t's vector in a tensor, for arithmetic in A.
    template <arithmetic_element A>
    [[nodiscard]] top_k_threshold<A> get(std::size_t tensor, std::size_t t) const
    {
        const std::size_t index = (per_tensor_ ? tensor : 0) * tasks_ + t;
        if constexpr (std::same_as<A, double>) { return wide_[index]; }
        else {
            return wide_.empty() ? single_[index] : threshold_as<float>(wide_[index]);
        }
    }
    /// How often the models were read to find them.
    [[nodiscard]] unsigned walks() const noexcept { return walks_; }

private:
    template <arithmetic_element A, class Count, class Search>
    void find(const aligned_models& models, const Count& count, bool equals, const Search& search,
        call_vector<top_k_threshold<A>>& thresholds)
    {
        const std::size_t scopes = per_tensor_ ? models.tensors().size() : 1;
        const top_k_threshold<A> none{static_cast<bits_type<A>>(~sign_mask<A>), 0}; // above every magnitude
        thresholds.assign(scopes * tasks_, none);
        call_vector<unsigned> walks(scopes, 0);
        const auto find_in = [&](std::size_t at, tensor_range range, std::uint64_t n, const auto& found_by) {
            call_vector<std::uint64_t> counts;
            call_vector<bool> empty;
            for (std::size_t t = 0; t < tasks_; ++t) {
                std::uint64_t k = 0;
                if constexpr (std::invocable<const Count&, std::uint64_t, std::size_t>) { k = count(n, t); }
                else {
                    k = count(n);
                }
                empty.push_back(k == 0);
                counts.push_back(std::max<std::uint64_t>(1, k)); // a search finds one at least
            }
            if (std::find(empty.begin(), empty.end(), false) == empty.end()) { return; }
            std::size_t task = 0;
            for (auto threshold :
                found_by(std::type_identity<A>{}, range, std::span<const std::uint64_t>(counts), &walks[at])) {
                if (equals) { threshold.equal_end = std::numeric_limits<std::uint64_t>::max(); }
                if (!empty[task]) { thresholds[at * tasks_ + task] = threshold; }
                ++task;
            }
        };
        const auto in_tensor = [&](std::size_t i, const auto& found_by) {
            find_in(i, {i, i + 1}, models.tensors()[i].size, found_by);
        };
        if (!per_tensor_) { find_in(0, {0, models.tensors().size()}, models.elements(), search); }
        else if constexpr (requires { search.for_each_tensor(in_tensor); }) {
            search.for_each_tensor(in_tensor);
        }
        else {
            for (std::size_t i = 0; i < scopes; ++i) { in_tensor(i, search); }
        }
        for (const unsigned taken : walks) { walks_ = std::max(walks_, taken); }
    }

    call_vector<top_k_threshold<float>> single_;
    call_vector<top_k_threshold<double>> wide_;
    bool per_tensor_;
    std::size_t tasks_;
    unsigned walks_ = 0;
};

/// The thresholds that a method's passes find, on whatever policy they run: see cpu_passes (methods/passes.hpp).
template <class Passes>
    requires(Passes::space == memory_space::host)
[[nodiscard]] trim_thresholds trim_thresholds_of(
    Passes& passes, const task_shares& density, scope over, trim_rule rule = trim_rule::exact)
{
    using types = storage_of<Passes>;
    return {types{}, passes.models(), density, over, rule,
        detail::top_k_by_sampling<types>{&passes.policy(), &passes.models()}};
}

/// The same where count(n) entries of n, or count(n, t) of task t, are kept, the largest.
template <class Passes, entry_count Count>
    requires(Passes::space == memory_space::host)
[[nodiscard]] trim_thresholds trim_thresholds_of(Passes& passes, const Count& count, scope over)
{
    using types = storage_of<Passes>;
    return {
        types{}, passes.models(), count, over, detail::top_k_by_sampling<types>{&passes.policy(), &passes.models()}};
}

} // namespace taskvec::inline TASKVEC_ABI
