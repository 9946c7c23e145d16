// Linearizes a layer of the caller's own: f_lin(x; φ) = f(x; φ0) + ∇φ f(x; φ0)·(φ − φ0), in some of its parameters.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/taskvec.hpp>

#include <cstdio>

int main()
{
    using matrix = taskvec::row_matrix<double>;

    // A gated layer, written once: it runs on plain matrices, and on matrices that carry tangents.
    const auto layer = [](const auto& p, const auto& x) {
        const auto gate = taskvec::silu(taskvec::linear(x, p["gate"]));
        return taskvec::linear(taskvec::elementwise_product(gate, taskvec::linear(x, p["up"])), p["down"]);
    };
    const taskvec::parameters<double> phi0{
        {"gate", matrix{{1, -1}, {2, 0.5}, {-1, 1}}},
        {"up", matrix{{0.5, 1}, {-1, 2}, {1, 1}}},
        {"down", matrix{{1, 2, -1}}},
    };
    const matrix x{{1, 2}};

    // One forward pass gives the value and the derivative along a direction.
    const taskvec::parameters<double> direction{{"gate", matrix{{1, 0}, {0, 1}, {1, 1}}}};
    const auto [value, derivative] = taskvec::jvp(layer, phi0, direction, x);
    std::printf("f = %.4f, derivative = %.4f\n", value(0, 0), derivative(0, 0));

    // Linear in the active parameters: twice the step, twice the change.
    const auto linearized = taskvec::linearize(layer, phi0, {.active = {"gate", "up"}});
    for (const double step : {0.1, 0.2, 0.4}) {
        auto phi = phi0;
        phi["gate"] += step * direction["gate"];
        std::printf("step %.1f: f = %.4f, linearized = %.4f\n", step, layer(phi, x)(0, 0), linearized(phi, x)(0, 0));
    }
}
