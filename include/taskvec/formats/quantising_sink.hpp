// Results of quantised layers, written as codes and scales again.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/float_bits.hpp>
#include <taskvec/core/half.hpp>
#include <taskvec/core/overflow.hpp>
#include <taskvec/core/sink.hpp>
#include <taskvec/core/tensor_ref.hpp>
#include <taskvec/formats/file.hpp>
#include <taskvec/formats/quantised.hpp>
#include <taskvec/formats/system.hpp>
#include <taskvec/models/aligned_models.hpp>
#include <taskvec/models/operand_source.hpp>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Quantises numbers as a scaled FP8 layer is, with fresh scales: for each group that shares a scale, the largest
/// finite magnitude over the largest number of the codes (448 for E4M3, 57344 for E5M2), rounded to the scale's dtype
/// (up to a power of two where the layer has those); 1 for a group of zeros. A code is the number over the scale as
/// stored, rounded to nearest even and saturated. NaN stays NaN, infinity becomes NaN in E4M3. `out` receives codes as
/// tensor `codes` and scales as tensor `scales`. Throws nonfinite_error for a scale that its dtype cannot hold. Error:
/// at most half a unit of the codes' last place times the scale. Cost: two reads of the numbers.
inline void quantise_fp8(
    const quantised_layer& like, const float* values, tensor_sink& out, std::size_t codes, std::size_t scales);

namespace detail {

/// A power of two that is at least `value`.
[[nodiscard]] inline float power_above(float value) noexcept
{
    int exponent = 0;
    return std::frexp(value, &exponent) == 0.5f ? value : std::ldexp(1.0f, exponent);
}

/// The word of a scale in its dtype, and the number that it then stands for.
struct stored_scale {
    std::uint64_t word = 0;
    float value = 0;
};
[[nodiscard]] inline stored_scale store_scale(dtype type, float scale) noexcept
{
    switch (type) {
    case dtype::f16: {
        const auto word = f32_to_f16(std::max(scale, 0x1p-14f));
        return {word, f16_to_f32(word)};
    }
    case dtype::bf16: {
        const auto word = f32_to_bf16(std::max(scale, 0x1p-126f));
        return {word, bf16_to_f32(word)};
    }
    case dtype::f64: {
        const double value = std::max(scale, 0x1p-126f);
        return {reinterpret_bits<std::uint64_t>(value), static_cast<float>(value)};
    }
    case dtype::f8_e8m0: {
        const float value = power_above(std::max(scale, 0x1p-126f));
        return {reinterpret_bits<std::uint32_t>(value) >> 23, value};
    }
    default: {
        const float value = std::max(scale, 0x1p-126f);
        return {reinterpret_bits<std::uint32_t>(value), value};
    }
    }
}

/// Whether a finite number rounds to none that fp8 holds: beyond the middle between the largest one and what would
/// come next.
[[nodiscard]] inline bool overflows_fp8(float value, bool wide) noexcept
{
    const float magnitude = std::abs(value);
    return wide ? magnitude >= 61440.0f : magnitude > 464.0f;
}
/// What an overflow becomes where it propagates: infinity, or NaN in E4M3, which has none.
[[nodiscard]] inline std::uint8_t fp8_infinity(bool negative, bool wide) noexcept
{
    return static_cast<std::uint8_t>((negative ? 0x80u : 0u) | (wide ? 0x7cu : 0x7fu));
}

} // namespace detail

