// Blocks: a few thousand elements of every aligned model, widened to the arithmetic type on demand.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/models/aligned_models.hpp>
#include <taskvec/models/row_conversions.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory_resource>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Elements of a block: a row of f32 takes 16 KiB, so a dozen rows stay in the second-level cache.
inline constexpr std::size_t block_size = 4096;

/// The rows of one block: base(), task(t) and delta(t) = task(t) − base() in the arithmetic type A, loaded on demand,
/// and scratch rows. There is one for each worker; open() moves it on.
template <arithmetic_element A>
class row_block {
public:
    /// `scratch_rows`: rows beside those of the models; all of them lie in `memory`.
    row_block(const aligned_models& models, std::size_t scratch_rows, std::pmr::memory_resource* memory,
        const detail::row_conversions<A>& conversions = detail::conversions_between<A, storage_types>)
        : models_(&models)
        , conversions_(&conversions)
        , rows_((models.task_count() + 1 + scratch_rows) * block_size, memory)
        , raw_(block_size, memory)
    { }

    /// Moves to elements [offset, offset + size) of a tensor; size ≤ block_size.
    void open(const aligned_tensor& tensor, std::uint64_t offset, std::size_t size)
    {
        tensor_ = &tensor;
        offset_ = offset;
        size_ = size;
        base_ = nullptr;
        largest_ = 0;
    }

    [[nodiscard]] std::size_t size() const noexcept { return size_; }
    /// The block's first element, in its tensor.
    [[nodiscard]] std::uint64_t offset() const noexcept { return offset_; }
    /// The same in the concatenation of all included tensors.
    [[nodiscard]] std::uint64_t position() const noexcept { return tensor_->position + offset_; }
    /// The tensor that is open.
    [[nodiscard]] const aligned_tensor& tensor() const noexcept { return *tensor_; }
    /// The tensor's place in models().tensors().
    [[nodiscard]] std::size_t tensor_index() const noexcept
    {
        return static_cast<std::size_t>(tensor_ - models_->tensors().data());
    }
    /// The models that it reads.
    [[nodiscard]] const aligned_models& models() const noexcept { return *models_; }
    /// How many tasks there are.
    [[nodiscard]] std::size_t task_count() const noexcept { return models_->task_count(); }

    /// θ0 of this block.
    const A* base()
    {
        if (!base_) { base_ = load(tensor_->base, rows_.data()); }
        return base_;
    }
    /// θt of this block: in place where it is stored as A, otherwise in row(t), which it shares with delta(t).
    const A* task(std::size_t t) { return load(tensor_->tasks[t], row(t)); }
    /// τt of this block (θt itself when there is no base).
    const A* delta(std::size_t t)
    {
        if (!tensor_->base.data) { return task(t); }
        const A* const from = base();
        const auto& task = tensor_->tasks[t];
        const auto& conversion = conversions_->of(task.dtype, tensor_->name);
        ahead(elements(task), width(task), largest_, [&](const std::byte* values, std::size_t at, std::size_t n) {
            return conversion.subtract(values, from + at, row(t) + at, n);
        });
        return row(t);
    }
    /// The stored words of this block, when the base (where there is one) and every task store T at aligned places:
    /// what a kernel reads without a detour through rows. tasks[t] for each task. False otherwise.
    template <storage_element T>
    [[nodiscard]] bool stored(const storage_word<T>*& base, std::pmr::vector<const void*>& tasks) const
    {
        if (tensor_->base.data && !usable<T>(tensor_->base)) { return false; }
        for (const auto& task : tensor_->tasks) {
            if (!usable<T>(task)) { return false; }
        }
        base = tensor_->base.data ? place<T>(tensor_->base) : nullptr;
        tasks.resize(task_count());
        for (std::size_t t = 0; t < task_count(); ++t) { tasks[t] = place<T>(tensor_->tasks[t]); }
        return true;
    }
    /// The same for task t alone.
    template <storage_element T>
    [[nodiscard]] bool stored_task(std::size_t t, const storage_word<T>*& base, const storage_word<T>*& task) const
    {
        if (!usable<T>(tensor_->tasks[t]) || (tensor_->base.data && !usable<T>(tensor_->base))) { return false; }
        base = tensor_->base.data ? place<T>(tensor_->base) : nullptr;
        task = place<T>(tensor_->tasks[t]);
        return true;
    }
    /// Tells check_finite() the largest magnitude bits that a fused kernel met: of its inputs, or of a result that NaN
    /// and infinity in an input cannot but reach.
    void note(bits_type<A> magnitude) noexcept { largest_ = std::max(largest_, magnitude); }
    /// The largest magnitude bits that were met since open().
    [[nodiscard]] bits_type<A> largest() const noexcept { return largest_; }

