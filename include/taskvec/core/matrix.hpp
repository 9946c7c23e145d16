// Matrices: views of somebody else's memory in either storage order, and a small owner for results and scratch.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/view.hpp>
#include <taskvec/fwd.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Which neighbours lie side by side in memory: those of a row (C, NumPy, PyTorch) or those of a column (Fortran, BLAS,
/// Eigen's default).
enum class matrix_order : std::uint8_t { row_major, column_major };

/// A rows×cols matrix of T in memory space S; does not own it. T may be const. `stride` counts the elements between the
/// starts of consecutive rows (row_major) or columns (column_major); 0 stands for a matrix without gaps.
///
///     matrix_view<const float> weight(data, out, in, matrix_order::row_major);
template <class T, memory_space S>
    requires storage_element<std::remove_const_t<T>>
class matrix_view {
public:
    using element_type = T;
    using value_type = std::remove_const_t<T>;
    static constexpr memory_space space = S; ///< Where the elements are.

    constexpr matrix_view() noexcept = default;
    /// Rows×cols elements from `data` on; `stride`: between starts of rows or columns, 0 for no gaps.
    constexpr matrix_view(
        T* data, std::size_t rows, std::size_t cols, matrix_order order, std::size_t stride = 0) noexcept
        : data_(data)
        , rows_(rows)
        , cols_(cols)
        , stride_(stride ? stride : (order == matrix_order::row_major ? cols : rows))
        , order_(order)
    { }
    /// A view of mutable elements is a view of const ones.
    template <std::same_as<value_type> Other>
        requires std::is_const_v<T>
    constexpr matrix_view(const matrix_view<Other, S>& other) noexcept
        : matrix_view(other.data(), other.rows(), other.cols(), other.order(), other.stride())
    { }

    [[nodiscard]] constexpr T* data() const noexcept { return data_; }
    /// Rows.
    [[nodiscard]] constexpr std::size_t rows() const noexcept { return rows_; }
    /// Columns.
    [[nodiscard]] constexpr std::size_t cols() const noexcept { return cols_; }
    [[nodiscard]] constexpr std::size_t size() const noexcept { return rows_ * cols_; }
    /// Elements between the starts of consecutive rows (row_major) or columns (column_major).
    [[nodiscard]] constexpr std::size_t stride() const noexcept { return stride_; }
    /// Which of the two lie together.
    [[nodiscard]] constexpr matrix_order order() const noexcept { return order_; }
    [[nodiscard]] constexpr bool empty() const noexcept { return rows_ == 0 || cols_ == 0; }

    /// The element; the caller keeps inside the matrix. On the host.
    [[nodiscard]] constexpr T& operator()(std::size_t row, std::size_t col) const noexcept
        requires(S == memory_space::host)
    {
        return data_[order_ == matrix_order::row_major ? row * stride_ + col : col * stride_ + row];
    }
    /// The same memory read as the transposed matrix.
    [[nodiscard]] constexpr matrix_view transposed() const noexcept
    {
        return {data_, cols_, rows_,
            order_ == matrix_order::row_major ? matrix_order::column_major : matrix_order::row_major, stride_};
    }
    /// rows×cols elements from (row, col) on; the caller keeps inside the matrix.
    [[nodiscard]] constexpr matrix_view block(
        std::size_t row, std::size_t col, std::size_t rows, std::size_t cols) const noexcept
    {
        T* const first = data_ + (order_ == matrix_order::row_major ? row * stride_ + col : col * stride_ + row);
        return {first, rows, cols, order_, stride_};
    }
    /// The first `count` columns.
    [[nodiscard]] constexpr matrix_view left_columns(std::size_t count) const noexcept
    {
        return block(0, 0, rows_, count);
    }

private:
    T* data_ = nullptr;
    std::size_t rows_ = 0, cols_ = 0, stride_ = 0;
    matrix_order order_ = matrix_order::column_major;
};

/// A matrix that owns its memory, without gaps, zero at first. A backend specialises it for its own memory space.
template <storage_element T, memory_space S>
class matrix;

template <storage_element T>
class matrix<T, memory_space::host> {
public:
    matrix() = default;
    matrix(std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major,
        std::pmr::memory_resource* memory = std::pmr::get_default_resource())
        : data_(rows * cols, T{}, memory)
        , rows_(rows)
        , cols_(cols)
        , order_(order)
    { }
    matrix(const matrix&) = default;
    matrix& operator=(const matrix&) = default;
    matrix(matrix&& other) noexcept
        : data_(std::move(other.data_))
        , rows_(std::exchange(other.rows_, 0))
        , cols_(std::exchange(other.cols_, 0))
        , order_(other.order_)
    { }
    /// Takes over the other's memory, and with it the resource that it came from.
    matrix& operator=(matrix&& other) noexcept
    {
        if (this != &other) {
            std::destroy_at(&data_);
            std::construct_at(&data_, std::move(other.data_));
            rows_ = std::exchange(other.rows_, 0);
            cols_ = std::exchange(other.cols_, 0);
            order_ = other.order_;
        }
        return *this;
    }
    ~matrix() = default;

    [[nodiscard]] T* data() noexcept { return data_.data(); }
    [[nodiscard]] const T* data() const noexcept { return data_.data(); }
    [[nodiscard]] std::size_t rows() const noexcept { return rows_; }
    [[nodiscard]] std::size_t cols() const noexcept { return cols_; }
    [[nodiscard]] std::size_t size() const noexcept { return data_.size(); }
    [[nodiscard]] bool empty() const noexcept { return data_.empty(); }
    [[nodiscard]] matrix_order order() const noexcept { return order_; }

    [[nodiscard]] T& operator()(std::size_t row, std::size_t col) noexcept { return view()(row, col); }
    [[nodiscard]] const T& operator()(std::size_t row, std::size_t col) const noexcept { return view()(row, col); }

    [[nodiscard]] matrix_view<T> view() & noexcept { return {data_.data(), rows_, cols_, order_}; }
    [[nodiscard]] matrix_view<const T> view() const& noexcept { return {data_.data(), rows_, cols_, order_}; }
    void view() const&& = delete; // name the owner first: its views would dangle
    /// Also of a temporary, for the call that it is an argument of.
    operator matrix_view<T>() noexcept { return view(); }
    operator matrix_view<const T>() const noexcept { return view(); }

private:
    std::pmr::vector<T> data_;
    std::size_t rows_ = 0, cols_ = 0;
    matrix_order order_ = matrix_order::column_major;
};

/// The transposed matrix in memory of its own, row-major.
///
///     const matrix<float> in_by_out = transposed_copy(out_by_in);
template <storage_element T>
[[nodiscard]] matrix<T> transposed_copy(const matrix<T>& x)
{
    matrix<T> y(x.cols(), x.rows(), matrix_order::row_major);
    for (std::size_t i = 0; i < x.rows(); ++i) {
        for (std::size_t j = 0; j < x.cols(); ++j) { y(j, i) = x(i, j); }
    }
    return y;
}

} // namespace taskvec::inline TASKVEC_ABI
