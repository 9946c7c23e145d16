// Fisher merging and RegMean against the golden cases of tests/data/statistics.
// SPDX-License-Identifier: Apache-2.0
#include "golden.hpp"

#include <taskvec/merge/fisher.hpp>

#include <span>

using namespace golden;

TEST_CASE("Fisher merges are the definition")
{
    const golden::file file("statistics/statistics.safetensors");
    int count = 0;
    for (const auto& which : file.cases()) {
        if (which.method() != "fisher") { continue; }
        const auto expected = file.part(which.name + "/expected");
        const std::string group = which.about.at("input");
        std::vector<const_model_ref> fishers;
        for (int t = 0; t < 3; ++t) { fishers.push_back(file.part(group + "/input/fisher" + std::to_string(t))); }
        const auto tasks = file.tasks(which);
        for (const unsigned threads : {1u, 3u}) {
            owned_model out(expected);
            for (const auto& [name, tensor] : out.model()) { std::memset(tensor.data, 0x55, tensor.bytes()); }
            const fisher_options options{.fishers = fishers,
                .weights = which.options().at("weights"),
                .normalize = which.options().at("normalize"),
                .floor = which.options().at("floor")};
            merge(cpu{.threads = threads}, options, std::span<const const_model_ref>(tasks), out.model());
            check_equal(out.model(), expected, which.tolerance(), which.name);
        }
        ++count;
    }
    CHECK(count == 8);
}
