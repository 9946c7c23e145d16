// Merges of some tensors at a time, by methods that learn all of a tensor from that tensor.
// SPDX-License-Identifier: Apache-2.0
#include "../reference/sample_models.hpp"

#include <taskvec/methods/slerp.hpp>
#include <taskvec/methods/ties.hpp>

#include <doctest/doctest.h>
#include <library_methods.hpp>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <typeinfo>
#include <vector>

using namespace taskvec;
using namespace testing;

namespace {

/// Counting over tensors, where there is a choice, and with another walk for L1 norms.
template <class Options>
Options over_tensors(Options options)
{
    if constexpr (requires { options.scope; }) { options.scope = scope::tensor; }
    if constexpr (requires { options.ties; }) { options.ties.scope = scope::tensor; }
    if constexpr (requires { options.rescale = drop_rescale::l1; }) { options.rescale = drop_rescale::l1; }
    else if constexpr (requires { options.rescale = true; }) {
        options.rescale = true;
    }
    return options;
}

template <class... Options>
struct each_in_runs {
    template <class Use>
    static void visit(const Use& use)
    {
        const auto one = [&]<class One>(std::type_identity<One>) {
            if constexpr (requires(const One& options) { method<One>::tensor_by_tensor(options); }) {
                use(std::type_identity<One>());
            }
        };
        (one(std::type_identity<Options>()), ...);
    }
};

bool same_bytes(const written_model& a, const written_model& b)
{
    return std::equal(a.memory.begin(), a.memory.end(), b.memory.begin(), b.memory.end());
}

/// A task that keeps a list of which tensors are read.
struct told_reads final : operand_source {
    std::vector<float> values;
    char name;
    std::string* order;
    std::mutex* writing;

    told_reads(char called, std::string& to, std::mutex& mutex)
        : values(3000)
        , name(called)
        , order(&to)
        , writing(&mutex)
    {
        std::mt19937 random(static_cast<unsigned>(called));
        for (auto& x : values) { x = std::normal_distribution<float>()(random); }
    }
    [[nodiscard]] dtype type() const noexcept override { return dtype::f32; }
    void read(std::uint64_t offset, std::size_t count, void* out) const override
    {
        std::memcpy(out, values.data() + offset, count * sizeof(float));
        const std::lock_guard lock(*writing);
        if (order->empty() || order->back() != name) { order->push_back(name); }
    }
};

} // namespace

TEST_CASE("some tensors at a time have the bits and the report of all together")
{
    std::size_t methods = 0;
    for (const auto rule : {all_f32, all_bf16, mixed_types}) {
        sample from(rule);
        if (rule == all_f32) { // an entry that f16 does not hold, in every model
            const float large = 1e5F;
            for (auto* const model : {&from.base, from.tasks.data(), &from.tasks[1], &from.tasks[2]}) {
                std::memcpy(model->memory["c.weight"].data(), &large, sizeof large);
            }
        }
        with_library_methods<each_in_runs>::visit([&]<class Options>(std::type_identity<Options>) {
            CAPTURE(typeid(Options).name());
            const std::size_t count = tasks_for<Options>(from);
            const auto options = over_tensors(options_for<Options>(from, count));
            CHECK(method<Options>::tensor_by_tensor(options));
            const auto merged = [&](std::size_t memory, merge_report& report) {
                const auto models = from.models(count,
                    {.output = dtype::f16, .on_overflow = overflow::saturate, .statistics = true, .memory = memory});
                return written_model(
                    models, [&](tensor_sink& sink) { report = merge(cpu{.threads = 3}, options, models, sink); });
            };
            merge_report whole;
            const auto expected = merged(std::size_t{1} << 28, whole);
            CHECK(whole.saturated == (rule == all_f32 ? 1 : 0));
            for (const std::size_t memory : {1, 20000, 400000}) {
                CAPTURE(memory);
                merge_report report;
                CHECK(same_bytes(merged(memory, report), expected));
                CHECK(report.kept == whole.kept);
                CHECK(report.conflicting == whole.conflicting);
                CHECK(report.saturated == whole.saturated);
                CHECK(report.beside == whole.beside);
                CHECK(report.walks >= whole.walks); // less memory, more reads for a threshold
            }
            ++methods;
        });
    }
    CHECK(methods == std::size_t{3} * 15);
}

