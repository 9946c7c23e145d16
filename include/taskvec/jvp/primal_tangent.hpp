// Matrices that carry a tangent beside their values: what the network operations work on.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/jvp/dual.hpp>

#include <Eigen/Core>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <string_view>
#include <type_traits>
#include <utility>

// In debug builds every operation looks for NaN in the tangent it made, and names itself. Define TASKVEC_CHECK_TANGENTS
// as 0 or 1 (the same in all translation units) to decide otherwise.
#ifndef TASKVEC_CHECK_TANGENTS
#ifdef NDEBUG
#define TASKVEC_CHECK_TANGENTS 0
#else
/// 1: every operation looks for NaN in the tangent it made, and names itself, as in debug builds; 0: none does.
#define TASKVEC_CHECK_TANGENTS 1
#endif
#endif

namespace taskvec::inline TASKVEC_ABI {

/// The matrix of this module: row-major, contiguous. Activations are batch × features, weights out × in (as PyTorch
/// stores them), biases 1 × features.
template <differentiable_scalar T>
using row_matrix = Eigen::Matrix<T, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// A borrowed, contiguous, row-major matrix.
template <differentiable_scalar T>
using row_matrix_map = Eigen::Map<const row_matrix<T>>;

/// A matrix and its tangent (the directional derivative that travels with it), both rows × cols and row-major.
/// Without a tangent it is inactive: a constant, whose derivative is zero and costs nothing.
/// It owns its memory (what operations return: primal and tangent lie one after the other, so that one product serves
/// both), or borrows the caller's (`borrow`), which must then outlive it.
///
///     primal_tangent<float> w(weights, direction);             // copies both
///     auto x = primal_tangent<float>::borrow(images);          // a constant, no copy
template <differentiable_scalar T>
class primal_tangent {
public:
    /// What derivatives are taken of.
    using scalar = T;

    primal_tangent() = default;
    /// A constant. Takes over `primal`'s memory.
    explicit primal_tangent(row_matrix<T> primal)
        : storage_(std::move(primal))
        , primal_(storage_.data())
        , rows_(storage_.rows())
        , cols_(storage_.cols())
    { }
    /// A value and its tangent, which must have the same shape (else shape_mismatch).
    primal_tangent(const row_matrix<T>& primal, const row_matrix<T>& tangent)
        : storage_(2 * primal.rows(), primal.cols())
        , primal_(storage_.data())
        , tangent_(storage_.data() + primal.size())
        , rows_(primal.rows())
        , cols_(primal.cols())
    {
        check_shapes(primal.rows(), primal.cols(), tangent.rows(), tangent.cols(), "primal_tangent");
        storage_.topRows(rows_) = primal;
        storage_.bottomRows(rows_) = tangent;
    }
    primal_tangent(const primal_tangent& other)
        : storage_(other.storage_)
        , primal_(other.primal_)
        , tangent_(other.tangent_)
        , rows_(other.rows_)
        , cols_(other.cols_)
    {
        if (storage_.size() != 0) {
            primal_ = storage_.data();
            if (tangent_) { tangent_ = storage_.data() + rows_ * cols_; }
        }
    }
    primal_tangent(primal_tangent&& other) noexcept = default;
    primal_tangent& operator=(primal_tangent other) noexcept
    {
        storage_.swap(other.storage_);
        primal_ = other.primal_;
        tangent_ = other.tangent_;
        rows_ = other.rows_;
        cols_ = other.cols_;
        return *this;
    }
    ~primal_tangent() = default;

    /// A constant that lives in the caller's memory.
    [[nodiscard]] static primal_tangent borrow(const row_matrix<T>& primal)
    {
        return {primal.data(), nullptr, primal.rows(), primal.cols()};
    }
    [[nodiscard]] static primal_tangent borrow(const row_matrix_map<T>& primal)
    {
        return {primal.data(), nullptr, primal.rows(), primal.cols()};
    }
    /// A value and its tangent in the caller's memory; unequal shapes are a shape_mismatch that names `what`.
    [[nodiscard]] static primal_tangent borrow(
        const row_matrix<T>& primal, const row_matrix<T>& tangent, std::string_view what = "primal_tangent")
    {
        check_shapes(primal.rows(), primal.cols(), tangent.rows(), tangent.cols(), what);
        return {primal.data(), tangent.data(), primal.rows(), primal.cols()};
    }
    /// Not yet written: rows × cols, with room for a tangent if `active`. For writing operations; see mutable_primal().
    [[nodiscard]] static primal_tangent uninitialized(Eigen::Index rows, Eigen::Index cols, bool active)
    {
        primal_tangent result;
        result.storage_.resize(active ? 2 * rows : rows, cols);
        result.primal_ = result.storage_.data();
        result.tangent_ = active ? result.storage_.data() + rows * cols : nullptr;
        result.rows_ = rows;
        result.cols_ = cols;
        return result;
    }

