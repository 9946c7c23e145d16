// Exact top-k on taskvec::gpu: the CPU's thresholds, whatever ties; errors.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/device/models/streamed_models.hpp>
#include <taskvec/device/select.hpp>

#include "on_device.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <limits>

using namespace taskvec;

TEST_CASE_TEMPLATE("top_k finds the CPU's threshold", T, double, float, bf16, f16)
{
    const gpu policy;
    for (const int levels : {0, 3}) { // few values: most magnitudes tie
        for (const std::size_t n : {1, 64, 4097, 50000}) {
            const testing::random_models<T> models({n}, 1, static_cast<unsigned>(n), levels);
            const testing::on_device<T> device(policy, models);
            for (const std::uint64_t k : {std::uint64_t{1}, n / 5, n - 1, static_cast<std::uint64_t>(n)}) {
                if (k == 0) { continue; }
                CHECK(top_k(policy, device.base_view(), k) == top_k(cpu{.threads = 1}, models.base, k));
                CHECK(kth_magnitude(policy, device.base_view(), k) == kth_magnitude(cpu{.threads = 1}, models.base, k));
            }
        }
    }
}

TEST_CASE("all equal, all zero, subnormals and infinity on request")
{
    const gpu policy;
    for (const float value : {0.0f, -2.5f, 1e-42f}) {
        const std::vector<float> values(9000, value);
        const device::buffer<float> x(policy, values);
        CHECK(top_k(policy, x.view(), 4100) == top_k(cpu{}, values, 4100));
    }
    CHECK(top_k(policy, device_view<const float>(), 0) == top_k_threshold<float>{});
    const device::buffer<float> x(policy, std::vector<float>{1, 2, std::numeric_limits<float>::infinity()});
    CHECK_THROWS_WITH_AS((void)top_k(policy, x.view(), 1),
        "tensor 'values' of task 1 holds infinity at index 2: repair it, exclude the tensor, or ask for non-finite "
        "values to propagate",
        nonfinite_error);
    CHECK_THROWS_WITH_AS((void)top_k(policy, x.view(), 4), "k is 4 for 3 entries; expected 1 to 3", invalid_argument);
    CHECK_THROWS_AS((void)top_k(policy, x.view(), 0), invalid_argument);
    CHECK_THROWS_AS((void)kth_magnitude(policy, x.view(), 0), invalid_argument);
    unsigned walks = 0;
    const device::buffer<double> wide(policy, std::vector<double>{1, 2, 3});
    CHECK(top_k(policy, wide.view(), 2, &walks).equal_end == 2);
    CHECK(walks == 1);
}

TEST_CASE_TEMPLATE("thresholds of task vectors over a model and tensor by tensor", T, double, float, bf16, f16)
{
    const gpu policy;
    for (const int levels : {0, 2}) {
        const testing::random_models<T> models({3000, 1, 0, 64, 20000}, 9, 4, levels);
        const testing::on_device<T> on_device(policy, models);
        const auto base = models.model(models.base), device_base = on_device.base();
        const auto tasks = models.task_models(), device_tasks = on_device.tasks();
        const aligned_models host(&base, tasks), device = align_on_device(policy, &device_base, device_tasks);
        for (const double density : {0.0001, 0.2, 1.0}) {
            for (const scope over : {scope::model, scope::tensor}) {
                for (const trim_rule rule : {trim_rule::exact, trim_rule::reach_next}) {
                    const trim_thresholds expected(cpu{}, host, density, over, rule),
                        found = find_thresholds(policy, device, density, over, rule);
                    std::size_t different = 0;
                    for (std::size_t i = 0; i < host.tensors().size(); ++i) {
                        for (std::size_t t = 0; t < 9; ++t) {
                            different += found.get<arithmetic_type<T>>(i, t) != expected.get<arithmetic_type<T>>(i, t);
                        }
                    }
                    CHECK(different == 0);
                }
            }
        }
        CHECK_THROWS_AS((void)find_thresholds(policy, device, 0, scope::model), invalid_argument);
    }
}

