// Matrices in device memory: an owner, and copies from and to the host.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/matrix.hpp>
#include <taskvec/device/memory.hpp>

#include <concepts>
#include <cstddef>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// A matrix that owns device memory from the policy's allocator, zero at first; move-only. Memory is given back in the
/// order of the policy's stream, which (like the allocator) must outlive it.
template <storage_element T>
class matrix<T, memory_space::device> {
public:
    using host_type = matrix<T>;

    matrix() = default;
    matrix(const gpu& policy, std::size_t rows, std::size_t cols, matrix_order order = matrix_order::column_major)
        : data_({.stream = policy.stream, .allocator = policy.allocator, .context = nullptr}, rows * cols)
        , rows_(rows)
        , cols_(cols)
        , order_(order)
    {
        data_.clear();
    }

    [[nodiscard]] T* data() noexcept { return data_.data(); }
    [[nodiscard]] const T* data() const noexcept { return data_.data(); }
    [[nodiscard]] std::size_t rows() const noexcept { return rows_; }
    [[nodiscard]] std::size_t cols() const noexcept { return cols_; }
    [[nodiscard]] std::size_t size() const noexcept { return data_.size(); }
    [[nodiscard]] bool empty() const noexcept { return size() == 0; }
    [[nodiscard]] matrix_order order() const noexcept { return order_; }

    [[nodiscard]] device_matrix_view<T> view() & noexcept { return {data_.data(), rows_, cols_, order_}; }
    [[nodiscard]] device_matrix_view<const T> view() const& noexcept { return {data_.data(), rows_, cols_, order_}; }
    void view() const&& = delete; // name the owner first: its views would dangle
    operator device_matrix_view<T>() noexcept { return view(); }
    operator device_matrix_view<const T>() const noexcept { return view(); }

private:
    device::buffer<T> data_;
    std::size_t rows_ = 0, cols_ = 0;
    matrix_order order_ = matrix_order::column_major;
};

/// A matrix that owns device memory.
template <storage_element T>
using device_matrix = matrix<T, memory_space::device>;

/// A copy of a host matrix in device memory, in the same order and without gaps; of each run of a view only its
/// elements. Queued on the policy's stream; the source may be reused on return.
template <storage_element T>
[[nodiscard]] device_matrix<T> to_device(const gpu& policy, matrix_view<const T> from)
{
    device_matrix<T> to(policy, from.rows(), from.cols(), from.order());
    const bool by_rows = from.order() == matrix_order::row_major;
    const std::size_t runs = by_rows ? from.rows() : from.cols(), length = by_rows ? from.cols() : from.rows();
    if (from.stride() == length) {
        device::upload(policy, static_cast<void*>(to.data()), from.data(), from.size() * sizeof(T));
        return to;
    }
    for (std::size_t k = 0; k < runs; ++k) {
        device::upload(
            policy, static_cast<void*>(to.data() + k * length), from.data() + k * from.stride(), length * sizeof(T));
    }
    return to;
}
template <storage_element T>
[[nodiscard]] device_matrix<T> to_device(const gpu& policy, const matrix<T>& from)
{
    return to_device<T>(policy, from.view());
}

template <storage_element T>
[[nodiscard]] device_matrix<T> to_device(const gpu& policy, matrix_view<T> from)
{
    return to_device<T>(policy, matrix_view<const T>(from));
}
namespace detail {
/// Eigen's matrices, vectors, maps and blocks, and with them row_matrix, by the interface that they have.
template <class X>
concept dense_matrix = requires(const X& x) {
    { x.data() } -> std::same_as<const typename X::Scalar*>;
    requires storable<typename X::Scalar>;
    { x.rows() } -> std::convertible_to<std::ptrdiff_t>;
    { x.cols() } -> std::convertible_to<std::ptrdiff_t>;
    { x.outerStride() } -> std::convertible_to<std::ptrdiff_t>;
    { x.innerStride() } -> std::convertible_to<std::ptrdiff_t>;
    { bool(X::IsRowMajor) };
};
} // namespace detail
/// The same of an Eigen matrix, vector, map or block, of either order (of half or bfloat16 with
/// <taskvec/interop/eigen.hpp>). Throws invalid_argument where elements of a row
/// (column) do not lie side by side.
///
///     const device_matrix<float> a = to_device(gpu, Eigen::MatrixXf::Random(64, 8));
template <detail::dense_matrix X>
[[nodiscard]] auto to_device(const gpu& policy, const X& from)
{
    using T = std::remove_const_t<detail::stored_as<typename X::Scalar>>;
    if (from.size() > 0 && from.innerStride() != 1) {
        raise<invalid_argument>(error_code::tensor_layout,
            message("a matrix of ", from.rows(), "×", from.cols(), " leaves ", from.innerStride() - 1,
                " elements out between two of a run: copy it into a matrix of its own first"));
    }
    return to_device<T>(policy,
        matrix_view<const T>(detail::as_stored(from.data()), static_cast<std::size_t>(from.rows()),
            static_cast<std::size_t>(from.cols()), X::IsRowMajor ? matrix_order::row_major : matrix_order::column_major,
            static_cast<std::size_t>(from.outerStride())));
}

/// A copy of a device matrix on the host. Waits for the policy's stream.
template <storage_element T>
[[nodiscard]] matrix<T> to_host(const gpu& policy, device_matrix_view<const T> from)
{
    matrix<T> to(from.rows(), from.cols(), from.order());
    const bool by_rows = from.order() == matrix_order::row_major;
    const std::size_t runs = by_rows ? from.rows() : from.cols(), length = by_rows ? from.cols() : from.rows();
    if (from.stride() == length || from.empty()) {
        device::download(policy, static_cast<void*>(to.data()), from.data(), to.size() * sizeof(T));
        return to;
    }
    for (std::size_t k = 0; k < runs; ++k) {
        device::download(
            policy, static_cast<void*>(to.data() + k * length), from.data() + k * from.stride(), length * sizeof(T));
    }
    return to;
}
template <storage_element T>
[[nodiscard]] matrix<T> to_host(const gpu& policy, const device_matrix<T>& from)
{
    return to_host<T>(policy, from.view());
}

} // namespace taskvec::inline TASKVEC_ABI
