// What a method may ask for before the walk that merges: sums over the models, and memory for tables that bodies read.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/methods/method.hpp>
#include <taskvec/models/operand_pair.hpp>
#include <taskvec/models/tensor_sums.hpp>

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The passes of the cpu policy. device_passes (device/methods) has the same interface; what needs a walk is a
/// function: tensor_dots(passes, pairs, difference) here, trim_thresholds_of(passes, …) in select/thresholds.hpp.
class cpu_passes {
public:
    /// Over models, on this policy, all of which it refers to; `beside`: what a method reads beside them.
    cpu_passes(const cpu& policy, const aligned_models& models, std::span<const aligned_tensor::operand> beside = {})
        : policy_(&policy)
        , models_(&models)
        , beside_(beside)
    { }
    // Name both first: they are referred to.
    cpu_passes(const cpu&&, const aligned_models&, std::span<const aligned_tensor::operand> = {}) = delete;
    cpu_passes(const cpu&, const aligned_models&&, std::span<const aligned_tensor::operand> = {}) = delete;

    /// Where the passes run.
    [[nodiscard]] const cpu& policy() const noexcept { return *policy_; }
    /// The models that are merged.
    [[nodiscard]] const aligned_models& models() const noexcept { return *models_; }
    /// How many tasks there are.
    [[nodiscard]] std::size_t tasks() const noexcept { return models_->task_count(); }
    static constexpr memory_space space = memory_space::host; ///< Where tables lie.
    /// Operands beside the models, for each tensor.
    [[nodiscard]] std::size_t beside_each() const noexcept
    {
        return models_->tensors().empty() ? 0 : beside_.size() / models_->tensors().size();
    }
    [[nodiscard]] const aligned_tensor::operand& beside(std::size_t tensor, std::size_t b) const noexcept
    {
        return beside_[tensor * beside_each() + b];
    }
    /// A table where bodies can read it; it lives as long as the passes do.
    template <class T, class Allocator>
    [[nodiscard]] const T* keep(std::vector<T, Allocator> table)
    {
        auto kept = std::allocate_shared<std::vector<T, Allocator>>(call_allocator<T>(), std::move(table));
        const T* const data = kept->data();
        tables_.push_back(std::move(kept));
        return data;
    }

private:
    const cpu* policy_;
    const aligned_models* models_;
    std::span<const aligned_tensor::operand> beside_;
    call_vector<std::shared_ptr<const void>> tables_;
};

/// The passes of models that are known, when the program is compiled, to store nothing but the types of a storage_list:
/// no code is made for others.
template <class Types>
class typed_passes : public cpu_passes {
public:
    /// The storage_list that the models' types are of.
    using storage = Types;
    /// As cpu_passes.
    using cpu_passes::cpu_passes;
};

/// Numbers for bodies, rounded to both arithmetic types once.
class kept_numbers {
public:
    /// Keeps `numbers` as long as the passes live, in f32 and in f64.
    template <class Passes>
    kept_numbers(Passes& passes, std::span<const double> numbers)
        : single_(passes.keep(call_vector<float>(numbers.begin(), numbers.end())))
        , wide_(passes.keep(call_vector<double>(numbers.begin(), numbers.end())))
    { }
    /// The numbers in A, where bodies can read them.
    template <arithmetic_element A>
    [[nodiscard]] const A* get() const noexcept
    {
        if constexpr (std::same_as<A, double>) { return wide_; }
        else {
            return single_;
        }
    }

private:
    const float* single_;
    const double* wide_;
};

namespace detail {

/// An operand of a block by number, in A; nullptr where it is not there.
template <arithmetic_element A>
const A* operand_row(const cpu_passes& passes, row_block<A>& rows, std::uint32_t which, A* scratch)
{
    if (which == 0) { return rows.tensor().base.data ? rows.base() : nullptr; }
    if (which <= rows.task_count()) { return rows.task(which - 1); }
    const auto& from = passes.beside(rows.tensor_index(), which - 1 - rows.task_count());
    if (!from.data) { return nullptr; }
    bits_type<A> ignored = 0;
    return rows.beside(from, scratch, ignored);
}

} // namespace detail

/// The dot products of pairs of operands over every tensor, [tensor][pair], in f64 with a fixed shape: the same bits
/// for any threads, blocks and policy. `difference`: of task vectors instead of tasks. An operand that is not there
/// counts as 0. One read of the models.
///
///     const auto squares = tensor_dots(passes, {{1, 1}}, true); // ‖τ1‖² of every tensor
template <std::derived_from<cpu_passes> Passes>
[[nodiscard]] call_vector<call_vector<double>> tensor_dots(
    Passes& passes, std::span<const operand_pair> pairs, bool difference, std::string_view phase = "sums")
{
    const std::size_t tasks = passes.tasks();
    return tensor_sums<storage_of<Passes>>(
        passes.policy(), passes.models(), pairs.size(), 2, phase, [&]<class A>(row_block<A>& rows, double* sum) {
            if (difference) { // they share rows with the tasks: all of them first
                for (std::size_t t = 0; t < tasks; ++t) { (void)rows.delta(t); }
            }
            for (const operand_pair pair : pairs) {
                const auto row = [&](std::uint32_t which, A* scratch) -> const A* {
                    if (difference && which > 0 && which <= tasks && rows.tensor().base.data) {
                        return rows.row(which - 1);
                    }
                    return detail::operand_row(passes, rows, which, scratch);
                };
                if (pair.first > tasks && pair.first == pair.second) { // statistics in f64 not as rounded to A
                    const auto& from = passes.beside(rows.tensor_index(), pair.first - 1 - tasks);
                    if (from.data && from.dtype == dtype::f64 && std::same_as<A, float>) {
                        std::array<double, block_size> raw;
                        *sum++ = detail::with_elements(from, rows.offset(), rows.size(),
                            reinterpret_cast<std::byte*>(raw.data()), [&]<class T>(const T* stored) {
                                if constexpr (std::same_as<T, double>) {
                                    return kernels::dot(stored, stored, rows.size());
                                }
                                else {
                                    return 0.0; // it is f64
                                }
                            });
                        continue;
                    }
                }
                const A* const x = row(pair.first, rows.scratch(0));
                const A* const y = pair.second == pair.first ? x : row(pair.second, rows.scratch(1));
                *sum++ = x && y ? kernels::dot(x, y, rows.size()) : 0.0;
            }
        });
}

/// The same of pairs in braces.
template <std::derived_from<cpu_passes> Passes>
[[nodiscard]] call_vector<call_vector<double>> tensor_dots(
    Passes& passes, std::initializer_list<operand_pair> pairs, bool difference, std::string_view phase = "sums")
{
    return tensor_dots(passes, std::span<const operand_pair>(pairs.begin(), pairs.size()), difference, phase);
}

} // namespace taskvec::inline TASKVEC_ABI
