// Average, task arithmetic, SLERP and Model Stock on taskvec::gpu: weighted sums, some of whose weights come from dot
// products. SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/arithmetic/linear_functors.hpp>
#include <taskvec/device/methods/merge.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/model_stock.hpp>
#include <taskvec/methods/slerp.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace detail {

/// Lists of weights in device memory, rounded to both arithmetic types.
class device_weights {
public:
    device_weights(const gpu& policy, const std::vector<double>& weights)
        : single_(policy, std::vector<float>(weights.begin(), weights.end()))
        , wide_(policy, weights)
    { }
    template <arithmetic_element A>
    [[nodiscard]] const A* get() const noexcept
    {
        if constexpr (std::same_as<A, double>) { return wide_.data(); }
        else {
            return single_.data();
        }
    }

private:
    device::buffer<float> single_;
    device::buffer<double> wide_;
};

/// Writes finish(Σ weights·operands) for a range of tensors; factor(tensor, A{}) is what it finishes with, `stride` how
/// far apart the weights of two tensors are (0: all have the same).
template <class Factor>
void write_linear(device_models& models, tensor_range range, const device_weights& weights, std::size_t stride,
    std::size_t first, std::size_t count, bool difference, elementwise::linear_finish finish, const Factor& factor)
{
    models.write(range, [&](const gpu& policy, std::size_t tensor, const device_piece& piece) {
        visit_arithmetic(models.models().tensors()[tensor], [&]<class A>(std::type_identity<A>) {
            const elementwise::linear_combination<A> merge{piece, weights.get<A>() + tensor * stride, first, count,
                difference, finish, factor(tensor, A{}), models.nonfinite_flag()};
            if constexpr (std::same_as<A, float>) {
                const bool done = visit_packs(piece, [&]<class T>(std::type_identity<T>) {
                    using packs = elementwise::linear_combination_of_packs<T>;
                    device::sweep(policy, packs::packs(piece.size), packs{merge});
                });
                if (done) { return; }
            }
            device::sweep(policy, piece.size, merge);
        });
    });
}

} // namespace detail

template <>
class detail::device_merger<average_options> {
public:
    static constexpr bool needs_base = false, in_place = true;

    device_merger(device_models& models, const average_options& options)
        : host_(cpu{}, models.models(), options)
        , weights_(models.policy(), checked_weights(options.weights, models.models().task_count()))
    { }
    void write(device_models& models, merge_report&) const { write(models, all_tensors(models.models())); }
    void write(device_models& models, tensor_range range) const
    {
        write_linear(models, range, weights_, 0, 1, models.models().task_count(), false,
            elementwise::linear_finish::divide, [&]<class A>(std::size_t, A) { return host_.total<A>(); });
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }

private:
    merger<average_options> host_; // checks, and the sum of the weights
    device_weights weights_;
};

template <>
class detail::device_merger<task_arithmetic_options> {
public:
    static constexpr bool needs_base = true, in_place = true;

    device_merger(device_models& models, const task_arithmetic_options& options)
        : lambda_(options.lambda)
        , weights_(models.policy(), checked_weights(options.weights, models.models().task_count()))
    {
        check_factor(lambda_, "lambda");
    }
    void write(device_models& models, merge_report&) const
    {
        write_linear(models, all_tensors(models.models()), weights_, 0, 1, models.models().task_count(), true,
            elementwise::linear_finish::add_to_base, [&]<class A>(std::size_t, A) { return static_cast<A>(lambda_); });
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }

private:
    double lambda_;
    device_weights weights_;
};

template <>
class detail::device_merger<slerp_options> {
public:
    static constexpr bool needs_base = false, in_place = true;

    device_merger(device_models& models, const slerp_options& options)
        : first_(check_slerp(models.models(), options) ? 0u : 1u)
        , weights_(models.policy(), factors(models, options))
    { }
    void write(device_models& models, merge_report&) const
    {
        write_linear(models, all_tensors(models.models()), weights_, 2, first_, 2, false,
            elementwise::linear_finish::plain, []<class A>(std::size_t, A) { return A{1}; });
    }
    [[nodiscard]] unsigned walks() const noexcept { return 1; }

private:
    [[nodiscard]] std::vector<double> factors(device_models& models, const slerp_options& options) const
    {
        std::vector<double> pairs;
        for (const auto& sum :
            tensor_dots(models, {{first_, first_}, {first_ + 1, first_ + 1}, {first_, first_ + 1}}, false)) {
            const slerp_factors pair = factors_of(options, sum[0], sum[1], sum[2]);
            pairs.insert(pairs.end(), {pair.of_a, pair.of_b});
        }
        return pairs;
    }

    std::uint32_t first_; // the operand that is a: the base, or the first task
    device_weights weights_; // two for each tensor
};

template <>
class detail::device_merger<model_stock_options> {
public:
    static constexpr bool needs_base = true, in_place = true;

    device_merger(device_models& models, const model_stock_options& options)
        : weights_(models.policy(), std::vector<double>(models.models().task_count(), 1.0))
    {
        const auto tasks = static_cast<std::uint32_t>(models.models().task_count());
        check_model_stock(tasks);
        std::vector<operand_pair> pairs;
        for (std::uint32_t i = 0; i < tasks; ++i) {
            for (std::uint32_t j = 0; j <= i; ++j) { pairs.push_back({1 + i, 1 + j}); }
        }
        const auto sums = tensor_dots(models, pairs, true);
        for (std::size_t tensor = 0; tensor < sums.size(); ++tensor) {
            factors_.push_back(
                model_stock_factor(options, models.models().tensors()[tensor].name, tasks, sums[tensor]));
        }
    }
    void write(device_models& models, merge_report&) const
    {
        write_linear(models, all_tensors(models.models()), weights_, 0, 1, models.models().task_count(), true,
            elementwise::linear_finish::add_to_base,
            [&]<class A>(std::size_t tensor, A) { return static_cast<A>(factors_[tensor]); });
    }
    [[nodiscard]] unsigned walks() const noexcept { return 1; }

private:
    std::vector<double> factors_; // for each tensor
    device_weights weights_;
};

} // namespace taskvec::inline TASKVEC_ABI
