// The fully fine-tuned half of the digits example: the first paper's table, its curve over m, and its claims.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "claims.hpp"
#include "curves.hpp"
#include "setting.hpp"
#include "table.hpp"

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace digits {

/// Collected over seeds.
struct fft_results {
    table methods{"Full fine-tuning: test accuracy in percent"};
    /// Post-Pruning and PERU-FFT at every density of the curve, rows named like those of `methods`.
    table curve{"Accuracy against m"};
    /// PERU-FFT with as many parameters as PERU-LoRA at each of table_ranks(), rows named like those of PERU-LoRA.
    table as_large{"PERU-FFT with as many parameters as PERU-LoRA"};
    lambda_curves lambdas;
    /// The chosen hyperparameters, a line for each seed.
    std::string chosen;
};

/// The densities of the table, and those of the curve, which begins at 0: the base itself, and the merged model itself.
[[nodiscard]] const std::vector<double>& table_densities();
[[nodiscard]] const std::vector<double>& curve_densities();

/// One model per task, fully fine-tuned from the same base.
std::vector<encoder> fine_tune_all(const setting& s);

/// Trains, merges and measures for one seed. Checkpoints and deltas go to `out`, if given.
void run_fft(const setting& s, const std::optional<std::filesystem::path>& out, fft_results& results);

/// Tables and curves as CSV, the curves as SVG.
void write_fft(const fft_results& results, const std::filesystem::path& out);

/// What this run says about the first paper's claims on full fine-tuning.
std::vector<claim> fft_claims(const fft_results& results);

} // namespace digits
