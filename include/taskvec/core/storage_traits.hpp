// What a storage type is: the trait to specialise for a type that tensors are stored in.
// SPDX-License-Identifier: Apache-2.0
//
// A storage type is one header, which includes this one and holds the type and its storage_traits, and one entry in the
// list of core/storage_list.hpp. A program that brings a type of its own leaves that list alone: it compiles with
// TASKVEC_MORE_STORAGE defined as the name of its header, `-DTASKVEC_MORE_STORAGE='"my/fixed.hpp"'`, which ends with
//
//     namespace taskvec::inline TASKVEC_ABI {
//     using more_storage_types = storage_list<my::fixed>;
//     }
//
// All files of the program define it alike (the inline namespace holds them apart where they do not). Everything else,
// files, merges, selection, messages, follows from the trait.
#pragma once

#include <taskvec/core/dtype.hpp>
#include <taskvec/core/float_bits.hpp>
#include <taskvec/core/storage_list.hpp>

namespace taskvec::inline TASKVEC_ABI {

/// Specialised for each storage type T, a trivially copyable type that holds one word and nothing else:
///
///     word        the unsigned integer (or float, double) that holds an element: what loops load and store
///     arithmetic  float or double: the type that arithmetic on T runs in; it holds every T exactly
///     dtype       the dtype of safetensors that T is stored as; two storage types cannot share one
///     widen       word → arithmetic, exact
///     narrow      arithmetic → word, rounded once, to nearest even; NaN stays NaN
///
/// widen and narrow are static, constexpr, noexcept and TASKVEC_HOST_DEVICE, and stand between TASKVEC_KERNELS_BEGIN
/// and TASKVEC_KERNELS_END; without a branch, loops of them vectorise. An f64 becomes a T whose arithmetic is f32
/// through a float that is rounded to odd, hence by one rounding where T has at most 22 bits of precision.
///
///     template <>
///     struct storage_traits<my::fixed> {
///         using word = std::uint16_t;
///         using arithmetic = float;
///         static constexpr taskvec::dtype dtype = taskvec::dtype::i16;
///         static constexpr float widen(word stored) noexcept;
///         static constexpr word narrow(float value) noexcept;
///     };
template <class T>
struct storage_traits;

} // namespace taskvec::inline TASKVEC_ABI
