// A program for any processor, one file of which is built for a wide one: taskvec does the same in both.
// SPDX-License-Identifier: Apache-2.0
#include "work.hpp"

#include <cstdio>

std::uint64_t wide_work();

int main()
{
    const std::uint64_t narrow = work();
    const bool asked = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
    const std::uint64_t wide = asked ? wide_work() : narrow;
    std::printf("%llx, and %llx from the file with other flags%s\n", static_cast<unsigned long long>(narrow),
        static_cast<unsigned long long>(wide), asked ? "" : " (not run: this processor lacks AVX-512)");
    return narrow == wide ? 0 : 1;
}
