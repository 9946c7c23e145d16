// Losses and means with tangents: cross_entropy, mean; each with its vjp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/jvp/primal_tangent.hpp>

#include <cmath>
#include <concepts>
#include <ranges>
#include <string_view>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// Class indices or token ids: a contiguous range of integers, one for each row.
template <class Indices>
concept index_range = std::ranges::contiguous_range<Indices> && std::ranges::sized_range<Indices>
    && std::integral<std::ranges::range_value_t<Indices>>;

/// What an operation with a scalar result returns: a number for a matrix, a dual number for a primal_tangent.
template <operand X>
using scalar_result = std::conditional_t<detail::plain_matrix<X>, operand_scalar<X>, dual<operand_scalar<X>>>;

/// The mean over the batch of −log softmax(logits)[label]; logits are batch × classes, one label for each row.
/// Stable for any finite logits (the row's maximum is subtracted first). Its tangent is Σ (softmax − onehot)·ẋ / batch.
/// Throws shape_mismatch for a wrong number of labels, invalid_argument for a label out of range or an empty batch.
template <operand X, index_range Labels>
[[nodiscard]] scalar_result<X> cross_entropy(const X& logits, const Labels& labels);

/// vjp of cross_entropy: factor·(softmax(logits) − onehot(labels)) / batch; batch × classes.
template <operand X, index_range Labels>
[[nodiscard]] row_matrix<operand_scalar<X>> cross_entropy_vjp(
    const X& logits, const Labels& labels, const operand_scalar<X>& factor = operand_scalar<X>(1));

/// The mean of all elements. An empty x is an invalid_argument.
template <operand X>
[[nodiscard]] scalar_result<X> mean(const X& x);
/// vjp of mean: factor / size everywhere, in the shape of x.
template <operand X>
[[nodiscard]] row_matrix<operand_scalar<X>> mean_vjp(
    const X& x, const operand_scalar<X>& factor = operand_scalar<X>(1));

/// The mean of each `group` consecutive rows: (n·group) × features to n × features, such as a pooling over tokens.
/// Throws invalid_argument when group does not divide the rows.
template <operand X>
[[nodiscard]] operation_result<X> mean_rows(const X& x, Eigen::Index group);

/// vjp of mean_rows: dy is n × features; each row is repeated `group` times and divided by group.
template <class G>
    requires matching_operands<G>
[[nodiscard]] row_matrix<operand_scalar<G>> mean_rows_vjp(const G& dy, Eigen::Index group);

namespace detail {

template <differentiable_scalar T, class Labels>
void check_labels(std::string_view name, const primal_tangent<T>& logits, const Labels& labels)
{
    check_equal(name, "the number of labels", static_cast<Eigen::Index>(std::ranges::size(labels)), logits.rows());
    if (logits.rows() == 0) {
        raise<invalid_argument>(error_code::inputs_empty,
            message("operation '", name, "': the batch is empty; a mean over nothing does not exist"));
    }
    Eigen::Index row = 0;
    for (const auto label : labels) {
        if (!std::in_range<Eigen::Index>(label) || static_cast<Eigen::Index>(label) < 0
            || static_cast<Eigen::Index>(label) >= logits.cols()) {
            raise<invalid_argument>(error_code::index_out_of_range,
                message(
                    "operation '", name, "': label ", label, " of row ", row, " is outside [0, ", logits.cols(), ")"));
        }
        ++row;
    }
}

/// value and, when active, tangent of the mean cross entropy; with `gradient`, its derivative times factor.
template <differentiable_scalar T, class Labels>
dual<T> cross_entropy(const primal_tangent<T>& logits, const Labels& labels, row_matrix<T>* gradient, const T& factor)
{
    using std::log;
    const auto batch = logits.rows();
    const T share = T(1) / T(static_cast<double>(batch));
    dual<T> total(T(0), T(0));
    Eigen::Array<T, 1, Eigen::Dynamic> weights(logits.cols());
    const auto* label = std::ranges::data(labels);
    for (Eigen::Index row = 0; row < batch; ++row) {
        const auto target = static_cast<Eigen::Index>(label[row]);
        const auto values = logits.primal().row(row).array();
        const T top = values.maxCoeff();
        weights = (values - top).exp();
        const T sum = weights.sum();
        total.primal += log(sum) + top - values(target);
        if (logits.active()) {
            const auto tangents = logits.tangent().row(row).array();
            total.tangent += (weights * tangents).sum() / sum - tangents(target);
        }
        if (gradient) {
            const T weight = factor * share;
            gradient->row(row) = (weights * (weight / sum)).matrix();
            (*gradient)(row, target) -= weight;
        }
    }
    total.primal *= share;
    total.tangent *= share;
    return total;
}

template <operand X, differentiable_scalar T>
scalar_result<X> finish_scalar(const dual<T>& value, [[maybe_unused]] std::string_view name)
{
    if constexpr (plain_matrix<X>) { return value.primal; }
    else {
#if TASKVEC_CHECK_TANGENTS
        using std::isnan;
        if (isnan(value.tangent)) {
            raise<nonfinite_error>(error_code::tangent_not_finite,
                message("operation '", name, "' made a NaN in its tangent; look at its inputs"));
        }
#endif
        return value;
    }
}

} // namespace detail

