// A weight with adapters added, worked out a block at a time: what folds adapters into a base, and what makes a task of
// an adapter that no file holds.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/lora.hpp>
#include <taskvec/core/kernels.hpp>
#include <taskvec/core/parallel.hpp>
#include <taskvec/models/block.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How an update belongs to its weight.
struct update_place {
    bool transposed = false; ///< the weight is in×out: a Conv1D layer, or an embedding (entries×dimensions)
    bool row_blocks = false; ///< the slices are equal blocks of the rows of one matrix (a fused projection), out×in
    /// DoRA's magnitudes, one for each output: the weight becomes m·(θ0 + ΔW)/‖θ0 + ΔW‖, norms over each output's
    /// inputs. Empty: none.
    std::vector<double> magnitude{};
    /// Of a tensor that is several matrices, one behind the other (experts): which one, and how many there are.
    /// 0 of them: the tensor is one matrix.
    std::size_t slice = 0, slices = 0;
};

/// One thing that is added to a tensor. It refers to the update, or the stored tensor, which outlive it.
struct weight_change {
    const lora_update<float>* single = nullptr; ///< the update, in f32
    const lora_update<double>* wide = nullptr; ///< or in f64; both null: `saved` takes the tensor's place
    const_tensor_ref saved{}; ///< a whole tensor in place of the base's, where there is no update
    double weight = 1; ///< of the change: θ0 + weight·(θ − θ0)
    update_place place{}; ///< how the update lies in the tensor
    std::string label{}; ///< names the adapter in messages

    /// Whether it is a low-rank update; out() to b() are its own, and are asked of nothing else.
    [[nodiscard]] bool is_update() const noexcept { return single || wide; }
    /// Outputs of the module.
    [[nodiscard]] std::size_t out() const noexcept { return single ? single->out() : wide->out(); }
    /// Inputs of the module.
    [[nodiscard]] std::size_t in() const noexcept { return single ? single->in() : wide->in(); }
    /// The rank of its factors.
    [[nodiscard]] std::size_t rank() const noexcept { return single ? single->rank() : wide->rank(); }
    /// The factor of b·a.
    [[nodiscard]] double scaling() const noexcept { return single ? single->scaling : wide->scaling; }
    /// Entry (k, i) of lora_A, in f64.
    [[nodiscard]] double a(std::size_t k, std::size_t i) const noexcept
    {
        return single ? static_cast<double>(single->a(k, i)) : wide->a(k, i);
    }
    /// Entry (i, k) of lora_B, in f64.
    [[nodiscard]] double b(std::size_t i, std::size_t k) const noexcept
    {
        return single ? static_cast<double>(single->b(i, k)) : wide->b(i, k);
    }
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// Entries of A in a panel: a cache line.
template <arithmetic_element A>
inline constexpr std::size_t panel_width = 64 / sizeof(A);

/// out += left·right for rows of `out`. `right` lies in panels of panel_width columns, [panel][rank][column]. Each
/// entry is out + (0 + l0·r0 + l1·r1 + …), every product and sum rounded by itself, in that order: the same bits for
/// any packs and any range.
template <arithmetic_element A>
struct low_rank_rows {
    const A* left; ///< rows×rank
    const A* panels;
    std::size_t rank, rows, first, count; ///< columns [first, first + count)
    A* out;
    std::size_t stride; ///< of out

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        constexpr std::size_t width = panel_width<A>;
        constexpr int tall = bytes == 64 ? 8 : 4;
        std::size_t j = 0;
        for (; j < count && (first + j) % width != 0; ++j) { column(j); }
        for (; j + width <= count; j += width) {
            const A* const panel = panels + (first + j) * rank; // whole panels lie before it
            std::size_t i = 0;
            for (; i + tall <= rows; i += tall) { tile<bytes, tall>(panel, i, j); }
            for (; i < rows; ++i) { tile<bytes, 1>(panel, i, j); }
        }
        for (; j < count; ++j) { column(j); }
    }

private:
    TASKVEC_INLINE void column(std::size_t j) const
    {
        constexpr std::size_t width = panel_width<A>;
        const std::size_t at = first + j;
        const A* const panel = panels + (at / width) * width * rank + at % width;
        for (std::size_t i = 0; i < rows; ++i) {
            TASKVEC_STRICT_FP
            A sum = 0;
            for (std::size_t k = 0; k < rank; ++k) {
                const A product = left[i * rank + k] * panel[k * width];
                sum = sum + product;
            }
            out[i * stride + j] = out[i * stride + j] + sum;
        }
    }
    template <int bytes, int tall>
    TASKVEC_INLINE void tile(const A* panel, std::size_t i, std::size_t j) const
    {
        constexpr std::size_t width = panel_width<A>, lanes = static_cast<std::size_t>(pack_lanes<A, bytes>);
        constexpr int across = static_cast<int>(width / lanes);
        if constexpr (across > 4) { // baseline packs: half a panel at a time leaves registers for the sums
            for (std::size_t c = 0; c < width; c += 2 * lanes) { sums<bytes, tall, 2>(panel + c, i, j + c); }
        }
        else {
            sums<bytes, tall, across>(panel, i, j);
        }
    }
    template <int bytes, int tall, int across>
    TASKVEC_INLINE void sums(const A* panel, std::size_t i, std::size_t j) const
    {
        constexpr std::size_t width = panel_width<A>, lanes = static_cast<std::size_t>(pack_lanes<A, bytes>);
        pack<A, bytes> sum[tall][across]{};
        const A* const l = left + i * rank;
        for (std::size_t k = 0; k < rank; ++k) {
            pack<A, bytes> r[across];
            TASKVEC_UNROLL(4)
            for (int c = 0; c < across; ++c) {
                r[c] = load_row<A, bytes, A>(words(panel + k * width + static_cast<std::size_t>(c) * lanes));
            }
            TASKVEC_UNROLL(8)
            for (int t = 0; t < tall; ++t) {
                const A factor = l[static_cast<std::size_t>(t) * rank + k];
                TASKVEC_UNROLL(4)
                for (int c = 0; c < across; ++c) { sum[t][c] = sum[t][c] + factor * r[c]; }
            }
        }
        TASKVEC_UNROLL(8)
        for (int t = 0; t < tall; ++t) {
            A* const to = out + (i + static_cast<std::size_t>(t)) * stride + j;
            TASKVEC_UNROLL(4)
            for (int c = 0; c < across; ++c) {
                A* const here = to + static_cast<std::size_t>(c) * lanes;
                store_row<A, A, bytes>(load_row<A, bytes, A>(words(here)) + sum[t][c], words(here));
            }
        }
    }
};

