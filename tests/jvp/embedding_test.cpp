// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/embedding.hpp>

#include "../reference/derivatives.hpp"

#include <vector>

using namespace taskvec;
using reference::random_matrix;
using reference::wide_matrix;

TEST_CASE("embedding: values, tangents and gradient, repeated rows added up")
{
    const std::vector<std::int64_t> ids{2, 0, 2, 4};
    const std::array<wide_matrix, 1> inputs{random_matrix(5, 3, 1)};
    const auto f = [&](const auto& table) { return embedding(table, ids); };
    const wide_matrix y = f(inputs[0]);
    for (Eigen::Index row = 0; row < 4; ++row) {
        CHECK(y.row(row) == inputs[0].row(ids[static_cast<std::size_t>(row)]));
    }
    reference::check_operation("embedding", f, inputs);
    reference::check_vjp(
        "embedding", f, [&](const wide_matrix& dy) { return std::array<wide_matrix, 1>{embedding_vjp(dy, ids, 5)}; },
        inputs);
    CHECK(embedding_vjp(y, ids, 5).row(1).isZero(0));
    CHECK_THROWS_WITH_AS((void)embedding(inputs[0], std::vector<int>{1, 5}),
        "operation 'embedding': index 5 at place 1 is outside [0, 5)", invalid_argument);
    CHECK_THROWS_AS((void)embedding_vjp(y, std::vector<int>{0, 1, 2, -1}, 5), invalid_argument);
    CHECK_THROWS_AS((void)embedding_vjp(y, std::vector<int>{0}, 5), shape_mismatch);
}
