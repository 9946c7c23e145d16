// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/wrong_call.hpp>

#include <taskvec/arithmetic/task_vector.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/reuse/peru_fft.hpp>
#include <taskvec/select/sparse.hpp>
#include <taskvec/select/top_k.hpp>

#include <doctest/doctest.h>

#include <array>
#include <complex>
#include <cstddef>
#include <span>
#include <tuple>
#include <vector>

namespace {

// Functions of a caller's own, some of which take their arguments by conversion.
struct own_vector {
    std::vector<float> values;
};
int dot(const taskvec::cpu&, const own_vector&, const own_vector&)
{
    return 1;
}
int dot(std::span<const float>, std::span<const float>)
{
    return 2;
}
int norm(std::span<const float>)
{
    return 3;
}
template <class X, class Y>
int cosine(const X&, const Y&)
{
    return 4;
}

} // namespace

TEST_CASE("a caller's own functions are called beside the library's of the same names")
{
    using namespace taskvec;
    own_vector own;
    std::vector<float> x(3);
    CHECK(dot(cpu{}, own, own) == 1);
    CHECK(dot(x, x) == 2);
    CHECK(norm(x) == 3);
    CHECK(cosine(x, x) == 4);
    const host_view<const float> view = as_view(x); // found by its namespace too
    CHECK(dot(view, view) == 2);
}

TEST_CASE("functions of the standard library are called beside the library's of the same names")
{
    using namespace std;
    using namespace taskvec;
    CHECK(norm(std::complex<double>(3, 4)) == 25);
    CHECK(apply([](int x) { return x; }, std::tuple{5}) == 5);
}

TEST_CASE("calls that rely on conversions are right ones")
{
    using namespace taskvec;
    const cpu policy;
    std::vector<float> x{1, 2, 3}, y{3, 2, 1}, out(3);
    float raw[3]{};
    const std::vector<std::vector<float>> tasks{x, y};
    difference(policy, as_view(x), std::span<const float>(y), as_view(out));
    CHECK(out == std::vector<float>{-2, 0, 2});
    difference(policy, x, y, raw);
    apply(policy, x, raw, 1, out);
    CHECK(out == std::vector<float>{-1, 2, 5});
    combine(policy, tasks, std::array{1.0, 1.0}, std::span(out), nonfinite::propagate);
    CHECK(out == std::vector<float>{4, 4, 4});
    combine(policy, std::array{host_view<const float>(x.data(), 3)}, std::vector{2.0}, host_view<float>(out.data(), 3));
    CHECK(out == std::vector<float>{2, 4, 6});

    const auto delta = post_pruning(policy, {.density = 0.5}, x, y);
    const auto saved = apply(policy, delta, as_view(out), 1);
    undo(policy, delta, std::span(saved), as_view(out));
    CHECK(out == std::vector<float>{2, 4, 6});
    unsigned walks = 0;
    CHECK(top_k(policy, raw, 1U, &walks).equal_end > 0);
    CHECK(walks > 0);

    const model_ref live{{"w", as_tensor(as_view(x))}};
    const const_model_ref base = live;
    const std::vector<const_model_ref> models{base};
    model_ref merged{{"w", as_tensor(as_view(out))}};
    CHECK(peru_fft(policy, task_arithmetic_options{}, {}, live, models, merged).size() == 1);
    CHECK(peru_fft(policy, task_arithmetic_options{}, {.density = 0.1}, x, tasks, as_view(out), {}).size() == 2);
    const sparse_model sparse = post_pruning(policy, {}, live, live);
    const auto words = apply(policy, sparse, live, 1);
    undo(policy, sparse, words, live);
    undo(policy, views(sparse), words.bytes(), live);
}