/// sums[i] += x[i]², in f64.
template <arithmetic_element A>
TASKVEC_NOINLINE void add_squares(const A* x, double* sums, std::size_t n)
{
    TASKVEC_STRICT_FP
    for (std::size_t i = 0; i < n; ++i) {
        const double square = static_cast<double>(x[i]) * static_cast<double>(x[i]);
        sums[i] = sums[i] + square;
    }
}
/// x·(y − 1) + sum.
TASKVEC_NOINLINE inline double add_gain(double sum, double x, double y)
{
    TASKVEC_STRICT_FP
    const double part = x * (y - 1);
    return sum + part;
}

TASKVEC_KERNELS_END

} // namespace kernels

/// One tensor of a base with changes: c∘θ0 + Σ factors, in A, of any block of its elements. It reads the base where it
/// lies and forms no ΔW.
///
/// With updates ΔWt = st·bt·at and weights wt each entry is θ0 + Σ (wt·st·bt)·at: the factors wt·st·b are rounded to A
/// once, all ranks are summed one after the other in the order of the changes, from 0, and the sum is added to θ0;
/// every product and sum rounds by itself. DoRA's ΔW = g∘(θ0 + s·b·a) − θ0, with g = m/‖θ0 + s·b·a‖ in f64, is put into
/// the factors (wt·gt·st·bt) and into c = 1 + Σ wt·(gt − 1), which is rounded once and scales θ0. Tensors that were
/// saved whole add wt·(θ − θ0) after θ0; a single one of weight 1 takes its place. The same bits for any threads,
/// blocks and instruction sets.
/// Factors laid out for reads lie in ordinary memory: (rows + columns)·rank entries of A.
template <arithmetic_element A>
class adapted_weight final : public operand_source {
public:
    /// `columns`: of the weight as it lies in memory, row-major; convolutions count their kernel as columns. The
    /// changes fit the weight. Keeps to what it is handed.
    adapted_weight(std::string name, const aligned_tensor::operand& base, std::size_t rows, std::size_t columns,
        std::vector<weight_change> changes)
        : name_(std::move(name))
        , base_(base)
        , rows_(rows)
        , columns_(columns)
        , changes_(std::move(changes))
    { }

