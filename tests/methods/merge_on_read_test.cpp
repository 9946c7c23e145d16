// merge_on_read(): the elements that merge() stores, wherever they are read, and whatever reads them.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/sample_models.hpp"

#include <taskvec/formats/fingerprint.hpp>
#include <taskvec/methods/merge_on_read.hpp>

#include <doctest/doctest.h>
#include <library_methods.hpp>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <concepts>
#include <cstring>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <typeinfo>
#include <vector>

using namespace taskvec;
using namespace testing;

namespace {

/// All of a tensor as a file would have it.
std::vector<std::byte> words_of(const const_tensor_ref& tensor)
{
    std::vector<std::byte> words(tensor.bytes() + 8);
    if (tensor.source) { detail::read_stored(*tensor.source, tensor.dtype, 0, tensor.size(), words.data()); }
    else if (tensor.bytes() > 0) {
        std::memcpy(words.data(), tensor.data, tensor.bytes());
    }
    words.resize(tensor.bytes());
    return words;
}

/// The same tensors with the same bytes, read from end to end.
void check_same(const const_model_ref& merged, const const_model_ref& stored)
{
    REQUIRE(merged.size() == stored.size());
    for (const auto& entry : stored) {
        CAPTURE(entry.name);
        const auto* const found = merged.find(entry.name);
        REQUIRE(found);
        CHECK(found->dtype == entry.tensor.dtype);
        CHECK(found->shape == entry.tensor.shape);
        CHECK(words_of(*found) == words_of(entry.tensor));
    }
}

/// Reads of any part, on several threads, give the stored elements.
void check_reads(const const_model_ref& merged, const const_model_ref& stored)
{
    std::atomic<int> wrong{0};
    const auto read = [&](unsigned seed) {
        std::mt19937 random(seed);
        for (int round = 0; round < 14; ++round) {
            const auto& [name, tensor] = stored[random() % stored.size()];
            const auto* const source = merged.find(name)->source;
            const std::size_t size = tensor.size();
            if (!source || size == 0) { continue; }
            std::size_t offset = random() % size;
            if (random() % 3 == 0) { offset = offset / 4096 * 4096; }
            const std::size_t most[] = {1, 63, 4096, 20000};
            const std::size_t count = 1 + random() % std::min(most[random() % 4], size - offset);
            const std::size_t width = byte_count(source->type(), 1);
            std::vector<std::byte> found((count + 1) * width), expected(found);
            source->read(offset, count, found.data());
            detail::widen_stored(tensor.dtype,
                static_cast<const std::byte*>(tensor.data) + byte_count(tensor.dtype, offset), count, expected.data());
            wrong += found == expected ? 0 : 1; // nothing is written behind what was asked for
        }
    };
    std::vector<std::thread> threads;
    for (unsigned seed = 1; seed <= 4; ++seed) { threads.emplace_back(read, seed); }
    for (auto& one : threads) { one.join(); }
    CHECK(wrong.load() == 0);
}

template <class... Options>
struct each_method {
    template <class Use>
    static void visit(const Use& use)
    {
        const auto one = [&]<class One>(std::type_identity<One>) {
            if constexpr (merges_on_read<One>) { use(std::type_identity<One>()); }
        };
        (one(std::type_identity<Options>()), ...);
    }
};

} // namespace

TEST_CASE("every elementwise method gives, wherever it is read, what merge() stores")
{
    std::size_t methods = 0;
    for (const auto rule : {all_f32, all_bf16, all_f16, mixed_types}) {
        const sample from(rule);
        for (const auto output : {std::optional<dtype>(), std::optional(dtype::bf16)}) {
            if (output && rule != all_f32) { continue; }
            with_library_methods<each_method>::visit([&]<class Options>(std::type_identity<Options>) {
                CAPTURE(typeid(Options).name());
                const std::size_t count = tasks_for<Options>(from);
                const auto options = options_for<Options>(from, count);
                const auto models = from.models(count, {.output = output});
                const written_model stored(
                    models, [&](tensor_sink& sink) { merge(cpu{.threads = 3}, options, models, sink); });
                const_model_ref merged;
                const auto sources = merge_on_read(cpu{.threads = 2}, options, models, merged);
                check_reads(merged, stored.ref);
                check_same(merged, stored.ref);
                CHECK(fingerprint_sketch(merged) == fingerprint_sketch(stored.ref));
                ++methods;
            });
        }
    }
    CHECK(methods == std::size_t{5} * 22); // all but RegMean
}