    /// Rows of primal and tangent.
    [[nodiscard]] Eigen::Index rows() const noexcept { return rows_; }
    /// Columns of both.
    [[nodiscard]] Eigen::Index cols() const noexcept { return cols_; }
    [[nodiscard]] Eigen::Index size() const noexcept { return rows_ * cols_; }
    /// Whether there is a tangent.
    [[nodiscard]] bool active() const noexcept { return tangent_ != nullptr; }
    /// The values.
    [[nodiscard]] row_matrix_map<T> primal() const { return {primal_, rows_, cols_}; }
    /// The tangent; only while active().
    [[nodiscard]] row_matrix_map<T> tangent() const { return {tangent_, rows_, cols_}; }
    /// A copy of the tangent, zeros when inactive.
    [[nodiscard]] row_matrix<T> tangent_or_zero() const
    {
        if (active()) { return tangent(); }
        return row_matrix<T>::Zero(rows_, cols_);
    }
    /// True when the tangent lies right behind the primal: the two are then one matrix of 2·rows rows, stack().
    [[nodiscard]] bool stacked() const noexcept { return tangent_ != nullptr && tangent_ == primal_ + rows_ * cols_; }
    /// [primal; tangent], while stacked().
    [[nodiscard]] row_matrix_map<T> stack() const { return {primal_, 2 * rows_, cols_}; }

    /// Writable views of a result that owns its memory.
    [[nodiscard]] Eigen::Map<row_matrix<T>> mutable_primal() { return {storage_.data(), rows_, cols_}; }
    /// The tangent to be written; of a result that has one.
    [[nodiscard]] Eigen::Map<row_matrix<T>> mutable_tangent()
    {
        return {storage_.data() + rows_ * cols_, rows_, cols_};
    }
    /// [primal; tangent] to be written.
    [[nodiscard]] Eigen::Map<row_matrix<T>> mutable_stack() { return {storage_.data(), storage_.rows(), cols_}; }
    /// The values alone, without a copy where the object owns them and has no tangent.
    [[nodiscard]] row_matrix<T> take_primal() &&
    {
        if (storage_.size() == 0 || active()) { return primal(); }
        return std::move(storage_);
    }

private:
    primal_tangent(const T* primal, const T* tangent, Eigen::Index rows, Eigen::Index cols)
        : primal_(primal)
        , tangent_(tangent)
        , rows_(rows)
        , cols_(cols)
    { }
    static void check_shapes(Eigen::Index rows, Eigen::Index cols, Eigen::Index tangent_rows, Eigen::Index tangent_cols,
        std::string_view what)
    {
        if (rows != tangent_rows || cols != tangent_cols) {
            raise<shape_mismatch>(error_code::operation_shape,
                message("'", what, "': the primal is [", rows, ", ", cols, "] and its tangent [", tangent_rows, ", ",
                    tangent_cols, "]; they must have the same shape"));
        }
    }

