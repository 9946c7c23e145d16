// NearSwap, RAM and RAM+: against their definitions entry by entry, and what they refuse.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/kept.hpp"
#include "../reference/random_models.hpp"

#include <taskvec/methods/nearswap.hpp>
#include <taskvec/methods/ram.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

using namespace taskvec;
using reference::product;
using reference::sum;

namespace {

template <class T, class Options, class Expected>
void check(const testing::random_models<T>& models, const Options& options, const Expected& expected)
{
    std::vector<T> out, wanted;
    for (std::size_t i = 0; i < models.base.size(); ++i) { wanted.push_back(narrow<T>(expected(i))); }
    for (const std::size_t chunk : {64u, 65536u}) {
        model_options how;
        how.chunk = chunk;
        merge(cpu{.threads = 2}, options, models.model(models.base), models.task_models(), models.output(out), how);
        CHECK(std::memcmp(out.data(), wanted.data(), out.size() * sizeof(T)) == 0);
    }
}

} // namespace

TEST_CASE_TEMPLATE("NearSwap equals its definition", T, float, double, bf16, f16)
{
    using A = arithmetic_type<T>;
    const testing::random_models<T> models({3000, 1, 77}, 1, 4);
    for (const double t : {0.0, 0.01, 0.7, 50.0}) {
        check(models, nearswap_options{.t = t}, [&](std::size_t i) {
            const A a = widen<A>(models.base[i]), b = widen<A>(models.tasks[0][i]);
            const A apart = std::max(std::abs(sum(a, -b)), static_cast<A>(1e-6));
            const A weight = std::min(product(static_cast<A>(t), A{1} / apart), A{1});
            return sum(product(weight, b), product(sum(A{1}, -weight), a));
        });
    }
}

TEST_CASE_TEMPLATE("RAM and RAM+ equal their definitions, in either scope", T, float, double, bf16)
{
    using A = arithmetic_type<T>;
    testing::random_models<T> models({3000, 1, 77}, 3, 4);
    for (std::size_t t = 0; t < 3; ++t) { // tasks that leave most entries as they are
        for (std::size_t i = 0; i < models.base.size(); ++i) {
            if ((i * 7 + t * 3) % 5 > 1) { models.tasks[t][i] = models.base[i]; }
        }
    }
    std::vector<std::vector<A>> tasks;
    const auto base = testing::widen_all(models.base);
    for (const auto& task : models.tasks) { tasks.push_back(testing::widen_all(task)); }
    const auto deltas = reference::task_vectors(base, tasks);
    const A epsilon = static_cast<A>(0.1);
    const auto acting = [&](std::size_t i) {
        return std::count_if(deltas.begin(), deltas.end(), [&](const auto& x) { return std::abs(x[i]) > epsilon; });
    };
    const auto expected = [&](std::size_t i, const std::vector<A>& raise) {
        A total = 0;
        for (std::size_t t = 0; t < 3; ++t) {
            if (!(std::abs(deltas[t][i]) > epsilon)) { continue; }
            total =
                sum(total, acting(i) == 1 ? product(raise[t], deltas[t][i]) : deltas[t][i] / static_cast<A>(acting(i)));
        }
        return sum(base[i], total);
    };
    check(models, ram_options{.epsilon = 0.1}, [&](std::size_t i) { return expected(i, {1, 1, 1}); });
    const auto raises = [&](std::size_t begin, std::size_t end) {
        std::vector<A> raise;
        for (std::size_t t = 0; t < 3; ++t) {
            double shared = 0, alone = 0;
            for (std::size_t i = begin; i < end; ++i) {
                if (std::abs(deltas[t][i]) > epsilon) { (acting(i) > 1 ? shared : alone) += 1; }
            }
            raise.push_back(static_cast<A>(1 + 0.3 * std::min(shared / alone, 1.5)));
        }
        return raise;
    };
    ram_plus_options options{.epsilon = 0.1, .r = 0.3, .alpha = 1.5};
    const auto of_model = raises(0, base.size());
    check(models, options, [&](std::size_t i) { return expected(i, of_model); });
    options.scope = scope::tensor;
    const std::vector<std::vector<A>> of_tensors{raises(0, 3000), raises(3000, 3001), raises(3001, 3078)};
    check(models, options, [&](std::size_t i) { return expected(i, of_tensors[i < 3000 ? 0 : i < 3001 ? 1 : 2]); });
    CHECK(of_model != of_tensors[0]);
    CHECK(ram_plus_options::as_in_mergekit().scope == scope::tensor);
}

TEST_CASE("NearSwap and RAM refuse what has no meaning")
{
    const std::vector<float> x{1, 2};
    std::vector<float> out(2);
    CHECK_THROWS_WITH_AS(merge(cpu{}, nearswap_options{}, x, std::vector{x, x}, out),
        "NearSwap takes a base and one task, and there are 2 tasks: give one", invalid_argument);
    CHECK_THROWS_WITH_AS(merge(cpu{}, nearswap_options{.t = -1}, x, std::vector<std::vector<float>>{x}, out),
        "t is -1; expected a distance of at least 0, such as 0.001", invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, ram_options{.epsilon = -1}, x, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, ram_plus_options{.alpha = -1}, x, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, ram_plus_options{.r = NAN}, x, std::vector{x, x}, out), invalid_argument);
    CHECK_THROWS_AS(merge(cpu{}, ram_options{}, x, std::vector{x, {1, NAN}}, out), nonfinite_error);
}
