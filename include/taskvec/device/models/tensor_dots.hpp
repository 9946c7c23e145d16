// Dot products over models on the gpu policy: f64 sums of the fixed shape that the CPU's have (arithmetic/reduce.hpp).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/device/models/device_models.hpp>
#include <taskvec/models/operand_pair.hpp>
#include <taskvec/models/tensor_sums.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

namespace elementwise {

inline constexpr std::size_t dot_lanes = 16; // of kernels::dot

TASKVEC_KERNELS_BEGIN

/// partial[(leaf·pairs + pair)·lanes + lane] = Σ x·y over the elements lane, lane + lanes, … of a leaf of block_size
/// elements.
template <arithmetic_element A>
struct dot_partials {
    device_piece piece;
    const operand_pair* pairs;
    std::size_t pair_count;
    bool difference;
    std::uint64_t first_leaf; // of the piece
    double* partial;
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            const std::uint64_t lane = k % dot_lanes, leaf = first_leaf + k / dot_lanes / pair_count;
            const operand_pair pair = pairs[k / dot_lanes % pair_count];
            const std::uint64_t begin = leaf * block_size,
                                end = begin + block_size < piece.size ? begin + block_size : piece.size;
            double total = 0;
            for (std::uint64_t i = begin + lane; i < end; i += dot_lanes) {
                const double x = value(pair.first, i), y = pair.second == pair.first ? x : value(pair.second, i);
                total = sum(total, product(x, y));
            }
            partial[k] = total;
        }
    }
    /// Element i as A has it; an f64 operand (of statistics, beside an f32 tensor) as it is.
    [[nodiscard]] TASKVEC_HOST_DEVICE double value(std::uint32_t which, std::uint64_t i) const
    {
        const aligned_tensor::operand& from = piece.operands[which];
        if (!from.data) { return 0; }
        const A x = load<A>(from, i, piece.position + i, flag);
        if (difference) { return static_cast<double>(elementwise::difference(x, origin<A>(piece, i, flag))); }
        return from.dtype == dtype::f64 ? load<double>(from, i) : static_cast<double>(x);
    }
};

/// leaves[k] = the sum of the lanes of partial sum k, pairwise.
struct add_lanes {
    const double* partial;
    double* leaves;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        TASKVEC_STRICT_FP
        for (std::uint64_t k = at.first; k < at.last; k += at.step) {
            double lanes[dot_lanes];
            for (std::size_t lane = 0; lane < dot_lanes; ++lane) { lanes[lane] = partial[k * dot_lanes + lane]; }
            for (std::size_t half = dot_lanes / 2; half > 0; half /= 2) {
                for (std::size_t lane = 0; lane < half; ++lane) { lanes[lane] = sum(lanes[lane], lanes[lane + half]); }
            }
            leaves[k] = lanes[0];
        }
    }
};

TASKVEC_KERNELS_END

} // namespace elementwise

/// The dots of `pairs` over every tensor, [tensor][pair]: the same bits as tensor_sums() of kernels::dot on the CPU.
/// One read of the models, n/4096 numbers of 8 bytes to the host for each pair. Waits. The least place of NaN or
/// infinity is noted in *flag: by default where models.check_finite() looks. Operands that are null count as 0.
[[nodiscard]] inline call_vector<call_vector<double>> tensor_dots(
    device_models& models, std::span<const operand_pair> pairs, bool difference, elementwise::counter* flag)
{
    const auto& tensors = models.models().tensors();
    std::vector<std::size_t> first_leaf{0};
    for (const auto& tensor : tensors) {
        first_leaf.push_back(first_leaf.back() + (tensor.size + block_size - 1) / block_size);
    }
    const std::size_t width = pairs.size();
    std::size_t first_operand = difference ? 0 : models.operand_count();
    for (const operand_pair& pair : pairs) {
        first_operand = std::min<std::size_t>({first_operand, pair.first, pair.second});
    }
    const device::buffer<operand_pair> list(models.policy(), pairs);
    const device::buffer<double> leaves(models.policy(), first_leaf.back() * width);
    models.read(
        all_tensors(models.models()),
        [&](const gpu& policy, std::size_t tensor, const device_piece& piece) {
            const std::uint64_t count = (piece.size + block_size - 1) / block_size,
                                most = std::max<std::uint64_t>(1, (1u << 20) / (width * elementwise::dot_lanes));
            const device::buffer<double> partial(policy, std::min(count, most) * width * elementwise::dot_lanes);
            for (std::uint64_t leaf = 0; leaf < count; leaf += most) {
                const std::uint64_t sums = std::min(most, count - leaf) * width;
                visit_arithmetic(tensors[tensor], [&]<class A>(std::type_identity<A>) {
                    device::sweep(policy, sums * elementwise::dot_lanes,
                        elementwise::dot_partials<A>{
                            piece, list.data(), width, difference, leaf, partial.data(), flag});
                });
                device::sweep(policy, sums,
                    elementwise::add_lanes{partial.data(),
                        leaves.data() + (first_leaf[tensor] + piece.offset / block_size + leaf) * width});
            }
        },
        first_operand);
    const std::vector<double> found = leaves.download();
    call_vector<call_vector<double>> sums(tensors.size(), call_vector<double>(width));
    for (std::size_t i = 0; i < sums.size(); ++i) {
        for (std::size_t which = 0; which < width; ++which) {
            detail::pairwise_sum sum;
            for (std::size_t leaf = first_leaf[i]; leaf < first_leaf[i + 1]; ++leaf) {
                sum.add(found[leaf * width + which]);
            }
            sums[i][which] = sum.total();
        }
    }
    return sums;
}

[[nodiscard]] inline call_vector<call_vector<double>> tensor_dots(
    device_models& models, std::span<const operand_pair> pairs, bool difference)
{
    return tensor_dots(models, pairs, difference, models.nonfinite_flag());
}
[[nodiscard]] inline call_vector<call_vector<double>> tensor_dots(
    device_models& models, std::initializer_list<operand_pair> pairs, bool difference)
{
    return tensor_dots(models, std::span<const operand_pair>(pairs.begin(), pairs.size()), difference);
}

} // namespace taskvec::inline TASKVEC_ABI
