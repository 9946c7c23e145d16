// Sweeps: candidates bit for bit, tables that are gone on with, scores that fail.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/search/sweep.hpp>

#include <taskvec/core/random.hpp>
#include <taskvec/methods/task_arithmetic.hpp>

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <set>
#include <sstream>
#include <stdexcept>

using namespace taskvec;

namespace {

struct models {
    std::vector<float> base;
    std::vector<std::vector<float>> tasks, vectors;

    models()
    {
        for (std::uint32_t t = 0; t < 4; ++t) {
            const random_stream stream(3, t);
            std::vector<float> values(5000);
            for (std::size_t i = 0; i < values.size(); ++i) { values[i] = static_cast<float>(stream.normal(i)); }
            if (t == 0) { base = values; }
            else {
                tasks.push_back(values);
                vectors.emplace_back(values.size());
                difference(cpu{}, values, base, vectors.back());
            }
        }
    }
};

double checksum(host_view<const float> theta)
{
    double sum = 0;
    for (std::size_t i = 0; i < theta.size(); ++i) { sum += theta[i] * static_cast<double>(i % 17); }
    return sum;
}

} // namespace

TEST_CASE("the steps of lambda are the papers', to the nearest double")
{
    const auto steps = lambda_steps();
    REQUIRE(steps.size() == 21);
    CHECK(steps.front() == 0);
    CHECK(steps[1] == 0.05);
    CHECK(steps[3] == 0.15);
    CHECK(steps[6] == 0.3);
    CHECK(steps.back() == 1);
}

TEST_CASE("sweeps score the candidates of the definitions, one at a time or several at once")
{
    const models m;
    for (const std::size_t at_once : {std::size_t{1}, std::size_t{4}}) {
        const sweep_options options{.at_once = at_once};
        sweep_table lambda, ties, subsets;
        sweep_lambda(cpu{.threads = 2}, m.base, m.vectors[0], lambda_steps(), lambda, checksum, options);
        REQUIRE(lambda.rows().size() == 21);
        std::vector<float> expected(m.base.size());
        for (std::size_t i = 0; i < 21; ++i) {
            apply(cpu{}, m.base, m.vectors[0], lambda_steps()[i], expected);
            CHECK(lambda.rows()[i].score == checksum(as_view(std::as_const(expected))));
        }
        CHECK(lambda.rows()[6].point == std::vector<std::string>{"0.3"});

        sweep_ties(cpu{}, {}, m.base, m.tasks, std::array{0.1, 0.5}, std::array{0.25, 1.0}, ties, checksum, options);
        REQUIRE(ties.rows().size() == 4);
        merge(cpu{}, ties_options{.density = 0.5, .lambda = 0.25}, m.base, m.tasks, expected);
        CHECK(ties.rows()[2].point == std::vector<std::string>{"0.5", "0.25"});
        CHECK(ties.rows()[2].score == checksum(as_view(std::as_const(expected))));

        std::vector<host_view<const float>> vectors;
        for (const auto& vector : m.vectors) { vectors.push_back(as_view(vector)); }
        sweep_subsets(cpu{}, as_view(m.base), vectors, {}, std::array{0.3, 0.5}, subsets, checksum, options);
        REQUIRE(subsets.rows().size() == 8);
        std::set<std::string> seen;
        for (const auto& row : subsets.rows()) { seen.insert(row.point[0]); }
        CHECK(seen == std::set<std::string>{"0+1", "0+1+2", "0+2", "1+2"});
        merge(cpu{}, task_arithmetic_options{.lambda = 0.5}, m.base, std::vector{m.tasks[0], m.tasks[2]}, expected);
        for (const auto& row : subsets.rows()) {
            if (row.point == std::vector<std::string>{"0+2", "0.5"}) {
                CHECK(row.score == checksum(as_view(std::as_const(expected))));
            }
        }

        // A score that is told the subset.
        sweep_table told;
        const auto members_score = [](host_view<const float> theta, std::span<const std::size_t> subset) {
            double sum = 0;
            for (const std::size_t task : subset) { sum += theta[task] * static_cast<double>(task + 1); }
            return sum;
        };
        sweep_subsets(cpu{}, as_view(m.base), vectors, {}, std::array{0.5}, told, members_score, options);
        REQUIRE(told.rows().size() == 4);
        const std::vector<std::vector<std::size_t>> order{{0, 1}, {0, 1, 2}, {0, 2}, {1, 2}};
        for (std::size_t i = 0; i < 4; ++i) {
            std::vector<std::vector<float>> chosen;
            for (const std::size_t task : order[i]) { chosen.push_back(m.tasks[task]); }
            merge(cpu{}, task_arithmetic_options{.lambda = 0.5}, m.base, chosen, expected);
            CHECK(told.rows()[i].score == members_score(as_view(std::as_const(expected)), order[i]));
        }
    }
}