TEST_CASE("what counts over the whole model is asked of the whole model")
{
    CHECK(!method<ties_options>::tensor_by_tensor({.scope = scope::model}));
    const sample from(all_f32);
    const auto with = [&](std::size_t memory) {
        const auto models = from.models(3, {.memory = memory});
        return written_model(
            models, [&](tensor_sink& sink) { merge(cpu{}, ties_options{.density = 0.1}, models, sink); });
    };
    CHECK(same_bytes(with(1), with(std::size_t{1} << 28)));
}

TEST_CASE("a part of aligned models shares their list of outputs, and has a budget of its own")
{
    const sample from(all_bf16);
    const auto models = from.models(2, {.memory = 4096});
    const std::vector<std::size_t> chosen{1, 4};
    const aligned_models part(models, chosen), poorer(models, chosen, 100);
    CHECK(&part.outputs() == &models.outputs());
    REQUIRE(part.tensors().size() == 2);
    CHECK(part.tensors()[0].name == models.tensors()[1].name);
    CHECK(part.tensors()[1].position == models.tensors()[1].size);
    CHECK(part.elements() == models.tensors()[1].size + models.tensors()[4].size);
    CHECK(part.copied().empty());
    CHECK(part.has_base());
    CHECK(part.task_count() == 2);
    CHECK(part.options().memory == 4096);
    CHECK(poorer.options().memory == 100);
}

TEST_CASE("a run of tensors is merged before the next is read")
{
    std::string order;
    std::mutex writing;
    std::vector<told_reads> stored;
    for (char name = 'a'; name <= 'j'; ++name) { stored.emplace_back(name, order, writing); }
    const std::vector<float> base(3000, 0.5F);
    const_model_ref base_model, task_model;
    for (const auto& one : stored) {
        const std::string name(1, one.name);
        base_model.insert(name, {base.data(), dtype::f32, {3000}});
        task_model.insert(name, {nullptr, dtype::f32, {3000}, {}, memory_space::host, 0, &one});
    }
    const auto order_with = [&](std::size_t memory, const auto& options) {
        order.clear();
        const aligned_models models(&base_model, std::vector{task_model}, {.memory = memory});
        const written_model done(models, [&](tensor_sink& sink) { merge(cpu{.threads = 1}, options, models, sink); });
        return order;
    };
    constexpr std::size_t each = 3000 * 2 * sizeof(float); // of base and task
    CHECK(order_with(4 * each, slerp_options{}) == "abcdefghij");
    CHECK(order_with(8 * each, slerp_options{}) == "ababcdcdefefghghijij");
    CHECK(order_with(10 * each, slerp_options{}) == "abcdefghijabcdefghij");
    CHECK(order_with(1, ties_options{.scope = scope::tensor}) == "abcdefghij");
    CHECK(order_with(1, ties_options{.scope = scope::model}).size() >= 20);
}

TEST_CASE("progress is that of one walk, and what another tensor's run writes is no input")
{
    const sample from(all_f32);
    const auto models = from.models(2, {.memory = 1000});
    std::uint64_t reached = 0;
    std::map<std::string, std::uint64_t> totals;
    const cpu told{.progress = [&](const progress_event& event) {
        if (event.phase == "merge") {
            CHECK(event.done >= reached);
            reached = event.done;
        }
        totals[std::string(event.phase)] = event.total;
        return true;
    }};
    const written_model done(models, [&](tensor_sink& sink) { merge(told, slerp_options{}, models, sink); });
    CHECK(totals == std::map<std::string, std::uint64_t>{{"copy", 2440}, {"merge", models.bytes()}});
    CHECK(reached == models.bytes());
    const cpu stopped{.progress = [](const progress_event&) { return false; }};
    CHECK_THROWS_AS(
        written_model(models, [&](tensor_sink& sink) { merge(stopped, slerp_options{}, models, sink); }), cancelled);

    std::vector<float> first(100, 1.0F), second(100, 2.0F), out(100);
    const const_model_ref a{{"x", {first.data(), dtype::f32, {100}}}, {"y", {second.data(), dtype::f32, {100}}}};
    const aligned_models two(nullptr, std::vector{a, a}, {.memory = 1});
    memory_sink over({second.data(), out.data()}); // x over what y is read from
    CHECK_THROWS_AS(merge(cpu{}, slerp_options{}, two, over), invalid_argument);
}
