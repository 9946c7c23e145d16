// SPDX-License-Identifier: Apache-2.0
#include <taskvec/jvp/attention.hpp>

#include "../reference/derivatives.hpp"

#include <vector>

using namespace taskvec;
using reference::random_matrix;
using reference::wide_matrix;

namespace {
// One element at a time, from the definition.
wide_matrix plain_attention(
    const wide_matrix& q, const wide_matrix& k, const wide_matrix& v, const attention_options& options)
{
    const Eigen::Index queries = q.rows() / options.batch, keys = k.rows() / options.batch,
                       d = q.cols() / options.heads, e = v.cols() / options.heads;
    wide_matrix y = wide_matrix::Zero(q.rows(), v.cols());
    for (Eigen::Index b = 0; b < options.batch; ++b) {
        for (Eigen::Index h = 0; h < options.heads; ++h) {
            for (Eigen::Index i = 0; i < queries; ++i) {
                std::vector<double> weight(static_cast<std::size_t>(keys), 0.0);
                double sum = 0;
                for (Eigen::Index j = 0; j < keys && (!options.causal || j <= i); ++j) {
                    double score = 0;
                    for (Eigen::Index c = 0; c < d; ++c) {
                        score += q(b * queries + i, h * d + c) * k(b * keys + j, h * d + c);
                    }
                    sum += weight[static_cast<std::size_t>(j)] = std::exp(score / std::sqrt(static_cast<double>(d)));
                }
                for (Eigen::Index j = 0; j < keys; ++j) {
                    for (Eigen::Index c = 0; c < e; ++c) {
                        y(b * queries + i, h * e + c) +=
                            weight[static_cast<std::size_t>(j)] / sum * v(b * keys + j, h * e + c);
                    }
                }
            }
        }
    }
    return y;
}

void check_attention(const std::array<wide_matrix, 3>& inputs, const attention_options& options)
{
    const auto f = [&](const auto& q, const auto& k, const auto& v) { return attention(q, k, v, options); };
    CHECK(reference::largest_difference(
              f(inputs[0], inputs[1], inputs[2]), plain_attention(inputs[0], inputs[1], inputs[2], options))
        < 1e-12);
    reference::check_operation("attention", f, inputs);
    reference::check_vjp(
        "attention", f,
        [&](const wide_matrix& dy) {
            const auto gradient = attention_vjp(inputs[0], inputs[1], inputs[2], dy, options);
            return std::array<wide_matrix, 3>{gradient.q, gradient.k, gradient.v};
        },
        inputs);
}
} // namespace

TEST_CASE("attention: one head")
{
    check_attention({random_matrix(5, 4, 1), random_matrix(5, 4, 2), random_matrix(5, 4, 3)}, {});
}
TEST_CASE("attention: batches and heads, causal and not, different numbers of queries and keys, another value width")
{
    check_attention({random_matrix(6, 8, 1), random_matrix(6, 8, 2), random_matrix(6, 8, 3)},
        {.batch = 2, .heads = 2, .causal = true});
    check_attention({random_matrix(4, 6, 1), random_matrix(10, 6, 2), random_matrix(10, 3, 3)},
        {.batch = 2, .heads = 3, .causal = false});
    check_attention({random_matrix(8, 6, 1), random_matrix(4, 6, 2), random_matrix(4, 6, 3)},
        {.batch = 2, .heads = 1, .causal = true});
}
TEST_CASE("attention: a causal position does not see later ones")
{
    const wide_matrix q = random_matrix(4, 4, 1), k = random_matrix(4, 4, 2), v = random_matrix(4, 4, 3);
    wide_matrix changed = v;
    changed.row(3).setConstant(100);
    const attention_options causal{.causal = true};
    CHECK(attention(q, k, v, causal).topRows(3) == attention(q, k, changed, causal).topRows(3));
    CHECK(attention(q, k, v, causal).row(0).isApprox(v.row(0), 1e-15));
}
TEST_CASE("attention: errors")
{
    const wide_matrix q = random_matrix(4, 4, 1);
    CHECK_THROWS_AS((void)attention(q, random_matrix(4, 5, 1), q), shape_mismatch);
    CHECK_THROWS_AS((void)attention(q, q, random_matrix(5, 4, 1)), shape_mismatch);
    CHECK_THROWS_AS((void)attention(q, q, q, {.batch = 3}), invalid_argument);
    CHECK_THROWS_AS((void)attention(q, q, q, {.heads = 3}), invalid_argument);
    CHECK_THROWS_AS((void)attention(q, q, q, {.heads = 0}), invalid_argument);
    CHECK_THROWS_AS((void)attention_vjp(q, q, q, random_matrix(3, 4, 1)), shape_mismatch);
}