template <operand X, index_range Labels>
scalar_result<X> cross_entropy(const X& logits, const Labels& labels)
{
    using T = operand_scalar<X>;
    decltype(auto) x = detail::as_primal_tangent(logits);
    detail::check_labels("cross_entropy", x, labels);
    return detail::finish_scalar<X>(
        detail::cross_entropy(x, labels, static_cast<row_matrix<T>*>(nullptr), T(1)), "cross_entropy");
}

template <operand X, index_range Labels>
row_matrix<operand_scalar<X>> cross_entropy_vjp(const X& logits, const Labels& labels, const operand_scalar<X>& factor)
{
    decltype(auto) x = detail::as_primal_tangent(logits);
    detail::check_labels("cross_entropy_vjp", x, labels);
    row_matrix<operand_scalar<X>> gradient(x.rows(), x.cols());
    (void)detail::cross_entropy(primal_tangent<operand_scalar<X>>::borrow(x.primal()), labels, &gradient, factor);
    return gradient;
}

template <operand X>
scalar_result<X> mean(const X& x)
{
    using T = operand_scalar<X>;
    decltype(auto) values = detail::as_primal_tangent(x);
    if (values.size() == 0) {
        raise<invalid_argument>(
            error_code::inputs_empty, "operation 'mean': the matrix is empty; a mean over nothing does not exist");
    }
    const T share = T(1) / T(static_cast<double>(values.size()));
    dual<T> result(values.primal().sum() * share, T(0));
    if (values.active()) { result.tangent = values.tangent().sum() * share; }
    return detail::finish_scalar<X>(result, "mean");
}
template <operand X>
row_matrix<operand_scalar<X>> mean_vjp(const X& x, const operand_scalar<X>& factor)
{
    using T = operand_scalar<X>;
    decltype(auto) values = detail::as_primal_tangent(x);
    if (values.size() == 0) {
        raise<invalid_argument>(
            error_code::inputs_empty, "operation 'mean_vjp': the matrix is empty; a mean over nothing does not exist");
    }
    return row_matrix<T>::Constant(
        values.rows(), values.cols(), factor * (T(1) / T(static_cast<double>(values.size()))));
}

template <operand X>
operation_result<X> mean_rows(const X& x, Eigen::Index group)
{
    using T = operand_scalar<X>;
    decltype(auto) values = detail::as_primal_tangent(x);
    if (group < 1 || values.rows() % group != 0) {
        raise<invalid_argument>(error_code::operation_size,
            message("operation 'mean_rows': groups of ", group, " rows do not divide ", values.rows(), " rows"));
    }
    const Eigen::Index groups = values.rows() / group;
    const T share = T(1) / T(static_cast<double>(group));
    auto y = primal_tangent<T>::uninitialized(groups, values.cols(), values.active());
    for (Eigen::Index i = 0; i < groups; ++i) {
        y.mutable_primal().row(i) = values.primal().middleRows(i * group, group).colwise().sum() * share;
        if (values.active()) {
            y.mutable_tangent().row(i) = values.tangent().middleRows(i * group, group).colwise().sum() * share;
        }
    }
    detail::check_tangent(y, "mean_rows");
    return detail::finish<operation_result<X>>(std::move(y));
}

template <class G>
    requires matching_operands<G>
row_matrix<operand_scalar<G>> mean_rows_vjp(const G& dy, Eigen::Index group)
{
    using T = operand_scalar<G>;
    decltype(auto) cotangent = detail::as_primal_tangent(dy);
    if (group < 1) {
        raise<invalid_argument>(error_code::operation_size,
            message("operation 'mean_rows_vjp': the group must be at least 1, got ", group));
    }
    row_matrix<T> dx(cotangent.rows() * group, cotangent.cols());
    const T share = T(1) / T(static_cast<double>(group));
    for (Eigen::Index i = 0; i < cotangent.rows(); ++i) {
        dx.middleRows(i * group, group).rowwise() = cotangent.primal().row(i) * share;
    }
    return dx;
}

} // namespace taskvec::inline TASKVEC_ABI
