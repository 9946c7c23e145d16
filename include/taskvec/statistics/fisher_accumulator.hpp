// Diagonal Fisher information, built from per-example gradients: what Fisher merging needs to know of the data.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/by_name.hpp>
#include <taskvec/models/block.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// sum += weight · x², in f64
template <arithmetic_element A>
TASKVEC_NOINLINE void accumulate_squares(
    double* TASKVEC_RESTRICT sum, const A* TASKVEC_RESTRICT x, double weight, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const double value = static_cast<double>(x[i]);
        const double square = value * value;
        const double product = weight * square;
        sum[i] = sum[i] + product;
    }
}

TASKVEC_KERNELS_END

} // namespace kernels

/// Sums of squared gradients over the parameters of a model, in f64, and the number of examples they come from. What
/// the two kinds of Fisher share: empirical_fisher_accumulator and expected_fisher_accumulator say which gradients they
/// take.
class fisher_accumulator {
public:
    /// Examples seen.
    [[nodiscard]] std::uint64_t examples() const noexcept { return examples_; }
    /// The parameters' names and shapes.
    [[nodiscard]] const std::vector<tensor_spec>& parameters() const noexcept { return parameters_; }
    /// The mean of tensor `index` of parameters(): its diagonal Fisher. Throws invalid_argument before the first
    /// example.
    [[nodiscard]] std::vector<double> fisher(std::size_t index) const
    {
        if (examples_ == 0) {
            raise<invalid_argument>(
                error_code::inputs_empty, "no example was given: the Fisher information is a mean over examples");
        }
        std::vector<double> mean = sums_[index];
        for (double& value : mean) { value /= static_cast<double>(examples_); }
        return mean;
    }

protected:
    /// `parameters` gives names and shapes; its data are not read.
    explicit fisher_accumulator(const const_model_ref& parameters)
    {
        for (const auto& [name, tensor] : parameters) {
            if (!is_storage(tensor.dtype) && !is_fp8(tensor.dtype)) { continue; } // integers have no gradient
            parameters_.push_back({name, tensor.dtype, tensor.shape});
            sums_.emplace_back(tensor.size(name), 0.0);
        }
    }
    ~fisher_accumulator() = default;
    fisher_accumulator(const fisher_accumulator&) = default;
    fisher_accumulator(fisher_accumulator&&) = default;
    fisher_accumulator& operator=(const fisher_accumulator&) = default;
    fisher_accumulator& operator=(fisher_accumulator&&) = default;

    /// Checks a gradient whole before any of it counts.
    void check(const cpu& policy, const const_model_ref& gradient) const
    {
        for (const auto& [name, tensor] : gradient) {
            if (!has(name)) {
                raise<invalid_argument>(error_code::tensor_unexpected,
                    message("the gradient has tensor '", name, "', which the model has not"));
            }
        }
        for (const auto& spec : parameters_) {
            const const_tensor_ref* const tensor = gradient.find(spec.name);
            if (!tensor) {
                raise<invalid_argument>(error_code::tensor_missing,
                    message(
                        "the gradient lacks tensor '", spec.name, "': pass zeros for a parameter that is not used"));
            }
            if (tensor->shape != spec.shape) {
                raise<shape_mismatch>(error_code::statistics_shape,
                    message("the gradient of '", spec.name, "' has shape ", to_string(tensor->shape), "; expected ",
                        to_string(spec.shape), ", its parameter's"));
            }
            if (!is_storage(tensor->dtype)) {
                raise<dtype_mismatch>(error_code::dtype_unsupported,
                    message("the gradient of '", spec.name, "' has dtype ", to_string(tensor->dtype), "; expected ",
                        storage_names()));
            }
            if (tensor->space != memory_space::host || !tensor->contiguous() || (!tensor->data && tensor->size() > 0)) {
                raise<invalid_argument>(error_code::tensor_layout,
                    message("the gradient of '", spec.name, "' must be contiguous host memory: copy it first"));
            }
            visit(policy, *tensor, [&](std::size_t at, const double* values, std::size_t n) {
                for (std::size_t i = 0; i < n; ++i) {
                    if (!std::isfinite(values[i])) {
                        raise<nonfinite_error>(error_code::statistics_not_finite,
                            message("the gradient of '", spec.name, "' holds ",
                                std::isnan(values[i]) ? "NaN" : "infinity", " at index ", at + i,
                                ": leave out this example"));
                    }
                }
            });
        }
    }
    /// sums += weight · gradient²
    void add_squares(const cpu& policy, const const_model_ref& gradient, double weight)
    {
        constexpr std::size_t piece = 65536;
        for (std::size_t index = 0; index < parameters_.size(); ++index) {
            const const_tensor_ref& tensor = *gradient.find(parameters_[index].name);
            const std::size_t size = sums_[index].size();
            for_each_index(size > piece ? policy : sequential(policy), (size + piece - 1) / piece,
                [&](std::size_t p, std::size_t) {
                    const std::size_t first = p * piece;
                    visit_range(policy, tensor, first, std::min(piece, size - first),
                        [&](std::size_t at, const double* values, std::size_t n) {
                            kernels::accumulate_squares(sums_[index].data() + at, values, weight, n);
                        });
                });
        }
    }
    /// One example more, whose gradients are all added.
    void count_example() noexcept { ++examples_; }
    /// Adds what was seen elsewhere. Throws invalid_argument, shape_mismatch for another model's.
    void add_sums(const fisher_accumulator& other)
    {
        if (other.parameters_.size() != parameters_.size()) {
            raise<invalid_argument>(
                error_code::statistics_differ, "Fisher sums of models with different parameters cannot be added");
        }
        for (std::size_t i = 0; i < parameters_.size(); ++i) {
            if (other.parameters_[i].name != parameters_[i].name) {
                raise<invalid_argument>(error_code::statistics_differ,
                    message("Fisher sums of models with different parameters cannot be added: one has '",
                        parameters_[i].name, "' where the other has '", other.parameters_[i].name, "'"));
            }
            if (other.parameters_[i].shape != parameters_[i].shape) {
                raise<shape_mismatch>(error_code::statistics_shape,
                    message("Fisher sums of '", parameters_[i].name, "' have shapes ", to_string(parameters_[i].shape),
                        " and ", to_string(other.parameters_[i].shape)));
            }
        }
        for (std::size_t i = 0; i < sums_.size(); ++i) {
            for (std::size_t k = 0; k < sums_[i].size(); ++k) { sums_[i][k] += other.sums_[i][k]; }
        }
        examples_ += other.examples_;
    }

private:
    [[nodiscard]] bool has(std::string_view name) const { return detail::find_by_name(parameters_, name) != nullptr; }
    /// Calls use(first, values, count) for consecutive runs of elements [first, first + size), in f64.
    template <class Use>
    static void visit_range(
        const cpu& policy, const const_tensor_ref& tensor, std::size_t first, std::size_t size, Use&& use)
    {
        std::pmr::vector<double> raw(block_size, memory_of(policy)), values(block_size, memory_of(policy));
        const aligned_tensor::operand from{static_cast<const std::byte*>(tensor.data), tensor.dtype};
        for (std::size_t at = 0; at < size; at += block_size) {
            const std::size_t n = std::min(block_size, size - at);
            detail::with_elements(from, first + at, n, reinterpret_cast<std::byte*>(raw.data()),
                [&](const auto* stored) { (void)kernels::widen(stored, values.data(), n); });
            use(first + at, values.data(), n);
        }
    }
    template <class Use>
    static void visit(const cpu& policy, const const_tensor_ref& tensor, Use&& use)
    {
        visit_range(policy, tensor, 0, tensor.size(), use);
    }