TEST_CASE("merges of merges have the bits of merges of what was stored, and so on")
{
    const sample from(all_bf16);
    const auto models = from.models(3);
    const average_options first{.weights = {0.5, 0.3, 0.2}};
    const written_model stored(models, [&](tensor_sink& sink) { merge(cpu{}, first, models, sink); });
    const_model_ref merged;
    const auto sources = merge_on_read(cpu{}, first, models, merged);
    CHECK(fingerprint(cpu{}, merged) == fingerprint(cpu{}, stored.ref));
    // As a base and as a task, by methods that look at everything before they merge, and draw.
    const auto then = [&](const const_model_ref& mixed_in, auto&& use) {
        const std::vector<const_model_ref> tasks{from.tasks[0].ref, mixed_in, from.tasks[2].ref};
        use(aligned_models(&from.base.ref, tasks));
        use(aligned_models(&mixed_in, std::vector{from.tasks[0].ref, from.tasks[1].ref, from.tasks[2].ref}));
    };
    const auto each = [&](const auto& options) {
        std::vector<written_model> expected;
        then(stored.ref, [&](const aligned_models& lined_up) {
            expected.emplace_back(lined_up, [&](tensor_sink& sink) { merge(cpu{}, options, lined_up, sink); });
        });
        std::size_t next = 0;
        then(merged, [&](const aligned_models& lined_up) {
            const written_model found(
                lined_up, [&](tensor_sink& sink) { merge(cpu{.threads = 4}, options, lined_up, sink); });
            check_same(found.ref, expected[next].ref);
            // A stage of a stage.
            const_model_ref again;
            const auto deeper = merge_on_read(cpu{}, options, lined_up, again);
            check_same(again, expected[next].ref);
            ++next;
        });
    };
    each(ties_options{.density = 0.3});
    each(dare_options{.density = 0.4, .seed = 5});
    each(della_options{});
    each(model_stock_options{});
    each(breadcrumbs_options{});
}

TEST_CASE("options by tensor are those of merge_by_tensor()")
{
    const sample from(all_f16);
    const auto models = from.models(3);
    const callback<ties_options(std::string_view)> options_of = [](std::string_view name) {
        return ties_options{.density = name.ends_with("weight") ? 0.2 : 0.7, .scope = scope::model};
    };
    const written_model stored(
        models, [&](tensor_sink& sink) { merge_by_tensor<ties_options>(cpu{}, options_of, models, sink); });
    const_model_ref merged;
    const auto sources = merge_on_read_by_tensor<ties_options>(cpu{}, options_of, models, merged);
    check_reads(merged, stored.ref);
    check_same(merged, stored.ref);
}

TEST_CASE("NaN in an input is an error of the read that comes to it, and nobody else's")
{
    const std::size_t place = 5000;
    std::vector<float> base(9000, 1.0F), task(9000, 2.0F);
    task[place] = std::numeric_limits<float>::quiet_NaN();
    const const_model_ref base_model{{"w", {base.data(), dtype::f32, {9000}}}},
        task_model{{"w", {task.data(), dtype::f32, {9000}}}};
    std::vector<float> found(9000);
    const_model_ref merged;
    {
        const aligned_models models(&base_model, {&task_model, 1}, {.labels = {"'mine'"}});
        const auto sources = merge_on_read(cpu{}, task_arithmetic_options{.lambda = 0.5}, models, merged);
        const auto& source = *merged.find("w")->source;
        for (int time = 0; time < 2; ++time) {
            source.read(0, 4000, found.data());
            CHECK(found[3999] == 1.5F);
            try {
                source.read(4990, 20, found.data());
                FAIL("no error");
            }
            catch (const nonfinite_error& wrong) {
                CHECK(std::string(wrong.what()).find("tensor 'w' of 'mine' holds NaN at index 5000") == 0);
            }
            source.read(6000, 3000, found.data());
            CHECK(found[2999] == 1.5F);
        }
    }
    const aligned_models models(&base_model, {&task_model, 1}, {.on_nonfinite = nonfinite::propagate});
    const auto sources = merge_on_read(cpu{}, task_arithmetic_options{.lambda = 0.5}, models, merged);
    merged.find("w")->source->read(place - 1, 2, found.data());
    CHECK(found[0] == 1.5F);
    CHECK(std::isnan(found[1]));
}