TEST_CASE("f32 tensors beside f64 ones compare in f64")
{
    const gpu policy;
    const testing::random_models<double> wide({5000}, 1, 1);
    const testing::random_models<float> narrow({7000}, 1, 2);
    const testing::on_device<double> x(policy, wide);
    const testing::on_device<float> y(policy, narrow);
    const auto both = [](const_tensor_ref a, const_tensor_ref b) { return const_model_ref{{"a", a}, {"b", b}}; };
    const auto host = both(as_tensor(host_view<const double>(wide.base.data(), 5000)),
        as_tensor(host_view<const float>(narrow.base.data(), 7000)));
    const auto on_device = both(as_tensor(x.base_view()), as_tensor(y.base_view()));
    const trim_thresholds expected(cpu{}, aligned_models(nullptr, {&host, 1}), 0.3, scope::model),
        found = find_thresholds(policy, align_on_device(policy, nullptr, {&on_device, 1}), 0.3, scope::model);
    CHECK(found.get<double>(0, 0) == expected.get<double>(0, 0));
    CHECK(found.get<float>(1, 0) == expected.get<float>(1, 0));
}

namespace {

/// Thresholds of both searches over task vectors in device memory, and how often the bracket's read the data.
template <class T>
unsigned check_bracket(const testing::random_models<T>& models, const std::vector<std::uint64_t>& counts,
    const detail::bracket_options& options)
{
    using A = arithmetic_type<T>;
    const gpu policy;
    const testing::on_device<T> device(policy, models);
    const auto base = device.base();
    const auto tasks = device.tasks();
    const aligned_models aligned = align_on_device(policy, &base, tasks);
    resident_models resident(policy, aligned);
    const tensor_range all{0, aligned.tensors().size()};
    unsigned walks = 0, radix_walks = 0;
    const auto expected = detail::device_radix_search<A>(resident, all).run(counts, &radix_walks);
    const auto found = detail::device_top_k_search<A>(resident, all, options).run(counts, &walks);
    CHECK(found == expected);

    // Through a little device memory, sampled on the host.
    const auto host_base = models.model(models.base);
    const auto host_tasks = models.task_models();
    const aligned_models host(&host_base, host_tasks);
    streamed_models streamed(policy, host, {.memory = 100000});
    unsigned streamed_walks = 0;
    CHECK(detail::device_top_k_search<A>(streamed, all, options).run(counts, &streamed_walks) == expected);
    if (options.spare > 0) { CHECK(streamed_walks == walks); } // the same places are looked at
    return walks;
}

} // namespace

TEST_CASE_TEMPLATE(
    "a bracket from a sample finds what the radix select finds, in one walk", T, double, float, bf16, f16)
{
    const std::vector<std::size_t> numbers =
        std::same_as<T, float> ? std::vector<std::size_t>{1, 9} : std::vector<std::size_t>{2};
    for (const std::size_t tasks : numbers) { // 8 are counted at a time
        const testing::random_models<T> smooth({3000, 1, 0, 64, 60000}, tasks, 4);
        for (const std::uint64_t k : {1, 12613, 31000, 63064}) {
            CAPTURE(k);
            CHECK(check_bracket(smooth, std::vector(tasks, k), {.spare = std::size_t{1} << 24}) == 1);
            CHECK(check_bracket(smooth, std::vector(tasks, k), {.sample = 512, .spare = std::size_t{1} << 24}) == 1);
        }
        // Few values: they are counted, and other entries beside them listed; or, without a sample, long lists of
        // equals.
        testing::random_models<T> few({3000, 1, 0, 64, 60000}, tasks, 4, 2);
        for (const bool mixed : {false, true}) {
            for (std::size_t i = 0; mixed && i < few.base.size(); i += 16) { few.tasks[0][i] = smooth.tasks[0][i]; }
            for (const std::uint64_t k : {1, 2000, 12613, 40000}) {
                CAPTURE(k);
                CHECK(check_bracket(few, std::vector(tasks, k), {.sample = 512, .spare = std::size_t{1} << 26}) == 1);
                CHECK(
                    check_bracket(few, std::vector(tasks, k), {.sample = 1 << 20, .spare = std::size_t{1} << 26}) == 1);
            }
        }
        std::vector<std::uint64_t> counts(tasks, 700);
        counts.front() = 63065; // everything
        check_bracket(smooth, counts, {.spare = std::size_t{1} << 24});
    }
}

