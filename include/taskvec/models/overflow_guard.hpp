// Results that an output's dtype cannot hold, found as they are written.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/call_memory.hpp>
#include <taskvec/core/callback.hpp>
#include <taskvec/models/block.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

namespace taskvec::inline TASKVEC_ABI {

/// A sink that looks at what is written for infinity (or NaN) that no input holds at that place: a finite result that
/// the dtype of the output cannot hold. It is an error that names tensor and index, or becomes the dtype's largest
/// number. What an input has of NaN and infinity passes, for model_options::on_nonfinite to judge; so does what a
/// method adds of its own (excuse()). Everything goes through write(): direct() has no memory. Host memory only.
///
/// Cost: one look at each written byte while it is in the cache. None for outputs with the exponents of f32 or f64
/// where what a merge reads stays below 2^64, as weights do: a walk says so by write_bounded(), which is not looked at
/// unless the numbers of a method's options (`gain`, their product) can make a result 2^50 times as large.
///
///     overflow_guard guarded(file, models, overflow::error);
///     merge(cpu{}, ties_options{}, models, guarded);
class overflow_guard final : public tensor_sink {
public:
    /// In front of `out`, which outlives it as the models do; `gain`: how far options may enlarge a result.
    overflow_guard(tensor_sink& out, const aligned_models& models, overflow how, double gain = 1)
        : out_(&out)
        , models_(&models)
        , how_(how)
        , bounded_(gain < 0x1p50)
        , tensors_(models.outputs().size(), nullptr)
    {
        for (const auto& tensor : models.tensors()) { tensors_[tensor.output] = &tensor; }
    }

    /// Another input than the models: whether it has NaN or infinity at an index of models.tensors()[tensor].
    void excuse(callback<bool(std::size_t tensor, std::uint64_t index)> nonfinite) { beside_ = std::move(nonfinite); }

    [[nodiscard]] bool rewritable() const override { return out_->rewritable(); }
    [[nodiscard]] bool wants(std::size_t index) const override { return out_->wants(index); }
    void write(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        const auto* const tensor = tensors_[index];
        if (!tensor || how_ == overflow::propagate || !holds_nonfinite(tensor->output_dtype, data, size)) {
            if (lost_.load(std::memory_order_acquire)) { count(index, offset, 0); }
            out_->write(index, offset, data, size);
            return;
        }
        std::uint64_t saturated = 0;
        call_vector<std::byte> words(static_cast<const std::byte*>(data), static_cast<const std::byte*>(data) + size);
        visit_storage(tensor->output_dtype, tensor->name, [&]<class T>(std::type_identity<T>) {
            for (std::size_t i = 0; i < size / sizeof(T); ++i) {
                storage_word<T> word;
                std::memcpy(&word, words.data() + i * sizeof(T), sizeof(T));
                const auto value = static_cast<double>(widen_word<arithmetic_type<T>, T>(word));
                if (std::isfinite(value)) { continue; }
                const std::uint64_t place = offset / sizeof(T) + i;
                if (any_input_nonfinite(*tensor, place)) { continue; }
                const bool lost = std::isnan(value);
                if (lost && models_->options().on_nonfinite == nonfinite::propagate) { continue; }
                if (how_ == overflow::error || lost) { refuse<T>(*tensor, place, lost); }
                word = static_cast<storage_word<T>>(largest_word<T>(value < 0));
                std::memcpy(words.data() + i * sizeof(T), &word, sizeof(T));
                ++saturated;
            }
        });
        count(index, offset, saturated);
        out_->write(index, offset, words.data(), size);
    }

    void write_bounded(std::size_t index, std::uint64_t offset, const void* data, std::size_t size) override
    {
        bounded_ ? out_->write(index, offset, data, size) : write(index, offset, data, size);
    }

    /// Results that became the largest number of their dtype: of what was written twice, the last.
    [[nodiscard]] std::uint64_t saturated() const
    {
        const std::lock_guard lock(counting_);
        std::uint64_t total = 0;
        for (const auto& [piece, found] : of_pieces_) { total += found; }
        return total;
    }

private:
    template <std::size_t bytes>
    using signed_word_of = std::conditional_t<bytes == 2, std::int16_t,
        std::conditional_t<bytes == 4, std::int32_t, std::conditional_t<bytes == 8, std::int64_t, std::int8_t>>>;