inline void quantise_fp8(
    const quantised_layer& like, const float* values, tensor_sink& out, std::size_t codes, std::size_t scales)
{
    const std::uint64_t size = element_count(like.shape), groups = element_count(like.grid);
    const std::uint64_t columns = like.shape.empty() ? 1 : static_cast<std::uint64_t>(like.shape.back());
    const std::uint64_t width = like.shape.empty() ? 1 : static_cast<std::uint64_t>(like.block.back());
    const bool wide = like.codes.dtype == dtype::f8_e5m2;
    const auto each_run = [&](const auto& body) { // body(scale, first, count): numbers in a row that share a scale
        for (std::uint64_t row = 0; row * columns < size; ++row) {
            const std::uint64_t first = detail::first_scale(like, row);
            for (std::uint64_t at = 0; at < columns; at += width) {
                body(first + at / width, row * columns + at, std::min(width, columns - at));
            }
        }
    };
    std::vector<float> scale(groups, 0.0f);
    each_run([&](std::uint64_t group, std::uint64_t first, std::uint64_t count) {
        float most = scale[group];
        for (std::uint64_t i = first; i < first + count; ++i) {
            const float magnitude = std::abs(values[i]);
            most = magnitude > most && magnitude <= std::numeric_limits<float>::max() ? magnitude : most;
        }
        scale[group] = most;
    });
    const std::size_t word_bytes = bits_per_element(like.scales.dtype) / 8;
    std::vector<std::byte> words(groups * word_bytes);
    for (std::uint64_t g = 0; g < groups; ++g) {
        float wanted = scale[g] == 0 ? 1.0f : scale[g] / (wide ? 57344.0f : 448.0f);
        if (like.powers_of_two && wanted > 0x1p-126f) { wanted = detail::power_above(wanted); }
        const auto stored = detail::store_scale(like.scales.dtype, wanted);
        if (!std::isfinite(stored.value)) {
            raise<nonfinite_error>(error_code::result_overflow,
                message("layer '", like.name, "' would have the scale ", wanted, ", which ",
                    to_string(like.scales.dtype), " cannot hold: choose a dtype that is not quantised"));
        }
        std::memcpy(words.data() + g * word_bytes, &stored.word, word_bytes);
        scale[g] = stored.value;
    }
    if (!words.empty()) { out.write(scales, 0, words.data(), words.size()); }
    std::vector<std::uint8_t> buffer(static_cast<std::size_t>(std::min<std::uint64_t>(size, 1u << 18)));
    std::uint64_t begin = 0, held = 0;
    each_run([&](std::uint64_t group, std::uint64_t first, std::uint64_t count) {
        const float by = scale[group];
        for (std::uint64_t i = first; i < first + count; ++i) {
            buffer[held++] = wide ? f32_to_e5m2(values[i] / by) : f32_to_e4m3(values[i] / by);
            if (held == buffer.size()) {
                out.write(codes, begin, buffer.data(), held);
                begin += held;
                held = 0;
            }
        }
    });
    if (held > 0) { out.write(codes, begin, buffer.data(), held); }
}

/// What the outputs of aligned models become in a file: numbers, or a layer's codes and scales.
struct quantised_outputs {
    /// What becomes of an output.
    enum class way : std::uint8_t {
        numbers, ///< as the algorithm writes them
        rounded, ///< its numbers, each rounded to fp8 that has no scale
        quantised, ///< quantised again, by the layer's own scheme
        as_stored ///< a layer that takes no part: its tensors as they are
    };
    /// One output of the aligned models.
    struct output {
        way how = way::numbers; ///< what becomes of it
        std::size_t first = 0; ///< its tensor in `specs`, or the first of them (codes; scales come next)
        const quantised_layer* layer = nullptr; ///< of one that is quantised, or as stored
    };
    /// A tensor of the file that comes from elsewhere as it is.
    struct copy {
        std::size_t spec = 0; ///< its place in `specs`
        const_tensor_ref source{}; ///< its bytes
    };
    std::vector<output> outputs; ///< for each of aligned_models::outputs()
    std::vector<tensor_spec> specs; ///< of the file
    std::vector<copy> copies; ///< what the file holds of `specs` as it is
    std::vector<std::string> left_out; ///< tensors about the quantisation that the file has no more
    std::size_t dequantised = 0; ///< layers that become numbers
    std::size_t requantised = 0; ///< layers that are quantised again
    std::size_t rounded = 0; ///< tensors in fp8 without scales that stay it
    overflow on_overflow = overflow::error; ///< what becomes of a number that these cannot hold

