// Which types tensors are stored in, by name alone: the list that a new storage type is entered in.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/config.hpp>

#include <concepts>

namespace taskvec::inline TASKVEC_ABI {

/// The types that arithmetic runs in.
template <class T>
concept arithmetic_element = std::same_as<T, double> || std::same_as<T, float>;

/// Storage types in a row: the list of all of them is storage_types (fwd.hpp).
template <class... T>
struct storage_list { };

struct TASKVEC_MAY_ALIAS bf16;
struct TASKVEC_MAY_ALIAS f16;

/// The storage types that come with the library, in the order in which messages name them.
using own_storage_types = storage_list<double, float, bf16, f16>;

} // namespace taskvec::inline TASKVEC_ABI
