// Tensors that are worked out, as the words that a file would store of them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/storage.hpp>
#include <taskvec/models/block.hpp>
#include <taskvec/models/operand_source.hpp>
#include <taskvec/models/row_conversions.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Elements [offset, offset + count) of a source as they are stored in dtype `stored`, rounded to nearest even where
/// that is narrower. `out` has room for them, and is aligned to them. Throws dtype_mismatch for what is no storage
/// type.
inline void read_stored(const operand_source& from, dtype stored, std::uint64_t offset, std::size_t count, void* out)
{
    if (from.type() == stored) {
        from.read(offset, count, out);
        return;
    }
    // Word by word, not by the CPU's kernels: device files copy what is worked out, too, and hold none of those.
    const auto narrowed = [&]<class T, class A>(std::type_identity<T>, A) {
        std::array<A, block_size> values;
        auto* const words = static_cast<storage_word<T>*>(out);
        for (std::size_t at = 0; at < count; at += block_size) {
            const std::size_t n = std::min(block_size, count - at);
            from.read(offset + at, n, values.data());
            for (std::size_t k = 0; k < n; ++k) { words[at + k] = narrow_word<T>(values[k]); }
        }
    };
    visit_storage(stored, "operand", [&]<class T>(std::type_identity<T> as) {
        from.type() == dtype::f64 ? narrowed(as, double{}) : narrowed(as, float{});
    });
}

/// The type that operand_source::read() gives elements of a dtype in.
[[nodiscard]] constexpr dtype read_type(dtype stored) noexcept
{
    return stored == dtype::f64 ? dtype::f64 : dtype::f32;
}

/// Stored words as elements of read_type(stored).
inline void widen_stored(dtype stored, const void* words, std::size_t count, void* out)
{
    if (stored == dtype::f64) {
        (void)conversions_between<double, storage_types>.of(stored, "operand").widen(words, static_cast<double*>(out), count);
    }
    else {
        (void)conversions_between<float, storage_types>.of(stored, "operand").widen(words, static_cast<float*>(out), count);
    }
}

/// Elements of a source as they come back once they have been stored.
class rounded_source final : public operand_source {
public:
    /// Of `from`, which outlives this.
    rounded_source(const operand_source& from, dtype stored)
        : from_(&from)
        , stored_(stored)
    { }
    [[nodiscard]] dtype type() const noexcept override { return read_type(stored_); }
    [[nodiscard]] unsigned stored_bits() const noexcept override { return from_->stored_bits(); }
    void prepare(const cpu& policy) const override { from_->prepare(policy); }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        std::array<double, block_size> words;
        for (std::size_t at = 0; at < count; at += block_size) {
            const std::size_t n = std::min(block_size, count - at);
            read_stored(*from_, stored_, offset + at, n, words.data());
            widen_stored(stored_, words.data(), n, static_cast<std::byte*>(out) + byte_count(type(), at));
        }
    }

private:
    const operand_source* from_;
    dtype stored_;
};

} // namespace taskvec::inline TASKVEC_ABI::detail
