// Several models lined up tensor by tensor: what every model-wide algorithm walks over, block by block.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/overflow.hpp>
#include <taskvec/core/parallel.hpp>
#include <taskvec/core/sink.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/models/operand_source.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// What a tensor that a task lacks means: an error, or "unchanged from the base".
enum class missing_tensors : std::uint8_t { error, base };

/// A task's tensors, and the base's where the task lacks some: the model that missing_tensors::base takes it for.
[[nodiscard]] inline const_model_ref completed(const_model_ref task, const const_model_ref& base)
{
    for (const auto& [name, tensor] : base) {
        if (!task.find(name)) { task.insert(name, tensor); }
    }
    return task;
}

/// What every model-wide algorithm may be told. None of it changes a bit of a tensor that is included.
struct model_options {
    callback<bool(std::string_view)> include{}; ///< empty: every floating tensor; the others are copied from the base
    std::optional<taskvec::dtype>
        output{}; ///< dtype of the result; empty: the base's, tensor by tensor (fp8 becomes f32)
    nonfinite on_nonfinite = nonfinite::error; ///< NaN and infinity in an input
    missing_tensors on_missing = missing_tensors::error; ///< a tensor that a task lacks
    overflow on_overflow = overflow::propagate; ///< a result that is too large for the output's dtype (host memory)
    std::vector<std::string> labels{}; ///< names of the tasks in messages; empty: "task 1", "task 2", …
    std::string base_label = "the base"; ///< name of the base in messages
    std::size_t chunk = 65536; ///< elements handed to a thread at a time (rounded up to a multiple of 64)
    bool statistics = false; ///< collect counts and norms for a report, at some cost
    std::size_t memory = std::size_t{256}
        << 20; ///< bytes of scratch that a pass may take, and of inputs that a merge tensor by tensor works on at a
               ///< time; less means more reads of the inputs, never other bits
};

/// One tensor of the aligned models: where its data lie in the base and in each task.
struct aligned_tensor {
    /// Where a tensor's elements lie in one model, and how they are stored.
    struct operand {
        const std::byte* data = nullptr;
        taskvec::dtype dtype = taskvec::dtype::f32; ///< as they are stored
        const operand_source* source = nullptr; ///< where set, elements come from it, and `data` is not read

        /// Bytes of `count` elements as they are stored.
        [[nodiscard]] std::uint64_t bytes(std::size_t count) const noexcept
        {
            return source ? (std::uint64_t{count} * source->stored_bits() + 7) / 8 : byte_count(dtype, count);
        }
    };
    std::string name; ///< of the tensor
    extents shape; ///< slowest first
    std::size_t size = 0;
    std::size_t output = 0; ///< index in aligned_models::outputs()
    std::uint64_t position = 0; ///< first element's place in the concatenation of all included tensors
    taskvec::dtype output_dtype = taskvec::dtype::f32; ///< of the merged tensor
    bool wide = false; ///< arithmetic runs in f64, because some model stores f64
    operand base{}; ///< data == nullptr when there is no base
    std::vector<operand> tasks{}; ///< in their order

    /// True when what is to be added to the base has f64 values: an f64 tensor, whatever the tasks store.
    [[nodiscard]] bool wide_base() const noexcept { return base.dtype == taskvec::dtype::f64; }
    /// Bytes of `count` elements in the base and all tasks together; a task that stands for the base adds none.
    [[nodiscard]] std::uint64_t bytes(std::size_t count) const noexcept
    {
        std::uint64_t total = base.data ? base.bytes(count) : 0;
        for (const auto& task : tasks) { total += task.data == base.data ? 0 : task.bytes(count); }
        return total;
    }
};

/// A tensor that takes no part: it is copied through unchanged.
struct copied_tensor {
    std::string name; ///< of the tensor
    std::size_t output = 0; ///< index in aligned_models::outputs()
    const_tensor_ref source{}; ///< its bytes
};

/// A run of consecutive elements of one tensor, handed to one thread.
struct tensor_chunk {
    std::size_t tensor = 0; ///< index in aligned_models::tensors()
    std::uint64_t offset = 0; ///< of the first element in its tensor
    std::size_t size = 0;
};

