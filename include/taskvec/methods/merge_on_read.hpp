// merge_on_read(): what merge() would store, worked out whenever it is read, for merges of merges.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/methods/by_tensor.hpp>
#include <taskvec/models/stored_elements.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The options of a method whose result can be worked out piece by piece, in any order: an elementwise one
/// (method.hpp). What it has to know of whole tensors, norms or thresholds, it finds beforehand.
template <class Options>
concept merges_on_read = merge_method<Options> && packed_method<Options>;

/// merge() whose result is stored nowhere: makes `merged` the model that merge() would write, each tensor of which
/// names a source that works its elements out whenever they are read. It goes into other algorithms as models on disk
/// do, so that a merge of merges needs no room for what comes between. The elements are those that would be read back,
/// rounded to the output's dtype: what is made of them has the same bits. What is copied through is the reference's.
///
/// The passes that come before the walk are made here, and the whole walk for a method that settles (TIES), with its
/// checks; nothing is written. A read reads these elements of all models, on the thread that asks; where a method looks
/// at rows, all of the piece that they lie in (row_pieces), unless a thread has just read there. A few rows are held
/// for each thread that reads at a time. Whoever reads twice has everything worked out twice. Reads may begin anywhere;
/// those of some thousand elements that begin at multiples of 64 cost least.
///
/// The result owns what `merged` refers to, and has it as long as anybody reads; the models outlive both. Errors: here
/// as check_merge(); in reads as merge() when it comes to these elements, or those since the last multiple of 64 before
/// them: nonfinite_error (inputs; overflow::error), naming this merge's tensor and model.
///
///     const_model_ref mixed;
///     const auto sources = merge_on_read(cpu{}, average_options{}, models, mixed);
///     merge(cpu{}, slerp_options{.t = 0.3}, aligned_models(&mixed, tasks), sink);
template <merges_on_read Options>
[[nodiscard]] std::vector<std::unique_ptr<operand_source>> merge_on_read(
    const cpu& policy, const Options& options, const aligned_models& models, const_model_ref& merged);

/// The same for merge_by_tensor().
///
///     const auto sources = merge_on_read_by_tensor<average_options>(cpu{}, options_of, models, mixed);
template <merges_on_read Options>
    requires described_options<Options>
[[nodiscard]] std::vector<std::unique_ptr<operand_source>> merge_on_read_by_tensor(const cpu& policy,
    const callback<Options(std::string_view)>& options_of, const aligned_models& models, const_model_ref& merged);

namespace detail {

/// A sink of which nothing is wanted: a walk into it only settles what there is to settle.
class unwanted_sink final : public tensor_sink {
public:
    [[nodiscard]] bool rewritable() const override { return false; }
    [[nodiscard]] bool wants(std::size_t /*index*/) const override { return false; }
    void write(std::size_t /*index*/, std::uint64_t /*offset*/, const void* /*data*/, std::size_t /*size*/) override { }
};

/// Takes the stored words of blocks, and gives those that a read is about in its type.
class read_sink final : public tensor_sink {
public:
    /// What is written next is of a tensor of dtype `stored`; elements [first, first + count) go to `out`.
    void open(dtype stored, std::uint64_t first, std::size_t count, void* out) noexcept
    {
        stored_ = stored;
        first_ = first;
        last_ = first + count;
        out_ = static_cast<std::byte*>(out);
    }
    void write(std::size_t /*index*/, std::uint64_t offset, const void* data, std::size_t size) override
    {
        const std::size_t width = byte_count(stored_, 1);
        const std::uint64_t begin = offset / width;
        const std::uint64_t first = std::max(begin, first_), last = std::min(begin + size / width, last_);
        if (first >= last) { return; }
        widen_stored(stored_, static_cast<const std::byte*>(data) + (first - begin) * width,
            static_cast<std::size_t>(last - first),
            out_ + byte_count(read_type(stored_), static_cast<std::size_t>(first - first_)));
    }

private:
    dtype stored_ = dtype::f32;
    std::uint64_t first_ = 0, last_ = 0;
    std::byte* out_ = nullptr;
};

/// A prepared merge, any part of which may be asked for, by any thread.
template <class Options>
class readable_merge {
public:
    /// Checks, and makes the passes. The models that `models` refers to outlive this.
    readable_merge(const cpu& policy, const Options& options, const aligned_models& models)
        : policy_(policy)
        , options_(options)
        , models_(models)
        , beside_(operands_beside(options_, models_, memory_space::host))
        , passes_(policy_, models_, beside_)
        , prepared_(passes_, options_)
    {
        if constexpr (requires(std::span<const merge_tally> tallies) { prepared_.settle(tallies); }) {
            unwanted_sink nothing;
            merge_report ignored;
            merge_walk<Options>(passes_, prepared_, nothing, ignored);
        }
    }
    readable_merge(const readable_merge&) = delete;
    readable_merge& operator=(const readable_merge&) = delete;

