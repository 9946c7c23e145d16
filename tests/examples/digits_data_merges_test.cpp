// Fisher merging, RegMean and LoraHub on models trained on real data: what their statistics are, that their files serve
// the library as well, and what a search finds.
// SPDX-License-Identifier: Apache-2.0
#include "data_merges.hpp"
#include "fft.hpp"
#include "lorahub.hpp"
#include "merging.hpp"

#include <taskvec/formats/statistics.hpp>
#include <taskvec/methods/fisher.hpp>
#include <taskvec/methods/regmean.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <list>
#include <vector>

using namespace digits;

namespace {

struct trained {
    setting s = make_setting(load_images(DIGITS_DATA_FILE), 1);
    std::vector<encoder> models = fine_tune_all(s);
    std::vector<statistics> known = collect(s, models);
};

/// Trained once for all test cases.
const trained& run()
{
    static const trained once;
    return once;
}

/// log p(label | image) by plain loops in f64.
double log_likelihood(const encoder& model, const matrix& head, const Eigen::RowVectorXf& input, int label)
{
    const auto layer = [](const auto& weight, const auto& bias, const Eigen::VectorXd& x) {
        Eigen::VectorXd y(weight.rows());
        for (Eigen::Index i = 0; i < weight.rows(); ++i) {
            y(i) = static_cast<double>(bias(i));
            for (Eigen::Index j = 0; j < weight.cols(); ++j) { y(i) += static_cast<double>(weight(i, j)) * x(j); }
            y(i) = std::max(y(i), 0.0);
        }
        return y;
    };
    const Eigen::VectorXd hidden_values = layer(model.weight1(), model.bias1(), input.transpose().cast<double>());
    const Eigen::VectorXd logits = head.cast<double>() * layer(model.weight2(), model.bias2(), hidden_values);
    const double top = logits.maxCoeff();
    return logits(label) - top - std::log((logits.array() - top).exp().sum());
}

} // namespace

TEST_CASE("the Fisher information is the label expectation of squared derivatives, here by differences")
{
    const auto& [s, models, known] = run();
    const std::size_t task = 2;
    CHECK(known[task].fisher.examples() == fisher_images);
    // Some entries of each tensor, over the same 256 images.
    const std::vector<std::size_t> entries{
        5, 128 + 64 * 3 + 20, 128 + 64 * 90 + 35, 128 + 64 * 128 + 17, 128 + 64 * 128 + 512 + 128 * 300 + 77};
    std::size_t first = 0, informative = 0;
    for (std::size_t tensor = 0; tensor < known[task].fisher.parameters().size(); ++tensor) {
        const std::vector<double> fisher = known[task].fisher.fisher(tensor);
        for (const std::size_t entry : entries) {
            if (entry < first || entry >= first + fisher.size()) { continue; }
            double expected = 0;
            const float step = 1e-3f;
            encoder there = models[task], back = models[task];
            there.values()[entry] += step;
            back.values()[entry] -= step;
            const double width = static_cast<double>(there.values()[entry]) - static_cast<double>(back.values()[entry]);
            for (std::size_t i = 0; i < fisher_images; ++i) {
                const Eigen::RowVectorXf input = s.train[task].inputs.row(static_cast<Eigen::Index>(i));
                for (int label = 0; label < classes; ++label) {
                    const double slope = (log_likelihood(there, s.base.head, input, label)
                                             - log_likelihood(back, s.base.head, input, label))
                        / width;
                    expected += std::exp(log_likelihood(models[task], s.base.head, input, label)) * slope * slope
                        / static_cast<double>(fisher_images);
                }
            }
            CHECK(fisher[entry - first]
                == doctest::Approx(expected).epsilon(0.05)); // a unit may change its side within the step
            informative += expected > 1e-9;
        }
        first += fisher.size();
    }
    CHECK(informative >= 2);
}

