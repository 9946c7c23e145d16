// Numbers for each row or column of a tensor, from the dot products that the tasks have there: what NuSLERP and Model
// Stock merge by.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/kernels.hpp>
#include <taskvec/core/option_table.hpp>
#include <taskvec/methods/passes.hpp>
#include <taskvec/methods/row_pieces.hpp>
#include <taskvec/models/tensor_sums.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <optional>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Which vectors of two models have an angle: whole tensors, their rows (along the last axis), or their columns (along
/// the first axis). A tensor with one axis is one vector, a scalar one of length 1.
enum class angles_between : std::uint8_t { tensors, rows, columns };

template <>
struct enum_words<angles_between> {
    static constexpr std::array words{enum_word<angles_between>{angles_between::tensors, "tensors"},
        enum_word<angles_between>{angles_between::rows, "rows"},
        enum_word<angles_between>{angles_between::columns, "columns"}};
};

namespace kernels {

TASKVEC_KERNELS_BEGIN

/// sums[i] += x[i]·y[i], in f64.
template <arithmetic_element A>
struct column_products {
    const A *x, *y;
    double* sums;
    std::size_t size;

    template <int bytes>
    TASKVEC_INLINE void run() const
    {
        std::size_t i = 0;
        if constexpr (bytes > 0) { add<bytes>(i); }
        add<0>(i);
    }

private:
    template <int bytes>
    TASKVEC_INLINE void add(std::size_t& i) const
    {
        TASKVEC_STRICT_FP
        constexpr std::size_t width = static_cast<std::size_t>(pack_lanes<double, bytes>);
        for (; i + width <= size; i += width) {
            const auto products = load_wide<bytes>(x + i) * load_wide<bytes>(y + i);
            store_row<double>(load_row<double, bytes, double>(sums + i) + products, sums + i);
        }
    }
};

TASKVEC_KERNELS_END

} // namespace kernels

namespace detail {

/// Which vector of its tensor an entry belongs to.
struct vector_layout {
    std::uint64_t width = 1; ///< entries of a row, or how many columns there are
    bool columns = false;

    [[nodiscard]] TASKVEC_HOST_DEVICE std::uint64_t vector_of(std::uint64_t entry) const noexcept
    {
        return columns ? entry % width : entry / width;
    }
    /// How many vectors a tensor of so many entries has.
    [[nodiscard]] std::uint64_t count(std::uint64_t size) const noexcept
    {
        return size == 0 ? 0 : columns ? width : size / width;
    }
};

[[nodiscard]] inline vector_layout layout_of(const aligned_tensor& tensor, angles_between which)
{
    if (which != angles_between::columns || tensor.shape.size() < 2 || tensor.size == 0) {
        return {row_length(tensor), false};
    }
    return {tensor.size / static_cast<std::uint64_t>(tensor.shape.front()), true};
}

/// The dot product of two parts of rows that begin at entry `first` of their tensor: sums of what lies between
/// multiples of block_size, added in order. So it has the same bits where a tensor comes in pieces.
template <arithmetic_element A>
[[nodiscard]] double row_dot(const A* x, const A* y, std::uint64_t first, std::size_t size)
{
    double total = 0;
    for (std::size_t at = 0; at < size;) {
        const std::size_t n = std::min(size - at, block_size - static_cast<std::size_t>((first + at) % block_size));
        total += kernels::dot(x + at, y + at, n);
        at += n;
    }
    return total;
}

/// What a body merges by: numbers that lie beside the models, and on devices in a table.
template <arithmetic_element A>
struct factors_of_vectors {
    static constexpr bool reads_beside = true;
    const A* table; ///< null on the CPU
    vector_layout layout;
    std::size_t factors; ///< of each vector