    /// Whether the file holds what the algorithm writes, and nothing else.
    [[nodiscard]] bool plain() const noexcept
    {
        return copies.empty() && requantised == 0 && rounded == 0
            && std::all_of(outputs.begin(), outputs.end(), [](const output& one) { return one.how == way::numbers; });
    }
};

/// Plans the outputs of models whose reference (the base, or the first task) has quantised layers, `layers`; null where
/// it has none. `quantise`: whether merged layers are quantised again, and tensors in fp8 without scales are rounded to
/// it again; otherwise they become numbers of the output's dtype. Layers that take no part stay as they are stored,
/// unless the models ask for one dtype throughout. Throws dtype_mismatch for a layer to be quantised again by a scheme
/// that is only read.
[[nodiscard]] inline quantised_outputs plan_outputs(
    const aligned_models& models, const const_model_ref& reference, const quantised_layers* layers, bool quantise)
{
    using way = quantised_outputs::way;
    quantised_outputs plan;
    plan.on_overflow = models.options().on_overflow;
    std::vector<bool> copied(models.outputs().size());
    for (const auto& tensor : models.copied()) { copied[tensor.output] = true; }
    std::map<const operand_source*, const quantised_layer*> by_source;
    if (layers) {
        for (const auto& tensor : layers->layers()) { by_source.emplace(&tensor, &tensor.layer()); }
    }
    bool any_layer = false;
    for (std::size_t i = 0; i < models.outputs().size(); ++i) {
        const auto& spec = models.outputs()[i];
        const auto* const tensor = reference.find(spec.name);
        const auto found = tensor && tensor->source ? by_source.find(tensor->source) : by_source.end();
        const auto* const layer = found != by_source.end() ? found->second : nullptr;
        quantised_outputs::output one{way::numbers, plan.specs.size(), layer};
        if (layer && copied[i] && !models.options().output) { one.how = way::as_stored; }
        if (layer && !copied[i] && quantise) { one.how = way::quantised; }
        if (one.how == way::quantised && layer->scheme != quantisation::fp8) {
            raise<dtype_mismatch>(error_code::output_dtype,
                message("layer '", spec.name, "' is ", to_string(layer->scheme),
                    ", which is read and not written: choose a dtype for the result, f32 or bf16"));
        }
        if (!layer && !copied[i] && quantise && tensor && is_dequantised(tensor->dtype) && spec.dtype == dtype::f32) {
            one.how = way::rounded;
            ++plan.rounded;
            plan.specs.push_back({spec.name, tensor->dtype, spec.shape});
        }
        else if (one.how == way::numbers) {
            plan.specs.push_back(spec);
            plan.dequantised += layer ? 1 : 0;
            if (layer) {
                for (std::size_t p = 2; p < layer->parts.size(); ++p) {
                    plan.left_out.push_back(std::string(layer_stem(spec.name)) + layer->parts[p].leaf);
                }
            }
        }
        else {
            any_layer = true;
            plan.requantised += one.how == way::quantised ? 1 : 0;
            for (std::size_t p = 0; p < layer->parts.size(); ++p) {
                const auto& part = layer->parts[p];
                if (p >= 2 || one.how == way::as_stored) { plan.copies.push_back({plan.specs.size(), part.tensor}); }
                plan.specs.push_back(
                    {std::string(layer_stem(spec.name)) + part.leaf, part.tensor.dtype, part.tensor.shape});
            }
        }
        plan.outputs.push_back(one);
    }
    for (const auto& [name, tensor] : layers ? layers->beside() : const_model_ref()) {
        if (!any_layer) {
            plan.left_out.push_back(name);
            continue;
        }
        plan.copies.push_back({plan.specs.size(), tensor});
        plan.specs.push_back({name, tensor.dtype, tensor.shape});
    }
    return plan;
}

