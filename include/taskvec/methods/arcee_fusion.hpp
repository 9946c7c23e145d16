// Arcee Fusion: the entries of one task that matter most in their tensor, by a threshold from its quartiles. mergekit.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/compiled/methods.hpp>
#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/exponential.hpp>
#include <taskvec/core/kernels.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/row_pieces.hpp>

#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// θ* = θ0 + τ where an entry's importance reaches the threshold of its tensor, θ0 elsewhere. The importance is
/// |τ|·KL(softmax(θ1) ‖ softmax(θ0)) of its row, with 1e-8 added to both distributions; rows lie along the last axis.
/// The threshold is the median plus `spread` interquartile ranges, over the tensor; the quantile q of n numbers is the
/// one at place floor(q·(n − 1)) in ascending order. One task. Bit-exact for any threads, blocks, processors and C
/// libraries: quartiles are exact, divergences are sums in f64 of a fixed shape, of exponentials and logarithms of the
/// library's own (core/exponential.hpp), rounded to the arithmetic type. Cost: five
/// reads of the models in f32 (one for divergences, three for quartiles, one to merge; eight in f64), two exponentials
/// and a logarithm an entry, and a number for each row. On the CPU.
///
///     merge(cpu{}, arcee_fusion_options{}, base, {as_view(task)}, out);
struct arcee_fusion_options {
    double spread = 1.5;
};

template <>
struct options_of<arcee_fusion_options> {
    static constexpr option_table table{option_row("spread", &arcee_fusion_options::spread,
        "interquartile ranges from the median importance to the threshold", {.unit = "X", .at_least = 0})};
};

/// θ0 + τ·(1 where the entry was chosen, or 0): the row beside the models says so.
template <arithmetic_element A>
struct chosen_body {
    static constexpr bool watches = false;
    static constexpr bool reads_beside = true;

    template <class In>
    [[nodiscard]] TASKVEC_INLINE typename In::pack operator()(In& in) const
    {
        const auto taken = where(in.beside(0) != 0, in.delta(0));
        if (in.counts_tasks()) { in.count_of(0, 0, taken != 0); }
        return in.base() + taken;
    }
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// The largest of some numbers, of which there is one.
template <arithmetic_element A>
struct largest_kernel {
    const A* x;
    std::size_t size;
    A& largest;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        constexpr std::size_t width = pack_lanes<A, bytes>;
        A most = x[0];
        std::size_t i = 0;
        if (size >= width) {
            auto most_of_lanes = load_row<A, bytes, A>(x);
            for (; i + width <= size; i += width) {
                const auto next = load_row<A, bytes, A>(x + i);
                most_of_lanes = select(next > most_of_lanes, next, most_of_lanes);
            }
            A lanes[width];
            std::memcpy(lanes, &most_of_lanes, sizeof lanes);
            for (const A lane : lanes) { most = lane > most ? lane : most; }
        }
        for (; i < size; ++i) { most = x[i] > most ? x[i] : most; }
        largest = most;
    }
};
/// e^(x − most), which go to `out` too.
template <arithmetic_element A>
struct shifted_exponentials {
    const A* x;
    double most;
    double* out;

    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE pack<double, bytes> at(std::size_t i) const noexcept
    {
        const auto made = exponential(load_wide<bytes>(x + i) - most);
        store_row<double>(made, out + i);
        return made;
    }
};
/// p·ln(p/q) of the shares that numbers have of their sums, 1e-8 added to both.
struct divergence_terms {
    const double *x, *y;
    double of_x, of_y; ///< the sums

