// What taskvec::compiled compiles of adapters/ and reuse/, as lists; see compiled/linalg.hpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#define TASKVEC_COMPILED_MERGE_ADAPTERS(EXTERN, T)                                                                     \
    EXTERN template adapter_result<T> merge_linear<T>(                                                                 \
        const cpu&, std::span<const lora_adapter<T>>, const linear_merge_options&);

#define TASKVEC_COMPILED_EXTRACT(EXTERN, T)                                                                            \
    EXTERN template void detail::subtract_tensors<T>(                                                                  \
        const cpu&, const const_tensor_ref&, const const_tensor_ref&, std::string_view, T*, std::size_t);

#define TASKVEC_COMPILED_PERU_LORA(EXTERN, T)                                                                          \
    EXTERN template adapter_result<T> peru_lora<T, memory_space::host, cpu>(                                           \
        const cpu&, const lora_adapter<T>&, const peru_lora_options&);
