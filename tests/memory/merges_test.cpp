// What merges by every method take through the policy's memory resource, and around it.
// SPDX-License-Identifier: Apache-2.0
#include "big_models.hpp"
#include "counted.hpp"

#include <taskvec/methods/arcee_fusion.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/breadcrumbs.hpp>
#include <taskvec/methods/checkpoint_average.hpp>
#include <taskvec/methods/dare.hpp>
#include <taskvec/methods/della.hpp>
#include <taskvec/methods/fisher.hpp>
#include <taskvec/methods/karcher.hpp>
#include <taskvec/methods/model_stock.hpp>
#include <taskvec/methods/multi_slerp.hpp>
#include <taskvec/methods/nearswap.hpp>
#include <taskvec/methods/nuslerp.hpp>
#include <taskvec/methods/passthrough.hpp>
#include <taskvec/methods/ram.hpp>
#include <taskvec/methods/sce.hpp>
#include <taskvec/methods/slerp.hpp>
#include <taskvec/methods/task_arithmetic.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/search/subset_sweep.hpp>
#include <taskvec/search/task_space.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstring>
#include <span>
#include <vector>

using namespace taskvec;
using testing::big_models, testing::call_memory, testing::check_call, testing::count_memory, testing::counted_memory;

namespace {

template <class T>
void check_merges(const big_models<T>& m, const model_options& how)
{
    const auto with_base = [&](const char* name, const auto& options) {
        check_call(name, m.all_tensors(),
            [&](const cpu& policy) { return merge(policy, options, m.base_model, m.task_models, m.out_model, how); });
    };
    with_base("task arithmetic", task_arithmetic_options{.lambda = 0.3});
    with_base("average", average_options{});
    with_base("Model Stock", model_stock_options{});
    with_base("TIES", ties_options{.density = 0.2});
    with_base("TIES as in mergekit", ties_options::as_in_mergekit());
    with_base("TIES of the paper's code", ties_options::as_in_ties_merging());
    with_base("DARE", dare_options{});
    with_base("DARE-TIES", dare_ties_options{});
    check_call("SLERP", m.all_tensors(), [&](const cpu& policy) {
        return merge(policy, slerp_options{}, std::span(m.task_models).first(2), m.out_model, how);
    });
    std::vector<std::vector<T>> squares = m.tasks;
    std::vector<const_model_ref> fishers;
    for (auto& square : squares) {
        for (auto& value : square) { value = narrow<T>(widen<float>(value) * widen<float>(value)); }
        const_model_ref& fisher = fishers.emplace_back();
        const T* at = square.data();
        for (const auto& [name, tensor] : m.base_model) {
            fisher.insert(name, as_tensor(host_view<const T>{at, tensor.size()}));
            at += tensor.size();
        }
    }
    with_base("Fisher", fisher_options{.fishers = fishers, .normalize = true});
}

} // namespace

TEST_CASE_TEMPLATE("Merges take what grows with the models from the policy's resource, once", T, float, bf16)
{
    const big_models<T> models(3);
    check_merges(models, {});
}

TEST_CASE("Counts and norms for a report do too, and the chunks of a merge in small pieces")
{
    const big_models<float> models(2);
    model_options how;
    how.statistics = true;
    how.chunk = 256;
    check_merges(models, how);
}

TEST_CASE("Around the resource goes a bounded amount for each tensor")
{
    const big_models<float> models(3, std::vector<std::size_t>(1000, 4));
    check_merges(models, {});
}