    template <int bytes>
    [[nodiscard]] TASKVEC_INLINE pack<double, bytes> at(std::size_t i) const noexcept
    {
        const auto p = load_wide<bytes>(x + i) / of_x + 1e-8, q = load_wide<bytes>(y + i) / of_y + 1e-8;
        return p * logarithm(p / q);
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// KL(softmax(x) ‖ softmax(y)) of a row, 1e-8 added to both, in f64; not below 0. `p`, `q`: room for n numbers each.
template <arithmetic_element A>
[[nodiscard]] double softmax_divergence(const A* x, const A* y, std::size_t n, double* p, double* q)
{
    const auto exponentials = [n](const A* from, double* to) {
        A most{};
        kernels::run_widest(kernels::largest_kernel<A>{from, n, most});
        return kernels::sum(kernels::shifted_exponentials<A>{from, static_cast<double>(most), to}, n);
    };
    const double of_x = exponentials(x, p), of_y = exponentials(y, q);
    const double sum = kernels::sum(kernels::divergence_terms{p, q, of_x, of_y}, n);
    return sum > 0 ? sum : 0.0;
}

/// Numbers of a list that is gone over once for each digit of their bits: those at three places in ascending order.
template <arithmetic_element A>
class quartile_search {
public:
    static constexpr unsigned digit_bits = 11;
    static constexpr unsigned digits = (sizeof(A) * 8 + digit_bits - 1) / digit_bits;
    using histograms = std::array<std::array<std::uint64_t, std::size_t{1} << digit_bits>, 3>;

    explicit quartile_search(std::uint64_t n)
    {
        for (std::size_t k = 0; k < 3; ++k) {
            left_[k] = static_cast<std::uint64_t>(0.25 * static_cast<double>(k + 1) * static_cast<double>(n - 1));
        }
    }
    /// Counts a number of at least 0.
    void count(A value, histograms& to) const noexcept
    {
        const auto bits = std::bit_cast<bits_type<A>>(value);
        const auto digit = static_cast<std::size_t>(bits >> shift()) & (to[0].size() - 1);
        for (std::size_t k = 0; k < 3; ++k) { to[k][digit] += (bits & known_) == found_[k] ? 1u : 0u; }
    }
    /// Goes on to the next digit, once all numbers were counted.
    void next(const histograms& counted)
    {
        for (std::size_t k = 0; k < 3; ++k) {
            std::size_t digit = 0;
            for (; left_[k] >= counted[k][digit]; ++digit) { left_[k] -= counted[k][digit]; }
            found_[k] |= static_cast<bits_type<A>>(digit) << shift();
        }
        known_ |= static_cast<bits_type<A>>((bits_type<A>{1} << digit_bits) - 1) << shift();
        ++done_;
    }
    [[nodiscard]] A quartile(std::size_t k) const noexcept { return std::bit_cast<A>(found_[k]); }

private:
    [[nodiscard]] unsigned shift() const noexcept { return (digits - 1 - done_) * digit_bits; }

    std::array<std::uint64_t, 3> left_{}; // how many of the numbers with the digits found come before
    std::array<bits_type<A>, 3> found_{};
    bits_type<A> known_ = 0;
    unsigned done_ = 0;
};

} // namespace detail

template <>
class method<arcee_fusion_options> : public elementwise_method {
public:
    static constexpr bool on_device = false; // rows and quartiles are looked at on the CPU
    static constexpr std::size_t task_slots = 1;

    template <class Passes>
    method(Passes& passes, const arcee_fusion_options& options)
        : models_(&passes.models())
        , pieces_(passes.models(), &row_length)
    {
        if (passes.tasks() != 1) {
            raise<invalid_argument>(error_code::task_count,
                message("Arcee Fusion takes a base and one task, and there are ", passes.tasks(), " tasks: give one"));
        }
        detail::piece_walk<storage_of<Passes>> walk(passes.policy(), *models_, pieces_);
        diverge(walk);
        search(walk, options.spread);
    }
    /// Divergences and quartiles are those of a tensor.
    [[nodiscard]] static bool tensor_by_tensor(const arcee_fusion_options&) noexcept { return true; }
    template <arithmetic_element A>
    [[nodiscard]] chosen_body<A> body(std::size_t) const
    {
        return {};
    }
    [[nodiscard]] unsigned walks() const noexcept { return 1; } // for divergences
    [[nodiscard]] std::uint64_t bytes_beside() const noexcept { return searched_; }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return pieces_; }
    [[nodiscard]] static std::size_t row_numbers() noexcept { return 1; }
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* numbers, detail::piece_memory& memory) const
    {
        const A threshold = static_cast<A>(thresholds_[piece.tensor]);
        each_importance(rows, piece, memory,
            [&](std::size_t i, A importance) { numbers[i] = importance >= threshold ? A{1} : A{0}; });
    }

