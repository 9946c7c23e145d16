// Exact top-k against a full sort.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/select/thresholds.hpp>
#include <taskvec/select/top_k.hpp>

#include <doctest/doctest.h>

#include <array>
#include <bit>
#include <iterator>
#include <limits>
#include <numeric>
#include <random>

using namespace taskvec;

namespace {

// The definition: sort by magnitude, then by index; the k first are kept.
template <class T>
std::vector<bool> kept_by_sorting(const std::vector<T>& x, std::uint64_t k)
{
    std::vector<std::size_t> order(x.size());
    std::iota(order.begin(), order.end(), 0u);
    std::stable_sort(order.begin(), order.end(),
        [&](auto a, auto b) { return std::abs(widen<double>(x[a])) > std::abs(widen<double>(x[b])); });
    std::vector<bool> kept(x.size(), false);
    for (std::uint64_t i = 0; i < k; ++i) { kept[order[i]] = true; }
    return kept;
}

template <class T>
void check_against_sorting(const std::vector<T>& x, std::uint64_t k, unsigned threads = 2)
{
    const auto threshold = top_k(cpu{.threads = threads}, x, k);
    const auto expected = kept_by_sorting(x, k);
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        wrong += threshold.keeps(widen<arithmetic_type<T>>(x[i]), i) != expected[i];
    }
    CAPTURE(x.size());
    CAPTURE(k);
    CHECK(wrong == 0);
}

template <class T>
std::vector<T> random_values(std::size_t n, unsigned seed)
{
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<T> x(n);
    for (auto& value : x) { value = narrow<T>(normal(generator)); }
    return x;
}

} // namespace

TEST_CASE_TEMPLATE("top_k keeps what sorting keeps, in every storage type", T, float, double, bf16, f16)
{
    for (const std::size_t n : {1, 2, 63, 64, 65, 2047, 2049, 70001, 600000}) {
        const auto x = random_values<T>(n, static_cast<unsigned>(n));
        for (const double density : {1e-9, 0.001, 0.1, 0.2, 0.5, 0.99, 1.0}) {
            check_against_sorting(x, top_k_count(density, n), 1 + n % 4);
        }
    }
}

TEST_CASE_TEMPLATE(
    "a ranking says what sorting says, whatever the width of its bins", Bits, std::uint32_t, std::uint64_t)
{
    std::mt19937_64 generator(7);
    const Bits highest = std::numeric_limits<Bits>::max() >> 1;
    for (const std::size_t n : {1, 2, 100, 5000}) {
        for (const Bits width : {Bits{0}, Bits{1}, Bits{2047}, Bits{2048}, Bits{1'000'003}, highest}) {
            for (const Bits low : {Bits{0}, Bits{12345}, static_cast<Bits>(highest - width)}) {
                if (low > highest - width) { continue; }
                std::vector<Bits> values(n);
                for (auto& value : values) {
                    value = static_cast<Bits>(low + generator() % (std::uint64_t{width} + 1));
                }
                auto sorted = values;
                std::sort(sorted.begin(), sorted.end(), std::greater<>());
                detail::ranking<Bits> ranked(
                    values, low, static_cast<Bits>(low + width), std::pmr::get_default_resource());
                CAPTURE(n);
                CAPTURE(width);
                CAPTURE(low);
                for (const std::size_t rank : {std::size_t{0}, n / 3, n / 2, n - 1}) {
                    CHECK(ranked[rank] == sorted[rank]);
                }
            }
        }
    }
}