    /// The same elements of an operand that lies beside the models, as a method's statistics do: in place or in `out`,
    /// a row of its own. `largest` receives their largest magnitude bits: whoever reads them reports NaN and infinity.
    const A* beside(const aligned_tensor::operand& from, A* out, bits_type<A>& largest)
    {
        return load(from, out, largest);
    }
    /// Row of task t. Rows of tasks and scratch rows are consecutive, block_size apart.
    [[nodiscard]] A* row(std::size_t t) noexcept { return rows_.data() + (1 + t) * block_size; }
    /// Scratch row i.
    [[nodiscard]] A* scratch(std::size_t i) noexcept { return row(task_count() + i); }

    /// Throws nonfinite_error if an input of this block that was loaded holds NaN or infinity (unless propagation was
    /// asked for). A difference of finite values that overflows is not an input.
    void check_finite()
    {
        if (largest_ < exponent_mask<A> || models_->options().on_nonfinite == nonfinite::propagate) { return; }
        for (std::size_t i = 0; i < size_; ++i) {
            if (tensor_->base.data) { check(tensor_->base, i, models_->options().base_label); }
            for (std::size_t t = 0; t < task_count(); ++t) { check(tensor_->tasks[t], i, models_->label(t)); }
        }
    }

private:
    template <storage_element T>
    [[nodiscard]] static bool usable(const aligned_tensor::operand& from) noexcept
    {
        return !from.source
            && from.dtype == dtype_of<T> && reinterpret_cast<std::uintptr_t>(from.data) % alignof(T) == 0;
    }
    template <storage_element T>
    [[nodiscard]] const storage_word<T>* place(const aligned_tensor::operand& from) const noexcept
    {
        return reinterpret_cast<const storage_word<T>*>(from.data) + offset_;
    }
    [[nodiscard]] std::byte* raw() noexcept { return reinterpret_cast<std::byte*>(raw_.data()); }

    const A* load(const aligned_tensor::operand& from, A* out)
    {
        bits_type<A> largest = 0;
        const A* const values = load(from, out, largest);
        note(largest);
        return values;
    }
    const A* load(const aligned_tensor::operand& from, A* out, bits_type<A>& largest)
    {
        const std::byte* const stored = elements(from);
        const bool in_place = from.dtype == dtype_of<A> && stored != raw();
        const auto& conversion = conversions_->of(from.dtype, tensor_->name);
        ahead(stored, width(from), largest, [&](const std::byte* values, std::size_t at, std::size_t n) {
            return in_place ? kernels::largest_magnitude(reinterpret_cast<const A*>(values), n)
                            : conversion.widen(values, out + at, n);
        });
        return in_place ? reinterpret_cast<const A*>(stored) : out;
    }
    [[nodiscard]] static std::size_t width(const aligned_tensor::operand& from) noexcept
    {
        return bits_per_element(from.dtype) / 8;
    }
    /// The elements of this block of an operand, put into raw() where they are not aligned or worked out.
    [[nodiscard]] const std::byte* elements(const aligned_tensor::operand& from)
    {
        if (from.source) {
            from.source->read(offset_, size_, raw());
            return raw();
        }
        const std::byte* const place = from.data + offset_ * width(from);
        if (reinterpret_cast<std::uintptr_t>(place) % width(from) == 0) { return place; }
        std::memcpy(raw(), place, size_ * width(from));
        return raw();
    }

