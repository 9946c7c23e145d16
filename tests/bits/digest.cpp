// Prints a digest of what every elementwise algorithm makes of fixed inputs. The program is built at several
// optimisation levels and instruction sets, by another compiler and for another processor where there is one: all must
// print the same. With TASKVEC_DIGEST_OF, a storage type, it is compiled in a third of the time and prints a part.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/core/hash.hpp>
#include <taskvec/core/instruction_set.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/dare.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/reuse/peru_fft.hpp>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace taskvec;

template <class T>
void print(const char* what, std::size_t tasks, std::span<const T> values)
{
    xxh64 hash;
    hash.update(values.data(), values.size_bytes());
    std::printf("%-16s %-5s %zu %016llx\n", what, std::string(to_string(dtype_of<T>)).c_str(), tasks,
        static_cast<unsigned long long>(hash.digest()));
}

// Values of many magnitudes, zeros and repeated values, from the counter-based generator: the same everywhere. No libm.
template <class T>
std::vector<T> draw(std::size_t n, std::uint32_t stream, double scale)
{
    const random_stream random(99, stream, "digest");
    std::vector<T> values(n);
    for (std::size_t i = 0; i < n; ++i) {
        const std::uint32_t word = random.word(i);
        const double mantissa = static_cast<double>(word >> 8) * 0x1p-24 - 0.5;
        const double exponent = static_cast<double>(1u << (word & 7u)) * 0x1p-6;
        values[i] = narrow<T>(word % 17 == 0 ? 0.0 : word % 13 == 0 ? scale : mantissa * exponent * scale);
    }
    return values;
}

template <class T>
void digest(std::size_t task_count)
{
    constexpr std::size_t n = 5003; // more than two blocks, and no multiple of a vector
    const cpu policy{.threads = 1};
    const std::vector<T> base = draw<T>(n, 0, 1.0);
    std::vector<std::vector<T>> tasks;
    std::vector<double> weights;
    for (std::size_t t = 0; t < task_count; ++t) {
        std::vector<T> task = draw<T>(n, static_cast<std::uint32_t>(t + 1), 0.1);
        for (std::size_t i = 0; i < n; ++i) { task[i] = narrow<T>(widen<double>(task[i]) + widen<double>(base[i])); }
        tasks.push_back(std::move(task));
        weights.push_back(0.3 + 0.17 * static_cast<double>(t));
    }
    std::vector<T> out(n);
    const auto merged = [&](const char* what, const auto& options) {
        merge(policy, options, base, tasks, out);
        print<T>(what, task_count, out);
    };
    merge(policy, average_options{.weights = weights}, tasks, out);
    print<T>("average", task_count, out);
    merged("task arithmetic", task_arithmetic_options{.lambda = 0.3, .weights = weights});
    merged("ties", ties_options{.density = 0.3, .lambda = 0.7, .weights = weights});
    merged("ties tensor sum",
        ties_options{.density = 0.2, .lambda = 1.1, .scope = scope::tensor, .combine = disjoint_merge::sum});
    merged("ties max", ties_options{.density = 0.5, .lambda = 0.9, .combine = disjoint_merge::max});
    merged("dare", dare_options{.density = 0.4, .seed = 5, .lambda = 0.6});
    merged("dare ties", dare_ties_options{.density = 0.4, .seed = 5});
    const auto deltas = peru_fft(policy, task_arithmetic_options{.lambda = 0.3}, {.density = 0.1}, base, tasks, out);
    for (const auto& delta : deltas) {
        print<std::remove_cvref_t<decltype(delta.values[0])>>("peru-fft delta", task_count, delta.values);
        std::vector<T> live = out;
        (void)apply(policy, delta, live);
        print<T>("peru-fft applied", task_count, live);
    }

    std::vector<T> tau(n);
    difference(policy, tasks[0], base, tau);
    print<T>("difference", task_count, tau);
    apply(policy, base, tau, 0.37, out);
    print<T>("apply", task_count, out);
    combine(policy, tasks, weights, out);
    print<T>("combine", task_count, out);
    const double numbers[] = {dot(policy, tau, base), norm(policy, tau), cosine(policy, tau, base)};
    print<double>("dot norm cosine", task_count, numbers);
}

} // namespace

/// digest [scalar|baseline|AVX2|AVX-512|BF16]: kernels run with no more than that; only what is made of bf16.
int main(int count, char** arguments)
{
    using taskvec::instruction_set;
    for (const auto set :
        {instruction_set::scalar, instruction_set::baseline, instruction_set::avx2, instruction_set::avx512}) {
        if (count > 1 && std::string(arguments[1]) == taskvec::to_string(set)) { taskvec::limit_instruction_set(set); }
    }
#if defined(__x86_64__)
    // Built for a machine that this is not: nothing can be said here (ctest counts 77 as skipped).
#if defined(__AVX512F__)
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl")
        || !__builtin_cpu_supports("avx512bw")) {
        return 77;
    }
#elif defined(__AVX2__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) { return 77; }
#endif
#endif
    const std::size_t few[] = {1, 2, 3, 5, 8, 9};
#if defined(TASKVEC_DIGEST_OF)
    for (const std::size_t tasks : few) { digest<TASKVEC_DIGEST_OF>(tasks); }
#else
    const bool all = count < 2 || std::string(arguments[1]) != "BF16";
    for (const std::size_t tasks : few) {
        if (all) { digest<float>(tasks); }
        digest<bf16>(tasks);
    }
    if (all) {
        digest<double>(3);
        digest<f16>(3);
    }
#endif
}
