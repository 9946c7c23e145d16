// Models on the host that pass through device memory, piece by piece: for models that are larger than it.
// SPDX-License-Identifier: Apache-2.0
//
// Two pieces are under way at any time, each in a pinned buffer of the host, a buffer of the device and a stream of its
// own: while one is copied and worked on, the host fills the other and stores what came back.
#pragma once

#include <taskvec/core/parallel.hpp>
#include <taskvec/device/models/device_models.hpp>
#include <taskvec/device/stream.hpp>
#include <taskvec/models/copy_through.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// How models stream through a device. None of it changes a bit of the result.
struct stream_options {
    /// Bytes of device memory for the pieces, and as many pinned ones on the host; at least two pieces of 4096
    /// elements. Selection takes up to half as much again on the device for what it collects.
    std::size_t memory = std::size_t{1} << 30;
    cpu host{}; ///< fills the buffers; its progress callback is called, and may stop the work
};

/// device_models over models in host memory and a sink on the host. Errors: those of the device, cancelled, what the
/// sink throws.
class streamed_models final : public device_models {
public:
    /// `out`: null, or the sink on the host that merged pieces go to.
    streamed_models(const gpu& policy, const aligned_models& models, const stream_options& options,
        tensor_sink* out = nullptr, std::span<const aligned_tensor::operand> beside = {})
        : device_models(policy, models, beside)
        , options_(options)
        , out_(out)
    {
        for (const auto& tensor : models.tensors()) {
            if (tensor.base.source || std::any_of(tensor.tasks.begin(), tensor.tasks.end(), [](const auto& task) {
                    return task.source != nullptr;
                })) {
                detail::refuse_source(tensor.name);
            }
        }
        device::require_device();
        std::size_t largest = 0;
        for (std::size_t i = 0; i < models.tensors().size(); ++i) {
            largest = std::max(
                largest, layout(i, std::min<std::uint64_t>(models.tensors()[i].size, most_elements(i)), true, 0).size);
        }
        for (slot& one : slots_) {
            one.stream.emplace(policy);
            one.host = device::pinned_memory(largest);
            one.device = device::buffer<std::byte>(policy, largest);
        }
    }
    ~streamed_models() override
    {
        for (slot& one : slots_) { one.stream.reset(); } // waits: the buffers may go
    }

    void read_part(std::size_t tensor, std::uint64_t offset, std::uint64_t size, const piece_body& body) override
    {
        start();
        send(slots_[0], tensor, offset, size, false, 0, body);
        stop();
    }
    void store(std::size_t tensor, const elementwise::strided_runs& runs, std::uint64_t count, const double* x,
        const double* y) override
    {
        const aligned_tensor& of = models().tensors()[tensor];
        device::buffer<std::byte> dense(policy(), byte_count(of.output_dtype, count));
        device::sweep(policy(), count, elementwise::store_sum{x, y, dense.data(), of.output_dtype, {0, count, count}});
        const std::vector<std::byte> bytes = dense.download();
        for (std::uint64_t k = 0; k < count; k += runs.length) {
            out_->write(of.output, byte_count(of.output_dtype, runs.at(k)),
                bytes.data() + byte_count(of.output_dtype, k), byte_count(of.output_dtype, runs.length));
        }
    }
    [[nodiscard]] memory_space space() const noexcept override { return memory_space::host; }
    [[nodiscard]] std::size_t spare() const noexcept override { return options_.memory / 2; }
    void copy_through() override { detail::copy_through(quiet(), models(), *out_); }
    [[nodiscard]] double element(std::size_t tensor, std::size_t which, std::uint64_t i) const override
    {
        const aligned_tensor::operand& from = operand(tensor, which);
        const std::size_t width = bits_per_element(from.dtype) / 8;
        alignas(8) std::byte word[8];
        std::memcpy(word, from.data + i * width, width);
        return elementwise::load<double>({word, from.dtype}, 0);
    }

protected:
    /// Pieces of as many elements as the buffers hold, each brought to the device before and back after.
    void walk(tensor_range range, bool writes, std::size_t first, const piece_body& body) override
    {
        std::uint64_t total = 0;
        for (std::size_t i = range.first; i < range.last; ++i) {
            total += models().tensors()[i].bytes(models().tensors()[i].size);
        }
        detail::progress_meter meter(options_.host, writes ? "merge" : "read", total);
        start();
        std::size_t next = 0;
        for (std::size_t i = range.first; i < range.last; ++i) {
            const std::uint64_t size = models().tensors()[i].size, most = most_elements(i);
            for (std::uint64_t offset = 0; offset < size; offset += most) {
                const std::uint64_t count = std::min(most, size - offset);
                send(slots_[next++ % slots_.size()], i, offset, count, writes, first, body);
                if (!meter.advance(models().tensors()[i].bytes(count))) { raise<cancelled>(error_code::cancelled); }
            }
        }
        stop();
    }

private:
    static constexpr std::size_t step = 4096; // pieces start at multiples of it
    static constexpr std::size_t alignment = 256;

