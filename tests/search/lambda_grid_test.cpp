// SPDX-License-Identifier: Apache-2.0
#include <taskvec/search/lambda_grid.hpp>

#include <doctest/doctest.h>

#include <sstream>

using namespace taskvec;

TEST_CASE("equidistant values reach both ends")
{
    const auto values = equidistant(-1, 2, 7);
    REQUIRE(values.size() == 7);
    CHECK(values.front() == -1);
    CHECK(values[2] == 0);
    CHECK(values.back() == 2);
    CHECK(equidistant(3, 9, 1) == std::vector<double>{3});
}

TEST_CASE("a grid as CSV reads back exactly")
{
    const lambda_grid grid{{0, 0.1}, {1, 2, 3}, {0.25, 1e-30, -1, 1.0 / 3, 4, 5}};
    CHECK(grid.at(1, 0) == 1.0 / 3);
    CHECK(grid.mean() == doctest::Approx((0.25 - 1 + 1.0 / 3 + 9) / 6));
    std::ostringstream out;
    write_csv(out, grid, "xi, two tasks");
    CHECK(out.str()
        == "lambda1,lambda2,\"xi, two "
           "tasks\"\n0,1,0.25\n0,2,1e-30\n0,3,-1\n0.1,1,0.3333333333333333\n0.1,2,4\n0.1,3,5\n");
}

TEST_CASE("a matrix as CSV has its labels, quoted where they must be")
{
    std::ostringstream out;
    const std::vector<std::string> labels{"a", "say \"b\""};
    write_csv(out, std::vector<double>{1, 0.5, 0.5, 1}, labels);
    CHECK(out.str() == ",a,\"say \"\"b\"\"\"\na,1,0.5\n\"say \"\"b\"\"\",0.5,1\n");
    CHECK_THROWS_AS(write_csv(out, std::vector<double>{1, 2}, labels), invalid_argument);
}