/// The chunks of a model's tensors in order. They are worked out when they are asked for: a list of them would grow
/// with the model.
class chunk_list {
public:
    /// `first_of[i]` is the number of the first chunk of tensor i, with the number of all chunks at the end; chunks are
    /// `step` elements long, the last one of each tensor excepted.
    chunk_list(
        std::span<const std::size_t> first_of, const std::vector<aligned_tensor>& tensors, std::size_t step) noexcept
        : first_of_(first_of)
        , tensors_(&tensors)
        , step_(step)
    { }
    [[nodiscard]] std::size_t size() const noexcept { return first_of_.empty() ? 0 : first_of_.back(); }
    [[nodiscard]] tensor_chunk operator[](std::size_t index) const noexcept
    {
        // Of tensors that share a first chunk only the last is not empty.
        const auto after = std::upper_bound(first_of_.begin(), first_of_.end(), index);
        const auto tensor = static_cast<std::size_t>(after - first_of_.begin()) - 1;
        const std::size_t offset = (index - first_of_[tensor]) * step_;
        return {tensor, offset, std::min(step_, (*tensors_)[tensor].size - offset)};
    }

private:
    std::span<const std::size_t> first_of_;
    const std::vector<aligned_tensor>* tensors_;
    std::size_t step_;
};

/// Tensors [first, last) of aligned models.
struct tensor_range {
    std::size_t first = 0, last = 0; ///< indices in aligned_models::tensors()
};

/// Lines up a base (optional) and tasks by tensor name, and checks everything that can be checked before any work:
/// names, shapes, dtypes, contiguity, memory space. Tensors are ordered by the bytes of their names. Integer tensors
/// must be equal in all models and are copied; excluded tensors are copied from the base. Holds views only. All tensors
/// live in the memory space `space`; for device memory `equal` says whether two runs of bytes are the same.
/// Errors: invalid_argument, shape_mismatch, dtype_mismatch, each naming the tensor and the model.
class aligned_models {
public:
    /// Whether two runs of bytes are the same; for memory that the host cannot read.
    using bytes_equal = callback<bool(const void* a, const void* b, std::size_t bytes)>;

    /// `base`: null for none. The models outlive the result.
    aligned_models(const const_model_ref* base, std::span<const const_model_ref> tasks, model_options options = {},
        memory_space space = memory_space::host, const bytes_equal& equal = {})
        : options_(std::move(options))
        , space_(space)
    {
        if (tasks.empty()) {
            raise<invalid_argument>(error_code::inputs_empty, "no task was given: at least one is needed");
        }
        if (!options_.labels.empty() && options_.labels.size() != tasks.size()) {
            raise<invalid_argument>(error_code::list_length,
                message(options_.labels.size(), " labels for ", tasks.size(), " tasks: give one each, or none"));
        }
        task_count_ = tasks.size();
        has_base_ = base != nullptr;
        filled_.assign(tasks.size(), 0);
        const const_model_ref& reference = base ? *base : tasks[0];
        for (std::size_t t = 0; t < tasks.size(); ++t) {
            for (const auto& [name, tensor] : tasks[t]) {
                if (!reference.find(name) && (!options_.include || options_.include(name))) {
                    raise<invalid_argument>(error_code::tensor_unexpected,
                        message("tensor '", name, "' is in ", label(t), " but not in ", reference_label(),
                            ": use models of one architecture, or exclude the tensor"));
                }
            }
        }
        for (const auto& [name, tensor] : reference) { add(name, tensor, tasks, equal); }
        cut();
    }

    /// What is no base and tasks: a sentence says so.
    template <class Base, class Tasks, class... Rest>
        requires(!std::derived_from<Base, aligned_models>
            && (!std::convertible_to<const Base&, const const_model_ref*>
                || !std::convertible_to<const Tasks&, std::span<const const_model_ref>>))
    aligned_models(const Base&, const Tasks&, const Rest&...)
    {
        constexpr bool address = std::convertible_to<const Base&, const const_model_ref*>;
        static_assert(address,
            "aligned_models: the base is the address of a taskvec::const_model_ref, or nullptr where there is none: "
            "aligned_models(&base, tasks)");
        static_assert(!address || std::convertible_to<const Tasks&, std::span<const const_model_ref>>,
            "aligned_models: the tasks are no list of models: pass a std::vector<taskvec::const_model_ref>, or {&task, "
            "1} for one");
    }