    struct slot {
        std::optional<device::side_stream> stream{};
        device::pinned_memory host{};
        device::buffer<std::byte> device{};
        bool busy = false;
        std::size_t output = 0; // what comes back: a tensor's bytes, and where they lie
        std::uint64_t first_byte = 0;
        std::size_t place = 0, bytes = 0;
    };
    /// Where the table, the operands and the output of a piece lie in a buffer.
    struct piece_layout {
        std::vector<std::size_t> operands{};
        std::size_t output = 0, size = 0;
    };

    [[nodiscard]] piece_layout layout(std::size_t tensor, std::uint64_t elements, bool writes, std::size_t first) const
    {
        const auto round = [](std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; };
        piece_layout result;
        result.size = round(operand_count() * sizeof(aligned_tensor::operand));
        for (std::size_t which = 0; which < operand_count(); ++which) {
            result.operands.push_back(result.size);
            const aligned_tensor::operand& from = operand(tensor, which);
            if (from.data && which >= first) { result.size += round(byte_count(from.dtype, elements)); }
        }
        result.output = result.size;
        if (writes) { result.size += round(byte_count(models().tensors()[tensor].output_dtype, elements)); }
        return result;
    }
    /// The most elements of a tensor that half the budget holds, a multiple of `step`, and at least one.
    [[nodiscard]] std::uint64_t most_elements(std::size_t tensor) const
    {
        const std::size_t fixed = layout(tensor, 0, true, 0).size + (operand_count() + 1) * alignment;
        std::size_t each = byte_count(models().tensors()[tensor].output_dtype, step);
        for (std::size_t which = 0; which < operand_count(); ++which) {
            if (operand(tensor, which).data) { each += byte_count(operand(tensor, which).dtype, step); }
        }
        const std::size_t half = options_.memory / 2;
        return std::max<std::uint64_t>(1, half > fixed ? (half - fixed) / each : 0) * step;
    }

    [[nodiscard]] cpu quiet() const
    {
        cpu policy = options_.host;
        policy.progress = {};
        return policy;
    }

    void start()
    {
        for (slot& one : slots_) { device::follow(policy(), one.stream->policy()); }
    }
    void stop()
    {
        for (slot& one : slots_) {
            finish(one);
            device::follow(one.stream->policy(), policy());
        }
    }

    /// Waits for a slot, and stores what came back.
    void finish(slot& one)
    {
        if (!one.busy) { return; }
        device::synchronize(one.stream->policy());
        one.busy = false;
        if (one.bytes > 0) { out_->write(one.output, one.first_byte, one.host.data() + one.place, one.bytes); }
    }

    void send(slot& one, std::size_t tensor, std::uint64_t offset, std::uint64_t size, bool writes, std::size_t first,
        const piece_body& body)
    {
        finish(one);
        const aligned_tensor& of = models().tensors()[tensor];
        const piece_layout places = layout(tensor, size, writes, first);
        auto* const table = reinterpret_cast<aligned_tensor::operand*>(one.host.data());
        for (std::size_t which = 0; which < operand_count(); ++which) {
            const aligned_tensor::operand& from = operand(tensor, which);
            const bool comes = from.data && which >= first;
            table[which] = {comes ? one.device.data() + places.operands[which] : nullptr, from.dtype};
            if (comes) {
                fill(one.host.data() + places.operands[which], from.data + byte_count(from.dtype, offset),
                    byte_count(from.dtype, size));
            }
        }
        const gpu& lane = one.stream->policy();
        one.busy = true;
        one.bytes = 0;
        device::upload(lane, one.device.data(), one.host.data(), places.output);
        body(lane, tensor,
            {reinterpret_cast<const aligned_tensor::operand*>(one.device.data()), models().task_count(), offset,
                of.position + offset, size, writes ? one.device.data() + places.output : nullptr, of.output_dtype,
                alike(tensor)});
        if (!writes) { return; }
        one.output = of.output;
        one.first_byte = byte_count(of.output_dtype, offset);
        one.place = places.output;
        one.bytes = byte_count(of.output_dtype, size);
        device::download_later(lane, one.host.data() + places.output, one.device.data() + places.output, one.bytes);
    }

    /// A copy within host memory, by as many threads as the policy allows.
    void fill(std::byte* to, const std::byte* from, std::size_t bytes) const
    {
        constexpr std::size_t part = std::size_t{4} << 20;
        for_each_index(quiet(), (bytes + part - 1) / part, [&](std::size_t i, std::size_t) {
            std::memcpy(to + i * part, from + i * part, std::min(part, bytes - i * part));
        });
    }

    stream_options options_;
    tensor_sink* out_;
    std::array<slot, 2> slots_;
};

} // namespace taskvec::inline TASKVEC_ABI
