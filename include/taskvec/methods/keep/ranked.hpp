// Keeping entries at random, larger ones more often: the MAGPRUNE of DELLA, by ranks within rows.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/error.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/core/pack.hpp>
#include <taskvec/core/random_words.hpp>
#include <taskvec/methods/passes.hpp>
#include <taskvec/methods/row_pieces.hpp>
#include <taskvec/models/tensor_sums.hpp>
#include <taskvec/select/thresholds.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Which entries are ranked among each other: those along the last axis (the rows of a matrix), or those along the
/// second one (mergekit's: another thing where there are three axes or more). A tensor with one axis is one row.
enum class rank_axis : std::uint8_t { last, second };

template <>
struct enum_words<rank_axis> {
    static constexpr std::array words{
        enum_word<rank_axis>{rank_axis::last, "last"}, enum_word<rank_axis>{rank_axis::second, "second"}};
};

/// The rule of one tensor: what an entry is divided by was worked out with its row; 0 where it is dropped.
template <arithmetic_element A>
struct keep_ranked_of_tensor {
    static constexpr bool sees_all =
        false; ///< NaN and infinity may be dropped: the walk looks for them in what it reads.
    static constexpr bool reads_beside = true;

    /// x divided by its own number where it is kept, 0 where not.
    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(
        const In& in, std::size_t t, const typename In::pack& x) const noexcept
    {
        const auto divisor = in.beside(t);
        return where(divisor != 0, x / divisor);
    }
};

namespace detail {

/// Ranks of magnitudes: 0 is the smallest. Among equals the lowest index counts as the largest.
template <arithmetic_element A>
class magnitude_ranks {
public:
    explicit magnitude_ranks(std::pmr::memory_resource* memory)
        : items_(memory)
        , other_(memory)
    { }

    /// Calls take(i, rank) for the entries x[0], x[stride], … x[(n − 1)·stride], in ascending rank.
    template <class Take>
    void rank(const A* x, std::size_t n, std::size_t stride, const Take& take)
    {
        items_.resize(n);
        for (std::size_t i = 0; i < n; ++i) { // a stable sort leaves equals as they are here: the last ones first
            const std::size_t from = n - 1 - i;
            items_[i] = {magnitude_bits(x[from * stride]), static_cast<std::uint32_t>(from)};
        }
        if (n < 256) {
            std::sort(items_.begin(), items_.end(),
                [](const item& a, const item& b) { return a.key != b.key ? a.key < b.key : a.index > b.index; });
        }
        else {
            sort_digits();
        }
        for (std::size_t rank = 0; rank < n; ++rank) { take(items_[rank].index, rank); }
    }

private:
    struct item {
        bits_type<A> key = 0;
        std::uint32_t index = 0;
    };
    static constexpr unsigned digit = 11;
    static constexpr std::size_t digits = (sizeof(A) * 8 - 1 + digit - 1) / digit; // the sign is none of the magnitude
    [[nodiscard]] static std::size_t digit_of(const item& one, std::size_t d) noexcept
    {
        return static_cast<std::size_t>(one.key >> (d * digit)) & ((std::size_t{1} << digit) - 1);
    }

    /// A radix sort, without the digits that are the same in all.
    void sort_digits()
    {
        other_.resize(items_.size());
        for (auto& one : counts_) { one.fill(0); }
        for (const item& one : items_) {
            for (std::size_t d = 0; d < digits; ++d) { ++counts_[d][digit_of(one, d)]; }
        }
        for (std::size_t d = 0; d < digits; ++d) {
            auto& places = counts_[d];
            if (places[digit_of(items_.front(), d)] == items_.size()) { continue; }
            std::uint32_t before = 0;
            for (auto& place : places) { before += std::exchange(place, before); }
            for (const item& one : items_) { other_[places[digit_of(one, d)]++] = one; }
            std::swap(items_, other_);
        }
    }

    std::pmr::vector<item> items_, other_;
    std::array<std::array<std::uint32_t, std::size_t{1} << digit>, digits> counts_;
};

} // namespace detail