TEST_CASE_TEMPLATE("looks at a long list say what sorting says", A, float, double)
{
    using bits = bits_type<A>;
    std::mt19937_64 generator(19);
    const bits low = magnitude_bits(A{1}), high = magnitude_bits(A{2});
    const auto check = [&](const std::vector<bits>& list) {
        auto sorted = list;
        std::sort(sorted.begin(), sorted.end(), std::greater<>());
        for (const std::size_t rank : {std::size_t{0}, list.size() / 50, list.size() / 2, list.size() - 1}) {
            CAPTURE(list.size());
            CAPTURE(rank);
            CHECK(
                detail::magnitude_of_rank<A>(list, rank, low, high, std::pmr::get_default_resource()) == sorted[rank]);
        }
        const bits floor = sorted[list.size() / 2], ceiling = sorted[list.size() / 3];
        std::vector<bits> inside(list.size() + 64 / sizeof(bits));
        const auto counts = kernels::look_again<A>(list, floor, ceiling, inside.data());
        const auto above = std::count_if(list.begin(), list.end(), [&](bits x) { return x > ceiling; });
        CHECK(counts.above == static_cast<std::uint64_t>(above));
        CHECK(counts.largest == sorted.front());
        std::vector<bits> expected;
        std::copy_if(
            list.begin(), list.end(), std::back_inserter(expected), [&](bits x) { return x >= floor && x <= ceiling; });
        REQUIRE(counts.inside == expected.size());
        inside.resize(expected.size());
        std::sort(inside.begin(), inside.end());
        std::sort(expected.begin(), expected.end());
        CHECK(inside == expected);
    };
    for (const std::size_t n : {1, 17, 9000, 100'003}) {
        std::vector<bits> even(n), few(n), sorted(n), striped(n);
        const std::size_t stride = std::max<std::size_t>(1, n / 1024); // as the sample is taken
        for (std::size_t i = 0; i < n; ++i) {
            even[i] = low + static_cast<bits>(generator() % (high - low + 1));
            few[i] = low + static_cast<bits>(generator() % 3);
            sorted[i] = low + static_cast<bits>(i);
            striped[i] = i % stride == 0 ? high : low + static_cast<bits>(generator() % 1000);
        }
        for (const auto& list : {even, few, sorted, striped, std::vector<bits>(n, low)}) { check(list); }
    }
}

TEST_CASE("top_k breaks ties by the lowest index, however many there are")
{
    const std::size_t n = 1 << 20;
    std::vector<float> equal(n, -0.5f);
    check_against_sorting(equal, 12345);
    std::vector<float> few(n), sorted(n), mostly_zero(n, 0.0f), steps(n);
    std::mt19937 generator(7);
    for (std::size_t i = 0; i < n; ++i) {
        few[i] = static_cast<float>(generator() % 3) - 1.0f;
        sorted[i] = static_cast<float>(i);
        if (generator() % 1000 == 0) { mostly_zero[i] = static_cast<float>(generator() % 5); }
        steps[i] = static_cast<float>(i / 4096);
    }
    for (const double density : {0.001, 0.2, 0.34, 0.6667, 0.999}) {
        for (const auto* x : {&few, &sorted, &mostly_zero, &steps}) {
            check_against_sorting(*x, top_k_count(density, n));
        }
    }
}

TEST_CASE("adversarial data need at most five walks")
{
    const std::size_t n = 1 << 22;
    std::mt19937 generator(11);
    std::vector<float> equal(n, 1.0f), few(n), sorted(n), heavy(n);
    for (std::size_t i = 0; i < n; ++i) {
        few[i] = static_cast<float>(generator() % 4);
        sorted[i] = static_cast<float>(n - i);
        heavy[i] = std::bit_cast<float>(static_cast<std::uint32_t>(generator() % 0x7f000000u)); // every exponent alike
    }
    for (const auto* x : {&equal, &few, &sorted, &heavy}) {
        for (const double density : {0.01, 0.2, 0.5, 0.75}) {
            unsigned walks = 0;
            (void)top_k(cpu{}, *x, top_k_count(density, n), &walks);
            CHECK(walks <= 4);
        }
    }
    unsigned walks = 0;
    (void)top_k(cpu{}, random_values<float>(n, 3), top_k_count(0.2, n), &walks);
    CHECK(walks == 1);
}

TEST_CASE("little memory, threads and chunks change nothing")
{
    const auto x = random_values<bf16>(500000, 5), y = random_values<bf16>(500000, 6);
    const const_model_ref base{{"a", as_tensor(as_view(x))}}, task{{"a", as_tensor(as_view(y))}};
    std::vector<top_k_threshold<float>> found;
    for (const unsigned threads : {1u, 3u}) {
        for (const std::size_t chunk : {64u, 1000u, 65536u}) {
            for (const std::size_t capacity : {1024u, 4194304u}) {
                model_options options;
                options.chunk = chunk;
                const aligned_models models(&base, {&task, 1}, options);
                found.push_back(top_k_thresholds<float>(cpu{.threads = threads}, models, all_chunks(models),
                    std::array<std::uint64_t, 1>{100000}, capacity)[0]);
            }
        }
    }
    for (const auto& threshold : found) { CHECK(threshold == found[0]); }
}

TEST_CASE("tensors that are searched at a time have the thresholds that each has by itself")
{
    const std::vector<std::size_t> sizes{700'000, 3, 40'000, 40'000, 0, 300'000, 90'000, 1, 90'000, 500'000, 20'000};
    std::vector<std::vector<bf16>> base, task;
    const_model_ref base_model, task_model;
    for (const std::size_t n : sizes) { // small steps of bf16: few magnitudes
        const auto seed = static_cast<unsigned>(base.size());
        base.push_back(random_values<bf16>(n, seed + 1));
        auto moved = random_values<bf16>(n, seed + 50);
        for (std::size_t i = 0; i < n; ++i) {
            moved[i] = narrow<bf16>(widen<float>(base.back()[i]) + 0.01f * widen<float>(moved[i]));
        }
        task.push_back(std::move(moved));
    }
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        const auto name = "t" + std::to_string(100 + i);
        base_model.insert(name, {base[i].data(), dtype::bf16, {static_cast<std::int64_t>(sizes[i])}});
        task_model.insert(name, {task[i].data(), dtype::bf16, {static_cast<std::int64_t>(sizes[i])}});
    }
    const aligned_models models(&base_model, {&task_model, 1});
    for (const unsigned threads : {1u, 2u, 5u}) {
        CAPTURE(threads);
        std::uint64_t last = 0, total = 0;
        const cpu policy{.threads = threads, .progress = [&](const progress_event& event) {
                             CHECK(event.phase == "select");
                             CHECK(event.done <= event.total);
                             last = event.done;
                             total = event.total;
                             return true;
                         }};
        const trim_thresholds found(policy, models, 0.2, scope::tensor);
        CHECK(last == total);
        for (std::size_t i = 0; i < sizes.size(); ++i) {
            CAPTURE(i);
            if (sizes[i] == 0) { continue; }
            std::vector<float> delta(sizes[i]);
            for (std::size_t k = 0; k < sizes[i]; ++k) {
                delta[k] = widen<float>(task[i][k]) - widen<float>(base[i][k]);
            }
            auto expected = top_k(cpu{.threads = 1}, delta, top_k_count(0.2, sizes[i]));
            if (expected.equal_end <= sizes[i]) { expected.equal_end += models.tensors()[i].position; }
            CHECK(found.get<float>(i, 0) == expected);
        }
    }
    const cpu stopped{.threads = 2, .progress = [](const progress_event&) { return false; }};
    CHECK_THROWS_AS(trim_thresholds(stopped, models, 0.2, scope::tensor), cancelled);
    // What is not finite is named in the first tensor that has it, whichever is searched by itself.
    for (const std::size_t wrong : {9, 6, 0}) {
        task[wrong][1] = narrow<bf16>(std::numeric_limits<float>::quiet_NaN());
        for (const unsigned threads : {1u, 3u}) {
            CHECK_THROWS_WITH_AS(trim_thresholds(cpu{.threads = threads}, models, 0.2, scope::tensor),
                doctest::Contains(("'t" + std::to_string(100 + wrong) + "'").c_str()), nonfinite_error);
        }
    }
}