TEST_CASE("a result that its dtype cannot hold is what merge() says it is")
{
    std::vector<float> base(9000, 1.0F), task(9000, 2.0F);
    base[4321] = 30000;
    task[4321] = -60000;
    const const_model_ref base_model{{"w", {base.data(), dtype::f32, {9000}}}},
        task_model{{"w", {task.data(), dtype::f32, {9000}}}};
    const task_arithmetic_options twice{.lambda = 2};
    const auto with = [&](overflow how, auto&& use) {
        const aligned_models models(&base_model, {&task_model, 1}, {.output = dtype::f16, .on_overflow = how});
        const_model_ref merged;
        const auto sources = merge_on_read(cpu{}, twice, models, merged);
        use(models, merged);
    };
    for (const auto how : {overflow::saturate, overflow::propagate}) {
        with(how, [&](const aligned_models& models, const const_model_ref& merged) {
            const written_model stored(models, [&](tensor_sink& sink) { merge(cpu{}, twice, models, sink); });
            check_same(merged, stored.ref);
            float found = 0;
            merged.find("w")->source->read(4321, 1, &found);
            CHECK(found == (how == overflow::saturate ? -65504.0F : -std::numeric_limits<float>::infinity()));
        });
    }
    with(overflow::error, [&](const aligned_models&, const const_model_ref& merged) {
        std::vector<float> found(9000);
        const auto& source = *merged.find("w")->source;
        source.read(0, 4321, found.data());
        try {
            source.read(0, 9000, found.data());
            FAIL("no error");
        }
        catch (const nonfinite_error& wrong) {
            CHECK(wrong.code() == error_code::result_overflow);
            CHECK(std::string(wrong.what()).find("tensor 'w' would hold infinity at index 4321") == 0);
        }
        source.read(4352, 1000, found.data()); // behind the 64 that the place is among
        CHECK(found[0] == 3.0F);
    });
}

TEST_CASE("what takes no part and is worked out is read as it would be stored")
{
    /// 1/3, 2/3, 1 …
    struct thirds final : operand_source {
        [[nodiscard]] dtype type() const noexcept override { return dtype::f64; }
        void read(std::uint64_t offset, std::size_t count, void* out) const override
        {
            for (std::size_t i = 0; i < count; ++i) {
                static_cast<double*>(out)[i] = static_cast<double>(offset + i + 1) / 3;
            }
        }
    } source;
    const std::vector<float> values(6, 1.0F);
    const_model_ref model{{"a", {values.data(), dtype::f32, {6}}}};
    model.insert("left.b", {nullptr, dtype::f64, {3000, 2}, {}, memory_space::host, 0, &source});
    for (const auto output : {dtype::f64, dtype::f32, dtype::bf16, dtype::f16}) {
        const aligned_models models(nullptr, std::vector{model, model},
            {.include = [](std::string_view name) { return name == "a"; }, .output = output});
        const written_model stored(models, [&](tensor_sink& sink) { merge(cpu{}, average_options{}, models, sink); });
        CHECK(stored.ref.find("left.b")->dtype == output);
        const_model_ref merged;
        const auto sources = merge_on_read(cpu{}, average_options{}, models, merged);
        check_same(merged, stored.ref);
        CHECK(fingerprint(cpu{}, merged) == fingerprint(cpu{}, stored.ref));
        CHECK(fingerprint_sketch(merged) == fingerprint_sketch(stored.ref));
    }
}

TEST_CASE("what merge() refuses before it begins is refused at once")
{
    const sample from(all_f32);
    const_model_ref merged;
    const std::vector<const_model_ref> tasks{from.tasks[0].ref};
    const aligned_models without(nullptr, tasks);
    CHECK_THROWS_AS((void)merge_on_read(cpu{}, ties_options{}, without, merged), invalid_argument);
    const auto models = from.models(3);
    CHECK_THROWS_AS((void)merge_on_read(cpu{}, ties_options{.density = 0}, models, merged), invalid_argument);
    CHECK_THROWS_AS((void)merge_on_read(cpu{}, average_options{.weights = {1}}, models, merged), invalid_argument);
}
