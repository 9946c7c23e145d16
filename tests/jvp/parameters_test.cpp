// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/parameters.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using reference::random_matrix;

TEST_CASE("parameters: by name, in the order of the names' bytes")
{
    parameters<double> p{{"b", random_matrix(2, 3, 1)}, {"a", random_matrix(1, 2, 2)}};
    p.insert("B", random_matrix(4, 1, 3));
    CHECK(p.begin()->name == "B");
    CHECK(p.size() == 3);
    CHECK(p.element_count() == 12);
    CHECK(p["b"].rows() == 2);
    CHECK(p.find("c") == nullptr);
    CHECK_THROWS_WITH_AS((void)p["c"], "there is no parameter 'c' among the 3 given", invalid_argument);
    CHECK_THROWS_WITH_AS(p.insert("a", random_matrix(1, 1, 1)), "parameter 'a' occurs twice", invalid_argument);
}

TEST_CASE("parameters: as a model, without a copy")
{
    parameters<float> p{{"w", random_matrix<float>(2, 3, 1)}};
    const auto model = as_model(p);
    REQUIRE(model.size() == 1);
    CHECK(model[0].tensor.data == p["w"].data());
    CHECK(model[0].tensor.shape == extents{2, 3});
    CHECK(model[0].tensor.dtype == dtype::f32);
    CHECK(as_model(std::as_const(p))[0].tensor.data == p["w"].data());
}
