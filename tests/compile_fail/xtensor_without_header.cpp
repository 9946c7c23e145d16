// Adaptors are xtensor's to make: without its header a sentence says which.
// SPDX-License-Identifier: Apache-2.0
// error: as_xtensor\(\) needs xtensor's adaptors: include <xtensor/xadapt.hpp>
#include <taskvec/interop/xtensor.hpp>

#if !defined(TASKVEC_FAULT)
// The part of xtensor's interface that matters, so that this needs no xtensor.
namespace xt {
template <layout_type, class T, class Shape>
T* adapt(T* data, const Shape&, layout_type)
{
    return data;
}
}
#endif

void f(taskvec::matrix<float>& x)
{
    (void)taskvec::as_xtensor(x);
    (void)taskvec::as_xtensor(taskvec::host_view<float>(x.data(), x.size()), {2, 3});
}