TEST_CASE("a score that fails keeps what came before it, and the sweep goes on from there")
{
    const models m;
    for (const std::size_t at_once : {std::size_t{1}, std::size_t{3}}) {
        sweep_table table;
        std::string file;
        std::atomic<int> calls{0};
        const sweep_options options{.at_once = at_once, .keep = [&](const sweep_table& now) {
                                        std::ostringstream out;
                                        write_csv(out, now);
                                        file = out.str();
                                    }};
        const std::array lambdas{0.0, 0.1, 0.2, 0.3, 0.4};
        const auto failing = [&](host_view<const float> theta) {
            ++calls;
            if (theta[1] == m.base[1] + 0.3f * m.vectors[0][1]) { throw std::runtime_error("out of memory"); }
            return checksum(theta);
        };
        CHECK_THROWS_AS(
            sweep_lambda(cpu{}, m.base, m.vectors[0], lambdas, table, failing, options), std::runtime_error);
        CHECK(table.rows().size() >= 3);
        CHECK_FALSE(table.contains({"0.3"}));
        auto again = read_sweep(file, "scores.csv");
        REQUIRE(again.rows().size() == table.rows().size());
        const int before = calls.exchange(0);
        CHECK(before >= 4);
        sweep_lambda(
            cpu{}, m.base, m.vectors[0], lambdas, again,
            [&](host_view<const float> theta) { return ++calls, checksum(theta); }, options);
        CHECK(calls == static_cast<int>(5 - table.rows().size()));
        REQUIRE(again.rows().size() == 5);
        for (std::size_t i = 0; i < 3; ++i) {
            CHECK(again.rows()[i].score == table.rows()[i].score);
        } // scores come back exactly
    }
    sweep_table table;
    CHECK_THROWS_AS(sweep_lambda(cpu{}, m.base, m.vectors[0], lambda_steps(), table,
                        [calls = 0](host_view<const float>) mutable { return ++calls == 3 ? std::nan("") : 1.0; }),
        nonfinite_error);
    CHECK(table.rows().size() == 2);
}

TEST_CASE("tables: the best row, CSV there and back")
{
    sweep_table table({"tasks", "lambda"});
    CHECK(table.best() == nullptr);
    table.add({"a,b", "0.1"}, 1.0 / 3);
    table.add({"say \"c\"\nd", "0.1"}, -2);
    table.add({"a,b", "0.2"}, 1.0 / 3);
    CHECK(table.best() == &table.rows()[0]);
    CHECK(table.best(false) == &table.rows()[1]);
    std::ostringstream out;
    write_csv(out, table);
    CHECK(out.str()
        == "tasks,lambda,score\n\"a,b\",0.1,0.3333333333333333\n\"say "
           "\"\"c\"\"\nd\",0.1,-2\n\"a,b\",0.2,0.3333333333333333\n");
    const auto back = read_sweep(out.str());
    CHECK(back.columns() == table.columns());
    REQUIRE(back.rows().size() == 3);
    CHECK(back.rows()[1].point == table.rows()[1].point);
    CHECK(read_sweep("lambda,score\r\n0.5,1e-3\r\n").rows()[0].score == 0.001);
    CHECK_THROWS_AS(table.add({"a,b", "0.1"}, 1), invalid_argument);
    CHECK_THROWS_AS(table.add({"a"}, 1), invalid_argument);
    CHECK_THROWS_AS(table.add({"a", "b"}, std::nan("")), nonfinite_error);
    for (const char* wrong : {"", "lambda\n", "lambda,score\n1\n", "lambda,score\n1,x\n", "lambda,score\n1,nan\n",
             "lambda,score\n1,2,3\n", "lambda,score\n1,2\n1,3\n", "lambda,score\n\"1,2\n"}) {
        CAPTURE(wrong);
        CHECK_THROWS_AS((void)read_sweep(wrong, "file.csv"), format_error);
    }
}

TEST_CASE("sweeps: errors")
{
    const models m;
    sweep_table table, other({"density", "lambda"});
    CHECK_THROWS_AS(
        sweep_lambda(cpu{}, m.base, m.vectors[0], std::vector<double>{}, table, checksum), invalid_argument);
    CHECK_THROWS_AS(
        sweep_lambda(cpu{}, m.base, m.vectors[0], std::array{std::nan("")}, table, checksum), invalid_argument);
    CHECK_THROWS_AS(sweep_lambda(cpu{}, m.base, m.vectors[0], std::array{0.5}, other, checksum), invalid_argument);
    CHECK_THROWS_AS(
        sweep_lambda(cpu{}, m.base, std::vector<float>(3), std::array{0.5}, table, checksum), shape_mismatch);
    CHECK_THROWS_AS(
        sweep_ties(cpu{}, {}, m.base, m.tasks, std::array{1.5}, std::array{0.5}, other, checksum), invalid_argument);
    CHECK(table.rows().empty());
}