TEST_CASE("a device without room for the lists finds the same by the radix select, and holds nothing of them")
{
    struct small final : device_memory_resource {
        void* allocate(std::size_t bytes, void*) override
        {
            asked = std::max(asked, bytes);
            if (bytes > limit) {
                ++refused;
                return nullptr;
            }
            ++live;
            return std::malloc(bytes);
        }
        void deallocate(void* place, std::size_t, void*) noexcept override
        {
            --live;
            std::free(place);
        }
        std::size_t limit = std::size_t{1} << 30, asked = 0, refused = 0;
        int live = 0;
    } memory;
    const testing::random_models<float> models({3000, 1, 0, 64, 2000000}, 2, 4);
    const testing::on_device<float> device(gpu{}, models);
    const auto base = device.base();
    const auto tasks = device.tasks();
    const gpu policy{.allocator = &memory};
    const aligned_models aligned = align_on_device(policy, &base, tasks);
    const tensor_range all{0, aligned.tensors().size()};
    resident_models resident(policy, aligned);
    const std::vector<std::uint64_t> counts{12613, 1000000};
    const int live = memory.live;
    unsigned walks = 0;
    const auto expected = detail::device_top_k_search<float>(resident, all).run(counts, &walks);
    CHECK(walks == 1);
    CHECK(memory.refused == 0);
    const std::size_t largest = memory.asked;
    for (const std::size_t limit : {largest - 1, largest / 2 - 1}) { // room for no places; for no magnitudes
        CAPTURE(limit);
        memory.limit = limit;
        memory.refused = 0;
        CHECK(detail::device_top_k_search<float>(resident, all).run(counts, &walks) == expected);
        CHECK(walks == 4);
        CHECK(memory.refused > 0);
        CHECK(memory.live == live);
    }
}

TEST_CASE("what does not fit, and a sample that misleads, are left to the radix select")
{
    CHECK(check_bracket(testing::random_models<float>({64000}, 2, 1), {20000, 30000}, {.sample = 512, .spare = 100000})
        == 4); // no room: not tried
    // The entries that a sample of 512 sees are unlike all others: their bracket holds none of these, or nearly all.
    std::vector<float> places(64000);
    for (std::size_t i = 0; i < places.size(); ++i) { places[i] = static_cast<float>(i); }
    const aligned_tensor::operand operands[2] = {
        {nullptr, dtype::f32}, {reinterpret_cast<const std::byte*>(places.data()), dtype::f32}};
    std::vector<std::uint32_t> seen(512, 0);
    elementwise::sample_magnitudes<float, float>{{operands, 1, 0, 0, 64000}, 0, 1000, 0, seen.data(), 512}(
        elementwise::indices{0, 512, 1, 0});
    testing::random_models<float> misleading({64000}, 1, 1);
    for (const bool equal : {false, true}) {
        for (std::size_t i = 0; i < 64000; ++i) {
            misleading.base[i] = 0;
            misleading.tasks[0][i] = equal ? 2.5f : 1.0f + 1e-6f * static_cast<float>(i);
        }
        for (std::size_t i = 0; i < 512; ++i) {
            misleading.tasks[0][static_cast<std::size_t>(std::bit_cast<float>(seen[i] & 0x7fffffffu))] =
                2.0f + static_cast<float>(i) / 512;
        }
        CHECK(check_bracket(misleading, {32000}, {.sample = 512, .spare = std::size_t{1} << 24}) == 5);
    }
}