    /// The same models, handed to threads in other chunks.
    aligned_models(const aligned_models& other, std::size_t chunk)
        : aligned_models(other)
    {
        options_.chunk = chunk;
        cut();
    }

    /// Some of the tensors that take part, by a list of their places in tensors(), ascending: the same outputs, and
    /// nothing that is copied. Model-wide shares are then shares of these. `memory`: instead of that of the options,
    /// where such parts share it; 0: all of it.
    aligned_models(const aligned_models& other, std::span<const std::size_t> chosen, std::size_t memory = 0)
        : options_(other.options_)
        , space_(other.space_)
        , outputs_(other.outputs_)
        , filled_(other.filled_)
        , task_count_(other.task_count_)
        , has_base_(other.has_base_)
        , computed_(other.computed_)
    {
        if (memory > 0) { options_.memory = memory; }
        for (const std::size_t i : chosen) {
            auto& tensor = tensors_.emplace_back(other.tensors()[i]);
            tensor.position = elements_;
            elements_ += tensor.size;
            any_wide_ = any_wide_ || tensor.wide;
        }
        cut();
    }

    /// Puts elements that are worked out in place of those that a task stores. `tensor` is a place in tensors();
    /// `source` outlives these models and their copies. Host memory only.
    void compute(std::size_t task, std::size_t tensor, const operand_source& source)
    {
        if (space_ != memory_space::host) {
            raise<invalid_argument>(error_code::tensor_memory,
                message("tensor '", tensors_[tensor].name, "' of ", label(task),
                    " is worked out on the host: use the cpu policy, or store the model first"));
        }
        auto& operand = tensors_[tensor].tasks[task];
        operand.dtype = source.type();
        operand.source = &source;
        tensors_[tensor].wide = tensors_[tensor].wide || operand.dtype == taskvec::dtype::f64;
        any_wide_ = any_wide_ || tensors_[tensor].wide;
        computed_ = true;
    }
    /// Whether some tensor of a task is worked out: compute().
    [[nodiscard]] bool computed() const noexcept { return computed_; }

    /// The tensors that the result holds, in name order.
    [[nodiscard]] const std::vector<tensor_spec>& outputs() const& noexcept { return *outputs_; }
    void outputs() const&& = delete; // name the owner first: the reference would dangle
    /// The included floating tensors, in name order.
    [[nodiscard]] const std::vector<aligned_tensor>& tensors() const& noexcept { return tensors_; }
    void tensors() const&& = delete; // name the owner first: the reference would dangle
    /// The tensors that are copied, in name order.
    [[nodiscard]] const std::vector<copied_tensor>& copied() const& noexcept { return copied_; }
    void copied() const&& = delete; // name the owner first: the reference would dangle
    /// All chunks, tensor by tensor.
    [[nodiscard]] chunk_list chunks() const& noexcept { return {first_chunk_, tensors_, step()}; }
    chunk_list chunks() const&& = delete; // a list over a temporary
    /// Chunks [first_chunk(i), first_chunk(i + 1)) cover tensor i.
    [[nodiscard]] std::size_t first_chunk(std::size_t tensor) const noexcept { return first_chunk_[tensor]; }
    /// Elements of all included tensors together.
    [[nodiscard]] std::uint64_t elements() const noexcept { return elements_; }
    /// How many tasks there are.
    [[nodiscard]] std::size_t task_count() const noexcept { return task_count_; }
    /// Whether there is a base.
    [[nodiscard]] bool has_base() const noexcept { return has_base_; }
    /// For each task, how many tensors it lacks that stand for the base's (missing_tensors::base), among those that
    /// take part and those that no task has, which are copied.
    [[nodiscard]] const std::vector<std::size_t>& filled() const noexcept { return filled_; }
    /// True when some included tensor computes in f64: model-wide magnitudes then compare as f64.
    [[nodiscard]] bool any_wide() const noexcept { return any_wide_; }
    /// As they were given.
    [[nodiscard]] const model_options& options() const noexcept { return options_; }
    /// What messages call a task: its label, or "task 1", "task 2", …
    [[nodiscard]] std::string label(std::size_t task) const
    {
        return options_.labels.empty() ? message("task ", task + 1) : options_.labels[task];
    }
    /// The tensor that holds place `position` of the concatenation.
    [[nodiscard]] std::size_t tensor_at(std::uint64_t position) const
    {
        const auto after = std::upper_bound(tensors_.begin(), tensors_.end(), position,
            [](std::uint64_t p, const aligned_tensor& tensor) { return p < tensor.position; });
        return static_cast<std::size_t>(after - tensors_.begin())
            - 1; // of tensors that share a position only the last is not empty
    }
    /// Bytes that one walk over all included tensors reads.
    [[nodiscard]] std::uint64_t bytes() const noexcept
    {
        std::uint64_t total = 0;
        for (const auto& tensor : tensors_) { total += tensor.bytes(tensor.size); }
        return total;
    }
    /// Bytes that one walk over a chunk reads.
    [[nodiscard]] std::uint64_t bytes(const tensor_chunk& piece) const noexcept
    {
        return tensors_[piece.tensor].bytes(piece.size);
    }

private:
    [[nodiscard]] std::size_t step() const noexcept
    {
        return std::max<std::size_t>(64, (options_.chunk + 63) / 64 * 64);
    }
    void cut()
    {
        first_chunk_.assign(1, 0);
        first_chunk_.reserve(tensors_.size() + 1);
        for (const auto& tensor : tensors_) {
            first_chunk_.push_back(first_chunk_.back() + tensor.size / step() + (tensor.size % step() != 0));
        }
    }