/// In every row of n entries the entry of rank r by magnitude (0: the smallest; among equals the lowest index is the
/// largest) is kept with probability p = density − epsilon + 2·epsilon·r / (n − 1), by its draw of (seed, task, tensor
/// name, element index) as in keep_random, and divided by p unless it is to stay as it is. In a row of one entry p is
/// the density; a task with density 1 is kept whole. Errors: invalid_argument unless 0 < density ≤ 1, and unless
/// 0 ≤ epsilon with density ± epsilon within (0, 1). Cost: every row is sorted. On the CPU.
class keep_ranked {
public:
    /// `axis`: which entries make a row; `divided`: what is kept is divided by its probability.
    template <class Passes>
    keep_ranked(Passes& passes, const task_shares& density, const task_shares& epsilon, std::uint64_t seed,
        rank_axis axis, bool divided)
        : policy_(passes.policy())
        , models_(&passes.models())
        , axis_(axis)
        , divided_(divided)
        , pieces_(passes.models(), [axis](const aligned_tensor& tensor) { return group_of(tensor, axis).block(); })
    {
        for (std::size_t t = 0; t < passes.tasks(); ++t) {
            densities_.push_back(density.of(t));
            epsilons_.push_back(epsilon.of(t));
            check(densities_[t], epsilons_[t]);
        }
        for (const auto& tensor : passes.models().tensors()) { keys_.push_back(hash64(tensor.name, seed)); }
    }
    /// Refuses what the constructor refuses of a task.
    static void check(double density, double epsilon)
    {
        if (!(density > 0.0 && density <= 1.0)) {
            raise<invalid_argument>(error_code::density_out_of_range,
                message("density is ", density, "; expected a share in (0, 1], such as 0.5"));
        }
        const double room = std::min(density, 1 - density);
        if (density < 1 && !(epsilon >= 0 && density - epsilon > 0 && density + epsilon < 1)) {
            raise<invalid_argument>(error_code::parameter_out_of_range,
                message("epsilon is ", epsilon, " and density ", density, "; expected an epsilon from 0 to below ",
                    room, ", for which density - epsilon and density + epsilon are within (0, 1)"));
        }
    }
    /// The rule of a tensor: the same for all, as what differs was worked out with the rows.
    template <arithmetic_element A>
    [[nodiscard]] keep_ranked_of_tensor<A> get(std::size_t) const noexcept
    {
        return {};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 0; }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return pieces_; }

    /// What each entry of a piece is divided by, 0 where it is dropped: out[t·size …] for task t.
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* out, detail::piece_memory& scratch) const
    {
        std::pmr::memory_resource* const memory = memory_of(policy_);
        const std::size_t tasks = densities_.size(), size = piece.size;
        A* const deltas = scratch.rows<A>(tasks, size);
        detail::read_deltas(rows, piece, deltas);
        weigh(piece, deltas, out, memory);
    }

    /// Σ|τ| / Σ|kept τ| for every tensor and task, as l1_factors() says of other rules.
    template <class Types>
    [[nodiscard]] call_vector<call_vector<double>> l1_factors() const
    {
        const std::size_t tasks = densities_.size();
        std::pmr::memory_resource* const memory = memory_of(policy_);
        std::pmr::vector<double> leaves(2 * tasks * pieces_.size(), memory);
        detail::piece_walk<Types> walk(policy_, *models_, pieces_);
        detail::progress_meter meter(policy_, "norms", models_->bytes());
        walk.each({0, pieces_.size()}, meter,
            [&]<class A>(std::size_t index, std::size_t, row_block<A>& rows, const tensor_chunk& piece,
                detail::piece_memory& held) {
                A* const deltas = held.rows<A>(2 * tasks, piece.size);
                A* const out = deltas + tasks * piece.size;
                detail::read_deltas(rows, piece, deltas);
                weigh(piece, deltas, out, memory);
                for (std::size_t t = 0; t < tasks; ++t) {
                    double all = 0, kept = 0;
                    for (std::size_t i = t * piece.size; i < (t + 1) * piece.size; ++i) {
                        const double x = std::abs(static_cast<double>(deltas[i]));
                        all += x;
                        if (out[i] != 0) { kept += x / static_cast<double>(out[i]); }
                    }
                    leaves[2 * (index * tasks + t)] = all;
                    leaves[2 * (index * tasks + t) + 1] = kept;
                }
            });
        call_vector<call_vector<double>> factors;
        for (std::size_t i = 0; i < models_->tensors().size(); ++i) {
            factors.emplace_back();
            for (std::size_t t = 0; t < tasks; ++t) {
                detail::pairwise_sum all, kept;
                const auto range = pieces_.of_tensor(i);
                for (std::size_t index = range.first; index < range.last; ++index) {
                    all.add(leaves[2 * (index * tasks + t)]);
                    kept.add(leaves[2 * (index * tasks + t) + 1]);
                }
                const bool none = all.total() < 1e-7 || kept.total() < 1e-7;
                factors.back().push_back(none ? 1.0 : all.total() / kept.total());
            }
        }
        return factors;
    }