TEST_CASE("an f64 threshold selects the same f32 entries")
{
    std::mt19937 generator(2);
    for (int i = 0; i < 2000; ++i) {
        const double exact = std::ldexp(static_cast<double>(generator()) + generator() * 0x1p-32, -32);
        const top_k_threshold<double> wide{
            magnitude_bits(i % 2 ? exact : static_cast<double>(static_cast<float>(exact))), generator() % 3};
        const auto single = threshold_as<float>(wide);
        const float near_it = static_cast<float>(exact);
        for (const float x : {near_it, std::nextafter(near_it, 2.0f), -std::nextafter(near_it, 0.0f)}) {
            CHECK(single.keeps(x, 1) == wide.keeps(x, 1));
        }
    }
}

TEST_CASE_TEMPLATE("every instruction set finds the same thresholds", T, float, bf16, f16, double)
{
    using A = arithmetic_type<T>;
    struct back_to_all {
        ~back_to_all() { limit_instruction_set(instruction_set::avx512); }
    } restore;
    for (const std::size_t n : {1, 7, 16, 31, 32, 33, 64, 127, 4096, 4099, 200001}) {
        auto x = random_values<T>(n, static_cast<unsigned>(n)), y = random_values<T>(n, static_cast<unsigned>(n + 1));
        for (std::size_t i = 0; i < n; i += 5) { y[i] = x[i]; } // differences of 0
        std::vector<T> shifted(n + 1);
        std::copy(y.begin(), y.end(), shifted.begin() + 1); // aligned for T, not for a vector
        const host_view<const T> aside(shifted.data() + 1, n);
        const const_model_ref base{{"a", as_tensor(as_view(x))}}, task{{"a", as_tensor(aside)}};
        const aligned_models difference(&base, {&task, 1}), alone(nullptr, {&task, 1});
        std::vector<A> deltas(n), values(n);
        for (std::size_t i = 0; i < n; ++i) {
            values[i] = widen<A>(y[i]);
            deltas[i] = values[i] - widen<A>(x[i]);
        }
        for (const double density : {0.001, 0.2, 0.9}) {
            const std::array<std::uint64_t, 1> k{top_k_count(density, n)};
            for (const auto set :
                {instruction_set::scalar, instruction_set::baseline, instruction_set::avx2, instruction_set::avx512}) {
                limit_instruction_set(set);
                CAPTURE(n);
                CAPTURE(density);
                CAPTURE(to_string(set));
                for (const std::size_t capacity : {std::size_t{1024}, std::size_t{1} << 22}) { // bins, too
                    const auto search = [&](const aligned_models& models) {
                        return top_k_thresholds<A>(cpu{}, models, all_chunks(models), k, capacity)[0];
                    };
                    const auto wrong = [&](const std::vector<A>& of, const top_k_threshold<A>& threshold) {
                        const auto expected = kept_by_sorting(of, k[0]);
                        std::size_t count = 0;
                        for (std::size_t i = 0; i < n; ++i) { count += threshold.keeps(of[i], i) != expected[i]; }
                        return count;
                    };
                    static top_k_threshold<A> of_differences, of_values; // as scalars find them
                    if (set == instruction_set::scalar && capacity == 1024) {
                        of_differences = search(difference);
                        of_values = search(alone);
                        CHECK(wrong(deltas, of_differences) == 0);
                        CHECK(wrong(values, of_values) == 0);
                    }
                    CHECK(search(difference) == of_differences);
                    CHECK(search(alone) == of_values);
                }
                auto trimmed = values;
                const auto threshold = top_k_thresholds<A>(cpu{}, alone, all_chunks(alone), k)[0];
                kernels::trim(trimmed.data(), n, 0, threshold);
                std::size_t wrong = 0;
                for (std::size_t i = 0; i < n; ++i) {
                    wrong += trimmed[i] != (threshold.keeps(values[i], i) ? values[i] : A{0});
                }
                CHECK(wrong == 0);
            }
        }
    }
}

