// The second paper's claims that hold on real data for one fixed seed, and the chain from L-LoRA adapters on disk to a
// plain one.
// SPDX-License-Identifier: Apache-2.0
#include "checkpoints.hpp"
#include "fft.hpp"
#include "fusion.hpp"
#include "lora.hpp"
#include "lorahub.hpp"
#include "low_rank.hpp"

#include <taskvec/adapters/fold_adapter.hpp>
#include <taskvec/adapters/phi_space.hpp>
#include <taskvec/analysis/scores.hpp>
#include <taskvec/methods/ties.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

using namespace digits;

namespace {

/// Less than the example measures by itself: the tests are built without the processor's own instructions.
constexpr effort quick{
    .subsets = 1, .choice_images = 40, .hub_images = 16, .hub_evaluations = 40, .images = 100, .grid = 5};

struct experiment {
    experiment()
        : out(std::filesystem::temp_directory_path() / "taskvec-digits-fusion-test")
        , s(make_setting(load_images(DIGITS_DATA_FILE), 1))
        , initial(initial_adapter(s.seed))
        , lora(fine_tune_adapters(s, initial, parameterisation::lora))
        , linearized(fine_tune_adapters(s, initial, parameterisation::linearized))
        , tangent(fine_tune_linearized(s))
        , ways{full_way(s, fine_tune_all(s)), adapter_way(s, initial, lora, parameterisation::lora),
              adapter_way(s, initial, linearized, parameterisation::linearized), linearized_way(s, tangent)}
    {
        std::filesystem::remove_all(out);
        std::filesystem::create_directories(out);
        save_linearized(s.base, initial, linearized, out);
        run_fusion(s, ways, quick, results);
        write_fusion(results, out);
    }
    ~experiment() { std::filesystem::remove_all(out); }

