// A program's own storage types: one header (tiny_storage.hpp) and one definition, and every merge computes with them.
// SPDX-License-Identifier: Apache-2.0
#define TASKVEC_MORE_STORAGE "core/tiny_storage.hpp"
#include <taskvec/core/sink.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/select/top_k.hpp>

#include <doctest/doctest.h>

#include <cmath>
#include <cstddef>
#include <random>
#include <string>
#include <vector>

using namespace taskvec;
using tests::coarse;
using tests::tiny;

namespace {

std::vector<tiny> random_tiny(std::size_t count, unsigned seed)
{
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<tiny> values;
    for (std::size_t i = 0; i < count; ++i) { values.push_back(narrow<tiny>(normal(random))); }
    return values;
}

std::vector<float> widened(const std::vector<tiny>& x)
{
    std::vector<float> values;
    for (const tiny element : x) { values.push_back(widen<float>(element)); }
    return values;
}

std::vector<int> words(const std::vector<tiny>& x)
{
    std::vector<int> values;
    for (const tiny element : x) { values.push_back(element.word); }
    return values;
}

} // namespace

TEST_CASE("a program's own storage type is in the list, in messages and in visits")
{
    CHECK(storage_element<tiny>);
    CHECK(is_storage(dtype::f8_e4m3fnuz));
    CHECK(storage_names() == "F64, F32, BF16, F16, F8_E4M3FNUZ or F8_E5M2");
    CHECK(visit_storage(dtype::f8_e4m3fnuz, "w", []<class T>(std::type_identity<T>) { return sizeof(T); }) == 1);
    CHECK_THROWS_WITH_AS(visit_storage(dtype::i8, "w", [](auto) { }),
        "tensor 'w' has dtype I8; expected F64, F32, BF16, F16, F8_E4M3FNUZ or F8_E5M2: exclude it or convert it first",
        dtype_mismatch);
    for (unsigned word = 0; word < 256; ++word) {
        const tiny x{static_cast<std::uint8_t>(word)};
        CHECK(narrow<tiny>(widen<float>(x)).word == word);
        CHECK(narrow<tiny>(widen<double>(x)).word == word);
    }
    CHECK(widen<float>(tiny{0x7f}) == 240.0f);
    CHECK(narrow<tiny>(1 + 0x1p-4 + 0x1p-40).word == 0x41); // one rounding, just above the middle of 1 and 9/8
    CHECK(narrow<tiny>(1 + 0x1p-4).word == 0x40);
}

TEST_CASE("merges and selection of a program's own storage type are those of its values in f32, rounded once")
{
    const std::size_t count = 5003;
    const auto base = random_tiny(count, 1);
    const std::vector<std::vector<tiny>> tasks{random_tiny(count, 2), random_tiny(count, 3), random_tiny(count, 4)};
    std::vector<std::vector<float>> wide;
    for (const auto& task : tasks) { wide.push_back(widened(task)); }
    std::vector<float> expected(count);
    std::vector<tiny> out(count), rounded;
    const auto check = [&](const auto& options) {
        merge(cpu{}, options, base, tasks, out);
        merge(cpu{}, options, widened(base), wide, expected);
        rounded.clear();
        for (const float value : expected) { rounded.push_back(narrow<tiny>(value)); }
        CHECK(words(out) == words(rounded));
    };
    check(ties_options{.density = 0.3, .lambda = 0.7});
    check(task_arithmetic_options{.lambda = 0.4});
    CHECK(kth_magnitude(cpu{}, base, 100) == kth_magnitude(cpu{}, widened(base), 100));
}

TEST_CASE("models by name hold a program's own storage type beside others, and keep its dtype")
{
    const auto base = random_tiny(100, 5), task = random_tiny(100, 6);
    std::vector<double> bias(7, 0.5), tuned(7, 1.5);
    const const_model_ref before{{"weight", as_tensor(as_view(base))}, {"bias", as_tensor(as_view(bias))}};
    const const_model_ref after{{"weight", as_tensor(as_view(task))}, {"bias", as_tensor(as_view(tuned))}};
    std::vector<tiny> weight(100);
    std::vector<double> offset(7);
    const model_ref out{{"weight", as_tensor(as_view(weight))}, {"bias", as_tensor(as_view(offset))}};
    merge(cpu{}, task_arithmetic_options{.lambda = 1.0}, before, std::vector{after}, out);
    CHECK(words(weight).size() == 100);
    CHECK(out.find("weight")->dtype == dtype::f8_e4m3fnuz);
    CHECK(offset == tuned);
    for (std::size_t i = 0; i < weight.size(); ++i) {
        const float start = widen<float>(base[i]), change = widen<float>(task[i]) - start;
        CHECK(weight[i].word == narrow<tiny>(start + change).word);
    }
}

TEST_CASE("a type whose dtype is fp8 takes the place of reading it as f32")
{
    const std::vector<float> from{1, -2, 0.5, 6, 57344, -0.25}, to{1.5, 2, 0.5, 7, 40960, 0.25};
    std::vector<coarse> base, task, out(from.size());
    for (const float x : from) { base.push_back(narrow<coarse>(x)); }
    for (const float x : to) { task.push_back(narrow<coarse>(x)); }
    const auto check = [&] {
        for (std::size_t i = 0; i < from.size(); ++i) {
            CAPTURE(i);
            CHECK(widen<float>(out[i]) == widen<float>(narrow<coarse>(0.5f * (from[i] + to[i]))));
        }
    };
    const const_model_ref before{{"w", as_tensor(as_view(base))}}, after{{"w", as_tensor(as_view(task))}};
    const model_ref result{{"w", as_tensor(as_view(out))}};
    CHECK(result.find("w")->dtype == dtype::f8_e5m2);
    merge(cpu{}, task_arithmetic_options{.lambda = 0.5}, before, std::vector{after}, result);
    check();
    out.assign(from.size(), coarse{0});
    merge(cpu{}, task_arithmetic_options{.lambda = 0.5}, base, std::vector<std::vector<coarse>>{task}, out);
    check();
}
