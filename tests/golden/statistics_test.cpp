// Fisher merging, RegMean and their accumulators against the golden cases of tests/data/statistics.
// SPDX-License-Identifier: Apache-2.0
#include "golden.hpp"

#include <taskvec/merge/fisher.hpp>
#include <taskvec/merge/fisher_accumulator.hpp>
#include <taskvec/merge/gram_accumulator.hpp>
#include <taskvec/merge/regmean.hpp>

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

TEST_CASE("RegMean merges are the definition")
{
    const golden::file file("statistics/statistics.safetensors");
    int count = 0;
    for (const auto& which : file.cases()) {
        if (which.method() != "regmean") { continue; }
        const auto expected = file.part(which.name + "/expected");
        const std::string group = which.about.at("input");
        std::vector<const_model_ref> grams;
        for (int t = 0; t < 3; ++t) { grams.push_back(file.part(group + "/input/gram" + std::to_string(t))); }
        const auto tasks = file.tasks(which);
        for (const unsigned threads : {1u, 3u}) {
            owned_model out(expected);
            for (const auto& [name, tensor] : out.model()) { std::memset(tensor.data, 0x55, tensor.bytes()); }
            merge(cpu{.threads = threads}, regmean_options{.grams = grams, .alpha = which.options().at("alpha")}, std::span<const const_model_ref>(tasks),
                out.model());
            check_equal(out.model(), expected, which.tolerance(), which.name);
        }
        ++count;
    }
    CHECK(count == 8);
}

TEST_CASE("accumulators build the stored statistics from gradients and batches")
{
    const golden::file file("statistics/statistics.safetensors");
    for (const std::string group : {"f32", "f64"}) {
        const double tolerance = group == "f32" ? 1e-6 : 1e-13; // what is stored was rounded to the group's dtype
        empirical_fisher_accumulator fisher(file.part(group + "/input/base"));
        for (int example = 0; example < 4; ++example) { fisher.add(cpu{}, file.part(group + "/input/gradient0_" + std::to_string(example))); }
        REQUIRE(fisher.examples() == 4);
        const auto expected = file.part(group + "/input/fisher0");
        REQUIRE(fisher.parameters().size() == expected.size());
        for (std::size_t i = 0; i < fisher.parameters().size(); ++i) {
            const auto& name = fisher.parameters()[i].name;
            const auto found = fisher.fisher(i), stored = numbers(*expected.find(name), name);
            REQUIRE(found.size() == stored.size());
            for (std::size_t k = 0; k < found.size(); ++k) { CHECK(std::abs(found[k] - stored[k]) <= tolerance * stored[k]); }
        }
        for (const std::string layer : {"fc0", "fc1"}) {
            const auto batches = file.part(group + "/input/batch0"), grams = file.part(group + "/input/gram0");
            const auto& batch = *batches.find(layer);
            const auto stored = numbers(*grams.find(layer + ".weight"), layer);
            const auto rows = static_cast<std::size_t>(batch.shape[0]), features = static_cast<std::size_t>(batch.shape[1]);
            gram_accumulator gram(features, layer);
            visit_storage(batch.dtype, layer, [&]<class T>(std::type_identity<T>) {
                gram.add(cpu{}, matrix_view<const T>(static_cast<const T*>(batch.data), rows, features, matrix_order::row_major));
            });
            CHECK(gram.examples() == rows);
            for (std::size_t i = 0; i < features; ++i) {
                for (std::size_t j = 0; j < features; ++j) {
                    // Entries may cancel: the scale is that of the diagonal.
                    const double scale = std::sqrt(stored[i * features + i] * stored[j * features + j]);
                    CHECK(std::abs(gram(i, j) - stored[i * features + j]) <= tolerance * scale);
                }
            }
        }
    }
}