    [[nodiscard]] static bool holds_nonfinite(dtype type, const void* data, std::size_t size);
    /// What is written again comes in the same pieces.
    void count(std::size_t index, std::uint64_t offset, std::uint64_t saturated)
    {
        const std::lock_guard lock(counting_);
        if (saturated == 0) { of_pieces_.erase({index, offset}); }
        else {
            of_pieces_[{index, offset}] = saturated;
            lost_.store(true, std::memory_order_release);
        }
    }
    [[nodiscard]] bool any_input_nonfinite(const aligned_tensor& tensor, std::uint64_t place) const
    {
        if (beside_ && beside_(static_cast<std::size_t>(&tensor - models_->tensors().data()), place)) { return true; }
        const auto wrong = [&](const aligned_tensor::operand& from) {
            alignas(8) std::byte raw[64];
            return from.data && !std::isfinite(detail::with_elements(from, place, 1, raw, [](const auto* value) {
                return static_cast<double>(widen<double>(*value));
            }));
        };
        return wrong(tensor.base) || std::any_of(tensor.tasks.begin(), tensor.tasks.end(), wrong);
    }
    /// "'base' and 'task'": the models, for messages.
    [[nodiscard]] TASKVEC_COLD std::string models_text() const
    {
        const bool base = models_->has_base();
        const std::size_t others = models_->task_count() - (base ? 0 : 1);
        return message(base ? models_->options().base_label : models_->label(0),
            others == 0       ? std::string()
                : others == 1 ? " and " + models_->label(base ? 0 : 1)
                              : message(" and the ", others, base ? " tasks" : " other tasks"));
    }
    template <storage_element T>
    [[noreturn]] TASKVEC_COLD void refuse(const aligned_tensor& tensor, std::uint64_t place, bool lost) const
    {
        raise<nonfinite_error>(error_code::result_overflow,
            message("tensor '", tensor.name, "' would hold ", lost ? "NaN" : "infinity", " at index ", place,
                " though it is finite in ", models_text(), ": ", to_string(dtype_of<T>), " holds numbers up to ",
                detail::largest_number<T>(), "; choose ", detail::if_narrow<T>("a wider dtype or "),
                "smaller factors, or let it saturate or propagate (overflow)"));
    }

    tensor_sink* out_;
    const aligned_models* models_;
    overflow how_;
    bool bounded_; // write_bounded() need not look
    call_vector<const aligned_tensor*> tensors_; // of each output; null for what is copied
    callback<bool(std::size_t, std::uint64_t)> beside_;
    mutable std::mutex counting_;
    std::map<std::pair<std::size_t, std::uint64_t>, std::uint64_t> of_pieces_; // saturated: of output and offset
    std::atomic<bool> lost_{false}; // something of that was ever there
};

namespace detail {

TASKVEC_KERNELS_BEGIN

/// The largest magnitude bits of stored words at any address, as a signed word. Whole numbers: any compiler's are the
/// same, nvcc's too.
template <class Word>
TASKVEC_NOINLINE Word largest_stored(const void* data, std::size_t n, Word magnitude)
{
#if TASKVEC_GNU()
    using word __attribute__((may_alias, aligned(1))) = Word;
    const auto* x = static_cast<const word*>(data);
#else
    struct words {
        const std::byte* at;
        [[nodiscard]] Word operator[](std::size_t i) const noexcept
        {
            Word word;
            std::memcpy(&word, at + i * sizeof word, sizeof word);
            return word;
        }
        void operator+=(std::size_t count) noexcept { at += count * sizeof(Word); }
    } x{static_cast<const std::byte*>(data)};
#endif
    constexpr std::size_t group = 256; // a number that the compiler knows, so that it vectorises at -O2
    Word largest = 0;
    for (; n >= group; n -= group, x += group) {
        for (std::size_t i = 0; i < group; ++i) {
            const Word found = static_cast<Word>(x[i] & magnitude);
            largest = found > largest ? found : largest;
        }
    }
    for (std::size_t i = 0; i < n; ++i) {
        const Word found = static_cast<Word>(x[i] & magnitude);
        largest = found > largest ? found : largest;
    }
    return largest;
}

TASKVEC_KERNELS_END

} // namespace detail

inline bool overflow_guard::holds_nonfinite(dtype type, const void* data, std::size_t size)
{
    return visit_storage(type, "", [&]<class T>(std::type_identity<T>) {
        using word = signed_word_of<sizeof(T)>;
        word infinity;
        const auto stored = narrow<T>(static_cast<arithmetic_type<T>>(HUGE_VAL));
        std::memcpy(&infinity, &stored, sizeof infinity);
        constexpr word magnitude = static_cast<word>(static_cast<std::make_unsigned_t<word>>(-1) >> 1);
        return detail::largest_stored<word>(data, size / sizeof(T), magnitude) >= infinity;
    });
}

} // namespace taskvec::inline TASKVEC_ABI
