// DLPack tensors: borrowed as tensor references, taken over with their deleter, and made from tensor references.
// SPDX-License-Identifier: Apache-2.0
//
// Written against the field names and numbers that DLPack's ABI fixes, and includes no dlpack.h: any version's
// structures will do (DLTensor and DLManagedTensor; DLManagedTensorVersioned where the header, from DLPack 1.0 on, has
// it), wherever the framework at hand keeps its copy of that header.
#pragma once

#include <taskvec/core/tensor_ref.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// DLPack's DLTensor, of any version.
template <class T>
concept dlpack_tensor = requires(T& tensor) {
    requires std::same_as<std::remove_const_t<decltype(tensor.data)>, void*>;
    tensor.device.device_type;
    tensor.device.device_id;
    requires std::integral<std::remove_cvref_t<decltype(tensor.ndim)>>;
    tensor.dtype.code;
    tensor.dtype.bits;
    tensor.dtype.lanes;
    requires std::same_as<std::remove_const_t<decltype(tensor.shape)>, std::int64_t*>;
    requires std::same_as<std::remove_const_t<decltype(tensor.strides)>, std::int64_t*>;
    tensor.byte_offset;
};

/// DLPack's DLManagedTensor or DLManagedTensorVersioned.
template <class M>
concept dlpack_managed = dlpack_tensor<decltype(std::declval<M&>().dl_tensor)> && requires(M& managed) {
    managed.manager_ctx;
    managed.deleter = static_cast<void (*)(M*)>(nullptr);
};

/// DLPack's DLManagedTensorVersioned: says its version and whether it may be written.
template <class M>
concept dlpack_versioned = dlpack_managed<M> && requires(M& managed) {
    managed.version;
    managed.flags;
};

namespace detail {
// Numbers of DLPack's ABI.
inline constexpr int dlpack_cpu = 1, dlpack_cuda = 2, dlpack_cuda_host = 3, dlpack_cuda_managed = 13;
inline constexpr unsigned dlpack_int = 0, dlpack_uint = 1, dlpack_float = 2, dlpack_bfloat = 4, dlpack_complex = 5,
                          dlpack_bool = 6, dlpack_e4m3fn = 10, dlpack_e5m2 = 12, dlpack_e8m0fnu = 14;
inline constexpr std::uint64_t dlpack_read_only = 1;
inline constexpr std::uint32_t dlpack_major = 1;

struct dlpack_dtype_row {
    dtype type;
    unsigned code;
    unsigned bits;
};
inline constexpr dlpack_dtype_row dlpack_dtypes[] = {
    {dtype::f64, dlpack_float, 64},
    {dtype::f32, dlpack_float, 32},
    {dtype::f16, dlpack_float, 16},
    {dtype::bf16, dlpack_bfloat, 16},
    {dtype::i64, dlpack_int, 64},
    {dtype::i32, dlpack_int, 32},
    {dtype::i16, dlpack_int, 16},
    {dtype::i8, dlpack_int, 8},
    {dtype::u64, dlpack_uint, 64},
    {dtype::u32, dlpack_uint, 32},
    {dtype::u16, dlpack_uint, 16},
    {dtype::u8, dlpack_uint, 8},
    {dtype::boolean, dlpack_bool, 8},
    {dtype::c64, dlpack_complex, 64},
    {dtype::f8_e4m3, dlpack_e4m3fn, 8},
    {dtype::f8_e5m2, dlpack_e5m2, 8},
    {dtype::f8_e8m0, dlpack_e8m0fnu, 8},
};
} // namespace detail