private:
    /// Groups that are ranked by themselves: `length` entries, `stride` apart; stride groups make a block.
    struct group {
        std::size_t length = 1, stride = 1;
        [[nodiscard]] std::size_t block() const noexcept { return length * stride; }
    };
    [[nodiscard]] static group group_of(const aligned_tensor& tensor, rank_axis axis)
    {
        const std::size_t axes = tensor.shape.size();
        if (axis == rank_axis::last || axes < 3 || tensor.size == 0) { return {row_length(tensor), 1}; }
        const auto rows = static_cast<std::size_t>(tensor.shape[0]), length = static_cast<std::size_t>(tensor.shape[1]);
        return {length, tensor.size / rows / length};
    }

    /// What an entry's word, less 2³¹, must be below to be kept, and what it is divided by.
    template <arithmetic_element A>
    struct chance {
        std::int64_t below = 0;
        A divisor = 0;
    };

    template <arithmetic_element A>
    void weigh(const tensor_chunk& piece, const A* deltas, A* out, std::pmr::memory_resource* memory) const
    {
        const std::size_t size = piece.size;
        const group rows = group_of(models_->tensors()[piece.tensor], axis_);
        detail::magnitude_ranks<A> ranks(memory);
        std::pmr::vector<std::int32_t> drawn(memory);
        std::pmr::vector<chance<A>> chances(rows.length, memory); // of every rank
        for (std::size_t t = 0; t < densities_.size(); ++t) {
            const A* const x = deltas + t * size;
            A* const numbers = out + t * size;
            if (densities_[t] == 1) {
                std::fill(numbers, numbers + size, A{1});
                continue;
            }
            for (std::size_t rank = 0; rank < rows.length; ++rank) {
                const double p = probability(t, rank, rows.length);
                chances[rank] = {static_cast<std::int64_t>(keep_below(p)) - (std::int64_t{1} << 31),
                    divided_ ? static_cast<A>(p) : A{1}};
            }
            const std::int32_t* const words =
                draw(random_stream(keys_[piece.tensor], static_cast<std::uint32_t>(t)), piece, drawn);
            for (std::size_t begin = 0; begin < size; begin += rows.block()) {
                for (std::size_t lane = 0; lane < rows.stride; ++lane) {
                    const std::size_t at = begin + lane;
                    ranks.rank(x + at, rows.length, rows.stride, [&](std::size_t i, std::size_t rank) {
                        const std::size_t place = at + i * rows.stride;
                        const chance<A>& its = chances[rank];
                        numbers[place] = words[place] < its.below ? its.divisor : A{0};
                    });
                }
            }
        }
    }
    /// The random words of a piece's entries, less 2³¹; they lie in `room`.
    [[nodiscard]] static const std::int32_t* draw(
        const random_stream& stream, const tensor_chunk& piece, std::pmr::vector<std::int32_t>& room)
    {
        const std::uint64_t first = piece.offset / 4, last = (piece.offset + piece.size + 3) / 4;
        room.resize(4 * (last - first));
        random_words<word_order::in_sequence>(stream, first, last - first, room.data());
        return room.data() + piece.offset % 4;
    }
    [[nodiscard]] double probability(std::size_t t, std::size_t rank, std::size_t n) const noexcept
    {
        if (n == 1) { return densities_[t]; }
        return densities_[t] - epsilons_[t] + 2 * epsilons_[t] * static_cast<double>(rank) / static_cast<double>(n - 1);
    }

    const cpu& policy_;
    const aligned_models* models_;
    rank_axis axis_;
    bool divided_;
    row_pieces pieces_;
    call_vector<double> densities_, epsilons_;
    call_vector<std::uint64_t> keys_;
};

/// The same of ranked entries, which are looked at in whole rows.
template <class Passes>
[[nodiscard]] call_vector<call_vector<double>> l1_factors(Passes&, const keep_ranked& keep)
{
    return keep.l1_factors<storage_of<Passes>>();
}

} // namespace taskvec::inline TASKVEC_ABI
