// Slow, obvious checks of derivatives: central differences, dual numbers element by element, and inner products.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/random.hpp>
#include <taskvec/jvp/primal_tangent.hpp>

#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>

namespace reference {

using wide_matrix = taskvec::row_matrix<double>;

/// Standard normal entries; the same for the same seed.
template <class T = double>
taskvec::row_matrix<T> random_matrix(Eigen::Index rows, Eigen::Index cols, std::uint64_t seed, double scale = 1)
{
    taskvec::row_matrix<T> x(rows, cols);
    const taskvec::random_stream stream(seed, 0);
    for (Eigen::Index i = 0; i < x.size(); ++i) {
        x.data()[i] = T(scale * stream.normal(static_cast<std::uint64_t>(i)));
    }
    return x;
}

template <class A, class B>
double largest_difference(const A& a, const B& b)
{
    REQUIRE(a.rows() == b.rows());
    REQUIRE(a.cols() == b.cols());
    double largest = 0;
    for (Eigen::Index i = 0; i < a.rows(); ++i) {
        for (Eigen::Index j = 0; j < a.cols(); ++j) {
            const double difference = std::abs(static_cast<double>(a(i, j)) - static_cast<double>(b(i, j)));
            if (!(difference <= largest)) { largest = difference; }
        }
    }
    return largest;
}

// A scalar result counts as a 1×1 matrix.
template <class T>
taskvec::row_matrix<T> matrix_of(const taskvec::row_matrix<T>& x)
{
    return x;
}
template <taskvec::differentiable_scalar T>
taskvec::row_matrix<T> matrix_of(const T& x)
{
    return taskvec::row_matrix<T>::Constant(1, 1, x);
}
template <class T>
std::pair<taskvec::row_matrix<T>, taskvec::row_matrix<T>> parts_of(const taskvec::primal_tangent<T>& x)
{
    return {x.primal(), x.tangent_or_zero()};
}
template <class T>
std::pair<taskvec::row_matrix<T>, taskvec::row_matrix<T>> parts_of(const taskvec::dual<T>& x)
{
    return {matrix_of(x.primal), matrix_of(x.tangent)};
}

template <class Dual, class T>
taskvec::row_matrix<Dual> join(const taskvec::row_matrix<T>& primal, const taskvec::row_matrix<T>& tangent)
{
    taskvec::row_matrix<Dual> x(primal.rows(), primal.cols());
    for (Eigen::Index i = 0; i < x.size(); ++i) { x.data()[i] = Dual(primal.data()[i], tangent.data()[i]); }
    return x;
}

/// Holds an operation, given as a generic function of operands, to
///  - its own forward pass (the primal of every combination of active and constant operands),
///  - central differences of the forward pass in f64,
///  - the forward pass on dual numbers, element by element,
///  - second derivatives: primal_tangent over dual numbers against nested duals.
template <std::size_t N, class F>
void check_operation(const std::string& name, const F& f, const std::array<wide_matrix, N>& inputs,
    double tolerance = 1e-6, std::uint64_t seed = 99)
{
    using taskvec::dual;
    using taskvec::primal_tangent;
    using one = dual<double>;
    using two = dual<one>;
    const auto each = [](const auto& function, auto&& make) {
        return [&]<std::size_t... Index>(std::index_sequence<Index...>) { return function(make(Index)...); }(
                   std::make_index_sequence<N>{});
    };
    std::array<wide_matrix, N> direction, second;
    for (std::size_t i = 0; i < N; ++i) {
        direction[i] = random_matrix(inputs[i].rows(), inputs[i].cols(), seed + i);
        second[i] = random_matrix(inputs[i].rows(), inputs[i].cols(), seed + 50 + i);
    }
    const wide_matrix expected = matrix_of(each(f, [&](std::size_t i) { return inputs[i]; }));
    for (unsigned mask = 0; mask < (1u << N); ++mask) {
        const std::string label = name + ", active operands " + std::to_string(mask);
        CAPTURE(label);
        const auto active = [mask](std::size_t i) { return (mask >> i & 1u) != 0; };
        const auto [primal, tangent] = parts_of(each(f, [&](std::size_t i) {
            return active(i) ? primal_tangent<double>(inputs[i], direction[i]) : primal_tangent<double>(inputs[i]);
        }));
        CHECK(largest_difference(primal, expected) <= 1e-12 * (1 + expected.cwiseAbs().maxCoeff()));
        // The same with primal and tangent in separate memory.
        const auto [primal_apart, tangent_apart] = parts_of(each(f, [&](std::size_t i) {
            return active(i) ? primal_tangent<double>::borrow(inputs[i], direction[i])
                             : primal_tangent<double>::borrow(inputs[i]);
        }));
        CHECK(largest_difference(tangent_apart, tangent) <= 1e-12 * (1 + tangent.cwiseAbs().maxCoeff()));
        // Central differences.
        const double h = 1e-5;
        const auto moved = [&](double step) {
            return matrix_of(each(f,
                [&](std::size_t i) { return active(i) ? wide_matrix(inputs[i] + step * direction[i]) : inputs[i]; }));
        };
        const wide_matrix difference = (moved(h) - moved(-h)) / (2 * h);
        CHECK(largest_difference(tangent, difference) <= tolerance * (1 + difference.cwiseAbs().maxCoeff()));
        // Dual numbers.
        const taskvec::row_matrix<one> duals = matrix_of(each(f, [&](std::size_t i) {
            return join<one>(inputs[i],
                active(i) ? direction[i] : wide_matrix(wide_matrix::Zero(inputs[i].rows(), inputs[i].cols())));
        }));
        wide_matrix dual_tangent(duals.rows(), duals.cols());
        for (Eigen::Index i = 0; i < duals.size(); ++i) { dual_tangent.data()[i] = duals.data()[i].tangent; }
        CHECK(largest_difference(tangent, dual_tangent) <= 1e-11 * (1 + dual_tangent.cwiseAbs().maxCoeff()));
        // Second derivatives along direction and second, both ways.
        const auto inner = [&](std::size_t i) { return join<one>(inputs[i], second[i]); };
        const auto outer = [&](std::size_t i) {
            const wide_matrix zero = wide_matrix::Zero(inputs[i].rows(), inputs[i].cols());
            return join<one>(active(i) ? direction[i] : zero, zero);
        };
        const auto nested = parts_of(each(f, [&](std::size_t i) {
            return active(i) ? primal_tangent<one>(inner(i), outer(i)) : primal_tangent<one>(inner(i));
        }));
        const taskvec::row_matrix<two> nested_duals =
            matrix_of(each(f, [&](std::size_t i) { return join<two>(inner(i), outer(i)); }));
        double worst = 0, largest = 1;
        for (Eigen::Index i = 0; i < nested_duals.size(); ++i) {
            const double wanted = nested_duals.data()[i].tangent.tangent, found = nested.second.data()[i].tangent;
            worst = std::max(worst, std::abs(wanted - found));
            if (!(worst >= 0)) { worst = std::abs(wanted - found); }
            largest = std::max(largest, std::abs(wanted));
        }
        CHECK(worst <= 1e-10 * largest);
    }
}

/// Holds a vjp to the jvp: ⟨dy, J·v⟩ = ⟨Jᵀ·dy, v⟩ for one operand at a time. `gradient(i)` is the vjp for operand i.
template <std::size_t N, class F, class Gradients>
void check_vjp(const std::string& name, const F& f, const Gradients& vjp, const std::array<wide_matrix, N>& inputs,
    std::uint64_t seed = 7)
{
    using taskvec::primal_tangent;
    const auto each = [](const auto& function, auto&& make) {
        return [&]<std::size_t... Index>(std::index_sequence<Index...>) { return function(make(Index)...); }(
                   std::make_index_sequence<N>{});
    };
    const wide_matrix y = matrix_of(each(f, [&](std::size_t i) { return inputs[i]; }));
    const wide_matrix dy = random_matrix(y.rows(), y.cols(), seed);
    const std::array<wide_matrix, N> gradients = vjp(dy);
    for (std::size_t k = 0; k < N; ++k) {
        CAPTURE(name);
        CAPTURE(k);
        REQUIRE(gradients[k].rows() == inputs[k].rows());
        REQUIRE(gradients[k].cols() == inputs[k].cols());
        for (std::uint64_t trial = 0; trial < 3; ++trial) {
            const wide_matrix v = random_matrix(inputs[k].rows(), inputs[k].cols(), seed + 100 + trial);
            const auto [primal, tangent] = parts_of(each(f, [&](std::size_t i) {
                return i == k ? primal_tangent<double>(inputs[i], v) : primal_tangent<double>(inputs[i]);
            }));
            const double forward = (dy.array() * tangent.array()).sum(),
                         backward = (gradients[k].array() * v.array()).sum();
            CHECK(std::abs(forward - backward) <= 1e-11 * (1 + dy.cwiseAbs().sum() * v.cwiseAbs().maxCoeff()));
        }
    }
}

} // namespace reference