    std::vector<tensor_spec> parameters_; // in name order
    std::vector<std::vector<double>> sums_;
    std::uint64_t examples_ = 0;
};

/// The empirical Fisher: mean over examples of g², g the gradient of log p(y|x) at the example's own label y. Cheap,
/// and biased where the model is wrong (Kunstner, Balles, Hennig 2019). The sign and any constant factor of the loss's
/// gradient do not matter to a merge, except that factors differ between tasks: divide a batch's mean loss back to one
/// example's. Errors leave the sums as they were. Cost of an example: one read of the gradient to check, one to add.
///
///     empirical_fisher_accumulator fisher(parameters);
///     for (…) { fisher.add(cpu{}, gradient_of_log_likelihood); }
class empirical_fisher_accumulator : public fisher_accumulator {
public:
    /// Zeros, of the names and shapes of `parameters`. Errors: as fisher_accumulator.
    explicit empirical_fisher_accumulator(const const_model_ref& parameters)
        : fisher_accumulator(parameters)
    { }
    /// Adds one example.
    void add(const cpu& policy, const const_model_ref& gradient)
    {
        check(policy, gradient);
        add_squares(policy, gradient, 1.0);
        count_example();
    }
    void add(const empirical_fisher_accumulator& other) { add_sums(other); }
};

/// The Fisher information itself: mean over examples of the expectation Σy p(y|x)·gy² over the model's own labels y, gy
/// the gradient of log p(y|x). Errors leave the sums as they were.
///
///     expected_fisher_accumulator fisher(parameters);
///     for (…) { fisher.add(cpu{}, gradients_of_each_label, probabilities); }
class expected_fisher_accumulator : public fisher_accumulator {
public:
    /// Zeros, of the names and shapes of `parameters`. Errors: as fisher_accumulator.
    explicit expected_fisher_accumulator(const const_model_ref& parameters)
        : fisher_accumulator(parameters)
    { }
    /// Adds one example: for each label the gradient and the probability that the model gives it; probabilities sum to
    /// 1 (within 1e-3). Where there are too many labels, draw some from the model and give each draw 1 / draws.
    void add(const cpu& policy, std::span<const const_model_ref> gradients, std::span<const double> probabilities)
    {
        if (gradients.size() != probabilities.size() || gradients.empty()) {
            raise<invalid_argument>(error_code::list_length,
                message(gradients.size(), " gradients for ", probabilities.size(),
                    " probabilities: give one of each for every label"));
        }
        double total = 0;
        for (std::size_t y = 0; y < probabilities.size(); ++y) {
            if (!(probabilities[y] >= 0)) {
                raise<invalid_argument>(error_code::parameter_out_of_range,
                    message("the probability of label ", y, " is ", probabilities[y]));
            }
            total += probabilities[y];
        }
        if (!(std::abs(total - 1) <= 1e-3)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message("the probabilities of the labels sum to ", total, "; expected 1"));
        }
        for (const auto& gradient : gradients) { check(policy, gradient); }
        for (std::size_t y = 0; y < gradients.size(); ++y) { add_squares(policy, gradients[y], probabilities[y]); }
        count_example();
    }
    void add(const expected_fisher_accumulator& other) { add_sums(other); }
};

} // namespace taskvec::inline TASKVEC_ABI