    [[nodiscard]] taskvec::dtype type() const noexcept override { return dtype_of<A>; }

    /// Lays the factors out for reads, and computes the norms that DoRA needs, which reads the base once. read() does
    /// it by itself, on one thread, when it was not done before.
    void prepare(const cpu& policy) const override
    {
        const std::lock_guard lock(mutex_);
        if (!ready_.load(std::memory_order_relaxed)) { lay_out(policy); }
    }
    /// Gives the memory of prepare() back. Nobody reads meanwhile.
    void release() const override
    {
        const std::lock_guard lock(mutex_);
        packs_.reset();
        ready_.store(false, std::memory_order_release);
    }

    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        if (!ready_.load(std::memory_order_acquire)) { prepare(cpu{.threads = 1}); }
        A* const values = static_cast<A*>(out);
        begin(offset, count, values);
        if (rank_ == 0) { return; }
        std::size_t row = static_cast<std::size_t>(offset / columns_),
                    column = static_cast<std::size_t>(offset % columns_);
        for (std::size_t at = 0; at < count;) {
            const std::size_t whole = column == 0 ? (count - at) / columns_ : 0;
            const std::size_t rows = std::max<std::size_t>(whole, 1);
            const std::size_t length = whole > 0 ? columns_ : std::min(columns_ - column, count - at);
            kernels::run_widest(kernels::low_rank_rows<A>{packs_->left.data() + row * rank_, packs_->right.data(),
                rank_, rows, column, length, values + at, columns_});
            at += rows * length;
            row += rows;
            column = 0;
        }
    }

