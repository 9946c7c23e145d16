// Linear combinations as elementwise functors: what the gpu policy's arithmetic, averages and task arithmetic are made
// of.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/models/elements.hpp>

#include <cstddef>
#include <cstdint>

namespace taskvec::inline TASKVEC_ABI::elementwise {

/// What becomes of a weighted sum s: s; s / factor; or θ0 + factor·s.
enum class linear_finish : std::uint8_t { plain, divide, add_to_base };

TASKVEC_KERNELS_BEGIN

/// out = finish(Σ weights[t]·xt), where xt is operand first + t, less the base where `difference` is set: +0 first,
/// then in order; each product and sum rounds in A, and the result once more in its storage type.
template <arithmetic_element A>
struct linear_combination {
    device_piece piece;
    const A* weights;
    std::size_t first, count;
    bool difference;
    linear_finish finish;
    A factor;
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        for (std::uint64_t i = at.first; i < at.last; i += at.step) { one(i); }
    }

    [[nodiscard]] TASKVEC_HOST_DEVICE bool needs_base() const noexcept
    {
        return difference || finish == linear_finish::add_to_base;
    }
    /// Element i.
    TASKVEC_HOST_DEVICE void one(std::uint64_t i) const
    {
        const A base = needs_base() ? origin<A>(piece, i, flag) : A{0};
        A total = 0;
        for (std::size_t t = 0; t < count; ++t) {
            add(total, weights[t], load<A>(piece.operands[first + t], i, piece.position + i, flag), base);
        }
        store(piece.out, piece.out_dtype, i, finished(total, base));
    }
    TASKVEC_HOST_DEVICE void add(A& total, A weight, A value, A base) const noexcept
    {
        total = sum(total, product(weight, difference ? elementwise::difference(value, base) : value));
    }
    [[nodiscard]] TASKVEC_HOST_DEVICE A finished(A total, A base) const noexcept
    {
        if (finish == linear_finish::divide) { return quotient(total, factor); }
        return finish == linear_finish::add_to_base ? sum(base, product(factor, total)) : total;
    }
};

/// linear_combination where everything is stored as T, by accesses of 16 bytes: the same operations on every element.
template <storage_element T>
struct linear_combination_of_packs {
    linear_combination<float> of_elements;

    /// The sweep is over packs.
    [[nodiscard]] static constexpr std::uint64_t packs(std::uint64_t size) noexcept
    {
        return (size + words16<T>::size - 1) / words16<T>::size;
    }

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        const device_piece& piece = of_elements.piece;
        const bool needs_base = of_elements.needs_base();
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t begin = k * words16<T>::size;
            if (begin + words16<T>::size > piece.size) {
                for (std::uint64_t i = begin; i < piece.size; ++i) { of_elements.one(i); }
                continue;
            }
            float base[words16<T>::size] = {}, value[words16<T>::size], total[words16<T>::size] = {};
            if (needs_base) { load_pack<T>(piece.operands[0], k, piece.position + begin, of_elements.flag, base); }
            for (std::size_t t = 0; t < of_elements.count; ++t) {
                const float weight = of_elements.weights[t];
                load_pack<T>(piece.operands[of_elements.first + t], k, piece.position + begin, of_elements.flag, value);
                for (std::size_t j = 0; j < words16<T>::size; ++j) {
                    of_elements.add(total[j], weight, value[j], base[j]);
                }
            }
            for (std::size_t j = 0; j < words16<T>::size; ++j) { total[j] = of_elements.finished(total[j], base[j]); }
            store_pack<T>(piece.out, k, total);
        }
    }
};

enum class pointwise_operation : std::uint8_t { difference, apply, negate };

/// out = x1 − x2, x1 + factor·x2, or −x1, for operands x1, x2.
template <arithmetic_element A>
struct pointwise {
    device_piece piece;
    pointwise_operation operation;
    A factor;
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t i = at.first; i < at.last; i += at.step) {
            const A x = load<A>(piece.operands[1], i, piece.position + i, flag);
            A result = -x;
            if (operation != pointwise_operation::negate) {
                const A y = load<A>(piece.operands[2], i, piece.position + i, flag);
                result = operation == pointwise_operation::difference ? difference(x, y) : sum(x, product(factor, y));
            }
            store(piece.out, piece.out_dtype, i, result);
        }
    }
};

TASKVEC_KERNELS_END

} // namespace taskvec::inline TASKVEC_ABI::elementwise
