// Aligned models as the gpu policy walks over them: piece by piece, with NaN and infinity found on the way.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/device/models/elements.hpp>
#include <taskvec/device/thrust/sweep.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The range of all tensors.
[[nodiscard]] inline tensor_range all_tensors(const aligned_models& models) noexcept
{
    return {0, models.tensors().size()};
}

/// Calls use(std::type_identity<A>{}) with the arithmetic type of a tensor.
template <class Use>
decltype(auto) visit_arithmetic(const aligned_tensor& tensor, Use&& use)
{
    return tensor.wide ? use(std::type_identity<double>{}) : use(std::type_identity<float>{});
}

/// What an algorithm of the gpu policy is written on: models of which it sees one piece at a time, in device memory,
/// whether they live there (resident_models) or pass through (streamed_models). Pieces start at multiples of 4096
/// elements of their tensor. `beside`: operands that a method reads besides the models, as many for each tensor, in the
/// order of tensors().
class device_models {
public:
    /// Queues work on the policy that it is handed: its stream is that of the piece. Reads of what an earlier walk
    /// left, and writes of integers by atomics, need no other order.
    using piece_body = std::function<void(const gpu& policy, std::size_t tensor, const device_piece& piece)>;

    /// Over models and what lies beside them, which outlive it. Errors: invalid_argument for a task that is worked out
    /// as it is read; backend_error.
    device_models(const gpu& policy, const aligned_models& models, std::span<const aligned_tensor::operand> beside)
        : policy_(policy)
        , models_(&models)
        , beside_(beside.begin(), beside.end())
        , beside_each_(models.tensors().empty() ? 0 : beside.size() / models.tensors().size())
    {
        if (models.computed()) {
            raise<invalid_argument>(error_code::device_unavailable,
                "a task that is worked out from a base and an adapter is merged on the CPU: use the cpu policy, or "
                "store the model first (fuse)");
        }
        if (models.options().on_nonfinite == nonfinite::error) {
            least_ = device::buffer<elementwise::counter>(policy, std::vector{none});
        }
    }
    device_models(const device_models&) = delete;
    device_models& operator=(const device_models&) = delete;
    virtual ~device_models() = default;

    /// Where walks run.
    [[nodiscard]] const gpu& policy() const noexcept { return policy_; }
    /// The models.
    [[nodiscard]] const aligned_models& models() const noexcept { return *models_; }
    /// Operands of a piece: the base, the tasks, what lies beside.
    [[nodiscard]] std::size_t operand_count() const noexcept { return 1 + models_->task_count() + beside_each_; }
    /// Operand number `which` of a tensor: 0 is the base, then the tasks, then what lies beside.
    [[nodiscard]] const aligned_tensor::operand& operand(std::size_t tensor, std::size_t which) const noexcept
    {
        const aligned_tensor& of = models_->tensors()[tensor];
        if (which == 0) { return of.base; }
        return which <= of.tasks.size() ? of.tasks[which - 1]
                                        : beside_[tensor * beside_each_ + which - 1 - of.tasks.size()];
    }
    /// Whether the base, the tasks and the output of a tensor have one dtype.
    [[nodiscard]] bool alike(std::size_t tensor) const noexcept
    {
        const aligned_tensor& of = models_->tensors()[tensor];
        bool result = !of.base.data || of.base.dtype == of.output_dtype;
        for (const auto& task : of.tasks) { result = result && task.dtype == of.output_dtype; }
        return result;
    }
    /// Where functors note the least place of NaN or infinity; null where it may spread.
    [[nodiscard]] elementwise::counter* nonfinite_flag() const noexcept { return least_.data(); }

