// Elements of any storage type, read and written by elementwise functors: the dtype is looked at in the loop, not in
// the type.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/rounding.hpp>
#include <taskvec/models/aligned_models.hpp>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI {

/// A run of consecutive elements of one tensor of all models, in the memory of a device.
struct device_piece {
    const aligned_tensor::operand* operands =
        nullptr; ///< on the device: the base (null data: none), each task, what lies beside
    std::size_t tasks = 0; ///< how many
    std::uint64_t offset = 0; ///< of the first element in its tensor
    std::uint64_t position = 0; ///< and in the concatenation of all tensors
    std::uint64_t size = 0;
    void* out = nullptr; ///< of the merged elements; null on walks that only read
    taskvec::dtype out_dtype = taskvec::dtype::f32; ///< of what `out` points to
    bool alike =
        false; ///< the base, the tasks and the output are stored as out_dtype, from addresses that are multiples of 16
};

namespace elementwise {

TASKVEC_KERNELS_BEGIN

/// Word i of stored words. What a host reads where it lies, a tensor of a file say, may lie at any address; the buffers
/// of a device are aligned.
template <class Word>
[[nodiscard]] TASKVEC_HOST_DEVICE inline Word word_at(const void* data, std::uint64_t i) noexcept
{
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
    return static_cast<const Word*>(data)[i];
#else
    Word word;
    std::memcpy(&word, static_cast<const std::byte*>(data) + i * sizeof(Word), sizeof(Word));
    return word;
#endif
}

/// Element i of elements of a storage type; 0 where `type` is none.
template <arithmetic_element A, class... T>
[[nodiscard]] TASKVEC_HOST_DEVICE inline A load_stored(
    const void* data, taskvec::dtype type, std::uint64_t i, storage_list<T...>) noexcept
{
    A value{0};
    static_cast<void>(
        ((type == dtype_of<T> && (value = widen_word<A, T>(word_at<storage_word<T>>(data, i)), true)) || ...));
    return value;
}

/// Element i of an operand in the arithmetic type.
template <arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE inline A load(const aligned_tensor::operand& from, std::uint64_t i) noexcept
{
    const void* const data = from.data;
    switch (from.dtype) {
    case taskvec::dtype::f8_e4m3: return static_cast<A>(e4m3_to_f32(static_cast<const std::uint8_t*>(data)[i]));
    case taskvec::dtype::f8_e5m2: return static_cast<A>(e5m2_to_f32(static_cast<const std::uint8_t*>(data)[i]));
    default: return load_stored<A>(data, from.dtype, i, storage_types{});
    }
}

/// The same, with NaN and infinity noted.
template <arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE inline A load(
    const aligned_tensor::operand& from, std::uint64_t i, std::uint64_t place, counter* flag) noexcept
{
    const A value = load<A>(from, i);
    note(value, place, flag);
    return value;
}

template <arithmetic_element A, class... T>
TASKVEC_HOST_DEVICE inline void store_stored(
    void* to, taskvec::dtype type, std::uint64_t i, A value, storage_list<T...>) noexcept
{
    static_cast<void>(
        ((type == dtype_of<T> && (static_cast<storage_word<T>*>(to)[i] = narrow_word<T>(value), true)) || ...));
}

/// Stores a value as element i, rounded once.
template <arithmetic_element A>
TASKVEC_HOST_DEVICE inline void store(void* to, taskvec::dtype type, std::uint64_t i, A value) noexcept
{
    store_stored(to, type, i, value, storage_types{});
}

/// Element i of task t's vector: θt − θ0, or θt where there is no base (`origin` is then not looked at).
template <arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE inline A delta(
    const device_piece& piece, std::size_t t, std::uint64_t i, A origin, counter* flag) noexcept
{
    const A value = load<A>(piece.operands[1 + t], i, piece.position + i, flag);
    return piece.operands[0].data ? difference(value, origin) : value;
}

/// Element i of the base; 0 where there is none.
template <arithmetic_element A>
[[nodiscard]] TASKVEC_HOST_DEVICE inline A origin(const device_piece& piece, std::uint64_t i, counter* flag) noexcept
{
    return piece.operands[0].data ? load<A>(piece.operands[0], i, piece.position + i, flag) : A{0};
}

/// Where a dense list of elements lies in a tensor: runs of `length` consecutive ones, `stride` apart.
struct strided_runs {
    std::uint64_t first = 0, length = 1, stride = 1;

    [[nodiscard]] TASKVEC_HOST_DEVICE std::uint64_t at(std::uint64_t k) const noexcept
    {
        return first + k / length * stride + k % length;
    }
};

/// Element runs.at(k) of a tensor = x[k] + y[k], rounded to storage once.
struct store_sum {
    const double *x, *y;
    void* out;
    taskvec::dtype out_dtype;
    strided_runs runs;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            store(out, out_dtype, runs.at(k), sum(x[k], y[k]));
        }
    }
};

/// As many consecutive elements as one access of 16 bytes moves.
template <storage_element T>
struct alignas(16) words16 {
    static constexpr std::size_t size = 16 / sizeof(T);
    storage_word<T> words[size];
};

/// Pack k of an operand, widened into `out`, with NaN and infinity noted. `place` is that of the pack's first element.
template <storage_element T>
TASKVEC_HOST_DEVICE inline void load_pack(const aligned_tensor::operand& from, std::uint64_t k, std::uint64_t place,
    counter* flag, arithmetic_type<T>* out) noexcept
{
    const void* const data = from.data;
    const words16<T> loaded = static_cast<const words16<T>*>(data)[k];
    for (std::size_t j = 0; j < words16<T>::size; ++j) {
        out[j] = widen_word<arithmetic_type<T>, T>(loaded.words[j]);
        note(out[j], place + j, flag);
    }
}

/// Stores values as pack k, each rounded once.
template <storage_element T>
TASKVEC_HOST_DEVICE inline void store_pack(void* to, std::uint64_t k, const arithmetic_type<T>* values) noexcept
{
    words16<T> stored;
    for (std::size_t j = 0; j < words16<T>::size; ++j) { stored.words[j] = narrow_word<T>(values[j]); }
    static_cast<words16<T>*>(to)[k] = stored;
}

TASKVEC_KERNELS_END

} // namespace elementwise

/// Calls use(std::type_identity<T>{}) where a piece is stored alike in a type that arithmetic in f32 has packs for;
/// otherwise false.
template <class Use>
bool visit_packs(const device_piece& piece, const Use& use)
{
    if (!piece.alike) { return false; }
    return [&]<class... T>(storage_list<T...>) {
        const auto used = [&]<class S>(std::type_identity<S> type) {
            if constexpr (std::same_as<arithmetic_type<S>, float>) {
                if (piece.out_dtype != dtype_of<S>) { return false; }
                use(type);
                return true;
            }
            else {
                return false;
            }
        };
        return (used(std::type_identity<T>{}) || ...);
    }(storage_types{});
}

} // namespace taskvec::inline TASKVEC_ABI
