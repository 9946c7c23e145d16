// What merges by every method take through the policy's memory resource, and around it.
// SPDX-License-Identifier: Apache-2.0
#include "big_models.hpp"
#include "counted.hpp"

#include <taskvec/methods/average.hpp>
#include <taskvec/methods/dare.hpp>
#include <taskvec/methods/fisher.hpp>
#include <taskvec/methods/model_stock.hpp>
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
using testing::big_models, testing::check_call;

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
        testing::counted_memory memory;
        merge(cpu{.threads = 2, .memory = &memory}, options, m.base_model, m.task_models, m.out_model);
        CHECK(std::memcmp(expected.data(), m.out.data(), m.out.size() * sizeof(float)) == 0);
        CHECK(memory.asked() > 0);
    };
    check(ties_options{.density = 0.3});
    check(model_stock_options{});
    check(dare_ties_options{});
    check(average_options{});
}
