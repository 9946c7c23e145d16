// What streaming work can cost at best on this machine, measured in the same process: bytes read at the rate of a read
// sweep, bytes written at the rate of non-temporal stores; and the interleaved timing that ratios come from.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/instruction_set.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace bench {

/// BENCH_INSTRUCTIONS=avx2 (baseline, scalar) in the environment: what a processor without wider vectors would do.
inline const bool limited = [] {
    using taskvec::instruction_set;
    const char* const given = std::getenv("BENCH_INSTRUCTIONS");
    const std::string_view most = given ? given : "";
    if (most == "avx2") { taskvec::limit_instruction_set(instruction_set::avx2); }
    if (most == "baseline") { taskvec::limit_instruction_set(instruction_set::baseline); }
    if (most == "scalar") { taskvec::limit_instruction_set(instruction_set::scalar); }
    return !most.empty();
}();

/// Reads every word once, as `streams` parts side by side, a line of each in turn; the answer keeps the compiler from
/// leaving it out. One stream alone is bound by latency, so work over several may not be measured by it.
[[gnu::noinline]] inline std::uint64_t read_sweep(const std::uint64_t* words, std::size_t count, std::size_t streams)
{
    constexpr std::size_t line = 8;
    std::uint64_t lanes[line]{};
    const std::size_t each = count / streams / line * line;
    for (std::size_t i = 0; i < each; i += line) {
        for (std::size_t s = 0; s < streams; ++s) {
            const std::uint64_t* const from = words + s * each + i;
            for (std::size_t lane = 0; lane < line; ++lane) { lanes[lane] ^= from[lane]; }
        }
    }
    std::uint64_t all = 0;
    for (const auto lane : lanes) { all ^= lane; }
    return all;
}

/// Writes every word once, past the caches where the machine can. `words` is aligned to 16 bytes.
[[gnu::noinline]] inline void write_sweep(std::uint64_t* words, std::size_t count, std::uint64_t value)
{
#if defined(__SSE2__)
    const __m128i pair = _mm_set1_epi64x(static_cast<long long>(value));
    for (std::size_t i = 0; i + 2 <= count; i += 2) { _mm_stream_si128(reinterpret_cast<__m128i*>(words + i), pair); }
    _mm_sfence();
#else
    std::fill(words, words + count, value);
#endif
}

template <class Work>
double seconds(Work&& work)
{
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

[[nodiscard]] inline double median(std::vector<double> values)
{
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    return *middle;
}

/// The least time that reading this many bytes of so many streams, and writing some, can take: sweeps over buffers of
/// 256 MiB, scaled.
class ceiling {
public:
    ceiling()
        : buffer_(words)
    {
        write_sweep(buffer_.data(), words, 1); // every page is there before anything is timed
    }
    [[nodiscard]] double operator()(double bytes_read, double bytes_written, std::size_t streams)
    {
        constexpr double bytes = words * sizeof(std::uint64_t);
        const double reading = seconds([&] { benchmark::DoNotOptimize(read_sweep(buffer_.data(), words, streams)); });
        const double writing = seconds([&] { write_sweep(buffer_.data(), words, 2); });
        return reading * bytes_read / bytes + writing * bytes_written / bytes;
    }

private:
    static constexpr std::size_t words = std::size_t{1} << 25;
    std::vector<std::uint64_t> buffer_;
};

/// Times `work` and its yardstick in turn. Reports the work's time, and the medians' ratio yardstick / work as the
/// counter `name`: a share of the ceiling, or how many times faster than a peer.
template <class Work, class Yardstick>
void interleave(benchmark::State& state, const char* name, Work&& work, Yardstick&& yardstick)
{
    std::vector<double> works, yardsticks;
    for (auto _ : state) {
        yardsticks.push_back(yardstick());
        works.push_back(seconds(work));
        state.SetIterationTime(works.back());
    }
    state.counters[name] = median(yardsticks) / median(works);
}

} // namespace bench
