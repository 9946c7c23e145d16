// The LoRA half of the first paper: adapters merged in the space of the weights that they make, and reused at a lower
// rank.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "adapter.hpp"
#include "claims.hpp"
#include "curves.hpp"
#include "setting.hpp"
#include "table.hpp"

#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
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
    /// The chosen hyperparameters, a line for each seed.
    std::string chosen;
};

/// The ranks q of the table, and those of the curve.
[[nodiscard]] const std::vector<std::size_t>& table_ranks();
[[nodiscard]] const std::vector<std::size_t>& curve_ranks();

/// "PERU-LoRA (q=8)"
[[nodiscard]] std::string with_rank(std::size_t q);

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
