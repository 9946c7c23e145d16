// The LoRA half of the first paper: adapters merged in the space of the weights that they make, and reused at a lower
// rank.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adapter.hpp"
#include "claims.hpp"
#include "curves.hpp"
#include "setting.hpp"
#include "table.hpp"

#include <array>
#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace digits {

/// Collected over seeds.
struct lora_results {
    table methods{"LoRA fine-tuning (rank 32), merged in weight space: test accuracy in percent"};
    /// PERU-LoRA at every rank of the curve, rows named like those of `methods`.
    table curve{"Accuracy against q"};
    lambda_curves lambdas;
    /// errors[i]: the relative errors ‖ΔW − ΔWq‖ / ‖ΔW‖ at curve_ranks()[i], over both weights together and for each, a
    /// mean over tasks, an element for each seed.
    struct truncation {
        std::vector<double> total, first, second;
    };
    std::vector<truncation> errors;
    /// Other ways to keep as many numbers of each update as PERU-LoRA does at q: A and B pruned, each to the same
    /// share; the product pruned; and a merged model with rank-q residuals. Rows by with_kept().
    table kept{"As many parameters kept of each LoRA update: test accuracy in percent"};
    /// Of updates cut to rank 4: residual_ranks[T - 2] holds, for each seed, the smaller of both layers' numerical rank
    /// of θ1 − θ* as a share of min(4·T, the layer's sides), θ* being the average of T tasks; and both ranks, as text.
    std::array<std::vector<double>, tasks - 1> residual_ranks{};
    std::string residual_text;
    /// Singular values over the largest, a mean over tasks, of fc1 and fc2: of the first seed.
    std::array<std::vector<double>, 2> spectra{};
    /// The chosen hyperparameters, a line for each seed.
    std::string chosen;
};

/// The ranks q of the table, and those of the curve.
[[nodiscard]] const std::vector<std::size_t>& table_ranks();
[[nodiscard]] const std::vector<std::size_t>& curve_ranks();

/// "PERU-LoRA (q=8)"
[[nodiscard]] std::string with_rank(std::size_t q);

/// Numbers that PERU-LoRA stores for one task: q·(out + in + 1) a layer.
[[nodiscard]] constexpr std::size_t peru_lora_parameters(std::size_t q)
{
    return q * ((hidden + pixels + 1) + (features + hidden + 1));
}

/// "product pruned, as many as q=8"
[[nodiscard]] std::string with_kept(std::string_view what, std::size_t q);

/// ln(error) = intercept − rate·q by least squares, and how much of its variance that explains.
struct exponential_fit {
    double rate = 0, intercept = 0, r_squared = 0;
};
/// Over the ranks whose error is above 1e-3, where rounding does not show, for each seed.
[[nodiscard]] std::vector<exponential_fit> fit_errors(const lora_results& results);

/// What the fit and the ranks of residuals say, as text.
[[nodiscard]] std::string text(const lora_results& results);

/// One adapter per task, fine-tuned from the same φ0 and the same base.
std::vector<adapter> fine_tune_adapters(const setting& s, const adapter& initial, parameterisation kind);

/// Merges, truncates and measures plain LoRA adapters for one seed. Adapter directories go to `out`, if given.
void run_lora(const setting& s, const std::vector<adapter>& adapters, const std::optional<std::filesystem::path>& out,
    lora_results& results);

/// Tables and curves as CSV, the curves as SVG.
void write_lora(const lora_results& results, const std::filesystem::path& out);

/// What this run says about the first paper's claims on LoRA.
std::vector<claim> lora_claims(const lora_results& results);

} // namespace digits