TEST_CASE("every instruction set sees NaN and infinity, wherever they lie")
{
    struct back_to_all {
        ~back_to_all() { limit_instruction_set(instruction_set::avx512); }
    } restore;
    for (const auto set :
        {instruction_set::scalar, instruction_set::baseline, instruction_set::avx2, instruction_set::avx512}) {
        limit_instruction_set(set);
        for (const std::size_t place : {0u, 1u, 30u, 95u, 96u, 98u}) {
            auto x = random_values<f16>(99, 1);
            x[place] = narrow<f16>(
                place % 2 ? std::numeric_limits<float>::quiet_NaN() : -std::numeric_limits<float>::infinity());
            CHECK_THROWS_AS((void)top_k(cpu{}, x, 10), nonfinite_error);
        }
    }
}

TEST_CASE("rows that are trimmed piece by piece keep what the whole row keeps")
{
    std::vector<float> whole(1000);
    std::mt19937 draw(5);
    for (auto& value : whole) { value = static_cast<float>(draw() % 7) - 3.0f; } // many are equal
    for (const std::uint64_t k : {1, 100, 500, 999}) {
        const auto threshold = top_k(cpu{}, whole, k);
        const auto kept = kept_by_sorting(whole, k);
        for (const std::size_t piece : {1u, 16u, 33u, 250u}) {
            auto trimmed = whole;
            for (std::size_t at = 0; at < trimmed.size(); at += piece) {
                kernels::trim(trimmed.data() + at, std::min(piece, trimmed.size() - at), at, threshold);
            }
            std::size_t wrong = 0;
            for (std::size_t i = 0; i < whole.size(); ++i) { wrong += trimmed[i] != (kept[i] ? whole[i] : 0.0f); }
            CAPTURE(k);
            CAPTURE(piece);
            CHECK(wrong == 0);
        }
    }
}

