// Gram matrices of a layer's inputs, built from batches: what RegMean needs to know of the data.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/linalg/eigen.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// G = Σ xᵀx over all rows x that a linear layer was given. Batches are examples×features, of any storage type and
/// order; only the half below the diagonal is summed and held, in f64, 4·n² bytes for n features. Accumulators over
/// parts of the data add up. The bits depend on the batches alone, not on threads. Cost: examples·n² flops.
///
///     gram_accumulator gram(768, "encoder.0.fc1");
///     for (…) { gram.add(cpu{}, matrix_view<const float>(x, examples, 768, matrix_order::row_major)); }
///     matrix<double> g = gram.matrix();
class gram_accumulator {
public:
    /// Of a layer with `features` inputs; `layer` names it in errors. 4·features² bytes.
    explicit gram_accumulator(std::size_t features, std::string layer = "the layer")
        : features_(features)
        , layer_(std::move(layer))
    {
        for (std::size_t j = 0; j < features; j += panel) {
            panels_.emplace_back(features - j, std::min(panel, features - j));
        }
    }

    /// Inputs of the layer.
    [[nodiscard]] std::size_t features() const noexcept { return features_; }
    /// Rows seen: examples, or tokens where each position is a row.
    [[nodiscard]] std::uint64_t examples() const noexcept { return examples_; }

    /// Adds a batch. Throws shape_mismatch; nonfinite_error, with the sums as they were before.
    template <storage_element T>
    void add(const cpu& policy, matrix_view<const T> batch)
    {
        if (batch.cols() != features_) {
            raise<shape_mismatch>(error_code::statistics_shape,
                message("a batch of ", batch.rows(), "×", batch.cols(), " was given to the Gram matrix of ", layer_,
                    ", which has ", features_, " inputs: pass examples×features"));
        }
        for (std::size_t i = 0; i < batch.rows(); ++i) {
            for (std::size_t j = 0; j < features_; ++j) {
                if (const double value = widen<double>(batch(i, j)); !std::isfinite(value)) {
                    raise<nonfinite_error>(error_code::statistics_not_finite,
                        message("a batch for ", layer_, " holds ", std::isnan(value) ? "NaN" : "infinity", " at row ",
                            i, ", column ", j, ": leave out this example"));
                }
            }
        }
        taskvec::matrix<double> rows(
            std::min(block, batch.rows()), features_, matrix_order::row_major, memory_of(policy));
        for (std::size_t first = 0; first < batch.rows(); first += block) {
            const std::size_t count = std::min(block, batch.rows() - first);
            for (std::size_t i = 0; i < count; ++i) {
                for (std::size_t j = 0; j < features_; ++j) { rows(i, j) = widen<double>(batch(first + i, j)); }
            }
            const matrix_view<const double> x = std::as_const(rows).view();
            const bool worth_threads =
                static_cast<double>(count) * static_cast<double>(features_) * static_cast<double>(features_) > 4e6;
            for_each_index(
                worth_threads ? policy : sequential(policy), panels_.size(), [&](std::size_t p, std::size_t) {
                    const std::size_t j = p * panel;
                    gemm(sequential(policy), 1.0, x.block(0, j, count, features_ - j).transposed(),
                        x.block(0, j, count, panels_[p].cols()), 1.0, panels_[p].view());
                });
        }
        examples_ += batch.rows();
    }
    template <storage_element T>
    void add(const cpu& policy, matrix_view<T> batch)
    {
        add(policy, matrix_view<const T>(batch));
    }
    /// Adds what was seen elsewhere. Throws shape_mismatch.
    void add(const gram_accumulator& other)
    {
        if (other.features_ != features_) {
            raise<shape_mismatch>(error_code::statistics_shape,
                message("the Gram matrix of ", layer_, " has ", features_, " inputs, and that of ", other.layer_,
                    " has ", other.features_));
        }
        for (std::size_t p = 0; p < panels_.size(); ++p) {
            for (std::size_t i = 0; i < panels_[p].size(); ++i) { panels_[p].data()[i] += other.panels_[p].data()[i]; }
        }
        examples_ += other.examples_;
    }

    /// G(i, j).
    [[nodiscard]] double operator()(std::size_t i, std::size_t j) const noexcept
    {
        if (i < j) { std::swap(i, j); }
        return panels_[j / panel](i - j / panel * panel, j % panel);
    }
    /// G, both halves, n×n.
    [[nodiscard]] taskvec::matrix<double> matrix() const
    {
        taskvec::matrix<double> g(features_, features_);
        for (std::size_t j = 0; j < features_; ++j) {
            for (std::size_t i = j; i < features_; ++i) { g(i, j) = g(j, i) = (*this)(i, j); }
        }
        return g;
    }

private:
    static constexpr std::size_t panel = 64, block = 256;

    std::size_t features_;
    std::string layer_;
    std::uint64_t examples_ = 0;
    std::vector<taskvec::matrix<double>> panels_; // columns [64·p, 64·(p + 1)), from their diagonal down
};

} // namespace taskvec::inline TASKVEC_ABI