    [[nodiscard]] const aligned_models& models() const noexcept { return models_; }
    /// What lies beside a tensor.
    [[nodiscard]] std::span<const aligned_tensor::operand> beside(std::size_t tensor) const noexcept
    {
        const std::size_t each = passes_.beside_each();
        return std::span(beside_).subspan(tensor * each, each);
    }
    /// Elements [offset, offset + count) of a tensor, in read_type() of its dtype.
    void read(std::size_t tensor, std::uint64_t offset, std::size_t count, void* out) const
    {
        if (count == 0) { return; }
        const std::uint64_t end = offset + count;
        if constexpr (by_rows) {
            const chunk_range own = prepared_.pieces().of_tensor(tensor);
            const std::size_t step = prepared_.pieces()[own.first].size;
            const worker_lease lease(*this, own.first + static_cast<std::size_t>(offset / step));
            lease.mine->taken.open(models_.tensors()[tensor].output_dtype, offset, count, out);
            for (std::uint64_t at = offset; at < end;) {
                const std::size_t number = own.first + static_cast<std::size_t>(at / step);
                const tensor_chunk piece = prepared_.pieces()[number];
                const std::uint64_t last = std::min(end, piece.offset + piece.size);
                // Blocks lie in a piece as merge() has them.
                work_out(*lease.mine, tensor, at - (at - piece.offset) % block_size, last, number);
                at = last;
            }
        }
        else {
            constexpr std::uint64_t start = 64; // of which blocks begin at a multiple: see fill_draws()
            const worker_lease lease(*this, 0);
            lease.mine->taken.open(models_.tensors()[tensor].output_dtype, offset, count, out);
            work_out(*lease.mine, tensor, offset - offset % start, end, 0);
        }
    }
    /// Gives the memory of workers back that nobody has.
    void release() const
    {
        const std::lock_guard lock(mutex_);
        idle_.clear();
    }

private:
    static constexpr bool by_rows = looks_at_rows<method<Options>>;

    /// What a thread needs that reads.
    struct worker {
        explicit worker(const readable_merge& merge)
            : space(merge.models_, 1, memory_of(merge.policy_), storage_conversions::of(storage_types{}))
            , writer(guarded(merge), false, memory_of(merge.policy_), storage_conversions::of(storage_types{}))
            , scratch(memory_of(merge.policy_))
        { }
        worker(const worker&) = delete;
        worker& operator=(const worker&) = delete;

        read_sink taken;
        std::optional<overflow_guard> guard;
        block_workspace space;
        row_writer writer;
        merge_scratch scratch;
        merge_tally tally;
        std::optional<std::size_t> weighed{}; ///< the piece of rows that `scratch` is about, by number

    private:
        tensor_sink& guarded(const readable_merge& merge)
        {
            const auto how = merge.models_.options().on_overflow;
            if (how == overflow::propagate) { return taken; }
            guard.emplace(taken, merge.models_, how, largest_gain(merge.options_));
            if constexpr (requires { merge.prepared_.nonfinite_beside(std::size_t{0}, std::uint64_t{0}); }) {
                guard->excuse([&prepared = merge.prepared_](std::size_t tensor, std::uint64_t index) {
                    return prepared.nonfinite_beside(tensor, index);
                });
            }
            return *guard;
        }
    };
    /// A worker for as long as it lives: of those that nobody has one that knows the piece, otherwise the one that was
    /// used the longest ago.
    struct worker_lease {
        worker_lease(const readable_merge& of, std::size_t piece)
            : merge(of)
        {
            const std::lock_guard lock(merge.mutex_);
            auto& idle = merge.idle_;
            if (idle.empty()) {
                idle.reserve(merge.workers_ + 1); // so that none comes back to a list that has no room
                mine = std::make_unique<worker>(merge);
                ++merge.workers_;
                return;
            }
            auto found = std::find_if(
                idle.begin(), idle.end(), [&](const auto& one) { return !by_rows || one->weighed == piece; });
            if (found == idle.end()) { found = idle.begin(); }
            mine = std::move(*found);
            idle.erase(found);
        }
        worker_lease(const worker_lease&) = delete;
        worker_lease& operator=(const worker_lease&) = delete;
        ~worker_lease()
        {
            const std::lock_guard lock(merge.mutex_);
            merge.idle_.push_back(std::move(mine));
        }
        const readable_merge& merge;
        std::unique_ptr<worker> mine;
    };

    /// Merges elements [begin, end) of a tensor into the worker's sink. `number`: the piece of rows that they lie in.
    void work_out(worker& own, std::size_t tensor, std::uint64_t begin, std::uint64_t end, std::size_t number) const
    {
        const aligned_tensor& from = models_.tensors()[tensor];
        with_block_of<storage_types>(own.space, from, [&]<class A>(row_block<A>& rows) {
            if constexpr (by_rows) {
                if (own.weighed != number) {
                    merge_scratch& scratch = own.scratch;
                    own.weighed.reset();
                    scratch.piece = prepared_.pieces()[number];
                    A* const made = scratch.weighed.rows<A>(prepared_.row_numbers(), scratch.piece.size);
                    prepared_.weigh(rows, scratch.piece, made, scratch.piece_rows);
                    scratch.weighed_rows = made;
                    own.weighed = number;
                }
            }
            visit_body<A>(prepared_, tensor, [&](const auto& body) {
                for (std::uint64_t at = begin; at < end; at += block_size) {
                    const tensor_chunk block{
                        tensor, at, static_cast<std::size_t>(std::min<std::uint64_t>(block_size, end - at))};
                    own.writer.open(from, block);
                    for_each_block_of(rows, block, [&](row_block<A>& opened) {
                        block_merge(prepared_, body, passes_, opened, own.writer, own.scratch, 0, own.tally).run();
                    });
                    own.writer.close();
                }
            });
        });
    }

