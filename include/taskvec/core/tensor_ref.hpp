// Tensors and models as the run-time layer sees them: a pointer, a dtype, a shape. Nothing here owns memory.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/by_name.hpp>
#include <taskvec/core/view.hpp>
#include <taskvec/fwd.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// A shape, or strides: slowest first, in elements.
using extents = std::vector<std::int64_t>;

/// "[2, 3]"
[[nodiscard]] inline std::string to_string(const extents& shape)
{
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) { text += (i ? ", " : "") + std::to_string(shape[i]); }
    return text + "]";
}

namespace detail {
/// How many elements a tensor may have, and how messages say it.
inline constexpr std::uint64_t most_elements = std::numeric_limits<std::size_t>::max() / 2;
inline constexpr std::string_view most_elements_text =
    sizeof(std::size_t) == 8 ? "2^63-1 elements" : "the 2^31-1 elements of a 32-bit program";
} // namespace detail

/// Number of elements of a shape; a negative extent or a product above 2^63-1 (2^31-1 in a 32-bit program) is an error
/// that names `what`.
[[nodiscard]] inline std::size_t element_count(const extents& shape, std::string_view what = "tensor")
{
    std::uint64_t count = 1;
    bool empty = false;
    for (const auto extent : shape) {
        if (extent < 0) {
            raise<shape_mismatch>(
                error_code::shape_invalid, message("tensor '", what, "' has a negative extent in ", to_string(shape)));
        }
        empty = empty || extent == 0;
    }
    if (empty) { return 0; }
    for (const auto extent : shape) {
        if (count > detail::most_elements / static_cast<std::uint64_t>(extent)) {
            raise<shape_mismatch>(error_code::shape_invalid,
                message(
                    "tensor '", what, "' of shape ", to_string(shape), " has more than ", detail::most_elements_text));
        }
        count *= static_cast<std::uint64_t>(extent);
    }
    return static_cast<std::size_t>(count);
}

namespace detail {
/// The product, or the sum, of two counts, modulo 2^64; whether that is another than theirs.
[[nodiscard]] constexpr bool product_wraps(std::uint64_t x, std::uint64_t y, std::uint64_t& product) noexcept
{
    product = x * y;
    return x != 0 && product / x != y;
}
[[nodiscard]] constexpr bool sum_wraps(std::uint64_t x, std::uint64_t y, std::uint64_t& sum) noexcept
{
    sum = x + y;
    return sum < x;
}
} // namespace detail

/// Bytes of `count` elements of `type` (packed sub-byte types round up to whole bytes).
[[nodiscard]] constexpr std::size_t byte_count(dtype type, std::size_t count) noexcept
{
    const std::size_t width = bits_per_element(type);
    return width % 8 == 0 ? count * (width / 8) : (count * width + 7) / 8;
}

/// {pointer, dtype, shape, strides, device}: DLPack's fields without the ownership. Byte is `void` or `const void`.
/// Strides count elements; empty strides mean row-major and contiguous.
template <class Byte>
    requires std::is_void_v<Byte>
struct basic_tensor_ref {
    Byte* data = nullptr;
    taskvec::dtype dtype = taskvec::dtype::f32; ///< of the elements
    extents shape{}; ///< slowest first; empty: a scalar
    extents strides{}; ///< empty, or one for each extent
    memory_space space = memory_space::host; ///< where `data` is
    int device = 0; ///< of a device's memory: its number
    const operand_source* source = nullptr; ///< not null: `data` is null, and elements come from here

    [[nodiscard]] std::size_t size(std::string_view what = "tensor") const { return element_count(shape, what); }
    /// Bytes of its elements, as if they were contiguous. `what` names it in errors.
    [[nodiscard]] std::size_t bytes(std::string_view what = "tensor") const
    {
        const std::size_t count = size(what);
        if constexpr (sizeof(std::size_t) < 8) {
            if (count > std::numeric_limits<std::size_t>::max() / 8 && bits_per_element(dtype) > 8) {
                raise<shape_mismatch>(error_code::shape_invalid,
                    message("tensor '", what, "' of shape ", to_string(shape), " and dtype ", to_string(dtype),
                        " has more bytes than a 32-bit program can address"));
            }
        }
        return byte_count(dtype, count);
    }
    /// True when the elements lie row-major without holes.
    [[nodiscard]] bool contiguous() const noexcept
    {
        if (strides.empty()) { return true; }
        std::int64_t expected = 1;
        for (std::size_t i = shape.size(); i-- > 0;) {
            if (shape[i] == 0) { return true; }
            if (shape[i] != 1 && strides[i] != expected) { return false; }
            expected *= shape[i];
        }
        return true;
    }
    /// What may be written may be read. (A template: of a reference that is const already nvcc would say that it never
    /// converts to itself.)
    template <class To>
        requires(std::same_as<To, const void> && !std::is_const_v<Byte>)
    operator basic_tensor_ref<To>() const
    {
        return {data, dtype, shape, strides, space, device, source};
    }
};