TEST_CASE("the Grams are those of the layers' inputs")
{
    const auto& [s, models, known] = run();
    const Eigen::MatrixXd inputs = s.train[3].inputs.topRows(static_cast<Eigen::Index>(gram_images)).cast<double>();
    const matrix hidden_values =
        forward(models[3], s.base.head, s.train[3].inputs.topRows(static_cast<Eigen::Index>(gram_images))).hidden;
    const Eigen::MatrixXd first = inputs.transpose() * inputs,
                          second = hidden_values.cast<double>().transpose() * hidden_values.cast<double>();
    CHECK(known[3].grams.at("fc1.weight").examples() == gram_images);
    for (const Eigen::Index i : {0, 20, 63}) {
        for (const Eigen::Index j : {1, 35, 62}) {
            const auto at = [&grams = known[3].grams, i, j](const char* weight) {
                return grams.at(weight)(static_cast<std::size_t>(i), static_cast<std::size_t>(j));
            };
            CHECK(at("fc1.weight") == doctest::Approx(first(i, j)));
            CHECK(at("fc2.weight") == doctest::Approx(second(i, j)));
        }
    }
}

TEST_CASE("merges that look at data, on full fine-tuning and from files")
{
    const auto& [s, models, known] = run();
    const auto average = [&s = s](const encoder& model) { return mean(evaluate(model, s.base.head, s.test)); };
    const double pre_trained = average(s.base.body);
    const encoder by_fisher = fisher_merged(s, models, known);
    const auto regmean = tuned_regmean(s, models, known);
    CHECK(average(by_fisher) >= pre_trained + 0.01);
    CHECK(average(regmean.best.model) >= pre_trained + 0.01);
    CHECK(regmean.score == mean(evaluate(regmean.best.model, s.base.head, s.validation)));

    // The files give the same merges, bit for bit, and say whose they are.
    const auto folder = std::filesystem::temp_directory_path() / "taskvec-digits-statistics-test";
    save(known, models, folder);
    {
        std::list<taskvec::statistics_file> files;
        std::vector<taskvec::const_model_ref> fishers, grams;
        for (std::size_t task = 0; task < tasks; ++task) {
            files.emplace_back(folder / taskvec::message(task_names[task], ".fisher.safetensors"));
            files.back().require_fisher();
            CHECK(files.back().info().kind == taskvec::statistics_kind::expected_fisher);
            CHECK(files.back().info().examples == fisher_images);
            taskvec::check_statistics(taskvec::cpu{}, files.back(), models[task].model());
            CHECK_THROWS_AS(taskvec::check_statistics(taskvec::cpu{}, files.back(), models[(task + 1) % tasks].model()),
                taskvec::invalid_argument);
            fishers.push_back(files.back().model());
            files.emplace_back(folder / taskvec::message(task_names[task], ".gram.safetensors"));
            files.back().require_gram();
            CHECK(files.back().info().examples == gram_images);
            grams.push_back(files.back().model());
        }
        const encoder fisher_again = merged(taskvec::fisher_options{.fishers = fishers}, s.base.body, models);
        const encoder regmean_again = merged(
            taskvec::regmean_options{.grams = grams, .alpha = regmean.best.alpha, .ridge = 1e-6}, s.base.body, models);
        CHECK(std::ranges::equal(fisher_again.values(), by_fisher.values()));
        CHECK(std::ranges::equal(regmean_again.values(), regmean.best.model.values()));
    }
    std::filesystem::remove_all(folder);
}

TEST_CASE("LoraHub combines the task vectors with weights that a few validation images choose")
{
    const auto& [s, models, known] = run();
    const auto [model, found] = lorahub(s, models);
    const few_shot_loss loss(s);
    REQUIRE(found.history.size() == lorahub_evaluations);
    CHECK(found.history.front().weights == std::vector<double>(tasks, 0.0));
    CHECK(found.history.front().objective == loss(s.base.body)); // at 0 there is nothing but the base
    double lowest = found.history.front().objective;
    for (const auto& candidate : found.history) {
        lowest = std::min(lowest, candidate.objective);
        for (const double weight : candidate.weights) { CHECK(std::abs(weight) <= 1.5); }
    }
    CHECK(found.best.objective == lowest);
    CHECK(found.best.objective < 0.95 * found.history.front().objective);
    CHECK(found.best.loss == loss(model));
    // The same combination by task arithmetic, bit for bit; the same search again, too.
    const encoder again =
        merged(taskvec::task_arithmetic_options{.lambda = 1, .weights = found.best.weights}, s.base.body, models);
    CHECK(std::ranges::equal(again.values(), model.values()));
    CHECK(lorahub(s, models).found.best.weights == found.best.weights);
    CHECK(mean(evaluate(model, s.base.head, s.test)) >= mean(evaluate(s.base.body, s.base.head, s.test)) + 0.01);
}