    cpu policy_;
    Options options_;
    aligned_models models_;
    decltype(operands_beside(
        std::declval<const Options&>(), std::declval<const aligned_models&>(), memory_space::host)) beside_;
    typed_passes<storage_types> passes_;
    method<Options> prepared_;
    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<worker>> idle_; // those that nobody has, the last one used at the end
    mutable std::size_t workers_ = 0; // of all
};

/// One tensor of a merge that is made when it is read.
template <class Options>
class merged_source final : public operand_source {
public:
    merged_source(std::shared_ptr<const readable_merge<Options>> merge, std::size_t tensor)
        : merge_(std::move(merge))
        , tensor_(tensor)
    { }
    [[nodiscard]] dtype type() const noexcept override { return read_type(of().output_dtype); }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        merge_->read(tensor_, offset, count, out);
    }
    void prepare(const cpu& policy) const override
    {
        const auto one = [&](const aligned_tensor::operand& from) {
            if (from.source) { from.source->prepare(policy); }
        };
        one(of().base);
        for (const auto& task : of().tasks) { one(task); }
        for (const auto& from : merge_->beside(tensor_)) { one(from); }
    }
    void release() const override { merge_->release(); }
    [[nodiscard]] unsigned stored_bits() const noexcept override { return static_cast<unsigned>(8 * of().bytes(1)); }

private:
    [[nodiscard]] const aligned_tensor& of() const noexcept { return merge_->models().tensors()[tensor_]; }

    std::shared_ptr<const readable_merge<Options>> merge_;
    std::size_t tensor_;
};

/// The sources of models.tensors(), in their order.
template <class Options>
std::vector<std::unique_ptr<operand_source>> merge_sources(
    const cpu& policy, const Options& options, const aligned_models& models)
{
    const call_memory none(nullptr); // what is made here outlives a call that may be under way
    std::vector<std::unique_ptr<operand_source>> sources;
    if constexpr (merges_on_read<Options>) { // others are compiled by the same list (compiled/methods.hpp)
        static_assert(check_method<Options>());
        check_options(options);
        if (method<Options>::needs_base && !models.has_base()) {
            raise<invalid_argument>(error_code::base_missing, "this merge method needs a base model");
        }
        const auto merge = std::make_shared<const readable_merge<Options>>(policy, options, models);
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            sources.push_back(std::make_unique<merged_source<Options>>(merge, i));
        }
    }
    return sources;
}

/// The model that a merge with these sources would write. Those of what is copied and comes out of being stored as
/// something else are added to them.
[[nodiscard]] inline const_model_ref model_of_sources(
    const aligned_models& models, std::vector<std::unique_ptr<operand_source>>& sources)
{
    const_model_ref merged;
    const auto insert = [&](std::size_t output, const operand_source& source) {
        const auto& spec = models.outputs()[output];
        merged.insert(spec.name, {nullptr, spec.dtype, spec.shape, {}, memory_space::host, 0, &source});
    };
    for (std::size_t i = 0; i < models.tensors().size(); ++i) { insert(models.tensors()[i].output, *sources[i]); }
    for (const auto& copied : models.copied()) {
        if (!copied.source.source) {
            merged.insert(copied.name, const_tensor_ref(copied.source));
            continue;
        }
        sources.push_back(
            std::make_unique<rounded_source>(*copied.source.source, models.outputs()[copied.output].dtype));
        insert(copied.output, *sources.back());
    }
    return merged;
}

} // namespace detail

template <merges_on_read Options>
std::vector<std::unique_ptr<operand_source>> merge_on_read(
    const cpu& policy, const Options& options, const aligned_models& models, const_model_ref& merged)
{
    auto sources = detail::merge_sources(policy, options, models);
    merged = detail::model_of_sources(models, sources);
    return sources;
}

template <merges_on_read Options>
    requires described_options<Options>
std::vector<std::unique_ptr<operand_source>> merge_on_read_by_tensor(const cpu& policy,
    const callback<Options(std::string_view)>& options_of, const aligned_models& models, const_model_ref& merged)
{
    std::vector<std::unique_ptr<operand_source>> sources(models.tensors().size());
    for (const auto& group : group_by_options(models, options_of)) {
        auto part = detail::merge_sources(policy, group.options, aligned_models(models, group.tensors));
        for (std::size_t i = 0; i < part.size(); ++i) { sources[group.tensors[i]] = std::move(part[i]); }
    }
    merged = detail::model_of_sources(models, sources);
    return sources;
}

} // namespace taskvec::inline TASKVEC_ABI