    /// Runs a kernel over the row in pieces, and before each fetches the same piece of the next block: with a dozen
    /// streams of 8 KiB each the hardware prefetchers start anew all the time.
    template <class Kernel>
    void ahead(const std::byte* values, std::size_t width, bits_type<A>& largest, const Kernel& kernel)
    {
        constexpr std::size_t piece = 512;
        for (std::size_t at = 0; at < size_; at += piece) {
            const std::byte* const here = values + at * width;
            const auto next = reinterpret_cast<std::uintptr_t>(here + block_size * width);
            for (std::size_t line = 0; line < piece * width; line += 64) {
                TASKVEC_PREFETCH(reinterpret_cast<const void*>(next + line), 2);
            }
            largest = std::max(largest, kernel(here, at, std::min(piece, size_ - at)));
        }
    }

    void check(const aligned_tensor::operand& from, std::size_t i, const std::string& where);

    const aligned_models* models_;
    const detail::row_conversions<A>* conversions_;
    std::pmr::vector<A> rows_;
    std::pmr::vector<double> raw_;
    const aligned_tensor* tensor_ = nullptr;
    std::uint64_t offset_ = 0;
    std::size_t size_ = 0;
    const A* base_ = nullptr;
    bits_type<A> largest_ = 0;
};

namespace detail {

/// Calls use(values) with the elements [offset, offset + size) of an operand as a typed pointer. Misaligned elements,
/// fp8 and what is worked out go through `raw` (room for block_size doubles).
template <class Use>
decltype(auto) with_elements(
    const aligned_tensor::operand& from, std::uint64_t offset, std::size_t size, std::byte* raw, Use&& use)
{
    if (from.source) {
        from.source->read(offset, size, raw);
        if (from.dtype == dtype::f64) { return use(reinterpret_cast<const double*>(raw)); }
        return use(reinterpret_cast<const float*>(raw));
    }
    if (is_dequantised(from.dtype)) {
        const auto* codes = reinterpret_cast<const unsigned char*>(from.data) + offset;
        auto* const values = reinterpret_cast<float*>(raw);
        for (std::size_t i = 0; i < size; ++i) { values[i] = fp8_value(from.dtype, codes[i]); }
        return use(static_cast<const float*>(values));
    }
    return visit_storage(from.dtype, "operand", [&]<class T>(std::type_identity<T>) -> decltype(auto) {
        const std::byte* place = from.data + offset * sizeof(T);
        if (reinterpret_cast<std::uintptr_t>(place) % alignof(T) != 0) {
            std::memcpy(raw, place, size * sizeof(T));
            place = raw;
        }
        return use(reinterpret_cast<const T*>(place));
    });
}

} // namespace detail

template <arithmetic_element A>
void row_block<A>::check(const aligned_tensor::operand& from, std::size_t i, const std::string& where)
{
    const double found = detail::with_elements(
        from, offset_ + i, 1, raw(), [](const auto* value) { return static_cast<double>(widen<double>(*value)); });
    if (!std::isfinite(found)) { detail::refuse_nonfinite(tensor_->name, where, found, offset_ + i); }
}

/// The blocks of one worker: in f32 and, where a tensor needs it, in f64.
class block_workspace {
public:
    /// `conversions`: of the storage types that the models may store, all of them where nothing else is known.
    block_workspace(const aligned_models& models, std::size_t scratch_rows, std::pmr::memory_resource* memory,
        detail::storage_conversions conversions)
        : models_(&models)
        , scratch_rows_(scratch_rows)
        , memory_(memory)
        , conversions_(conversions)
    { }
    /// The block in A, made when it is first asked for.
    template <arithmetic_element A>
    row_block<A>& get()
    {
        std::optional<row_block<A>>* slot;
        if constexpr (std::same_as<A, double>) { slot = &wide_; }
        else {
            slot = &single_;
        }
        if (!*slot) { slot->emplace(*models_, scratch_rows_, memory_, conversions_.get<A>()); }
        return **slot;
    }
    /// Calls use(block) with the block type that the tensor's arithmetic asks for.
    template <class Use>
    decltype(auto) with_block(const aligned_tensor& tensor, Use&& use)
    {
        return tensor.wide ? use(get<double>()) : use(get<float>());
    }

private:
    const aligned_models* models_;
    std::size_t scratch_rows_;
    std::pmr::memory_resource* memory_;
    detail::storage_conversions conversions_;
    std::optional<row_block<float>> single_;
    std::optional<row_block<double>> wide_;
};