private:
    /// Elements of an operand in A.
    static void widen_to(const aligned_tensor::operand& from, std::uint64_t offset, std::size_t count, A* out)
    {
        constexpr std::size_t piece = 512;
        std::array<double, piece> raw;
        for (std::size_t at = 0; at < count; at += piece) {
            const std::size_t n = std::min(piece, count - at);
            detail::with_elements(
                from, offset + at, n, reinterpret_cast<std::byte*>(raw.data()), [&]<class T>(const T* stored) {
                    for (std::size_t i = 0; std::same_as<T, double> && std::same_as<A, float> && i < n; ++i) {
                        out[at + i] = static_cast<A>(widen<double>(stored[i]));
                    }
                    if constexpr (!(std::same_as<T, double> && std::same_as<A, float>)) {
                        (void)kernels::widen(stored, out + at, n);
                    }
                });
        }
    }
    [[nodiscard]] static aligned_tensor::operand operand_of(const const_tensor_ref& tensor)
    {
        return {static_cast<const std::byte*>(tensor.data), tensor.dtype};
    }

    /// What the low-rank sum is added to.
    void begin(std::uint64_t offset, std::size_t count, A* out) const
    {
        const bool replaced = wholes_ == 1 && only_whole_->weight == 1;
        widen_to(replaced ? operand_of(only_whole_->saved) : base_, offset, count, out);
        if (packs_ && !packs_->scale.empty()) {
            for (std::size_t i = 0; i < count; ++i) {
                const auto place =
                    static_cast<std::size_t>(scale_by_column_ ? (offset + i) % columns_ : (offset + i) / columns_);
                out[i] = packs_->scale[place] * out[i];
            }
        }
        if (wholes_ == 0 || replaced) { return; }
        constexpr std::size_t piece = 512;
        std::array<A, piece> before, saved;
        for (std::size_t at = 0; at < count; at += piece) {
            const std::size_t n = std::min(piece, count - at);
            widen_to(base_, offset + at, n, before.data());
            for (const auto& change : changes_) {
                if (change.is_update()) { continue; }
                widen_to(operand_of(change.saved), offset + at, n, saved.data());
                (void)kernels::subtract(saved.data(), before.data(), saved.data(), n);
                kernels::accumulate(out + at, saved.data(), static_cast<A>(change.weight), n);
            }
        }
    }
    void lay_out(const cpu& policy) const
    {
        rank_ = wholes_ = 0;
        packs_.reset();
        bool rescaled = false;
        for (const auto& change : changes_) {
            if (!change.is_update()) {
                ++wholes_;
                only_whole_ = &change;
                continue;
            }
            rank_ += change.rank();
            if (!change.place.magnitude.empty()) {
                rescaled = true;
                scale_by_column_ = change.place.transposed;
            }
        }
        if (rank_ == 0) {
            ready_.store(true, std::memory_order_release);
            return;
        }
        std::pmr::memory_resource* const memory = memory_of(policy);
        std::pmr::vector<double> scale(rescaled ? (scale_by_column_ ? columns_ : rows_) : 0, 1.0, memory);
        constexpr std::size_t width = kernels::panel_width<A>;
        const std::size_t panels = (columns_ + width - 1) / width;
        packs laid(memory);
        laid.left.resize(rows_ * rank_);
        laid.right.resize(panels * width * rank_);
        std::size_t first = 0;
        for (const auto& change : changes_) {
            if (!change.is_update()) { continue; }
            std::pmr::vector<double> gain(memory);
            if (!change.place.magnitude.empty()) {
                gain = norms(policy, change);
                for (std::size_t i = 0; i < gain.size(); ++i) {
                    gain[i] = change.place.magnitude[i] / gain[i];
                    scale[i] = kernels::add_gain(scale[i], change.weight, gain[i]);
                }
            }
            const double factor = change.weight * change.scaling();
            const bool turned = change.place.transposed;
            const auto strength = [&](std::size_t output) { return gain.empty() ? factor : factor * gain[output]; };
            // The scaling goes into b, wherever b lies.
            for_each_index(policy, rows_, [&](std::size_t i, std::size_t) {
                A* const to = laid.left.data() + i * rank_ + first;
                for (std::size_t k = 0; k < change.rank(); ++k) {
                    to[k] = static_cast<A>(turned ? change.a(k, i) : change.b(i, k) * strength(i));
                }
            });
            for_each_index(policy, panels, [&](std::size_t p, std::size_t) {
                for (std::size_t k = 0; k < change.rank(); ++k) {
                    A* const to = laid.right.data() + (p * rank_ + first + k) * width;
                    for (std::size_t c = 0; c < std::min(width, columns_ - p * width); ++c) {
                        const std::size_t j = p * width + c;
                        to[c] = static_cast<A>(turned ? change.b(j, k) * strength(j) : change.a(k, j));
                    }
                }
            });
            first += change.rank();
        }
        laid.scale.assign(scale.begin(), scale.end());
        packs_.emplace(std::move(laid));
        ready_.store(true, std::memory_order_release);
    }

    /// ‖θ0 + s·b·a‖ of each output, in f64, in a fixed shape.
    [[nodiscard]] std::pmr::vector<double> norms(const cpu& policy, const weight_change& change) const
    {
        weight_change plain = change;
        plain.weight = 1;
        plain.place.magnitude.clear();
        const adapted_weight sum(name_, base_, rows_, columns_, {plain});
        sum.prepare(policy);
        const bool by_column = change.place.transposed;
        std::pmr::vector<double> squares(by_column ? columns_ : rows_, 0.0, memory_of(policy));
        if (!by_column) {
            for_each_index(policy, rows_, [&](std::size_t i, std::size_t) {
                std::pmr::vector<A> row(columns_, memory_of(policy));
                sum.read(std::uint64_t{i} * columns_, columns_, row.data());
                squares[i] = kernels::dot(row.data(), row.data(), columns_);
            });
        }
        else {
            constexpr std::size_t piece = 512;
            for_each_index(policy, (columns_ + piece - 1) / piece, [&](std::size_t index, std::size_t) {
                std::array<A, piece> row;
                const std::size_t from = index * piece, n = std::min(piece, columns_ - from);
                for (std::size_t i = 0; i < rows_; ++i) {
                    sum.read(std::uint64_t{i} * columns_ + from, n, row.data());
                    kernels::add_squares(row.data(), squares.data() + from, n);
                }
            });
        }
        for (std::size_t i = 0; i < squares.size(); ++i) {
            squares[i] = std::sqrt(squares[i]);
            if (squares[i] > 0 && std::isfinite(squares[i])) { continue; }
            raise<nonfinite_error>(error_code::not_finite,
                message("tensor '", name_, "' with the update of ", change.label, " has the norm ", squares[i],
                    " for output ", i,
                    ", by which DoRA divides: this adapter belongs to another base, or one of them is "
                    "damaged"));
        }
        return squares;
    }

    std::string name_;
    aligned_tensor::operand base_;
    std::size_t rows_, columns_;
    std::vector<weight_change> changes_;
    mutable std::mutex mutex_;
    mutable std::atomic<bool> ready_{false};
    /// The factors of all updates side by side, b with the scaling, a in panels; and what DoRA scales the base by.
    struct packs {
        explicit packs(std::pmr::memory_resource* memory)
            : left(memory)
            , right(memory)
            , scale(memory)
        { }
        std::pmr::vector<A> left, right, scale;
    };
    mutable std::optional<packs> packs_;
    mutable std::size_t rank_ = 0, wholes_ = 0;
    mutable const weight_change* only_whole_ = nullptr;
    mutable bool scale_by_column_ = false;
};

