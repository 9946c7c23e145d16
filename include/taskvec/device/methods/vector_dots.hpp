// Dot products of the rows or columns of tensors on the gpu policy, with the bits that they have on the CPU
// (methods/vector_factors.hpp).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/memory.hpp>
#include <taskvec/device/models/device_models.hpp>
#include <taskvec/device/models/tensor_dots.hpp>
#include <taskvec/device/stream.hpp>
#include <taskvec/methods/vector_factors.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace elementwise {

TASKVEC_KERNELS_BEGIN

/// sums[k] += the products of a pair of task vectors over what a piece has of a vector, for k = vector·pairs + pair
/// from that of the piece's first vector on.
template <arithmetic_element A>
struct vector_products {
    device_piece piece;
    taskvec::detail::vector_layout layout;
    const operand_pair* pairs; // numbers of tasks
    std::uint64_t pair_count, first_vector;
    double* sums;
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t vector = first_vector + k / pair_count;
            const operand_pair pair = pairs[k % pair_count];
            sums[k] = layout.columns ? column(vector, pair, sums[k]) : row(vector, pair, sums[k]);
        }
    }
    [[nodiscard]] TASKVEC_HOST_DEVICE double column(std::uint64_t vector, operand_pair pair, double total) const
    {
        TASKVEC_STRICT_FP
        const std::uint64_t width = layout.width, begins = piece.offset % width;
        for (std::uint64_t i = vector >= begins ? vector - begins : vector + width - begins; i < piece.size;
            i += width) {
            total = sum(total, term(pair, i));
        }
        return total;
    }
    [[nodiscard]] TASKVEC_HOST_DEVICE double row(std::uint64_t vector, operand_pair pair, double total) const
    {
        TASKVEC_STRICT_FP
        const std::uint64_t end = least((vector + 1) * layout.width, piece.offset + piece.size);
        std::uint64_t at = vector * layout.width;
        if (at < piece.offset) { at = piece.offset; }
        while (at < end) {
            const std::uint64_t until = least(end, (at / block_size + 1) * block_size);
            double lanes[dot_lanes] = {};
            for (std::size_t lane = 0; lane < dot_lanes; ++lane) {
                for (std::uint64_t i = at + lane; i < until; i += dot_lanes) {
                    lanes[lane] = sum(lanes[lane], term(pair, i - piece.offset));
                }
            }
            for (std::size_t half = dot_lanes / 2; half > 0; half /= 2) {
                for (std::size_t lane = 0; lane < half; ++lane) { lanes[lane] = sum(lanes[lane], lanes[lane + half]); }
            }
            total = sum(total, lanes[0]);
            at = until;
        }
        return total;
    }

private:
    [[nodiscard]] static TASKVEC_HOST_DEVICE std::uint64_t least(std::uint64_t x, std::uint64_t y) noexcept
    {
        return x < y ? x : y;
    }
    [[nodiscard]] TASKVEC_HOST_DEVICE double term(operand_pair pair, std::uint64_t i) const
    {
        const A base = origin<A>(piece, i, flag);
        const A x = delta<A>(piece, pair.first, i, base, flag);
        const A y = pair.second == pair.first ? x : delta<A>(piece, pair.second, i, base, flag);
        return product(static_cast<double>(x), static_cast<double>(y));
    }
};

TASKVEC_KERNELS_END

} // namespace elementwise

/// The dot products i·j, j ≤ i, of the tasks (task vectors, where there is a base) of every vector of every tensor:
/// [vector][pair], a tensor's from vector first[tensor] on. One read of the models. Waits.
[[nodiscard]] inline std::vector<double> vector_dots(device_models& models,
    std::span<const detail::vector_layout> layouts, std::span<const std::uint64_t> first, std::size_t vectors)
{
    std::vector<operand_pair> pairs;
    for (std::uint32_t i = 0; i < models.models().task_count(); ++i) {
        for (std::uint32_t j = 0; j <= i; ++j) { pairs.push_back({i, j}); }
    }
    const device::buffer<operand_pair> list(models.policy(), pairs);
    device::buffer<double> sums(models.policy(), vectors * pairs.size());
    sums.clear();
    std::optional<gpu> before; // pieces add to the same sums: one after the other
    models.read(all_tensors(models.models()), [&](const gpu& policy, std::size_t tensor, const device_piece& piece) {
        if (before) { device::follow(*before, policy); }
        before = policy;
        const detail::vector_layout& layout = layouts[tensor];
        const std::uint64_t begin = layout.columns ? 0 : layout.vector_of(piece.offset),
                            end = layout.columns ? layout.width : layout.vector_of(piece.offset + piece.size - 1) + 1;
        visit_arithmetic(models.models().tensors()[tensor], [&]<class A>(std::type_identity<A>) {
            device::sweep(policy, (end - begin) * pairs.size(),
                elementwise::vector_products<A>{piece, layout, list.data(), pairs.size(), begin,
                    sums.data() + (first[tensor] + begin) * pairs.size(), models.nonfinite_flag()});
        });
    });
    return sums.download();
}

} // namespace taskvec::inline TASKVEC_ABI