/// The sink between a walk over models and the file that a plan describes. The numbers of a layer that is quantised
/// again are gathered until all are there (in memory up to a MiB, otherwise in a file without a name in `folder`,
/// mapped) and then become codes and scales: a walk that takes tensors in order has few of them open at once, whatever
/// the model's size. What stays fp8 without a scale is rounded as it comes, to nearest even. Each byte has to be
/// written once. finish() writes what is copied. Throws what the file's sink throws, io_error; nonfinite_error for a
/// number that fp8 cannot hold, unless that saturates or propagates.
///
///     const auto plan = plan_outputs(models, base.model(), base.layers(), true);
///     safetensors_writer file(path, plan.specs);
///     quantising_sink out(plan, file, path.parent_path());
///     merge(cpu{}, options, models, out);
///     out.finish();
class quantising_sink final : public tensor_sink {
public:
    /// Between a walk and `out`, the sink of the file that `plan` describes; both outlive it. `folder`: for what is
    /// gathered beyond memory.
    quantising_sink(const quantised_outputs& plan, tensor_sink& out, std::filesystem::path folder)
        : plan_(&plan)
        , out_(&out)
        , folder_(std::move(folder))
    {
        gathered_.resize(plan.outputs.size());
        for (std::size_t i = 0; i < plan.outputs.size(); ++i) {
            if (plan.outputs[i].how == quantised_outputs::way::quantised) {
                gathered_[i] = std::make_unique<gathering>();
            }
        }
    }

    [[nodiscard]] void* direct(std::size_t index) override
    {
        const auto& output = plan_->outputs[index];
        return output.how == quantised_outputs::way::numbers ? out_->direct(output.first) : nullptr;
    }
    /// Not where layers are quantised again: their numbers are gone once all are there.
    [[nodiscard]] bool rewritable() const override
    {
        return out_->rewritable() && plan_->rounded == 0
            && std::all_of(gathered_.begin(), gathered_.end(), [](const auto& layer) { return !layer; });
    }
    [[nodiscard]] bool wants(std::size_t index) const override
    {
        const auto& output = plan_->outputs[index];
        return output.how != quantised_outputs::way::numbers || out_->wants(output.first);
    }
    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        const auto& output = plan_->outputs[index];
        switch (output.how) {
        case quantised_outputs::way::numbers: out_->write(output.first, offset, data, size); break;
        case quantised_outputs::way::rounded: round(output, offset, data, size); break;
        case quantised_outputs::way::as_stored: break;
        case quantised_outputs::way::quantised: gather(index, offset, data, size); break;
        }
    }
    void write_bounded(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        const auto& output = plan_->outputs[index];
        if (output.how == quantised_outputs::way::numbers) { out_->write_bounded(output.first, offset, data, size); }
        else {
            write(index, offset, data, size);
        }
    }

    /// Numbers that became the largest one of their fp8 (overflow::saturate).
    [[nodiscard]] std::uint64_t saturated() const noexcept { return saturated_.load(); }

    /// Writes what is copied. Throws invalid_argument where a layer was not written whole.
    void finish()
    {
        for (std::size_t i = 0; i < gathered_.size(); ++i) {
            if (!gathered_[i] || gathered_[i]->done) { continue; }
            const auto& output = plan_->outputs[i];
            if (element_count(output.layer->shape) > 0) {
                raise<invalid_argument>(error_code::call_order,
                    message("layer '", output.layer->name, "' is incomplete: ", gathered_[i]->received.load(),
                        " bytes of its numbers were written"));
            }
            quantise_fp8(*output.layer, nullptr, *out_, output.first, output.first + 1);
        }
        for (const auto& [spec, source] : plan_->copies) {
            if (const std::size_t bytes = source.bytes(); bytes > 0) { out_->write(spec, 0, source.data, bytes); }
        }
    }