    [[nodiscard]] std::string reference_label() const { return has_base_ ? options_.base_label : label(0); }
    void check_place(const const_tensor_ref& tensor, const std::string& name, const std::string& where) const
    {
        if (tensor.space != space_) {
            raise<invalid_argument>(error_code::tensor_memory,
                message("tensor '", name, "' of ", where,
                    space_ == memory_space::host ? " lives in device memory: the cpu policy needs host memory"
                                                 : " lives in host memory: the gpu policy needs device memory, or "
                                                   "merge_streamed() for models on the host"));
        }
        if (!tensor.contiguous()) {
            raise<invalid_argument>(error_code::tensor_layout,
                message("tensor '", name, "' of ", where, " is not contiguous: copy it to row-major memory first"));
        }
        if (tensor.source && space_ != memory_space::host) { detail::refuse_source(name); }
        if (!tensor.data && !tensor.source && tensor.bytes(name) > 0) {
            raise<invalid_argument>(error_code::tensor_without_data,
                message("tensor '", name, "' of ", where, " has no data (null pointer)"));
        }
    }
    static bool computes(taskvec::dtype type) noexcept { return is_storage(type) || is_fp8(type); }

    void add(const std::string& name, const const_tensor_ref& tensor, std::span<const const_model_ref> tasks,
        const bytes_equal& equal)
    {
        check_place(tensor, name, reference_label());
        const std::size_t size = tensor.size(name), output = outputs_->size();
        const bool included = !options_.include || options_.include(name);
        if (!included) {
            outputs_->push_back(
                {name, tensor.source ? options_.output.value_or(tensor.dtype) : tensor.dtype, tensor.shape});
            copied_.push_back({name, output, tensor});
            return;
        }
        aligned_tensor aligned{
            name, tensor.shape, size, output, elements_, tensor.dtype, tensor.dtype == taskvec::dtype::f64, {}, {}};
        const auto operand_of = [](const const_tensor_ref& from) {
            const void* const data = from.source ? from.source : from.data; // not read: it tells operands apart
            return aligned_tensor::operand{
                static_cast<const std::byte*>(data), from.source ? from.source->type() : from.dtype, from.source};
        };
        const auto reference = operand_of(tensor);
        aligned.wide = aligned.wide || reference.dtype == taskvec::dtype::f64;
        if (has_base_) { aligned.base = reference; }
        std::size_t lacking = 0;
        for (std::size_t t = 0; t < tasks.size(); ++t) {
            const const_tensor_ref* const mine = tasks[t].find(name);
            if (!mine) {
                // There is nothing to merge in integers: a task that lacks them (a buffer that is saved no more) has
                // the base's.
                if (has_base_ && !computes(tensor.dtype)) {
                    ++filled_[t];
                    continue;
                }
                if (options_.on_missing == missing_tensors::error || !has_base_) {
                    raise<invalid_argument>(error_code::tensor_missing,
                        message("tensor '", name, "' of ", reference_label(), " is missing in ", label(t),
                            has_base_ ? ": add it, or let missing tensors stand for the base's" : ": add it"));
                }
                aligned.tasks.push_back(reference);
                ++filled_[t];
                ++lacking;
                continue;
            }
            check_place(*mine, name, label(t));
            check_same(name, tensor, *mine, t, equal);
            aligned.tasks.push_back(operand_of(*mine));
            aligned.wide = aligned.wide || aligned.tasks.back().dtype == taskvec::dtype::f64;
        }
        // What no task has stays as it is: a share of entries does not count it.
        const bool untouched = lacking == tasks.size() && options_.output.value_or(tensor.dtype) == tensor.dtype;
        if (!computes(tensor.dtype) || untouched) {
            outputs_->push_back({name, tensor.dtype, tensor.shape});
            copied_.push_back({name, output, tensor});
            return;
        }
        aligned.output_dtype =
            options_.output.value_or(is_dequantised(tensor.dtype) ? taskvec::dtype::f32 : tensor.dtype);
        if (!is_storage(aligned.output_dtype)) {
            raise<dtype_mismatch>(error_code::output_dtype,
                message("a merge cannot be stored as ", to_string(aligned.output_dtype), ": choose ", storage_names()));
        }
        outputs_->push_back({name, aligned.output_dtype, tensor.shape});
        elements_ += size;
        any_wide_ = any_wide_ || aligned.wide;
        tensors_.push_back(std::move(aligned));
    }