namespace detail {

/// Whether some type of a list computes in A.
template <arithmetic_element A, class... T>
consteval bool computes_in(storage_list<T...>)
{
    return (std::same_as<arithmetic_type<T>, A> || ...);
}

/// block_workspace::with_block() for tensors that store the types of a list.
template <class Types, class Use>
decltype(auto) with_block_of(block_workspace& space, const aligned_tensor& tensor, Use&& use)
{
    if constexpr (!computes_in<double>(Types{})) { return use(space.get<float>()); }
    else if constexpr (!computes_in<float>(Types{})) {
        return use(space.get<double>());
    }
    else {
        return space.with_block(tensor, use);
    }
}

} // namespace detail

/// A range of chunks, by index.
struct chunk_range {
    std::size_t first = 0, last = 0; ///< indices in aligned_models::chunks()
};
/// The chunks of all tensors.
[[nodiscard]] inline chunk_range all_chunks(const aligned_models& models) noexcept
{
    return {0, models.chunks().size()};
}
/// The chunks of one tensor.
[[nodiscard]] inline chunk_range chunks_of(const aligned_models& models, std::size_t tensor) noexcept
{
    return {models.first_chunk(tensor), models.first_chunk(tensor + 1)};
}
/// Bytes that one walk over a range of chunks reads.
[[nodiscard]] inline std::uint64_t bytes_of(const aligned_models& models, chunk_range range) noexcept
{
    std::uint64_t total = 0;
    for (std::size_t c = range.first; c < range.last; ++c) { total += models.bytes(models.chunks()[c]); }
    return total;
}

/// One workspace for each worker that a walk over `count` chunks may use, for models that store the types of a
/// storage_list.
template <class Types = storage_types>
[[nodiscard]] std::pmr::vector<block_workspace> make_workspaces(
    const cpu& policy, const aligned_models& models, std::size_t count, std::size_t scratch_rows)
{
    std::pmr::vector<block_workspace> workspaces(memory_of(policy));
    const std::size_t workers = worker_count(policy, count);
    workspaces.reserve(workers);
    for (std::size_t w = 0; w < workers; ++w) {
        workspaces.emplace_back(models, scratch_rows, memory_of(policy), detail::storage_conversions::of(Types{}));
    }
    return workspaces;
}

/// Opens each block of a chunk in turn, calls body(block), and reports non-finite inputs after it.
template <arithmetic_element A, class Body>
void for_each_block_of(row_block<A>& rows, const tensor_chunk& piece, Body&& body)
{
    const aligned_tensor& tensor = rows.models().tensors()[piece.tensor];
    for (std::size_t at = 0; at < piece.size; at += block_size) {
        rows.open(tensor, piece.offset + at, std::min(block_size, piece.size - at));
        body(rows);
        rows.check_finite();
    }
}

/// Calls body(chunk index, worker, block) for every block of a range of chunks: chunks in parallel, the blocks of a
/// chunk in ascending order. `block` is a row_block<float>& or a row_block<double>&, `worker` as in for_each_index. No
/// code is made for storage types that `Types` does not list.
template <class Types = storage_types, class Body>
void for_each_block(const cpu& policy, const aligned_models& models, chunk_range range, std::size_t scratch_rows,
    std::string_view phase, Body&& body)
{
    const std::size_t count = range.last - range.first;
    auto workspaces = make_workspaces<Types>(policy, models, count, scratch_rows);
    detail::progress_meter meter(policy, phase, bytes_of(models, range));
    for_each_index(policy, count, [&](std::size_t index, std::size_t worker) {
        const tensor_chunk& piece = models.chunks()[range.first + index];
        detail::with_block_of<Types>(workspaces[worker], models.tensors()[piece.tensor], [&](auto& rows) {
            for_each_block_of(rows, piece, [&](auto& opened) { body(range.first + index, worker, opened); });
        });
        if (!meter.advance(models.bytes(piece))) { raise<cancelled>(error_code::cancelled); }
    });
}

} // namespace taskvec::inline TASKVEC_ABI
