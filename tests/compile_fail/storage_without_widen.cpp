// A storage type lacks a member of its trait: the sentence says which, and what it does.
// SPDX-License-Identifier: Apache-2.0
// error: this storage type has no storage_traits<T>::widen, which makes the arithmetic type of a word
#define TASKVEC_MORE_STORAGE "taskvec/core/storage_traits.hpp" // the type stands in this file
#include <taskvec/core/storage_traits.hpp>

#include <cstdint>

struct fixed {
    std::uint16_t word;
};

namespace taskvec::inline TASKVEC_ABI {
template <>
struct storage_traits<fixed> {
    using word = std::uint16_t;
    using arithmetic = float;
    static constexpr taskvec::dtype dtype = taskvec::dtype::u16;
#if !defined(TASKVEC_FAULT)
    static constexpr float widen(word stored) noexcept { return static_cast<float>(stored) / 256; }
#endif
    static constexpr word narrow(float value) noexcept { return static_cast<word>(value * 256); }
};
using more_storage_types = storage_list<fixed>;
} // namespace taskvec::inline TASKVEC_ABI

#include <taskvec/core/storage.hpp>

float f(fixed x)
{
    return taskvec::widen<float>(x);
}