/// A DLPack tensor as a tensor reference; borrows its memory, which must outlive the result.
///
/// `what` names the tensor in errors. Strides may be null (row-major) or any; algorithms refuse what is not row-major
/// and contiguous. byte_offset is applied. CPU and pinned memory are host memory; CUDA and managed memory are device
/// memory. Errors: dtype_mismatch for element types that safetensors has no name for, and for vector lanes;
/// invalid_argument for other devices, a missing shape, null or misaligned data; shape_mismatch for negative or
/// overflowing extents. Cost: the dimensions.
///
///     const taskvec::tensor_ref weight = taskvec::from_dlpack(managed->dl_tensor, "fc.weight");
template <dlpack_tensor T>
[[nodiscard]] tensor_ref from_dlpack(const T& tensor, std::string_view what = "DLPack tensor")
{
    tensor_ref result;
    const unsigned code = tensor.dtype.code, width = tensor.dtype.bits;
    const detail::dlpack_dtype_row* found = nullptr;
    for (const auto& row : detail::dlpack_dtypes) {
        if (row.code == code && row.bits == width) { found = &row; }
    }
    if (found == nullptr || tensor.dtype.lanes != 1) {
        raise<dtype_mismatch>(error_code::dtype_unsupported,
            message("tensor '", what, "' has DLPack type code ", code, " with ", width, " bits and ",
                static_cast<unsigned>(tensor.dtype.lanes),
                " lanes; expected one lane of a type that safetensors has a name for: convert it first"));
    }
    result.dtype = found->type;

    switch (static_cast<int>(tensor.device.device_type)) {
    case detail::dlpack_cpu:
    case detail::dlpack_cuda_host: result.space = memory_space::host; break;
    case detail::dlpack_cuda:
    case detail::dlpack_cuda_managed: result.space = memory_space::device; break;
    default:
        raise<invalid_argument>(error_code::tensor_memory,
            message("tensor '", what, "' lives on a device of DLPack type ",
                static_cast<int>(tensor.device.device_type),
                "; expected the CPU (1), CUDA (2), pinned (3) or managed CUDA memory (13): copy it to one of these "
                "first"));
    }
    result.device = result.space == memory_space::host ? 0 : static_cast<int>(tensor.device.device_id);

    if (tensor.ndim < 0 || (tensor.ndim > 0 && tensor.shape == nullptr)) {
        raise<invalid_argument>(error_code::dlpack_tensor,
            message("tensor '", what, "' has ", static_cast<int>(tensor.ndim), " dimensions and ",
                tensor.shape ? "a" : "no", " shape"));
    }
    if (tensor.ndim > 0) {
        result.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
        if (tensor.strides != nullptr) { result.strides.assign(tensor.strides, tensor.strides + tensor.ndim); }
    }
    const std::size_t count = result.size(what);
    if (count != 0) {
        if (tensor.data == nullptr) {
            raise<invalid_argument>(error_code::tensor_without_data,
                message("tensor '", what, "' of shape ", to_string(result.shape), " has no data"));
        }
        result.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
        const std::size_t alignment = result.dtype == dtype::c64 ? 4 : bits_per_element(result.dtype) / 8;
        if (reinterpret_cast<std::uintptr_t>(result.data) % alignment != 0) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", what, "' is not aligned to its ", alignment, "-byte elements: copy it first"));
        }
    }
    return result;
}

/// Owns a DLPack tensor that a framework handed over: calls its deleter exactly once, when it is destroyed or reset.
///
/// Takes the pointer over even when it refuses the tensor (the deleter is then called before the error leaves). A
/// DLManagedTensorVersioned of another major version than 1 is given back unread, with an invalid_argument.
///
///     taskvec::dlpack_handle weight(managed, "fc.weight");
///     model.insert("fc.weight", weight.tensor());
template <dlpack_managed M>
class dlpack_handle {
public:
    dlpack_handle() = default;
    /// Takes `managed` over, whatever happens; `what` names the tensor in errors. Errors: as from_dlpack();
    /// invalid_argument for null, and for another major version than 1.
    explicit dlpack_handle(M* managed, std::string_view what = "DLPack tensor")
        : managed_(managed)
        , what_(what)
    {
        if (managed == nullptr) {
            raise<invalid_argument>(
                error_code::dlpack_tensor, message("tensor '", what_, "': the DLPack pointer is null"));
        }
        if constexpr (dlpack_versioned<M>) {
            const auto [first, second] =
                managed->version; // by position: <sys/sysmacros.h> has macros of the members' names
            if (first != detail::dlpack_major) {
                raise<invalid_argument>(error_code::dlpack_tensor,
                    message("tensor '", what_, "' comes as DLPack ", first, ".", second, "; expected major version ",
                        detail::dlpack_major, ": ask its framework for that version"));
            }
        }
        tensor_ = from_dlpack(managed->dl_tensor, what_);
    }
    dlpack_handle(dlpack_handle&& other) noexcept
        : managed_(std::move(other.managed_))
        , what_(std::move(other.what_))
        , tensor_(std::exchange(other.tensor_, {}))
    { }
    dlpack_handle& operator=(dlpack_handle&& other) noexcept
    {
        managed_ = std::move(other.managed_);
        what_ = std::move(other.what_);
        tensor_ = std::exchange(other.tensor_, {});
        return *this;
    }

    /// True when the producer forbids writing. (An unversioned DLManagedTensor cannot say so.)
    [[nodiscard]] bool read_only() const noexcept
    {
        if constexpr (dlpack_versioned<M>) { return managed_ && (managed_->flags & detail::dlpack_read_only) != 0; }
        else {
            return false;
        }
    }
    /// The tensor, to be read.
    [[nodiscard]] const_tensor_ref tensor() const& { return tensor_; }
    void tensor() const&& = delete; // name the owner first: its views would dangle
    /// The tensor, to be written; invalid_argument if its producer made it read-only.
    [[nodiscard]] tensor_ref writable_tensor() &
    {
        if (read_only()) {
            raise<invalid_argument>(
                error_code::dlpack_tensor, message("tensor '", what_, "' is read-only: copy it before writing"));
        }
        return tensor_;
    }
    /// The flat elements, const T to read, T to write; refuses what flat_view refuses.
    template <class T, memory_space S = memory_space::host>
        requires storage_element<std::remove_const_t<T>>
    [[nodiscard]] taskvec::view<T, S> flat() &
    {
        const auto elements = flat_view<std::remove_const_t<T>, S>(tensor_, what_);
        if constexpr (std::is_const_v<T>) { return elements; }
        else {
            return {static_cast<T*>(writable_tensor().data), elements.size()};
        }
    }