    /// What in.beside(f) is on devices.
    [[nodiscard]] TASKVEC_HOST_DEVICE A number(std::size_t f, std::uint64_t entry) const noexcept
    {
        return table[layout.vector_of(entry) * factors + f];
    }
};

/// `factors` numbers for each vector: rule(dots, numbers) makes them from dots[i(i+1)/2 + j], the dot product of tasks
/// i and j ≤ i (of task vectors, where there is a base). On the CPU those of rows are made when their piece is merged,
/// and those of columns before, by a read of the models; on devices all are.
template <class Rule>
class vector_factors {
public:
    template <class Passes>
    vector_factors(Passes& passes, angles_between which, std::size_t factors, const Rule& rule)
        : models_(&passes.models())
        , tasks_(passes.tasks())
        , factors_(factors)
        , rule_(rule)
        , pieces_(passes.models(), [which](const aligned_tensor& tensor) { return together(tensor, which); })
        , table_(memory_for(passes))
    {
        if (which == angles_between::tensors) { return; }
        for (const auto& tensor : models_->tensors()) { layouts_.push_back(layout_of(tensor, which)); }
        prepare(passes);
    }
    /// Whether there are factors of rows or columns.
    [[nodiscard]] bool any() const noexcept { return !layouts_.empty(); }
    [[nodiscard]] unsigned walks() const noexcept { return first_.empty() ? 0 : 1; }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return pieces_; }
    /// How many there are for each vector.
    [[nodiscard]] std::size_t factors() const noexcept { return factors_; }
    /// Those of a piece's entries: out[f·size …] is factor f of each.
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* out, piece_memory& memory) const
    {
        const vector_layout& layout = layouts_[piece.tensor];
        const std::size_t size = piece.size, width = static_cast<std::size_t>(layout.width);
        if (layout.columns) {
            const double* const table = table_.data() + first_[piece.tensor] * factors_;
            for (std::size_t f = 0; f < factors_; ++f) {
                auto column = static_cast<std::size_t>(layout.vector_of(piece.offset));
                for (std::size_t i = 0; i < size; ++i) {
                    out[f * size + i] = static_cast<A>(table[column * factors_ + f]);
                    column = column + 1 == width ? 0 : column + 1;
                }
            }
            return;
        }
        A* const deltas = memory.rows<A>(tasks_, size);
        read_deltas(rows, piece, deltas);
        call_vector<double> dots(pair_count()), factors(factors_);
        for (std::size_t at = 0; at < size; at += width) {
            std::size_t pair = 0;
            for (std::size_t i = 0; i < tasks_; ++i) {
                for (std::size_t j = 0; j <= i; ++j) {
                    dots[pair++] = row_dot(deltas + i * size + at, deltas + j * size + at, piece.offset + at, width);
                }
            }
            rule_(dots.data(), factors.data());
            for (std::size_t f = 0; f < factors_; ++f) {
                std::fill_n(out + f * size + at, width, static_cast<A>(factors[f]));
            }
        }
    }
    /// What a body of a tensor is made of.
    template <arithmetic_element A>
    [[nodiscard]] factors_of_vectors<A> get(std::size_t tensor) const noexcept
    {
        return {table_on_device<A>(tensor), layouts_[tensor], factors_};
    }