    /// Calls body for every piece of a range of tensors. What it queued comes before everything that is queued on
    /// policy() afterwards. Operands before `first` are not looked at: they need not come along, and may be null.
    void read(tensor_range range, const piece_body& body, std::size_t first = 0) { walk(range, false, first, body); }
    /// The same, and each piece has an output, which is stored when body's work is done.
    void write(tensor_range range, const piece_body& body) { walk(range, true, 0, body); }
    /// Calls body once, with a piece that holds the elements [offset, offset + size) of a tensor, and may hold more.
    virtual void read_part(std::size_t tensor, std::uint64_t offset, std::uint64_t size, const piece_body& body) = 0;
    /// Elements runs.at(0) … runs.at(count − 1) of a tensor's output = x + y, of doubles in device memory: for what is
    /// not merged piece by piece. Queued on policy(), before everything that is queued there afterwards.
    virtual void store(std::size_t tensor, const elementwise::strided_runs& runs, std::uint64_t count, const double* x,
        const double* y) = 0;
    /// Writes the tensors that take no part.
    virtual void copy_through() = 0;
    /// Throws nonfinite_error if an input that was read holds NaN or infinity, unless they may spread. Waits.
    void check_finite()
    {
        if (least_.size() == 0) { return; }
        const elementwise::counter place = least_.download()[0];
        if (place == none) { return; }
        const std::size_t tensor = models_->tensor_at(place);
        const aligned_tensor& of = models_->tensors()[tensor];
        for (std::size_t which = of.base.data ? 0 : 1; which <= of.tasks.size(); ++which) {
            const double found = element(tensor, which, place - of.position);
            if (std::isfinite(found)) { continue; }
            detail::refuse_nonfinite(of.name, which == 0 ? models_->options().base_label : models_->label(which - 1),
                found, place - of.position);
        }
    }
    /// Where the models are.
    [[nodiscard]] virtual memory_space space() const noexcept = 0;
    /// Bytes of device memory that a method may take to spare itself a read of the models.
    [[nodiscard]] virtual std::size_t spare() const noexcept = 0;
    /// Element i of an operand, brought to the host.
    [[nodiscard]] virtual double element(std::size_t tensor, std::size_t which, std::uint64_t i) const = 0;

    /// What a flag of places holds while nothing was noted.
    static constexpr elementwise::counter none = std::numeric_limits<elementwise::counter>::max();

protected:
    /// Calls body(policy, tensor, piece) for every piece of the tensors in `range`; `writes`: pieces have
    /// outputs. Operands before `first` are not looked at.
    virtual void walk(tensor_range range, bool writes, std::size_t first, const piece_body& body) = 0;

private:
    gpu policy_;
    const aligned_models* models_;
    std::vector<aligned_tensor::operand> beside_;
    std::size_t beside_each_;
    device::buffer<elementwise::counter> least_;
};

/// Models that live in device memory, and outputs that do: a tensor is one piece. `out` (of which only direct() is
/// used) may be null for walks that only read. Errors: invalid_argument for elements that are not aligned to their
/// size.
class resident_models final : public device_models {
public:
    /// `out`: null, or what has the outputs' device memory by direct().
    resident_models(const gpu& policy, const aligned_models& models, tensor_sink* out = nullptr,
        std::span<const aligned_tensor::operand> beside = {})
        : device_models(policy, models, beside)
        , out_(out)
    {
        std::vector<aligned_tensor::operand> table;
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            const aligned_tensor& tensor = models.tensors()[i];
            for (std::size_t which = 0; which < operand_count(); ++which) {
                table.push_back(operand(i, which));
                check_alignment(table.back().data, table.back().dtype, tensor.name);
            }
            if (out) { check_alignment(out->direct(tensor.output), tensor.output_dtype, tensor.name); }
        }
        table_ = device::buffer<aligned_tensor::operand>(policy, table);
    }

    void copy_through() override
    {
        for (const auto& tensor : models().copied()) {
            device::copy(policy(), out_->direct(tensor.output), tensor.source.data, tensor.source.bytes());
        }
    }
    void store(std::size_t tensor, const elementwise::strided_runs& runs, std::uint64_t count, const double* x,
        const double* y) override
    {
        const aligned_tensor& of = models().tensors()[tensor];
        device::sweep(policy(), count, elementwise::store_sum{x, y, out_->direct(of.output), of.output_dtype, runs});
    }
    [[nodiscard]] memory_space space() const noexcept override { return memory_space::device; }
    [[nodiscard]] std::size_t spare() const noexcept override
    {
        return std::max<std::size_t>(std::size_t{16} << 20, models().bytes() / 8);
    }
    void read_part(std::size_t tensor, std::uint64_t, std::uint64_t, const piece_body& body) override
    {
        walk({tensor, tensor + 1}, false, 0, body);
    }
    [[nodiscard]] double element(std::size_t tensor, std::size_t which, std::uint64_t i) const override
    {
        const aligned_tensor::operand& from = operand(tensor, which);
        const std::size_t width = bits_per_element(from.dtype) / 8;
        alignas(8) std::byte word[8];
        device::download(policy(), word, from.data + i * width, width);
        return elementwise::load<double>({word, from.dtype}, 0);
    }

