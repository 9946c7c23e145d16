// SPDX-License-Identifier: Apache-2.0
#include <taskvec/search/subset_sweep.hpp>

#include <taskvec/core/random.hpp>

#include <doctest/doctest.h>

#include <cstring>
#include <limits>
#include <set>

using namespace taskvec;

namespace {
template <class T>
std::vector<std::vector<T>> random_vectors(std::size_t tasks, std::size_t n)
{
    std::vector<std::vector<T>> all;
    for (std::size_t t = 0; t < tasks; ++t) {
        const random_stream stream(5, static_cast<std::uint32_t>(t));
        std::vector<T> x(n);
        for (std::size_t i = 0; i < n; ++i) { x[i] = narrow<T>(static_cast<float>(stream.normal(i))); }
        all.push_back(std::move(x));
    }
    return all;
}
template <class T>
std::vector<host_view<const T>> views_of(const std::vector<std::vector<T>>& vectors)
{
    std::vector<host_view<const T>> views;
    for (const auto& x : vectors) { views.push_back(as_view(x)); }
    return views;
}

template <class T>
void check_sweep(std::size_t tasks, std::size_t n, const std::vector<double>& weights, unsigned threads)
{
    using A = arithmetic_type<T>;
    const auto vectors = random_vectors<T>(tasks, n);
    std::set<std::vector<std::size_t>> seen;
    std::vector<std::size_t> last;
    const auto visited = for_each_subset(cpu{.threads = threads}, views_of(vectors), {.weights = weights},
        [&](std::span<const std::size_t> subset, host_view<const A> sum) {
            std::vector<std::size_t> members(subset.begin(), subset.end());
            CHECK(std::is_sorted(members.begin(), members.end()));
            CHECK(members.size() >= 2);
            CHECK(std::lexicographical_compare(last.begin(), last.end(), members.begin(), members.end()));
            last = members;
            CHECK(seen.insert(members).second);
            // The direct sum of the subset, bit for bit.
            std::vector<std::vector<T>> chosen;
            std::vector<double> factors;
            for (const auto member : members) {
                chosen.push_back(vectors[member]);
                factors.push_back(weights.empty() ? 1.0 : weights[member]);
            }
            std::vector<A> direct(n);
            combine(cpu{}, chosen, factors, direct);
            CHECK(std::memcmp(direct.data(), sum.data(), n * sizeof(A)) == 0);
        });
    CHECK(visited == (std::size_t{1} << tasks) - (tasks + 1));
    CHECK(seen.size() == visited);
}
} // namespace

TEST_CASE("the sweep visits all 2ⁿ − (n + 1) subsets once, each sum with the bits of the direct one")
{
    check_sweep<float>(5, 4000, {}, 1);
    check_sweep<float>(4, 70001, {0.3, -1.7, 0.1, 2}, 2);
    check_sweep<double>(3, 100, {0.1, 0.2, 0.3}, 1);
    check_sweep<bf16>(4, 3000, {}, 1);
    check_sweep<float>(2, 1, {}, 1);
}

TEST_CASE("the sweep with smaller and larger smallest subsets; one task alone")
{
    const auto vectors = random_vectors<float>(4, 10);
    std::size_t calls = 0;
    const auto count = [&](std::span<const std::size_t>, host_view<const float>) { ++calls; };
    CHECK(for_each_subset(cpu{}, views_of(vectors), {.smallest = 1}, count) == 15);
    CHECK(for_each_subset(cpu{}, views_of(vectors), {.smallest = 4}, count) == 1);
    CHECK(for_each_subset(cpu{}, views_of(random_vectors<float>(1, 10)), {}, count) == 0);
    CHECK(calls == 16);
}

TEST_CASE("the sweep: errors")
{
    auto vectors = random_vectors<float>(3, 10);
    const auto ignore = [](std::span<const std::size_t>, host_view<const float>) { };
    CHECK_THROWS_AS(for_each_subset(cpu{}, std::vector<host_view<const float>>{}, {}, ignore), invalid_argument);
    CHECK_THROWS_AS(for_each_subset(cpu{}, views_of(vectors), {.weights = {1, 2}}, ignore), invalid_argument);
    CHECK_THROWS_AS(
        for_each_subset(cpu{}, std::vector<host_view<const float>>(64, as_view(std::as_const(vectors[0]))), {}, ignore),
        invalid_argument);
    vectors[1][3] = std::numeric_limits<float>::infinity();
    CHECK_THROWS_AS(for_each_subset(cpu{}, views_of(vectors), {}, ignore), nonfinite_error);
    vectors[2].pop_back();
    CHECK_THROWS_AS(for_each_subset(cpu{}, views_of(vectors), {}, ignore), shape_mismatch);
}
