// Model Stock: Jang, Yun and Han, "Model Stock: all we need is just a few fine-tuned models" (ECCV 2024).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/elect/sum.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/vector_factors.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace taskvec::inline TASKVEC_ABI {

/// For each tensor: θ* = θ0 + t·mean(τ), t = N·c / (1 + (N−1)·c), with c the mean cosine over all pairs of the N task
/// vectors of that tensor (0 for a pair with a zero vector). The less the fine-tuned models agree, the closer the
/// result stays to the base. t is clamped to [0, 1] unless `clamp` is off (mergekit does not clamp). At least two
/// tasks. With `angles` each row or column has its own t, 0 where its task vectors cancel. Cosines are f64 sums of a
/// fixed shape; t/N is rounded to f32 (f64 for f64) once; sums run in task order: bit-exact for any threads and blocks.
/// Errors: invalid_argument, also where a tensor's t has no value unclamped (task vectors that cancel). Cost: two reads
/// of all models, and N(N+1)/2 products an element in the first. For rows one, and memory for each thread: N + 1
/// numbers for each of 65,536 entries or of one row; for columns a number for each.
///
///     merge(cpu{}, model_stock_options{}, base, tasks, out);
struct model_stock_options {
    bool clamp = true;
    angles_between angles = angles_between::tensors;
};

template <>
struct options_of<model_stock_options> {
    static constexpr option_table table{
        option_row("clamp", &model_stock_options::clamp, "hold the ratio inside 0 to 1", {.negated = "unclamped"}),
        option_row("angles-between", &model_stock_options::angles, "whose angles count", {.unit = "WHICH"})};
};

namespace detail {

inline void check_model_stock(std::size_t tasks)
{
    if (tasks < 2) {
        raise<invalid_argument>(error_code::task_count,
            "Model Stock compares fine-tuned models with each other: at least two tasks are needed");
    }
}

/// c, the mean cosine over all pairs of task vectors: dots[i(i+1)/2 + j] = τi·τj for j ≤ i.
[[nodiscard]] inline double mean_cosine(std::size_t tasks, const double* dots)
{
    const auto dot = [&](std::size_t i, std::size_t j) { return dots[i * (i + 1) / 2 + j]; };
    double cosines = 0;
    for (std::size_t i = 0; i < tasks; ++i) {
        for (std::size_t j = 0; j < i; ++j) {
            const double norms = std::sqrt(dot(i, i)) * std::sqrt(dot(j, j));
            cosines += norms == 0 ? 0.0 : dot(i, j) / norms;
        }
    }
    const double n = static_cast<double>(tasks);
    return cosines / (n * (n - 1) / 2);
}

/// t/N for a tensor from the dots of its task vectors.
[[nodiscard]] inline double model_stock_factor(
    const model_stock_options& options, const std::string& tensor, std::size_t tasks, std::span<const double> dots)
{
    const double n = static_cast<double>(tasks), c = mean_cosine(tasks, dots.data()), below = 1 + (n - 1) * c;
    double t = n * c / below;
    if (options.clamp && c == c) {
        t = below > 0 ? std::clamp(t, 0.0, 1.0) : 0.0;
    } // c ≥ −1/(N−1): below it lies rounding
    else if (!(below > 0) && c == c) {
        raise<invalid_argument>(error_code::no_solution,
            message("the task vectors of tensor '", tensor, "' cancel (mean cosine ", c,
                "): the ratio of Model Stock has no value there; clamp it, or exclude the tensor"));
    }
    return t / n;
}

/// t/N for a row or column.
struct model_stock_rule {
    bool clamp;
    std::size_t tasks;

    void operator()(const double* dots, double* factor) const
    {
        const double n = static_cast<double>(tasks), c = mean_cosine(tasks, dots), below = 1 + (n - 1) * c;
        const double t = below < 1e-6 ? 0.0 : n * c / below; // what few entries are cancels often, to rounding
        *factor = (clamp ? std::clamp(t, 0.0, 1.0) : t) / n;
    }
};

} // namespace detail

/// θ0 + factor·Στt with a factor for each row or column.
template <arithmetic_element A>
struct scaled_vectors_body : detail::factors_of_vectors<A> {
    static constexpr bool watches = true;

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        const auto sum = in.sum_of([&](std::size_t t) TASKVEC_BODY { return in.delta(t); });
        in.watch(sum);
        return in.base() + in.beside(0) * sum;
    }
};

template <>
class method<model_stock_options> : public detail::method_by_vectors<elementwise_method, detail::model_stock_rule> {
public:
    template <class Passes>
    method(Passes& passes, const model_stock_options& options)
        : method_by_vectors(passes, options.angles, 1, detail::model_stock_rule{options.clamp, checked(passes.tasks())})
        , weights_(passes, call_vector<double>(passes.tasks(), 1.0))
    {
        if (by_vector().any()) { return; }
        const auto tasks = static_cast<std::uint32_t>(passes.tasks());
        call_vector<operand_pair> pairs;
        for (std::uint32_t i = 0; i < tasks; ++i) {
            for (std::uint32_t j = 0; j <= i; ++j) { pairs.push_back({1 + i, 1 + j}); }
        }
        const auto sums = tensor_dots(passes, pairs, true, "cosines");
        for (std::size_t tensor = 0; tensor < sums.size(); ++tensor) {
            factors_.push_back(detail::model_stock_factor(
                options, passes.models().tensors()[tensor].name, passes.tasks(), sums[tensor]));
        }
    }
    /// Angles are those of a tensor, or of its rows or columns.
    [[nodiscard]] static bool tensor_by_tensor(const model_stock_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] kept_sum_body<A> body(std::size_t tensor) const
    {
        return {{}, weights_.get<A>(), static_cast<A>(factors_[tensor])};
    }
    /// Calls use(body) with the body of a tensor.
    template <arithmetic_element A, class Use>
    decltype(auto) with_body(std::size_t tensor, Use&& use) const
    {
        if (!by_vector().any()) { return use(body<A>(tensor)); }
        return use(scaled_vectors_body<A>{by_vector().template get<A>(tensor)});
    }

private:
    [[nodiscard]] static std::size_t checked(std::size_t tasks)
    {
        detail::check_model_stock(tasks);
        return tasks;
    }

    kept_numbers weights_;
    call_vector<double> factors_; // t/N for each tensor
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MERGES(extern, model_stock_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
