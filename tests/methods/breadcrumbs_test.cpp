// Model Breadcrumbs and its kin: masks against a sort, sums and elections over them, normalisation, L1 norms.
// SPDX-License-Identifier: Apache-2.0
#include "../capture.hpp"
#include "../reference/kept.hpp"
#include "../reference/random_models.hpp"

#include <taskvec/methods/breadcrumbs.hpp>
#include <taskvec/methods/dare.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <random>
#include <vector>

using namespace taskvec;

namespace {

const std::vector<std::size_t> sizes{3000, 1, 64, 5000, 0, 7};

template <class T>
std::vector<T> narrowed(const std::vector<arithmetic_type<T>>& x)
{
    std::vector<T> out;
    for (const auto value : x) { out.push_back(narrow<T>(value)); }
    return out;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b)
{
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class T, class Options>
std::vector<T> merged(
    const testing::random_models<T>& models, const Options& options, std::size_t chunk = 65536, unsigned threads = 2)
{
    std::vector<T> out;
    model_options how;
    how.chunk = chunk;
    merge(cpu{.threads = threads}, options, models.model(models.base), models.task_models(), models.output(out), how);
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("Breadcrumbs equal their definition, in either scope, normalised or not", T, float, double, bf16)
{
    using A = arithmetic_type<T>;
    for (const int levels : {0, 9}) { // with levels, magnitudes tie
        const testing::random_models<T> models(sizes, 3, 31, levels);
        const auto base = testing::widen_all(models.base);
        std::vector<std::vector<A>> tasks;
        for (const auto& task : models.tasks) { tasks.push_back(testing::widen_all(task)); }
        const auto deltas = reference::task_vectors(base, tasks);
        const std::vector<double> weights{1, -0.5, 0.25};
        for (const auto& [density, gamma] :
            {std::array{0.85, 0.01}, {0.3, 0.2}, {0.9, 0.4}, {1.0, 0.1}, {0.0001, 0.0}}) {
            for (const scope over : {scope::tensor, scope::model}) {
                for (const bool normalize : {false, true}) {
                    CAPTURE_BOUND(density);
                    CAPTURE_BOUND(gamma);
                    const std::vector<std::size_t> stretches =
                        over == scope::model ? std::vector<std::size_t>{base.size()} : sizes;
                    auto kept = deltas;
                    for (auto& x : kept) { x = reference::between(x, stretches, density, gamma); }
                    const auto expected = narrowed<T>(reference::added(base, kept, weights, 0.7, normalize));
                    breadcrumbs_options options{
                        .density = density, .gamma = gamma, .lambda = 0.7, .weights = weights, .scope = over};
                    options.normalize = normalize;
                    CHECK(same_bits(merged(models, options), expected));
                    CHECK(same_bits(merged(models, options, 64, 3), expected));
                }
            }
        }
    }
}

TEST_CASE("Breadcrumbs-TIES elect among what is kept")
{
    const testing::random_models<float> models(sizes, 3, 5, 9);
    auto kept = reference::task_vectors(models.base, models.tasks);
    for (auto& x : kept) { x = reference::between(x, sizes, 0.5, 0.1); }
    const std::vector<float> zeros(models.base.size());
    for (const bool mergekit : {false, true}) {
        auto options = mergekit ? breadcrumbs_ties_options::as_in_mergekit() : breadcrumbs_ties_options{};
        options.density = 0.5;
        options.gamma = 0.1;
        auto election = options.ties;
        election.density = 1;
        auto expected = reference::ties(zeros, kept, sizes, election);
        for (std::size_t i = 0; i < expected.size(); ++i) { expected[i] = reference::sum(models.base[i], expected[i]); }
        CHECK(same_bits(merged(models, options), expected));
    }
}

TEST_CASE("each task has its own density and gamma, and equal ones are one for all")
{
    std::mt19937 random(12);
    for (int round = 0; round < 6; ++round) {
        const testing::random_models<float> models(sizes, 3, static_cast<unsigned>(round), round % 2 ? 9 : 0);
        std::uniform_real_distribution<double> share(0.0001, 1);
        const std::vector<double> each{share(random), round == 0 ? 1.0 : share(random), share(random)};
        const std::vector<double> gammas{0.5 * share(random), 0.0, 0.3 * share(random)};
        const auto deltas = reference::task_vectors(models.base, models.tasks);
        for (const scope over : {scope::tensor, scope::model}) {
            const std::vector<std::size_t> stretches =
                over == scope::model ? std::vector<std::size_t>{models.base.size()} : sizes;
            auto kept = deltas;
            for (std::size_t t = 0; t < 3; ++t) {
                kept[t] = reference::between(kept[t], stretches, each[t], gammas[t]);
            }
            breadcrumbs_options crumbs{.lambda = 0.7, .scope = over};
            crumbs.densities = each;
            crumbs.gammas = gammas;
            CHECK(same_bits(merged(models, crumbs), reference::added(models.base, kept, {1, 1, 1}, 0.7, false)));

            for (const trim_rule trim : {trim_rule::exact, trim_rule::reach_next}) {
                ties_options ties{.scope = over, .trim = trim};
                ties.densities = each;
                CHECK(same_bits(merged(models, ties), reference::ties(models.base, models.tasks, sizes, ties)));
                ties_options all{.density = 0.3, .scope = over, .trim = trim};
                ties = all;
                ties.density = 0.9;
                ties.densities = {0.3, 0.3, 0.3};
                CHECK(same_bits(merged(models, ties), merged(models, all)));
            }
            breadcrumbs_ties_options all;
            all.ties.scope = over;
            auto listed = all;
            listed.density = 0.1;
            listed.densities = {0.85, 0.85, 0.85};
            listed.gammas = {0.01, 0.01, 0.01};
            CHECK(same_bits(merged(models, listed), merged(models, all)));
        }

        auto kept = deltas;
        for (std::uint32_t t = 0; t < 3; ++t) {
            std::size_t begin = 0;
            for (std::size_t k = 0; k < sizes.size(); begin += sizes[k++]) {
                const random_stream stream(3, t, "t" + std::to_string(k));
                for (std::size_t i = 0; i < sizes[k]; ++i) {
                    if (!(stream.uniform(i) < each[t])) { kept[t][begin + i] = 0; }
                    else {
                        kept[t][begin + i] /= static_cast<float>(each[t]);
                    }
                }
            }
        }
        dare_options dare{.density = 0.5, .seed = 3};
        dare.densities = each;
        CHECK(same_bits(merged(models, dare), reference::added(models.base, kept, {1, 1, 1}, 1, false)));
        CHECK(same_bits(merged(models, dare, 64, 3), merged(models, dare)));
        dare.densities = {0.5, 0.5, 0.5};
        CHECK(same_bits(merged(models, dare), merged(models, dare_options{.density = 0.5, .seed = 3})));
        dare_ties_options elected{.density = 0.9, .seed = 3};
        elected.densities = {0.5, 0.5, 0.5};
        CHECK(same_bits(merged(models, elected), merged(models, dare_ties_options{.density = 0.5, .seed = 3})));
    }
    const testing::random_models<float> models(sizes, 2, 1);
    CHECK_THROWS_WITH_AS(merged(models, dare_options{.densities = {0.5}}),
        "1 densities for 2 tasks: give one each, or none", invalid_argument);
    CHECK_THROWS_WITH_AS(merged(models, breadcrumbs_options{.gammas = {0.1, 0.1, 0.1}}),
        "3 gammas for 2 tasks: give one each, or none", invalid_argument);
    CHECK_THROWS_AS(merged(models, breadcrumbs_options{.gammas = {0.1, 1.0}}), invalid_argument);
}

TEST_CASE("L1 norms come back: Breadcrumbs, DARE, and TIES of any kind")
{
    const testing::random_models<float> models({3000, 64, 5000}, 2, 8);
    const std::vector<std::size_t> parts{3000, 64, 5000};
    const auto deltas = reference::task_vectors(models.base, models.tasks);
    const auto close = [&](const std::vector<float>& found, const std::vector<float>& expected) {
        double worst = 0;
        for (std::size_t i = 0; i < found.size(); ++i) {
            worst = std::max(worst, static_cast<double>(std::abs(found[i] - expected[i])));
        }
        CHECK(worst < 4e-6); // weights are rounded with the factors, not before them
    };
    auto kept = deltas;
    for (auto& x : kept) { x = reference::with_l1_of(x, reference::between(x, parts, 0.4, 0.05), parts); }
    breadcrumbs_options crumbs{.density = 0.4, .gamma = 0.05, .lambda = 0.5};
    crumbs.rescale = true;
    close(merged(models, crumbs), reference::added(models.base, kept, {1, 1}, 0.5, false));

    kept = deltas;
    for (std::uint32_t t = 0; t < 2; ++t) {
        std::size_t begin = 0;
        for (std::size_t k = 0; k < parts.size(); begin += parts[k++]) {
            const random_stream stream(3, t, "t" + std::to_string(k));
            for (std::size_t i = 0; i < parts[k]; ++i) {
                if (!(stream.uniform(i) < 0.4)) { kept[t][begin + i] = 0; }
            }
        }
    }
    dare_options dare{.density = 0.4, .seed = 3, .lambda = 0.5};
    dare.rescale = drop_rescale::none;
    CHECK(same_bits(merged(models, dare), reference::added(models.base, kept, {1, 1}, 0.5, false)));
    for (std::uint32_t t = 0; t < 2; ++t) { kept[t] = reference::with_l1_of(deltas[t], kept[t], parts); }
    dare.rescale = drop_rescale::l1;
    dare.normalize = true;
    close(merged(models, dare), reference::added(models.base, kept, {1, 1}, 0.5, true));

    auto dare_ties = dare_ties_options::as_in_mergekit();
    dare_ties.density = 0.4;
    dare_ties.seed = 3;
    auto election = dare_ties.ties;
    election.density = 1;
    auto expected = reference::ties(std::vector<float>(models.base.size()), kept, parts, election);
    for (std::size_t i = 0; i < expected.size(); ++i) { expected[i] = reference::sum(models.base[i], expected[i]); }
    close(merged(models, dare_ties), expected);

    ties_options ties = ties_options::as_in_mergekit();
    ties.density = 0.3;
    ties.rescale = true;
    kept = deltas;
    for (auto& x : kept) {
        x = reference::with_l1_of(x, reference::between(x, parts, 0.3, 0.0), parts); // no outliers: the top
    }
    election = ties;
    election.density = 1;
    expected = reference::ties(std::vector<float>(models.base.size()), kept, parts, election);
    for (std::size_t i = 0; i < expected.size(); ++i) { expected[i] = reference::sum(models.base[i], expected[i]); }
    close(merged(models, ties), expected);
}

TEST_CASE("normalised task arithmetic divides by the weights")
{
    const testing::random_models<bf16> models({3000, 64}, 3, 12);
    std::vector<std::vector<float>> tasks;
    for (const auto& task : models.tasks) { tasks.push_back(testing::widen_all(task)); }
    const auto base = testing::widen_all(models.base);
    const std::vector<double> weights{0.3, 0.2, 0.9};
    task_arithmetic_options options{.lambda = 0.6, .weights = weights};
    options.normalize = true;
    CHECK(same_bits(merged(models, options),
        narrowed<bf16>(reference::added(base, reference::task_vectors(base, tasks), weights, 0.6, true))));
    options.weights = {1, -2, 1};
    CHECK_THROWS_WITH_AS(merged(models, options),
        "the weights sum to 0 (1 of task 1, -2 of task 2, 1 of task 3), and nothing can be divided by that: change one "
        "of them, or do not normalize",
        invalid_argument);
    CHECK(task_arithmetic_options::as_in_mergekit().lambda == 1.0);
}

TEST_CASE("shares that are none are refused, and counts follow what is kept")
{
    const testing::random_models<float> models({3000}, 2, 1);
    CHECK_THROWS_WITH_AS(merged(models, breadcrumbs_options{.density = 0.5, .gamma = 1.0}),
        "gamma is 1; expected a share from 0 to below 1, such as 0.01 for the top 1%", invalid_argument);
    CHECK_THROWS_AS(merged(models, breadcrumbs_options{.density = 0.5, .gamma = NAN}), invalid_argument);
    CHECK_THROWS_AS(merged(models, breadcrumbs_options{.density = 0}), invalid_argument);
    CHECK_THROWS_AS(merged(models, breadcrumbs_ties_options{.density = 1.1}), invalid_argument);
    std::vector<float> out;
    model_options how;
    how.statistics = true;
    const auto report = merge(cpu{}, breadcrumbs_options{.density = 0.5, .gamma = 0.1}, models.model(models.base),
        models.task_models(), models.output(out), how);
    CHECK(report.kept == std::vector<std::uint64_t>{1500, 1500});
}