    void check_same(const std::string& name, const const_tensor_ref& tensor, const const_tensor_ref& mine,
        std::size_t t, const bytes_equal& equal) const
    {
        if (mine.shape != tensor.shape) {
            raise<shape_mismatch>(error_code::tensor_shape,
                message("tensor '", name, "' has shape ", to_string(mine.shape), " in ", label(t), " but ",
                    to_string(tensor.shape), " in ", reference_label(),
                    ": use models of one architecture, or exclude the tensor"));
        }
        const bool floating = computes(tensor.dtype);
        if (computes(mine.dtype) != floating || (!floating && mine.dtype != tensor.dtype)) {
            raise<dtype_mismatch>(error_code::dtype_differs,
                message("tensor '", name, "' has dtype ", to_string(mine.dtype), " in ", label(t), " but ",
                    to_string(tensor.dtype), " in ", reference_label(),
                    ": convert one of them, or exclude the tensor"));
        }
        const std::size_t size = tensor.bytes(name);
        const auto same = [&] {
            return equal ? equal(mine.data, tensor.data, size) : std::memcmp(mine.data, tensor.data, size) == 0;
        };
        if (!floating && size > 0 && !same()) {
            raise<dtype_mismatch>(error_code::not_mergeable,
                message("tensor '", name, "' of dtype ", to_string(tensor.dtype), " differs between ", label(t),
                    " and ", reference_label(), ": only floating tensors can be merged; exclude it to keep the one of ",
                    reference_label()));
        }
    }

    model_options options_;
    memory_space space_;
    std::shared_ptr<std::vector<tensor_spec>> outputs_ =
        std::make_shared<std::vector<tensor_spec>>(); // complete once constructed: copies and parts share it
    std::vector<aligned_tensor> tensors_;
    std::vector<copied_tensor> copied_;
    std::vector<std::size_t> first_chunk_;
    std::vector<std::size_t> filled_;
    std::uint64_t elements_ = 0;
    std::size_t task_count_ = 0;
    bool has_base_ = false, any_wide_ = false, computed_ = false;
};

namespace detail {
/// A model that is one flat view: how the typed functions use the model-wide machinery.
template <class T, memory_space S>
[[nodiscard]] const_model_ref flat_model(view<T, S> values, std::string_view name = "values")
{
    const_model_ref model;
    model.insert(std::string(name), as_tensor(view<const std::remove_const_t<T>, S>(values)));
    return model;
}

/// What every walk over models says of NaN or infinity in an input.
[[noreturn]] TASKVEC_COLD inline void refuse_nonfinite(
    std::string_view tensor, std::string_view where, double found, std::uint64_t index)
{
    raise<nonfinite_error>(error_code::not_finite,
        message("tensor '", tensor, "' of ", where, " holds ", std::isnan(found) ? "NaN" : "infinity", " at index ",
            index, ": repair it, exclude the tensor, or ask for non-finite values to propagate"));
}
} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
