// Fisher merging, RegMean and their accumulators against the golden cases of tests/data/statistics.
// SPDX-License-Identifier: Apache-2.0
#include "golden.hpp"

#include <taskvec/methods/fisher.hpp>
#include <taskvec/methods/regmean.hpp>
#include <taskvec/statistics/fisher_accumulator.hpp>
#include <taskvec/statistics/gram_accumulator.hpp>

#include <span>

using namespace golden;

namespace {

/// Model `kind`N of a group, for each of three tasks.
std::vector<const_model_ref> of_tasks(const file& from, const test_case& which, const std::string& kind)
{
    std::vector<const_model_ref> all;
    for (int t = 0; t < 3; ++t) {
        all.push_back(from.part(which.about.at("input").get<std::string>() + "/input/" + kind + std::to_string(t)));
    }
    return all;
}

template <class Options>
void check_merge(const Options& options, const std::vector<const_model_ref>& tasks, const const_model_ref& expected,
    const test_case& which)
{
    for (const unsigned threads : {1u, 3u}) {
        owned_model out(expected);
        for (const auto& [name, tensor] : out.model()) { std::memset(tensor.data, 0x55, tensor.bytes()); }
        merge(cpu{.threads = threads}, options, std::span<const const_model_ref>(tasks), out.model());
        check_equal(out.model(), expected, which.tolerance(), which.name);
    }
}

/// Every element plus a constant.
void add_constant(const model_ref& model, double constant)
{
    for (const auto& [name, tensor] : model) {
        visit_storage(tensor.dtype, name, [&, &tensor = tensor]<class T>(std::type_identity<T>) {
            auto* const values = static_cast<T*>(tensor.data);
            for (std::size_t i = 0; i < tensor.size(); ++i) {
                values[i] = static_cast<T>(static_cast<double>(values[i]) + constant);
            }
        });
    }
}

void check_fisher_merges(const std::string& path, int cases, int differences)
{
    const file from(path);
    for (const auto& which : from.cases()) {
        if (which.method() != "fisher") { continue; }
        const auto tasks = from.tasks(which);
        fisher_options options{.fishers = of_tasks(from, which, "fisher"),
            .weights = which.options().at("weights"),
            .normalize = which.options().at("normalize"),
            .floor = which.options().at("floor")};
        check_merge(options, tasks, from.part(which.name + "/expected"), which);
        --cases;
        if (!which.options().contains("peer_adds")) { continue; }
        // What the peer adds to every Fisher is the whole difference.
        std::vector<owned_model> lifted(options.fishers.begin(), options.fishers.end());
        for (std::size_t t = 0; t < lifted.size(); ++t) {
            add_constant(lifted[t].model(), which.options().at("peer_adds"));
            options.fishers[t] = const_model_ref(lifted[t].model());
        }
        check_merge(options, tasks, from.part(which.name + "/peer"), which);
        --differences;
    }
    CHECK(cases == 0);
    CHECK(differences == 0);
}

void check_regmean_merges(const std::string& path, int cases)
{
    const file from(path);
    for (const auto& which : from.cases()) {
        if (which.method() != "regmean") { continue; }
        check_merge(regmean_options{.grams = of_tasks(from, which, "gram"), .alpha = which.options().at("alpha")},
            from.tasks(which), from.part(which.name + "/expected"), which);
        --cases;
    }
    CHECK(cases == 0);
}

} // namespace

TEST_CASE("Fisher merges are the definition")
{
    check_fisher_merges("statistics/statistics.safetensors", 8, 0);
}

TEST_CASE("Fisher merges are fusion_bench's, but for what it adds to every Fisher")
{
    check_fisher_merges("statistics/fusion_bench.safetensors", 10, 2);
}

TEST_CASE("RegMean merges are the definition")
{
    check_regmean_merges("statistics/statistics.safetensors", 8);
}

TEST_CASE("RegMean merges are fusion_bench's")
{
    check_regmean_merges("statistics/fusion_bench.safetensors", 6);
}

TEST_CASE("accumulators build the stored statistics from gradients and batches")
{
    const golden::file file("statistics/statistics.safetensors");
    for (const std::string group : {"f32", "f64"}) {
        const double tolerance = group == "f32" ? 1e-6 : 1e-13; // what is stored was rounded to the group's dtype
        empirical_fisher_accumulator fisher(file.part(group + "/input/base"));
        for (int example = 0; example < 4; ++example) {
            fisher.add(cpu{}, file.part(group + "/input/gradient0_" + std::to_string(example)));
        }
        REQUIRE(fisher.examples() == 4);
        const auto expected = file.part(group + "/input/fisher0");
        REQUIRE(fisher.parameters().size() == expected.size());
        for (std::size_t i = 0; i < fisher.parameters().size(); ++i) {
            const auto& name = fisher.parameters()[i].name;
            const auto found = fisher.fisher(i), stored = numbers(*expected.find(name), name);
            REQUIRE(found.size() == stored.size());
            for (std::size_t k = 0; k < found.size(); ++k) {
                CHECK(std::abs(found[k] - stored[k]) <= tolerance * stored[k]);
            }
        }
        for (const std::string layer : {"fc0", "fc1"}) {
            const auto batches = file.part(group + "/input/batch0"), grams = file.part(group + "/input/gram0");
            const auto& batch = *batches.find(layer);
            const auto stored = numbers(*grams.find(layer + ".weight"), layer);
            const auto rows = static_cast<std::size_t>(batch.shape[0]),
                       features = static_cast<std::size_t>(batch.shape[1]);
            gram_accumulator gram(features, layer);
            visit_storage(batch.dtype, layer, [&]<class T>(std::type_identity<T>) {
                gram.add(cpu{},
                    matrix_view<const T>(static_cast<const T*>(batch.data), rows, features, matrix_order::row_major));
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