TEST_CASE("of nothing, nothing is kept, and a threshold of NaN keeps NaN alone")
{
    CHECK(top_k(cpu{}, std::vector<float>{}, 0) == top_k_threshold<float>{});
    CHECK_THROWS_AS((void)top_k(cpu{}, std::vector<float>{}, 1), invalid_argument);
    CHECK_THROWS_WITH_AS(
        (void)kth_magnitude(cpu{}, std::vector<float>{1}, 0), "k is 0; expected at least 1", invalid_argument);
    CHECK(kth_magnitude(cpu{}, std::vector<float>{1, -3, 2}, 2) == 2.0f);
    const double none = std::numeric_limits<double>::quiet_NaN();
    const auto single = threshold_as<float>(top_k_threshold<double>{magnitude_bits(none), 2});
    CHECK(single.keeps(std::numeric_limits<float>::quiet_NaN(), 1));
    CHECK_FALSE(single.keeps(std::numeric_limits<float>::quiet_NaN(), 2));
    CHECK_FALSE(single.keeps(std::numeric_limits<float>::infinity(), 1));
}

TEST_CASE("a share for each task is its own; one that keeps nothing leaves the others as they are")
{
    const auto x = random_values<float>(5000, 1), y = random_values<float>(5000, 2);
    const std::vector<const_model_ref> tasks{{{"a", as_tensor(as_view(x))}}, {{"a", as_tensor(as_view(y))}}};
    const aligned_models models(nullptr, tasks);
    const auto shares = [](std::vector<double> each, std::size_t count) {
        return task_shares(0.3, each, count, "densities");
    };
    CHECK(shares({}, 2).of(1) == 0.3);
    CHECK(shares({0.1, 0.5}, 2).of(1) == 0.5);
    CHECK_THROWS_WITH_AS(
        shares({0.1, 0.2, 0.3}, 2), "3 densities for 2 tasks: give one each, or none", invalid_argument);
    for (const auto over : {scope::model, scope::tensor}) {
        const trim_thresholds found(cpu{}, models, shares({0.1, 0.5}, 2), over);
        CHECK(found.get<float>(0, 0) == top_k(cpu{}, x, 500));
        CHECK(found.get<float>(0, 1) == top_k(cpu{}, y, 2500));
        const trim_thresholds one(cpu{}, models, shares({1e-30, 0.5}, 2), over);
        CHECK(one.get<float>(0, 1) == top_k(cpu{}, y, 2500));
        std::size_t kept = 0;
        for (std::size_t i = 0; i < x.size(); ++i) { kept += one.get<float>(0, 0).keeps(x[i], i); }
        CHECK(kept == 0);
    }
    const const_model_ref nothing;
    const aligned_models empty(nullptr, {&nothing, 1});
    CHECK_THROWS_AS(trim_thresholds(cpu{}, empty, 1.5, scope::model), invalid_argument); // wrong anywhere
    CHECK_NOTHROW(trim_thresholds(cpu{}, empty, 0.5, scope::tensor));
}

TEST_CASE("tasks that take different numbers of walks have the thresholds that each has by itself")
{
    const std::size_t n = 40'000;
    const auto smooth = random_values<float>(n, 3);
    std::vector<float> heavy(n), equal(n, 2.0f), front(n, 0.0f);
    std::mt19937 draw(9);
    for (auto& value : heavy) { value = std::bit_cast<float>(static_cast<std::uint32_t>(draw() % 0x7f000000u)); }
    for (std::size_t i = 0; i < 1000; ++i) { front[i] = 1.0f + static_cast<float>(i) * 0x1p-20f; } // in one chunk
    const std::vector<const std::vector<float>*> values{&smooth, &heavy, &equal, &front, &smooth};
    const std::vector<std::uint64_t> counts{n / 5, n / 3, n / 2, 500, n};
    std::vector<const_model_ref> tasks;
    for (const auto* x : values) { tasks.push_back({{"a", as_tensor(as_view(*x))}}); }
    model_options options;
    options.chunk = 4096;
    const aligned_models models(nullptr, tasks, options);
    for (const unsigned threads : {1u, 3u}) {
        for (const std::size_t capacity : {1024u, 4096u, 4194304u}) {
            CAPTURE(threads);
            CAPTURE(capacity);
            const auto found =
                top_k_thresholds<float>(cpu{.threads = threads}, models, all_chunks(models), counts, capacity);
            for (std::size_t t = 0; t < values.size(); ++t) {
                CAPTURE(t);
                const auto kept = kept_by_sorting(*values[t], counts[t]);
                std::size_t wrong = 0;
                for (std::size_t i = 0; i < n; ++i) { wrong += found[t].keeps((*values[t])[i], i) != kept[i]; }
                CHECK(wrong == 0);
            }
        }
    }
}