TEST_CASE("A merge of models that are lined up already takes nothing around the resource")
{
    const big_models<float> m(3, {50'000, 1, 64, 8192, 0});
    std::vector<void*> tensors;
    for (const auto& [name, tensor] : m.out_model) { tensors.push_back(tensor.data); }
    const auto check = [&](const char* name, const auto& options, std::size_t tasks = 3) {
        CAPTURE(name);
        const aligned_models models(&m.base_model, std::span(m.task_models).first(tasks));
        memory_sink out(tensors);
        counted_memory memory;
        const auto call = [&](const cpu& policy) {
            static_cast<void>(merge(policy, options, models, out)); // warm: locales and the like
            const call_memory taken =
                count_memory(memory, [&] { static_cast<void>(merge(policy, options, models, out)); });
            CHECK(taken.around == 0);
            CHECK(taken.received == 0);
            CHECK(taken.fresh == 0);
            CHECK(memory.in_use() == 0);
        };
        call(cpu{.threads = 1, .memory = &memory});
        // The caller's own loop, as of a pool: the library's own threads are started anew for every call.
        call(cpu{.threads = 3,
            .executor =
                [](std::size_t count, const auto& body) {
                    for (std::size_t i = 0; i < count; ++i) { body(i); }
                },
            .memory = &memory});
    };
    const std::vector<double> weights{0.5, 1.0, 2.0}, densities{0.1, 0.2, 0.3};
    check("task arithmetic", task_arithmetic_options{.weights = weights});
    check("average", average_options{.weights = weights});
    check("checkpoint average", checkpoint_average_options{});
    check("TIES", ties_options{.weights = weights, .densities = densities});
    check("TIES as in mergekit", ties_options::as_in_mergekit());
    check("TIES of the paper's code", ties_options::as_in_ties_merging());
    ties_options rescaled = ties_options::as_in_mergekit();
    rescaled.rescale = true;
    check("TIES that rescales", rescaled);
    check("DARE", dare_options{.weights = weights, .densities = densities});
    check("DARE-TIES", dare_ties_options{});
    check("Breadcrumbs", breadcrumbs_options{});
    check("Breadcrumbs-TIES", breadcrumbs_ties_options{});
    check("DELLA", della_options{});
    check("DELLA-linear", della_linear_options{});
    check("Model Stock", model_stock_options{});
    check("Model Stock by rows", model_stock_options{.angles = angles_between::rows});
    check("SLERP", slerp_options{}, 2);
    check("NuSLERP", nuslerp_options{}, 2);
    check("Multi-SLERP", multi_slerp_options{});
    check("Karcher mean", karcher_options{});
    check("Nearswap", nearswap_options{}, 1);
    check("Arcee Fusion", arcee_fusion_options{}, 1);
    check("Passthrough", passthrough_options{}, 1);
    check("RAM", ram_options{});
    check("RAM+", ram_plus_options{});
    check("SCE of all entries", sce_options{.density = 1.0});
    std::vector<float> squares = m.base;
    for (float& value : squares) { value *= value; }
    const_model_ref fisher;
    const float* at = squares.data();
    for (const auto& [name, tensor] : m.base_model) {
        fisher.insert(name, as_tensor(host_view<const float>{at, tensor.size()}));
        at += tensor.size();
    }
    check("Fisher", fisher_options{.fishers = {fisher, fisher, fisher}, .weights = weights, .normalize = true});
}

TEST_CASE("Sums for a search take the model from the policy's resource")
{
    const big_models<float> m(2);
    const std::vector<host_view<const float>> vectors{as_view(m.tasks[0]), as_view(m.tasks[1])};
    check_call("for_each_subset", m.all_tensors(), [&](const cpu& policy) {
        return for_each_subset<float>(policy, vectors, {}, [](const auto&, const auto&) { });
    });
    check_call("task_space", m.all_tensors(), [&](const cpu& policy) {
        task_space<float> space(as_view(m.base), vectors, policy);
        return space.at(std::array{0.5, 0.25})[0];
    });
}

TEST_CASE("A merge gives the same bits in memory of any alignment")
{
    big_models<float> m(3, {300'000, 77, 5'000});
    const auto check = [&](const auto& options) {
        merge(cpu{}, options, m.base_model, m.task_models, m.out_model);
        const std::vector<float> expected = m.out;
        counted_memory memory;
        merge(cpu{.threads = 2, .memory = &memory}, options, m.base_model, m.task_models, m.out_model);
        CHECK(std::memcmp(expected.data(), m.out.data(), m.out.size() * sizeof(float)) == 0);
        CHECK(memory.asked() > 0);
    };
    check(ties_options{.density = 0.3});
    check(model_stock_options{});
    check(dare_ties_options{});
    check(average_options{});
}