    row_matrix<T> storage_;
    const T* primal_ = nullptr;
    const T* tangent_ = nullptr;
    Eigen::Index rows_ = 0;
    Eigen::Index cols_ = 0;
};

namespace detail {

template <class X>
inline constexpr bool is_primal_tangent = false;
template <differentiable_scalar T>
inline constexpr bool is_primal_tangent<primal_tangent<T>> = true;

template <class X>
concept plain_matrix = std::is_base_of_v<Eigen::MatrixBase<std::remove_cvref_t<X>>, std::remove_cvref_t<X>>
    && differentiable_scalar<typename std::remove_cvref_t<X>::Scalar>;

template <class X>
struct operand_scalar_of {
    using type = typename X::Scalar;
};
template <differentiable_scalar T>
struct operand_scalar_of<primal_tangent<T>> {
    using type = T;
};

} // namespace detail

/// What the operations take: a primal_tangent, or an Eigen matrix (a constant). Vectors count as one row.
template <class X>
concept operand = detail::is_primal_tangent<std::remove_cvref_t<X>> || detail::plain_matrix<X>;

/// The scalar of an operand.
template <operand X>
using operand_scalar = typename detail::operand_scalar_of<std::remove_cvref_t<X>>::type;

/// What an operation on these operands returns: a row_matrix when all are plain matrices, otherwise a primal_tangent.
/// A network written once (as a generic function) therefore runs forward on matrices, and jvp on primal_tangents.
template <operand First, operand... Rest>
using operation_result = std::conditional_t<(detail::plain_matrix<First> && ... && detail::plain_matrix<Rest>),
    row_matrix<operand_scalar<First>>, primal_tangent<operand_scalar<First>>>;

/// Operands that can meet in one operation: the same scalar.
template <class First, class... Rest>
concept matching_operands =
    operand<First> && (operand<Rest> && ...) && (std::same_as<operand_scalar<First>, operand_scalar<Rest>> && ...);

namespace detail {

/// The operand itself, or a borrowed constant around a matrix that is row-major and contiguous, or a copy of any other.
template <differentiable_scalar T>
const primal_tangent<T>& as_primal_tangent(const primal_tangent<T>& x)
{
    return x;
}
template <class Derived>
primal_tangent<typename Derived::Scalar> as_primal_tangent(const Eigen::MatrixBase<Derived>& x)
{
    using T = typename Derived::Scalar;
    if constexpr (Derived::IsVectorAtCompileTime) {
        if constexpr ((Derived::Flags & Eigen::DirectAccessBit) != 0) {
            if (x.derived().innerStride() == 1) {
                return primal_tangent<T>::borrow(row_matrix_map<T>(x.derived().data(), 1, x.size()));
            }
        }
        row_matrix<T> copy(1, x.size());
        for (Eigen::Index i = 0; i < x.size(); ++i) { copy(0, i) = x.derived().coeff(i); }
        return primal_tangent<T>(std::move(copy));
    }
    else {
        if constexpr ((Derived::Flags & Eigen::DirectAccessBit) != 0 && (Derived::Flags & Eigen::RowMajorBit) != 0) {
            const auto& direct = x.derived();
            if (direct.innerStride() == 1 && (direct.outerStride() == direct.cols() || direct.rows() <= 1)) {
                return primal_tangent<T>::borrow(row_matrix_map<T>(direct.data(), direct.rows(), direct.cols()));
            }
        }
        return primal_tangent<T>(row_matrix<T>(x));
    }
}

/// The operand for keeping: a temporary matrix or primal_tangent is taken over, anything else is borrowed if it can be.
template <operand X>
primal_tangent<operand_scalar<X>> keep(X&& x)
{
    using T = operand_scalar<X>;
    if constexpr (!std::is_lvalue_reference_v<X> && !is_primal_tangent<std::remove_cvref_t<X>>
        && std::is_base_of_v<Eigen::PlainObjectBase<std::remove_cvref_t<X>>, std::remove_cvref_t<X>>) {
        if constexpr (std::same_as<std::remove_cvref_t<X>, row_matrix<T>>) {
            return primal_tangent<T>(std::forward<X>(x));
        }
        else {
            return primal_tangent<T>(row_matrix<T>(as_primal_tangent(x).primal()));
        }
    }
    else {
        return as_primal_tangent(x);
    }
}

/// An operation's result in the form its operands ask for.
template <class Result, differentiable_scalar T>
Result finish(primal_tangent<T>&& result)
{
    if constexpr (std::same_as<Result, row_matrix<T>>) { return std::move(result).take_primal(); }
    else {
        return std::move(result);
    }
}

/// Debug builds: NaN in the tangent is an error that names the operation which made it.
template <differentiable_scalar T>
void check_tangent([[maybe_unused]] const primal_tangent<T>& result, [[maybe_unused]] std::string_view operation)
{
#if TASKVEC_CHECK_TANGENTS
    if (!result.active()) { return; }
    using std::isnan;
    const auto tangent = result.tangent();
    for (Eigen::Index row = 0; row < tangent.rows(); ++row) {
        for (Eigen::Index col = 0; col < tangent.cols(); ++col) {
            if (isnan(tangent(row, col))) {
                raise<nonfinite_error>(error_code::tangent_not_finite,
                    message("operation '", operation, "' made a NaN in its tangent at row ", row, ", column ", col,
                        " of [", tangent.rows(), ", ", tangent.cols(),
                        "]; look at its inputs there (an infinite primal or tangent, or a derivative that does not "
                        "exist)"));
            }
        }
    }
#endif
}

inline void check_equal(std::string_view operation, std::string_view what, Eigen::Index found, Eigen::Index expected)
{
    if (found != expected) {
        raise<shape_mismatch>(error_code::operation_shape,
            message("operation '", operation, "': ", what, " is ", found, ", expected ", expected));
    }
}

template <class X, class Y>
void check_same_shape(std::string_view operation, const X& x, const Y& y)
{
    if (x.rows() != y.rows() || x.cols() != y.cols()) {
        raise<shape_mismatch>(error_code::operation_shape,
            message("operation '", operation, "': the operands are [", x.rows(), ", ", x.cols(), "] and [", y.rows(),
                ", ", y.cols(), "]; they must have the same shape"));
    }
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
