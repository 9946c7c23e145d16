// Linear layers of several tasks, the inputs they saw, and their Gram matrices: what RegMean merges.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/methods/regmean.hpp>

#include "least_squares.hpp"

#include <random>
#include <utility>
#include <vector>

namespace testing {

/// One linear layer (in×out) and a bias for each task, the inputs it saw, and their Gram matrices.
template <class T>
struct linear_layers {
    std::size_t in, out;
    taskvec::weight_layout layout;
    std::vector<std::vector<T>> weights, biases, grams;
    std::vector<reference::rows> inputs;

    linear_layers(std::size_t n, std::size_t p, std::size_t tasks, std::size_t examples, unsigned seed,
        taskvec::weight_layout stored = taskvec::weight_layout::out_in)
        : in(n)
        , out(p)
        , layout(stored)
    {
        std::mt19937 generator(seed);
        std::normal_distribution<double> normal;
        for (std::size_t t = 0; t < tasks; ++t) {
            weights.emplace_back();
            biases.emplace_back();
            for (std::size_t i = 0; i < n * p; ++i) { weights.back().push_back(taskvec::narrow<T>(normal(generator))); }
            for (std::size_t i = 0; i < p; ++i) { biases.back().push_back(taskvec::narrow<T>(normal(generator))); }
            inputs.emplace_back(examples, std::vector<double>(n));
            for (auto& row : inputs.back()) {
                double common = normal(generator); // correlated inputs: the off-diagonals matter
                for (double& x : row) { x = 0.7 * normal(generator) + 0.5 * common; }
            }
            grams.emplace_back(n * n);
            for (std::size_t i = 0; i < n; ++i) {
                for (std::size_t j = 0; j < n; ++j) {
                    double sum = 0;
                    for (const auto& row : inputs.back()) { sum += row[i] * row[j]; }
                    grams.back()[i * n + j] = taskvec::narrow<T>(sum);
                }
            }
        }
    }
    [[nodiscard]] double weight(std::size_t t, std::size_t i, std::size_t o) const
    {
        return taskvec::widen<double>(weights[t][at(i, o)]);
    }
    [[nodiscard]] double gram(std::size_t t, std::size_t i, std::size_t j) const
    {
        return taskvec::widen<double>(grams[t][i * in + j]);
    }
    [[nodiscard]] std::size_t at(std::size_t i, std::size_t o) const
    {
        return layout == taskvec::weight_layout::out_in ? o * in + i : i * out + o;
    }
    [[nodiscard]] taskvec::extents shape() const
    {
        const auto n = static_cast<std::int64_t>(in), p = static_cast<std::int64_t>(out);
        return layout == taskvec::weight_layout::out_in ? taskvec::extents{p, n} : taskvec::extents{n, p};
    }
    [[nodiscard]] std::vector<taskvec::const_model_ref> models() const
    {
        std::vector<taskvec::const_model_ref> result;
        for (std::size_t t = 0; t < weights.size(); ++t) {
            result.push_back({{"fc.weight", {weights[t].data(), taskvec::dtype_of<T>, shape()}},
                {"fc.bias", {biases[t].data(), taskvec::dtype_of<T>, {static_cast<std::int64_t>(out)}}}});
        }
        return result;
    }
    [[nodiscard]] std::vector<taskvec::const_model_ref> gram_models() const
    {
        std::vector<taskvec::const_model_ref> result;
        const auto n = static_cast<std::int64_t>(in);
        for (const auto& g : grams) { result.push_back({{"fc.weight", {g.data(), taskvec::dtype_of<T>, {n, n}}}}); }
        return result;
    }
    [[nodiscard]] taskvec::regmean_options options(double alpha) const
    {
        return {.grams = gram_models(), .alpha = alpha, .layout = [this](std::string_view) { return layout; }};
    }
};

} // namespace testing