private:
    /// The numbers of one layer.
    struct gathering {
        std::mutex lock;
        std::vector<float> in_memory;
        float* values = nullptr;
        std::size_t mapped = 0; ///< bytes of the map
        std::atomic<std::uint64_t> received{0};
        bool done = false;

        gathering() = default;
        gathering(const gathering&) = delete;
        gathering& operator=(const gathering&) = delete;
        ~gathering() { release(); }
        void release() noexcept
        {
            if (mapped > 0) { detail::system::unmap(values, mapped); }
            mapped = 0;
            values = nullptr;
            in_memory = {};
        }
    };

    void round(const quantised_outputs::output& output, std::uint64_t offset, const void* data, std::size_t size)
    {
        const tensor_spec& spec = plan_->specs[output.first];
        const bool wide = spec.dtype == dtype::f8_e5m2;
        constexpr std::size_t step = 4096;
        std::array<std::uint8_t, step> codes;
        const auto* const words = static_cast<const std::byte*>(data);
        const std::size_t count = size / sizeof(float);
        const std::uint64_t first = offset / sizeof(float);
        std::uint64_t saturated = 0;
        for (std::size_t at = 0; at < count; at += step) {
            const std::size_t n = std::min(step, count - at);
            for (std::size_t i = 0; i < n; ++i) {
                float value;
                std::memcpy(&value, words + (at + i) * sizeof(float), sizeof(float));
                codes[i] = wide ? f32_to_e5m2(value) : f32_to_e4m3(value);
                if (!std::isfinite(value) || !detail::overflows_fp8(value, wide)) { continue; }
                if (plan_->on_overflow == overflow::error) {
                    raise<nonfinite_error>(error_code::result_overflow,
                        message("tensor '", spec.name, "' would hold ", value, " at index ", first + at + i, ", which ",
                            to_string(spec.dtype),
                            " cannot; choose a wider dtype, or let it saturate or propagate (overflow)"));
                }
                if (plan_->on_overflow == overflow::propagate) { codes[i] = detail::fp8_infinity(value < 0, wide); }
                else {
                    ++saturated;
                }
            }
            out_->write(output.first, first + at, codes.data(), n);
        }
        saturated_.fetch_add(saturated, std::memory_order_relaxed);
    }
    void gather(std::size_t index, std::uint64_t offset, const void* data, std::size_t size)
    {
        auto& mine = *gathered_[index];
        const auto& output = plan_->outputs[index];
        const std::uint64_t whole = std::uint64_t{element_count(output.layer->shape)} * sizeof(float);
        {
            const std::lock_guard hold(mine.lock);
            if (mine.done || size > whole || offset > whole - size) {
                raise<invalid_argument>(error_code::index_out_of_range,
                    message("a write of ", size, " bytes at ", offset, " lies outside layer '", output.layer->name,
                        "', or comes after it is whole"));
            }
            if (!mine.values) { prepare(mine, whole); }
        }
        std::memcpy(reinterpret_cast<std::byte*>(mine.values) + offset, data, size);
        if (mine.received.fetch_add(size, std::memory_order_acq_rel) + size < whole) { return; }
        quantise_fp8(*output.layer, mine.values, *out_, output.first, output.first + 1);
        const std::lock_guard hold(mine.lock);
        mine.done = true;
        mine.release();
    }
    void prepare(gathering& mine, std::uint64_t bytes) const
    {
        if (bytes <= std::uint64_t{1} << 20) {
            mine.in_memory.resize(static_cast<std::size_t>(bytes) / sizeof(float));
            mine.values = mine.in_memory.data();
            return;
        }
        void* const memory = detail::map_unnamed_file(folder_, bytes, "a layer that is quantised again");
        mine.values = static_cast<float*>(memory);
        mine.mapped = static_cast<std::size_t>(bytes);
    }

    const quantised_outputs* plan_;
    tensor_sink* out_;
    std::filesystem::path folder_;
    std::vector<std::unique_ptr<gathering>> gathered_;
    std::atomic<std::uint64_t> saturated_{0};
};

} // namespace taskvec::inline TASKVEC_ABI
