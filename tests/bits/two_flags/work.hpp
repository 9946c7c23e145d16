// What both files of the program do, each compiled with other flags: a merge of 16-bit models, and an exact top-k.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/methods/ties.hpp>
#include <taskvec/select/top_k.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace {
std::uint64_t work()
{
    std::uint32_t state = 1;
    const auto word = [&] { // numbers below 2 of both signs
        state = state * 1664525u + 1013904223u;
        return static_cast<std::uint16_t>(((state >> 16) & 0x8fffu) | 0x3000u);
    };
    std::vector<taskvec::bf16> base(30011), merged(base.size());
    std::vector<std::vector<taskvec::bf16>> tasks(3, base);
    for (auto& x : base) { x = taskvec::reinterpret_bits<taskvec::bf16>(word()); }
    for (auto& task : tasks) {
        for (auto& x : task) { x = taskvec::reinterpret_bits<taskvec::bf16>(word()); }
    }
    taskvec::merge(taskvec::cpu{.threads = 2}, taskvec::ties_options{.density = 0.2}, base, tasks, merged);
    std::uint64_t sum = taskvec::kth_magnitude(taskvec::cpu{}, base, 1000) > 0;
    for (const auto x : merged) { sum = sum * 31 + taskvec::reinterpret_bits<std::uint16_t>(x); }
    return sum;
}
} // namespace
