// Merges kernels that are xtensor's, and decomposes a matrix of xtensor's: everything in place.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/taskvec.hpp>

#if __has_include(<xtensor/containers/xarray.hpp>) // from xtensor 0.26 on
#include <xtensor/containers/xadapt.hpp>
#include <xtensor/containers/xarray.hpp>
#include <xtensor/containers/xtensor.hpp>
#include <xtensor/views/xview.hpp>
#else
#include <xtensor/xadapt.hpp>
#include <xtensor/xarray.hpp>
#include <xtensor/xtensor.hpp>
#include <xtensor/xview.hpp>
#endif

#include <cstddef>
#include <cstdio>
#include <vector>

int main()
{
    // Tensors of any rank go in and come out as they are.
    const xt::xarray<float> base = xt::zeros<float>({2, 1, 2, 2});
    const std::vector<xt::xarray<float>> tasks{
        {{{{4, 1}, {3, 0}}}, {{{-2, 0}, {1, 1}}}},
        {{{{2, -1}, {-5, 0}}}, {{{-2, 0}, {1, 1}}}},
    };
    xt::xarray<float> merged = base;
    taskvec::merge(taskvec::cpu{}, taskvec::ties_options{.density = 0.5}, base, tasks, merged);
    for (const float value : merged) { std::printf(" %g", value); }
    std::printf("\n");

    // Matrices of either layout, and blocks of them, go into decompositions; factors are seen as xtensor's.
    const xt::xtensor<float, 2> weight{{3, 0, 9}, {0, 4, 9}};
    const auto block = xt::view(weight, xt::all(), xt::range(0, 2));
    const auto s = taskvec::randomized_svd(taskvec::cpu{}, taskvec::as_matrix(block), {.rank = 1});
    const auto u = taskvec::as_xtensor(s.u), v = taskvec::as_xtensor(s.v);
    const xt::xtensor<float, 2> best = s.sigma[0] * u * xt::transpose(v); // of rank 1: a column times a row
    std::printf(" %.3f %.3f\n %.3f %.3f\n", best(0, 0), best(0, 1), best(1, 0), best(1, 1));
}