TEST_CASE("values that mislead the sample cost a walk and change nothing")
{
    const std::size_t n = 1 << 20, sampled = n / 512, runs = sampled / 32, stratum = n / runs;
    const random_stream places(0x746f702d6bull, 0); // where the first walk's sample lies
    std::vector<bool> seen(n);
    for (std::size_t r = 0; r < runs; ++r) {
        const std::size_t from = r * stratum + static_cast<std::size_t>(places.word(r) % stratum);
        for (std::size_t i = from; i < std::min(n, from + 32); ++i) { seen[i] = true; }
    }
    std::mt19937 draw(13);
    for (const bool larger : {true, false}) { // what is sampled is larger than all else, or smaller
        std::vector<float> x(n);
        for (std::size_t i = 0; i < n; ++i) {
            x[i] = (seen[i] == larger ? 2.0f : 1.0f) + static_cast<float>(draw()) * 0x1p-33f;
        }
        CAPTURE(larger);
        const const_model_ref model{{"a", as_tensor(as_view(x))}};
        const aligned_models models(nullptr, {&model, 1});
        const std::array<std::uint64_t, 1> k{n / 4};
        unsigned walks = 0;
        const auto found =
            top_k_thresholds<float>(cpu{.threads = 2}, models, all_chunks(models), k, 1 << 16, &walks)[0];
        CHECK(walks >= 2);
        CHECK(walks <= 5);
        const auto kept = kept_by_sorting(x, k[0]);
        std::size_t wrong = 0;
        for (std::size_t i = 0; i < n; ++i) { wrong += found.keeps(x[i], i) != kept[i]; }
        CHECK(wrong == 0);
    }
}

TEST_CASE("bad arguments are named")
{
    const std::vector<float> x{1, 2, 3}, poisoned{1, std::numeric_limits<float>::infinity(), 2};
    CHECK_THROWS_AS((void)top_k(cpu{}, x, 0), invalid_argument);
    CHECK_THROWS_AS((void)top_k(cpu{}, x, 4), invalid_argument);
    CHECK(top_k_count(1e-15, 5) == 1);
    CHECK(top_k_count(1e-30, 5) == 0); // a share of which nothing is an entry
    CHECK_THROWS_AS((void)top_k_count(0.0, 5), invalid_argument);
    CHECK_THROWS_AS((void)top_k_count(1.5, 5), invalid_argument);
    CHECK_THROWS_AS((void)top_k_count(std::nan(""), 5), invalid_argument);
    try {
        (void)top_k_count(20.0, 5);
        FAIL("accepted");
    }
    catch (const error& failure) {
        CHECK(failure.code() == error_code::density_out_of_range);
    }
    CHECK_THROWS_WITH_AS((void)top_k(cpu{}, poisoned, 1),
        "tensor 'values' of task 1 holds infinity at index 1: repair it, exclude the tensor, or ask for non-finite "
        "values to propagate",
        nonfinite_error);
}

TEST_CASE(
    "values in order, of one size and of one kind are searched in one walk: the sample's bracket holds the answer")
{
    constexpr std::size_t n = std::size_t{1} << 22;
    std::vector<float> ascending(n), descending(n), noise(n), steps(n);
    std::mt19937 draw(7);
    for (std::size_t i = 0; i < n; ++i) {
        ascending[i] = static_cast<float>(i);
        descending[i] = static_cast<float>(n - i);
        noise[i] = static_cast<float>(draw()) * 0x1p-32f - 0.5f;
        steps[i] = static_cast<float>(draw() % 4);
    }
    for (const auto* values : {&ascending, &descending, &noise, &steps}) {
        const const_model_ref model = detail::flat_model(host_view<const float>(values->data(), n));
        const aligned_models models(nullptr, {&model, 1});
        for (const std::uint64_t k : {std::uint64_t{n / 5}, std::uint64_t{n / 3}}) {
            unsigned walks = 0;
            (void)top_k_thresholds<float>(
                cpu{.threads = 2}, models, all_chunks(models), {&k, 1}, std::size_t{1} << 22, &walks);
            CHECK(walks == 1);
        }
    }
}
