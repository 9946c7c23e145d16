// SPDX-License-Identifier: Apache-2.0
#include <taskvec/analysis/scores.hpp>

#include <doctest/doctest.h>

#include <vector>

using namespace taskvec;

TEST_CASE("normalized scores")
{
    CHECK(normalized_score(0.6, 0.8) == doctest::Approx(0.75));
    CHECK(
        mean_normalized_score(std::vector<double>{0.6, 0.9}, std::vector<double>{0.8, 0.9}) == doctest::Approx(0.875));
    CHECK_THROWS_AS((void)normalized_score(0.5, 0), invalid_argument);
    CHECK_THROWS_AS((void)mean_normalized_score(std::vector<double>{1}, std::vector<double>{1, 2}), invalid_argument);
    CHECK_THROWS_AS((void)mean_normalized_score(std::vector<double>{}, std::vector<double>{}), invalid_argument);
}

TEST_CASE("summaries")
{
    const auto s = summarize(std::vector<double>{2, 4, 4, 4, 5, 5, 7, 9});
    CHECK(s.count == 8);
    CHECK(s.mean == 5);
    CHECK(s.standard_deviation == doctest::Approx(std::sqrt(32.0 / 7)));
    CHECK(s.lowest == 2);
    CHECK(s.highest == 9);
    CHECK(summarize(std::vector<double>{3}).standard_deviation == 0);
    CHECK_THROWS_AS((void)summarize(std::vector<double>{}), invalid_argument);
    CHECK(mean_off_diagonal(std::vector<double>{1, 0.5, 0.25, 1}) == 0.375);
    CHECK(mean_off_diagonal(std::vector<double>{1}) == 0);
    CHECK_THROWS_AS((void)mean_off_diagonal(std::vector<double>{1, 2, 3}), invalid_argument);
}