namespace detail {
/// What takes tensors as memory says this of those that are worked out.
[[noreturn]] TASKVEC_COLD inline void refuse_source(std::string_view tensor)
{
    raise<invalid_argument>(error_code::tensor_without_data,
        message("tensor '", tensor, "' is a quantised layer: its numbers are nowhere in memory; decode it first"));
}
} // namespace detail

/// The tensor that a view's memory makes with this shape (default: one flat dimension).
template <class T, memory_space S>
[[nodiscard]] auto as_tensor(view<T, S> flat, extents shape)
{
    using ref = basic_tensor_ref<std::conditional_t<std::is_const_v<T>, const void, void>>;
    if (element_count(shape) != flat.size()) {
        raise<shape_mismatch>(error_code::shape_invalid,
            message("a view of ", flat.size(), " elements cannot have shape ", to_string(shape)));
    }
    return ref{flat.data(), dtype_of<std::remove_const_t<T>>, std::move(shape), {}, S, 0};
}
template <class T, memory_space S>
[[nodiscard]] auto as_tensor(view<T, S> flat)
{
    return as_tensor(flat, {static_cast<std::int64_t>(flat.size())});
}

namespace detail {
template <class T, memory_space S, class Byte>
[[nodiscard]] view<const T, S> checked_flat_view(const basic_tensor_ref<Byte>& tensor, std::string_view what)
{
    if (tensor.dtype != dtype_of<T>) {
        raise<dtype_mismatch>(error_code::dtype_differs,
            message("tensor '", what, "' has dtype ", to_string(tensor.dtype), "; expected ", to_string(dtype_of<T>)));
    }
    if (tensor.space != S) {
        raise<invalid_argument>(error_code::tensor_memory,
            message("tensor '", what, "' lives in ", tensor.space == memory_space::host ? "host" : "device",
                " memory; copy it to the policy's own memory space first"));
    }
    if (!tensor.contiguous()) {
        raise<invalid_argument>(error_code::tensor_layout,
            message("tensor '", what, "' is not contiguous; copy it to row-major memory first"));
    }
    if (tensor.source) { refuse_source(what); }
    return {static_cast<const T*>(tensor.data), tensor.size(what)};
}
} // namespace detail

/// The flat view of a contiguous tensor of element type T in memory space S; anything else is an error naming `what`.
template <storage_element T, memory_space S = memory_space::host>
[[nodiscard]] auto flat_view(const const_tensor_ref& tensor, std::string_view what)
{
    return detail::checked_flat_view<T, S>(tensor, what);
}
template <storage_element T, memory_space S = memory_space::host>
[[nodiscard]] auto flat_view(const tensor_ref& tensor, std::string_view what)
{
    return detail::checked_flat_view<T, S>(tensor, what); // not by conversion, which copies the shape
}

/// A model: tensors by name. Kept sorted by the bytes of the name, which is the order that model-wide algorithms use.
template <class Ref>
class basic_model {
public:
    /// A tensor and its name.
    struct entry {
        std::string name; ///< sorts by its bytes
        Ref tensor; ///< borrowed
    };

    basic_model() = default;
    /// In any order. Errors: as insert().
    basic_model(std::initializer_list<entry> entries)
    {
        for (const auto& [name, tensor] : entries) { insert(name, tensor); }
    }
    /// A model of mutable tensors is a model of const ones.
    template <class Other>
        requires(!std::same_as<Other, Ref> && std::convertible_to<Other, Ref>)
    basic_model(const basic_model<Other>& other)
    {
        for (const auto& [name, tensor] : other) { entries_.push_back({name, Ref(tensor)}); }
    }

    /// Adds a tensor; a name that is already there is an error. Cost: O(log n) and a shift.
    void insert(std::string name, Ref tensor)
    {
        const auto place = detail::place_by_name(entries_, name);
        if (place != entries_.end() && place->name == name) {
            raise<invalid_argument>(
                error_code::tensor_repeated, message("tensor '", name, "' occurs twice in one model"));
        }
        entries_.insert(place, entry{std::move(name), std::move(tensor)});
    }
    /// The tensor of that name, or nullptr.
    [[nodiscard]] const Ref* find(std::string_view name) const
    {
        const entry* const one = detail::find_by_name(entries_, name);
        return one ? &one->tensor : nullptr;
    }
    [[nodiscard]] auto begin() const noexcept { return entries_.begin(); }
    [[nodiscard]] auto end() const noexcept { return entries_.end(); }
    [[nodiscard]] std::size_t size() const noexcept { return entries_.size(); }
    [[nodiscard]] bool empty() const noexcept { return entries_.empty(); }
    [[nodiscard]] const entry& operator[](std::size_t index) const noexcept { return entries_[index]; }

private:
    std::vector<entry> entries_;
};

} // namespace taskvec::inline TASKVEC_ABI