    /// Gives the tensor back to its framework now.
    void reset() noexcept
    {
        managed_.reset();
        tensor_ = {};
    }
    /// Hands the pointer on without calling the deleter.
    [[nodiscard]] M* release() noexcept
    {
        tensor_ = {};
        return managed_.release();
    }
    explicit operator bool() const noexcept { return managed_ != nullptr; }

private:
    struct deleter {
        void operator()(M* managed) const noexcept
        {
            if (managed->deleter != nullptr) { managed->deleter(managed); }
        }
    };
    std::unique_ptr<M, deleter> managed_;
    std::string what_;
    tensor_ref tensor_;
};

namespace detail {
/// What the deleter of an exported tensor frees: the structure, its shape and strides, and a share in the memory's
/// owner.
template <class M>
struct dlpack_export {
    M managed{};
    std::vector<std::int64_t> shape, strides;
    std::shared_ptr<const void> owner;
};
} // namespace detail

/// A tensor reference as a managed DLPack tensor, for a framework to take over. `owner` keeps the memory alive until
/// the framework calls the deleter; leave it empty where the caller does. Strides are always given. A const tensor can
/// only be given as a DLManagedTensorVersioned, marked read-only.
///
///     auto buffer = std::make_shared<std::vector<float>>(12);
///     auto tensor = taskvec::as_tensor(taskvec::as_view(*buffer), {4, 3});
///     DLManagedTensorVersioned* given = taskvec::to_dlpack<DLManagedTensorVersioned>(tensor, buffer);
template <dlpack_managed M, class Byte>
    requires(dlpack_versioned<M> || !std::is_const_v<Byte>)
[[nodiscard]] M* to_dlpack(const basic_tensor_ref<Byte>& tensor, std::shared_ptr<const void> owner = {})
{
    const detail::dlpack_dtype_row* found = nullptr;
    for (const auto& row : detail::dlpack_dtypes) {
        if (row.type == tensor.dtype) { found = &row; }
    }
    if (found == nullptr) {
        raise<dtype_mismatch>(error_code::dtype_unsupported,
            message("DLPack has no fixed type for ", to_string(tensor.dtype), ": convert the tensor first"));
    }
    if (!tensor.strides.empty() && tensor.strides.size() != tensor.shape.size()) {
        raise<shape_mismatch>(error_code::shape_invalid,
            message("a tensor of shape ", to_string(tensor.shape), " has strides ", to_string(tensor.strides)));
    }
    const std::size_t count = tensor.size();

    auto made = std::make_unique<detail::dlpack_export<M>>();
    made->owner = std::move(owner);
    made->shape = tensor.shape;
    made->strides = tensor.strides;
    if (made->strides.empty()) {
        made->strides.resize(made->shape.size());
        std::int64_t step = 1;
        for (std::size_t i = made->shape.size(); i-- > 0;) {
            made->strides[i] = step;
            step *= made->shape[i] == 0 ? 1 : made->shape[i];
        }
    }
    M& managed = made->managed;
    auto& out = managed.dl_tensor;
    out.data = count == 0 ? nullptr : const_cast<void*>(static_cast<const void*>(tensor.data));
    out.byte_offset = 0;
    const int kind = tensor.space == memory_space::host ? detail::dlpack_cpu : detail::dlpack_cuda;
    out.device.device_type = static_cast<decltype(out.device.device_type)>(kind);
    out.device.device_id = tensor.space == memory_space::host ? 0 : tensor.device;
    out.ndim = static_cast<decltype(out.ndim)>(made->shape.size());
    out.dtype.code = static_cast<decltype(out.dtype.code)>(found->code);
    out.dtype.bits = static_cast<decltype(out.dtype.bits)>(found->bits);
    out.dtype.lanes = 1;
    out.shape = made->shape.data();
    out.strides = made->strides.data();
    if constexpr (dlpack_versioned<M>) {
        managed.version = {detail::dlpack_major, 0};
        managed.flags = std::is_const_v<Byte> ? detail::dlpack_read_only : 0;
    }
    managed.manager_ctx = made.get();
    managed.deleter = [](M* self) { delete static_cast<detail::dlpack_export<M>*>(self->manager_ctx); };
    return &made.release()->managed;
}

} // namespace taskvec::inline TASKVEC_ABI