private:
    template <arithmetic_element A>
    [[nodiscard]] const A* table_on_device(std::size_t tensor) const noexcept
    {
        return kept_ ? kept_->get<A>() + first_[tensor] * factors_ : nullptr;
    }
    static constexpr std::size_t strip_width = 1024; ///< columns that are summed at a time

    /// Some columns of a tensor.
    struct strip {
        std::size_t tensor, first, count;
    };

    template <class Passes>
    [[nodiscard]] static std::pmr::memory_resource* memory_for(const Passes& passes)
    {
        if constexpr (Passes::space == memory_space::device) { return std::pmr::get_default_resource(); }
        else {
            return memory_of(passes.policy());
        }
    }
    /// How many entries a piece may not part.
    [[nodiscard]] static std::size_t together(const aligned_tensor& tensor, angles_between which)
    {
        const vector_layout layout = layout_of(tensor, which);
        return which == angles_between::tensors || layout.columns ? 1 : static_cast<std::size_t>(layout.width);
    }
    [[nodiscard]] std::size_t pair_count() const noexcept { return tasks_ * (tasks_ + 1) / 2; }

    /// Where the vectors of each tensor begin in the table, of those that `counts` says yes to.
    template <class Counts>
    std::size_t number_vectors(const Counts& counts)
    {
        std::uint64_t next = 0;
        for (std::size_t i = 0; i < layouts_.size(); ++i) {
            first_.push_back(next);
            next += counts(layouts_[i]) ? layouts_[i].count(models_->tensors()[i].size) : 0;
        }
        return static_cast<std::size_t>(next);
    }

    template <class Passes>
    void prepare(Passes& passes)
    {
        if constexpr (Passes::space == memory_space::device) {
            const std::size_t vectors = number_vectors([](const vector_layout&) { return true; });
            const auto dots = vector_dots(passes.walked(), layouts_, first_, vectors);
            call_vector<double> factors(vectors * factors_);
            for (std::size_t v = 0; v < vectors; ++v) {
                rule_(dots.data() + v * pair_count(), factors.data() + v * factors_);
            }
            kept_.emplace(passes, factors);
        }
        else {
            const auto columns = [](const vector_layout& layout) { return layout.columns; };
            if (std::none_of(layouts_.begin(), layouts_.end(), columns)) { return; }
            table_.resize(number_vectors(columns) * factors_);
            sum_columns<storage_of<Passes>>(passes.policy());
        }
    }

    /// Fills the table: a column's dot products are sums in order.
    template <class Types>
    void sum_columns(const cpu& policy)
    {
        call_vector<strip> strips;
        std::uint64_t bytes = 0;
        for (std::size_t i = 0; i < layouts_.size(); ++i) {
            if (!layouts_[i].columns) { continue; }
            const auto width = static_cast<std::size_t>(layouts_[i].width);
            for (std::size_t at = 0; at < width; at += strip_width) {
                strips.push_back({i, at, std::min(strip_width, width - at)});
            }
            bytes += models_->tensors()[i].bytes(models_->tensors()[i].size);
        }
        auto workspaces = make_workspaces<Types>(policy, *models_, strips.size(), 0);
        progress_meter meter(policy, "angles", bytes);
        for_each_index(policy, strips.size(), [&](std::size_t index, std::size_t worker) {
            const strip& part = strips[index];
            const aligned_tensor& tensor = models_->tensors()[part.tensor];
            with_block_of<Types>(
                workspaces[worker], tensor, [&](auto& rows) { sum_strip(rows, part, memory_of(policy)); });
            const std::size_t of_each = tensor.size / static_cast<std::size_t>(layouts_[part.tensor].width);
            if (!meter.advance(tensor.bytes(part.count * of_each))) { raise<cancelled>(error_code::cancelled); }
        });
    }
    template <arithmetic_element A>
    void sum_strip(row_block<A>& rows, const strip& part, std::pmr::memory_resource* memory)
    {
        const aligned_tensor& tensor = models_->tensors()[part.tensor];
        const auto width = static_cast<std::size_t>(layouts_[part.tensor].width);
        const std::size_t height = tensor.size / width;
        const std::size_t at_once = part.count == width ? std::max<std::size_t>(block_size / width, 1) : 1;
        std::pmr::vector<double> sums(pair_count() * part.count, memory);
        call_vector<const A*> deltas(tasks_);
        for (std::size_t row = 0; row < height; row += at_once) {
            const std::size_t n = std::min(at_once, height - row);
            rows.open(tensor, row * width + part.first, n * part.count);
            for (std::size_t t = 0; t < tasks_; ++t) { deltas[t] = rows.delta(t); }
            double* to = sums.data();
            for (std::size_t i = 0; i < tasks_; ++i) {
                for (std::size_t j = 0; j <= i; ++j, to += part.count) {
                    for (std::size_t k = 0; k < n; ++k) {
                        kernels::run_widest(kernels::column_products<A>{
                            deltas[i] + k * part.count, deltas[j] + k * part.count, to, part.count});
                    }
                }
            }
            rows.check_finite();
        }
        call_vector<double> dots(pair_count());
        for (std::size_t c = 0; c < part.count; ++c) {
            for (std::size_t pair = 0; pair < dots.size(); ++pair) { dots[pair] = sums[pair * part.count + c]; }
            rule_(dots.data(), table_.data() + (first_[part.tensor] + part.first + c) * factors_);
        }
    }

    const aligned_models* models_;
    std::size_t tasks_, factors_;
    Rule rule_;
    row_pieces pieces_;
    call_vector<vector_layout> layouts_; // of each tensor; empty where tensors are whole vectors
    call_vector<std::uint64_t> first_; // vector of each tensor in the table
    std::pmr::vector<double> table_; // [vector][factor] of columns, on the CPU
    std::optional<kept_numbers> kept_; // of all vectors, on devices
};

/// A method whose factors are those of whole tensors, as Method's are, or those that Rule makes of rows or columns.
template <class Method, class Rule>
class method_by_vectors : public Method {
public:
    [[nodiscard]] unsigned walks() const noexcept { return by_vector_.any() ? by_vector_.walks() : 1; }
    [[nodiscard]] const row_pieces& pieces() const noexcept { return by_vector_.pieces(); }
    [[nodiscard]] std::size_t row_numbers() const noexcept { return by_vector_.any() ? by_vector_.factors() : 0; }
    template <arithmetic_element A>
    void weigh(row_block<A>& rows, const tensor_chunk& piece, A* numbers, piece_memory& memory) const
    {
        if (by_vector_.any()) { by_vector_.weigh(rows, piece, numbers, memory); }
    }

protected:
    /// `factors` of each vector; `of_method` goes to Method's constructor.
    template <class Passes, class... OfMethod>
    method_by_vectors(
        Passes& passes, angles_between angles, std::size_t factors, const Rule& rule, OfMethod&&... of_method)
        : Method(std::forward<OfMethod>(of_method)...)
        , by_vector_(passes, angles, factors, rule)
    { }
    [[nodiscard]] const vector_factors<Rule>& by_vector() const noexcept { return by_vector_; }

private:
    vector_factors<Rule> by_vector_;
};

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