protected:
    /// One piece for each tensor.
    void walk(tensor_range range, bool writes, std::size_t, const piece_body& body) override
    {
        for (std::size_t i = range.first; i < range.last; ++i) {
            const aligned_tensor& tensor = models().tensors()[i];
            if (tensor.size == 0) { continue; }
            body(policy(), i,
                {table_.data() + i * operand_count(), models().task_count(), 0, tensor.position, tensor.size,
                    writes ? out_->direct(tensor.output) : nullptr, tensor.output_dtype,
                    alike(i) && aligned_for_packs(tensor)});
        }
    }

private:
    [[nodiscard]] bool aligned_for_packs(const aligned_tensor& tensor) const
    {
        const auto at_16 = [](const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; };
        bool result = at_16(tensor.base.data) && (!out_ || at_16(out_->direct(tensor.output)));
        for (const auto& task : tensor.tasks) { result = result && at_16(task.data); }
        return result;
    }
    static void check_alignment(const void* data, taskvec::dtype type, const std::string& name)
    {
        const std::size_t width = bits_per_element(type) / 8;
        if (reinterpret_cast<std::uintptr_t>(data) % width == 0) { return; }
        raise<invalid_argument>(error_code::tensor_layout,
            message("tensor '", name, "' is not aligned to its elements of ", width,
                " bytes in device memory: copy it to memory that is"));
    }

    tensor_sink* out_;
    device::buffer<aligned_tensor::operand> table_;
};

namespace elementwise {

TASKVEC_KERNELS_BEGIN

/// Raises *flag where two runs of bytes differ.
struct bytes_differ {
    const unsigned char *a, *b;
    counter* flag;

    TASKVEC_FUNCTOR void operator()(const indices& at) const
    {
        bool differ = false;
        for (std::uint64_t i = at.first; i < at.last; i += at.step) { differ = differ || a[i] != b[i]; }
        if (differ) { atomic_add(flag, 1); }
    }
};

TASKVEC_KERNELS_END

} // namespace elementwise

/// aligned_models of tensors in device memory. Integer tensors are compared there, for which it waits. Errors: as
/// aligned_models.
[[nodiscard]] inline aligned_models align_on_device(const gpu& policy, const const_model_ref* base,
    std::span<const const_model_ref> tasks, const model_options& how = {})
{
    const auto equal = [&](const void* a, const void* b, std::size_t bytes) {
        device::buffer<elementwise::counter> flag(policy, 1);
        flag.clear();
        device::sweep(policy, bytes,
            elementwise::bytes_differ{
                static_cast<const unsigned char*>(a), static_cast<const unsigned char*>(b), flag.data()});
        return flag.download()[0] == 0;
    };
    return {base, tasks, how, memory_space::device, equal};
}

} // namespace taskvec::inline TASKVEC_ABI