namespace detail {

/// What another source gives from some element on.
class source_from final : public operand_source {
public:
    source_from(const operand_source& whole, std::uint64_t first)
        : whole_(&whole)
        , first_(first)
    { }
    [[nodiscard]] taskvec::dtype type() const noexcept override { return whole_->type(); }
    [[nodiscard]] unsigned stored_bits() const noexcept override { return whole_->stored_bits(); }
    void prepare(const cpu& policy) const override { whole_->prepare(policy); }
    void release() const override { whole_->release(); }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        whole_->read(first_ + offset, count, out);
    }

private:
    const operand_source* whole_;
    std::uint64_t first_;
};

} // namespace detail

/// A tensor that is several matrices, one behind the other (experts, fused projections), each with changes of its own:
/// the entries of adapted_weight, matrix by matrix.
template <arithmetic_element A>
class adapted_stack final : public operand_source {
public:
    /// `rows`×`columns`: of each of `slices` matrices as they lie in memory. Updates say which one they are of; a
    /// tensor that was saved whole is of all.
    adapted_stack(const std::string& name, const aligned_tensor::operand& base, std::size_t slices, std::size_t rows,
        std::size_t columns, const std::vector<weight_change>& changes)
        : entries_(rows * columns)
    {
        for (std::size_t i = 0; i < slices; ++i) {
            const std::size_t first = i * entries_;
            aligned_tensor::operand from = base;
            if (base.source) {
                parts_.push_back(std::make_unique<detail::source_from>(*base.source, first));
                from.source = parts_.back().get();
            }
            else {
                from.data += byte_count(base.dtype, first);
            }
            std::vector<weight_change> own;
            for (const auto& change : changes) {
                if (change.is_update() && change.place.slice != i) { continue; }
                own.push_back(change);
                auto& saved = own.back().saved;
                if (change.is_update()) { continue; }
                saved.data = static_cast<const std::byte*>(saved.data) + byte_count(saved.dtype, first);
                saved.shape = {static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns)};
            }
            matrices_.push_back(std::make_unique<adapted_weight<A>>(name, from, rows, columns, std::move(own)));
        }
    }

    [[nodiscard]] taskvec::dtype type() const noexcept override { return dtype_of<A>; }
    void prepare(const cpu& policy) const override
    {
        for (const auto& one : matrices_) { one->prepare(policy); }
    }
    void release() const override
    {
        for (const auto& one : matrices_) { one->release(); }
    }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        A* to = static_cast<A*>(out);
        while (count > 0) {
            const std::uint64_t within = offset % entries_;
            const auto n = static_cast<std::size_t>(std::min<std::uint64_t>(count, entries_ - within));
            matrices_[static_cast<std::size_t>(offset / entries_)]->read(within, n, to);
            offset += n;
            count -= n;
            to += n;
        }
    }

private:
    std::size_t entries_;
    std::vector<std::unique_ptr<detail::source_from>> parts_;
    std::vector<std::unique_ptr<adapted_weight<A>>> matrices_;
};

} // namespace taskvec::inline TASKVEC_ABI
