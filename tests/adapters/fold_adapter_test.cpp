// SPDX-License-Identifier: Apache-2.0
#include <taskvec/adapters/fold_adapter.hpp>

#include <taskvec/jvp/linearized_lora.hpp>

#include "../reference/derivatives.hpp"

using namespace taskvec;
using reference::random_matrix;

namespace {
using dense = row_matrix<double>;

lora_update<double> update(const dense& b, const dense& a, double scaling = 0.75)
{
    return make_lora(b, a, scaling);
}
} // namespace

TEST_CASE("fold_linearized is the fold of the linearized LoRA layer, of rank r where B0 = 0 and 2r otherwise")
{
    const dense w = random_matrix(5, 7, 1), a0 = random_matrix(2, 7, 2), a = random_matrix(2, 7, 3),
                b = random_matrix(5, 2, 4), x = random_matrix(3, 7, 5);
    for (const double size : {0.0, 1.0}) {
        const dense b0 = size * random_matrix(5, 2, 6);
        linearized_lora_layer<double> layer(w, dense(), make_lora(b0, a0, 0.75));
        layer.set(make_lora(b, a, 0.75));
        const auto folded = fold_linearized(update(b0, a0), update(b, a));
        CHECK(folded.rank() == (size == 0 ? 2u : 4u));
        CHECK(folded.scaling == 0.75);
        CHECK(as_row_matrix(folded.a) == as_row_matrix(layer.fold().a));
        CHECK(as_row_matrix(folded.b) == as_row_matrix(layer.fold().b));
        const lora_layer<double> served(w, dense(), folded);
        CHECK(reference::largest_difference(served.forward(x), layer.forward(x)) < 1e-12);
    }
}

TEST_CASE("fold_linearized of a whole adapter; errors name the module")
{
    const dense a = random_matrix(2, 7, 3), b = random_matrix(5, 2, 4);
    const lora_adapter<double> initial{{"q", update(0 * b, a)}, {"v", update(b, a)}};
    const lora_adapter<double> only_q{{"q", update(b, a)}};
    const auto folded = fold_linearized(initial, {{"q", update(b, 2 * a)}, {"v", update(2 * b, a)}});
    CHECK(folded.at("q").rank() == 2);
    CHECK(folded.at("v").rank() == 4);
    CHECK_THROWS_WITH_AS((void)fold_linearized(initial, {{"q", update(b, a)}}),
        "module 'v' of the initialisation is missing in the adapter: give the initialisation that it was trained from",
        invalid_argument);
    CHECK_THROWS_WITH_AS((void)fold_linearized(only_q, initial),
        "module 'v' of the adapter is not in the initialisation: give the initialisation that it was trained from",
        invalid_argument);
    CHECK_THROWS_AS((void)fold_linearized(lora_adapter<double>{}, initial), invalid_argument);
    CHECK_THROWS_AS((void)fold_linearized(only_q, {{"q", update(b, a, 0.5)}}), invalid_argument);
    CHECK_THROWS_AS(
        (void)fold_linearized(only_q, {{"q", update(random_matrix(5, 3, 1), random_matrix(3, 7, 1))}}), shape_mismatch);
}
