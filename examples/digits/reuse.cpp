// SPDX-License-Identifier: Apache-2.0
#include "reuse.hpp"

namespace digits {

std::string equal_storage(const fft_results& fft, const lora_results& lora)
{
    std::vector<std::vector<std::string>> cells{{"", "#params", "KiB, LoRA", "KiB, FFT", "PERU-LoRA", "PERU-FFT"}};
    const auto line = [&](const std::string& name, const row& low_rank, const row& sparse) {
        const auto kib = [](std::size_t bytes) { return std::to_string((bytes + 512) / 1024); };
        cells.push_back({name, std::to_string(low_rank.parameters), kib(low_rank.bytes), kib(sparse.bytes),
            percent(low_rank.average()), percent(sparse.average())});
    };
    for (const std::size_t q : table_ranks()) {
        line(taskvec::message("q = ", q), lora.methods[with_rank(q)], fft.as_large[with_rank(q)]);
    }
    return "PERU-LoRA and PERU-FFT with as many parameters for all eight tasks, and their bytes with the places of "
           "sparse entries: test accuracy in percent\n\n"
        + aligned(cells);
}

std::vector<claim> reuse_claims(const fft_results& fft, const lora_results& lora)
{
    std::vector<claim> claims;
    const row &low_rank = lora.methods[with_rank(4)], &sparse = fft.methods[with_density("PERU-FFT", 0.10)],
              &full = fft.methods["Single-Task"], &adapters = lora.methods["Single-Task"];
    const auto times = [](const row& more, const row& fewer) {
        return taskvec::message("; parameters: ",
            fixed(static_cast<double>(more.parameters) / static_cast<double>(fewer.parameters)), " times fewer");
    };
    claims.push_back({"PERU-LoRA at an eighth of the rank (q=4; the paper: 16 of 128) is above PERU-FFT (10%) with "
                      "fewer parameters (the paper: 1.7 times)",
        "P §4.1–2", minus(low_rank.averages(), sparse.averages()),
        against("PERU-LoRA (q=4)", low_rank.averages(), "PERU-FFT (10%)", sparse.averages())
            + times(sparse, low_rank)});
    claims.push_back({"LoRA Single-Task is close to full fine-tuning's with fewer parameters (the paper: 3.9 to 7.4 "
                      "times): within 1 point",
        "P §4.1–2", minus(adapters.averages(), full.averages(), -0.01),
        against("LoRA", adapters.averages(), "full fine-tuning", full.averages()) + times(full, adapters)});
    for (const std::size_t q : table_ranks()) {
        const auto a = lora.methods[with_rank(q)].averages(), b = fft.as_large[with_rank(q)].averages();
        claims.push_back({taskvec::message("PERU-LoRA is above PERU-FFT of as many parameters, q = ", q), "",
            minus(a, b), against("PERU-LoRA", a, "PERU-FFT", b)});
    }
    return claims;
}

} // namespace digits