private:
    /// A divergence for each row of each tensor.
    template <class Types>
    void diverge(detail::piece_walk<Types>& walk)
    {
        first_row_.push_back(0);
        for (const auto& tensor : models_->tensors()) {
            first_row_.push_back(first_row_.back() + tensor.size / row_length(tensor));
        }
        divergences_.resize(first_row_.back());
        detail::progress_meter meter(walk.policy(), "divergences", models_->bytes());
        walk.each({0, pieces_.size()}, meter,
            [&]<class A>(
                std::size_t, std::size_t, row_block<A>& rows, const tensor_chunk& piece, detail::piece_memory& memory) {
                A* const base = memory.rows<A>(2, piece.size);
                A* const task = base + piece.size;
                for_each_block_of(rows, piece, [&](row_block<A>& opened) {
                    const std::size_t at = static_cast<std::size_t>(opened.offset() - piece.offset);
                    std::memcpy(base + at, opened.base(), opened.size() * sizeof(A));
                    std::memcpy(task + at, opened.task(0), opened.size() * sizeof(A));
                });
                const std::size_t length = row_length(models_->tensors()[piece.tensor]);
                std::pmr::vector<double> shares(2 * length, memory_of(walk.policy()));
                double* out = divergences_.data() + first_row_[piece.tensor] + piece.offset / length;
                for (std::size_t at = 0; at < piece.size; at += length) {
                    *out++ =
                        detail::softmax_divergence(task + at, base + at, length, shares.data(), shares.data() + length);
                }
            });
    }

    /// The quartiles of each tensor's importances, and the threshold that they make.
    template <class Types>
    void search(detail::piece_walk<Types>& walk, double spread)
    {
        thresholds_.assign(models_->tensors().size(), 0);
        for (const auto& tensor : models_->tensors()) {
            const unsigned reads =
                tensor.wide ? detail::quartile_search<double>::digits : detail::quartile_search<float>::digits;
            searched_ += reads * tensor.bytes(tensor.size);
        }
        detail::progress_meter meter(walk.policy(), "quartiles", searched_);
        for (std::size_t i = 0; i < models_->tensors().size(); ++i) {
            const aligned_tensor& tensor = models_->tensors()[i];
            if (tensor.size == 0) { continue; }
            if (tensor.wide) { thresholds_[i] = threshold<double>(walk, meter, i, spread); }
            else {
                thresholds_[i] = static_cast<double>(threshold<float>(walk, meter, i, static_cast<float>(spread)));
            }
        }
    }
    template <arithmetic_element A, class Types>
    [[nodiscard]] A threshold(
        detail::piece_walk<Types>& walk, detail::progress_meter& meter, std::size_t tensor, A spread)
    {
        using search = detail::quartile_search<A>;
        search quartiles(models_->tensors()[tensor].size);
        std::pmr::vector<typename search::histograms> counted(walk.workers(), memory_of(walk.policy()));
        for (unsigned digit = 0; digit < search::digits; ++digit) {
            for (auto& one : counted) { one = {}; }
            walk.each(pieces_.of_tensor(tensor), meter,
                [&]<class B>(std::size_t, std::size_t worker, row_block<B>& rows, const tensor_chunk& piece,
                    detail::piece_memory& memory) {
                    if constexpr (std::same_as<A, B>) {
                        each_importance(rows, piece, memory,
                            [&](std::size_t, A importance) { quartiles.count(importance, counted[worker]); });
                    }
                });
            for (std::size_t w = 1; w < counted.size(); ++w) {
                for (std::size_t k = 0; k < 3; ++k) {
                    for (std::size_t j = 0; j < counted[0][k].size(); ++j) { counted[0][k][j] += counted[w][k][j]; }
                }
            }
            quartiles.next(counted[0]);
        }
        const A range = quartiles.quartile(2) - quartiles.quartile(0);
        volatile A distance = spread * range; // so that no compiler fuses it with the sum
        return quartiles.quartile(1) + distance;
    }

    /// use(i, importance) for each entry of a piece.
    template <arithmetic_element A, class Use>
    void each_importance(
        row_block<A>& rows, const tensor_chunk& piece, detail::piece_memory& memory, const Use& use) const
    {
        A* const deltas = memory.rows<A>(1, piece.size);
        detail::read_deltas(rows, piece, deltas);
        const std::size_t length = row_length(models_->tensors()[piece.tensor]);
        const double* divergence = divergences_.data() + first_row_[piece.tensor] + piece.offset / length;
        for (std::size_t at = 0; at < piece.size; at += length, ++divergence) {
            const A factor = static_cast<A>(*divergence);
            for (std::size_t i = at; i < at + length; ++i) { use(i, std::abs(deltas[i]) * factor); }
        }
    }

    const aligned_models* models_;
    row_pieces pieces_;
    call_vector<std::uint64_t> first_row_;
    call_vector<double> divergences_, thresholds_;
    std::uint64_t searched_ = 0; // bytes read for quartiles
};

#if defined(TASKVEC_COMPILED)
TASKVEC_COMPILED_MODEL_MERGE(extern, arcee_fusion_options)
#endif

} // namespace taskvec::inline TASKVEC_ABI