    std::filesystem::path out;
    setting s;
    adapter initial;
    std::vector<adapter> lora, linearized;
    std::vector<encoder> tangent;
    std::vector<way> ways;
    fusion_results results;
};

/// Trained once for all test cases.
const experiment& run()
{
    static const experiment once;
    return once;
}

double average(std::string_view way, std::string_view method)
{
    return run().results[way].methods[method].average();
}

std::string content(const std::filesystem::path& file)
{
    std::ifstream stream(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
}

double at(const taskvec::lambda_grid& grid, double lambda1, double lambda2)
{
    for (std::size_t i = 0; i < grid.lambda1.size(); ++i) {
        for (std::size_t j = 0; j < grid.lambda2.size(); ++j) {
            if (grid.lambda1[i] == lambda1 && grid.lambda2[j] == lambda2) { return grid.at(i, j); }
        }
    }
    FAIL("no such point");
    return 0;
}

const subset_score& of_all_tasks(std::string_view way, std::string_view merge)
{
    const auto& all = run().results[way].subsets.seeds()[0].of.find(merge)->second;
    return *std::ranges::find_if(all, [](const subset_score& score) { return score.members.size() == tasks; });
}

} // namespace

TEST_CASE("every way of fine-tuning learns its tasks, and L-LoRA nearly as well as LoRA")
{
    CHECK(average("full", "Single-Task") >= 0.93);
    CHECK(average("lora", "Single-Task") >= 0.93);
    CHECK(std::abs(average("llora", "Single-Task") - average("lora", "Single-Task")) <= 0.06);
    CHECK(average("linearized", "Single-Task") >= average("linearized", "Pre-Trained") + 0.15);
    CHECK(average("llora", "Average") > average("lora", "Average"));
}

TEST_CASE("L-LoRA's task vectors are closer to orthogonal, and its models less entangled")
{
    const auto &lora = run().results["lora"], &linearized = run().results["llora"];
    CHECK(taskvec::mean_off_diagonal(linearized.cosines[0]) <= taskvec::mean_off_diagonal(lora.cosines[0]) - 0.01);
    const auto &xi = linearized.disentanglement[0], &lora_xi = lora.disentanglement[0];
    CHECK(xi.mean() < lora_xi.mean());
    double merging = 0, lora_merging = 0; // in the paper's box
    for (const double lambda1 : {0.0, 0.5, 1.0}) {
        for (const double lambda2 : {0.0, 0.5, 1.0}) {
            merging += at(xi, lambda1, lambda2);
            lora_merging += at(lora_xi, lambda1, lambda2);
        }
    }
    CHECK(merging <= 0.8 * lora_merging);
    CHECK(at(xi, 1, 1) <= 0.8 * at(lora_xi, 1, 1));
    CHECK(at(xi, 0, 0) == 0);
}

TEST_CASE("where B0 = 0 training leaves the A of a linearized adapter at its start, bit for bit")
{
    for (const auto& phi : run().linearized) {
        CHECK(phi.a1() == run().initial.a1());
        CHECK(phi.a2() == run().initial.a2());
        CHECK(phi.b1() != run().initial.b1());
    }
    CHECK(run().lora[0].a1() != run().initial.a1());
}

TEST_CASE("the linearized network is linear in its parameters, and the network itself at its start")
{
    const auto& w = run().ways[3];
    const matrix& inputs = run().s.test[2].inputs;
    const matrix start = w.at(w.start)(inputs);
    CHECK((start - forward(run().s.base.body, run().s.base.head, inputs).logits).cwiseAbs().maxCoeff() <= 1e-5f);
    std::vector<float> half(w.start.size()), whole = w.tuned[2];
    std::ranges::transform(w.start, whole, half.begin(), [](float a, float b) { return (a + b) / 2; });
    const matrix expected = (start + w.at(whole)(inputs)) / 2;
    CHECK((w.at(half)(inputs) - expected).cwiseAbs().maxCoeff() <= 1e-3f * expected.cwiseAbs().maxCoeff());
    // Its derivative along a direction is that of the network, to first order.
    encoder moved = run().s.base.body;
    constexpr float step = 1e-2f;
    for (std::size_t i = 0; i < whole.size(); ++i) { moved.values()[i] += step * w.vectors[2][i]; }
    const matrix secant = (forward(moved, run().s.base.head, inputs).logits - start) / step;
    const matrix slope = w.at(whole)(inputs) - start;
    CHECK((secant - slope).norm() <= 0.05f * slope.norm());
}

TEST_CASE("subsets are scored on all tasks; merged and held-out tasks are told apart")
{
    const auto& results = run().results["llora"].subsets;
    for (const auto merge : subset_merges()) {
        for (std::size_t k = 2; k <= tasks; ++k) {
            const std::size_t count = measured_subsets(k, quick);
            CHECK(results.values(merge, k, over::all, unit::absolute).size() == count);
            CHECK(results.values(merge, k, over::merged, unit::normalized).size() == count);
            CHECK(results.values(merge, k, over::held_out, unit::normalized).size() == (k == tasks ? 0 : count));
        }
    }
    CHECK(measured_subsets(2, effort{}) == 8);
    CHECK(measured_subsets(4, effort{}) == 2);
    CHECK(measured_subsets(4, effort::complete()) == 70);
    // The mean over all tasks is that of the merged and of the held-out ones, weighted.
    const auto value = [&](over which, unit as) { return results.values("TIES", 3, which, as)[0]; };
    for (const unit as : {unit::absolute, unit::normalized}) {
        CHECK(
            value(over::all, as) == doctest::Approx((3 * value(over::merged, as) + 5 * value(over::held_out, as)) / 8));
    }

    // The first subset is {0, 1}: its average, merged and scored directly.
    const auto& [out, s, initial, lora, linearized, tangent, ways, all] = run();
    adapter mean = initial;
    for (std::size_t i = 0; i < adapter::size(); ++i) {
        mean.values()[i] = (linearized[0].values()[i] + linearized[1].values()[i]) / 2;
    }
    const encoder merged = adapted(s.base, initial, mean, parameterisation::linearized);
    double normalized = 0, absolute = 0;
    for (std::size_t task = 0; task < tasks; ++task) {
        const dataset test = first(s.test[task], 100);
        const double score = accuracy(merged, s.base.head, test);
        absolute += score / tasks;
        normalized += score
            / accuracy(adapted(s.base, initial, linearized[task], parameterisation::linearized), s.base.head, test)
            / tasks;
    }
    // An image on either side of a boundary.
    CHECK(results.values("Average", 2, over::all, unit::absolute)[0] == doctest::Approx(absolute).epsilon(0.01));
    CHECK(results.values("Average", 2, over::all, unit::normalized)[0] == doctest::Approx(normalized).epsilon(0.01));
}

TEST_CASE("lambda and density are of the paper's grids, for each combination of tasks")
{
    const std::vector<double> points{0.25, 0.5, 0.75, 1};
    const std::vector<double> lambdas = grid(0, 1, 0.05);
    CHECK(lambdas.size() == 21);
    std::size_t different = 0;
    for (const auto& one : run().results.ways) {
        const auto& of = one.subsets.seeds()[0].of;
        double previous = -1;
        for (const auto& score : of.find("Task Arithmetic")->second) {
            CHECK(std::ranges::find(lambdas, score.lambda) != lambdas.end());
            different += score.lambda != previous;
            previous = score.lambda;
        }
        for (const auto& score : of.find("TIES")->second) {
            CHECK(std::ranges::find(points, score.lambda) != points.end());
            CHECK(std::ranges::find(points, score.density) != points.end());
        }
    }
    CHECK(different > 8); // more than one each: it was chosen anew
}

TEST_CASE("weights that shall sum to one do, within their bounds")
{
    std::vector<std::vector<double>> seen;
    const auto objective = [&](std::span<const double> w) {
        seen.emplace_back(w.begin(), w.end());
        return (w[0] - 1.4) * (w[0] - 1.4);
    };
    const taskvec::lorahub_problem problem{3, -1.5, 1.5, {1.0 / 3, 1.0 / 3, 1.0 / 3}, 200};
    evolution_strategy{.seed = 7, .sum_to_one = true}(problem, objective);
    REQUIRE(seen.size() == 200);
    double best = 0;
    for (const auto& w : seen) {
        CHECK(std::accumulate(w.begin(), w.end(), 0.0) == doctest::Approx(1.0).epsilon(1e-9));
        for (const double weight : w) { CHECK(std::abs(weight) <= 1.5); }
        best = std::max(best, w[0]);
    }
    CHECK(best > 1.2);
}

TEST_CASE("adapters on disk, merged in φ space and folded, are the models of the table")
{
    const auto& [out, s, initial, lora, linearized, tangent, ways, results] = run();
    const encoder base = load_encoder(out / "base.safetensors");
    const updates start = load_updates(out / "llora-init");
    std::vector<updates> tuned;
    double single = 0;
    for (std::size_t task = 0; task < tasks; ++task) {
        tuned.push_back(load_updates(out / "llora" / task_names[task]));
        const updates plain = taskvec::fold_linearized(start, tuned.back());
        CHECK(plain.at("fc1").rank() == rank); // B0 = 0
        single += accuracy(folded(base, plain), s.base.head, first(s.test[task], 100)) / tasks;
    }
    CHECK(single == doctest::Approx(average("llora", "Single-Task")).epsilon(2e-3));

    const subset_score& ties = of_all_tasks("llora", "TIES");
    const updates merged = taskvec::merge_in_phi_space<float>(
        taskvec::cpu{}, taskvec::ties_options{.density = ties.density, .lambda = ties.lambda}, start, tuned);
    const encoder served = folded(base, taskvec::fold_linearized(start, merged));
    double score = 0;
    for (std::size_t task = 0; task < tasks; ++task) {
        score += accuracy(served, s.base.head, first(s.test[task], 100)) / tasks;
    }
    CHECK(score == doctest::Approx(average("llora", "TIES")).epsilon(5e-3));
}

TEST_CASE("tables, scores, matrices and grids are written as CSV")
{
    const auto& out = run().out;
    CHECK(content(out / "merged-llora.csv")
            .starts_with("method,#params,bytes,rot90,rot180,rot270,transpose,mirror,flip,invert,permute,Avg\n"
                         "Pre-Trained,74368,297472,"));
    CHECK(content(out / "merged-lora.csv").find("\nSingle-Task,287360,") != std::string::npos);
    CHECK(content(out / "cosine-full.csv")
            .starts_with(",rot90,rot180,rot270,transpose,mirror,flip,invert,permute\nrot90,1,"));
    const std::string grid = content(out / "disentanglement-llora.csv");
    CHECK(grid.starts_with("lambda1,lambda2,xi\n-1,-1,"));
    CHECK(std::ranges::count(grid, '\n') == 1 + 25);
    CHECK(std::ranges::count(content(out / "disentanglement-of-pairs.csv"), '\n') == 1 + 4 * 8 * 25);
    CHECK(std::ranges::count(content(out / "planes.csv"), '\n') == 1 + 4 * 2 * 25);
    const std::string scores = content(out / "score-against-tasks.csv");
    CHECK(scores.find("\n\"full fine-tuning\",\"Average\",2,all eight tasks,4,") != std::string::npos);
    CHECK(std::ranges::count(scores, '\n') == 1 + 4 * 5 * (3 * 7 - 1));
    CHECK(std::ranges::count(content(out / "normalized-score-of-each-task.csv"), '\n') == 1 + 4 * 5);
    CHECK(content(out / "subsets-full.csv").find("\n1,\"Average\",rot90+rot180,0,0,") != std::string::npos);
    CHECK(std::ranges::count(content(out / "disentanglement-of-eight.csv"), '\n')
        == 1 + static_cast<std::ptrdiff_t>(together_lambdas().size()));
}

TEST_CASE("the second paper's claims are judged by the figures of the run, and name their place")
{
    const auto& results = run().results;
    const auto holds = [](const fusion_results& measured, std::string_view sentence) {
        for (const auto& claim : fusion_claims(measured)) {
            if (claim.text.find(sentence) != std::string::npos) { return claim.holds(); }
        }
        FAIL("no such claim");
        return false;
    };
    CHECK(holds(results, "orthogonal than LoRA's"));
    CHECK(holds(results, "lower than LoRA's, on average in the box"));
    for (const auto& claim : fusion_claims(results)) { CHECK((claim.place.empty() || claim.place.starts_with("L "))); }
    // With two ways changed about, what held does not, and what is asked of a difference does not hold of equals.
    fusion_results swapped = results;
    std::swap(swapped.ways[1].file, swapped.ways[2].file);
    CHECK_FALSE(holds(swapped, "orthogonal than LoRA's"));
    CHECK_FALSE(holds(swapped, "lower than LoRA's, on average in the box"));
    fusion_results equal = results;
    equal.ways[2] = equal.ways[0];
    equal.ways[2].file = "llora";
    equal.ways[1] = equal.ways[0];
    equal.ways[1].file = "lora";
    for (const auto& claim : fusion_claims(equal)) {
        if (claim.text.find("rises") == std::string::npos) { CHECK_FALSE_MESSAGE(claim.holds(), claim.text); }
    }
    CHECK_THROWS_AS((void)fusion_results{}["lora"], taskvec::invalid_argument);
}
