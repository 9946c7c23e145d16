// Work in parts of unequal sizes: large ones on all threads, the others on a thread each.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/error.hpp>
#include <taskvec/core/parallel.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace taskvec::inline TASKVEC_ABI::detail {

/// Calls use(part, policy, at_once) for every part; part i has `bytes[i]`. Several parts at a time on a thread each,
/// for one has little to do for many threads, and while one waits for its bytes others work; those that are large
/// beside the others one by one, on all threads. `at_once`: how many there may be at that time, which share a budget.
/// Progress is that of one walk over all parts: what a part tells of counts where it calls it `phase`. Of what use()
/// throws, that of the first part; cancelled.
template <class Use>
void for_each_part(const cpu& policy, std::string_view phase, std::span<const std::uint64_t> bytes, const Use& use)
{
    const std::size_t workers = worker_count(policy, bytes.size());
    std::uint64_t total = 0;
    for (const std::uint64_t part : bytes) { total += part; }
    const auto large = [&](std::size_t i) { return workers == 1 || bytes[i] > total / (8 * workers); };
    progress_meter meter(policy, phase, total);
    const auto done = [&](std::size_t i) {
        if (!meter.advance(bytes[i])) { raise<cancelled>(error_code::cancelled); }
    };
    std::uint64_t before = 0; // bytes of the parts that come before one that is worked on by itself
    cpu reporting; // a copy that tells of the place among all parts, where somebody is told
    if (policy.progress) {
        reporting = policy;
        reporting.progress = [&](const progress_event& event) {
            return policy.progress({phase, before + (event.phase == phase ? event.done : 0), total, event.unit});
        };
    }
    const cpu& together = policy.progress ? reporting : policy;
    const cpu alone = sequential(policy);
    for (std::size_t i = 0, end = 0; i < bytes.size(); i = end) {
        end = i + 1;
        if (large(i)) {
            use(i, together, std::size_t{1});
            before += bytes[i];
            done(i);
            continue;
        }
        while (end < bytes.size() && !large(end)) { ++end; }
        for_each_index(policy, end - i, [&](std::size_t index, std::size_t) {
            use(i + index, alone, workers);
            done(i + index);
        });
        for (std::size_t part = i; part < end; ++part) { before += bytes[part]; }
    }
}

} // namespace taskvec::inline TASKVEC_ABI::detail
