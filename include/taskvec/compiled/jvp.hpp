// What taskvec::compiled compiles of jvp/, as a list; see compiled/linalg.hpp.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#define TASKVEC_COMPILED_JVP_PRODUCTS(EXTERN, T)                                                                       \
    EXTERN template void detail::product_into<true, false, T>(                                                         \
        primal_tangent<T>&, const primal_tangent<T>&, const primal_tangent<T>&);                                       \
    EXTERN template void detail::product_into<true, true, T>(                                                          \
        primal_tangent<T>&, const primal_tangent<T>&, const primal_tangent<T>&);                                       \
    EXTERN template void detail::product_into<false, false, T>(                                                        \
        primal_tangent<T>&, const primal_tangent<T>&, const primal_tangent<T>&);                                       \
    EXTERN template void detail::product_into<false, true, T>(                                                         \
        primal_tangent<T>&, const primal_tangent<T>&, const primal_tangent<T>&);
