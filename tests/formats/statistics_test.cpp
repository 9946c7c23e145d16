// Statistics files: round trips, joining parts, files of another model or kind, files that break the format.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/statistics.hpp>
#include <taskvec/methods/fisher.hpp>

#include "../reference/goldens.hpp"
#include "scratch.hpp"

#include <doctest/doctest.h>

#include <random>
#include <string>
#include <utility>
#include <vector>

using namespace taskvec;

namespace {

const_tensor_ref tensor(const std::vector<float>& v, extents shape)
{
    return {v.data(), dtype::f32, std::move(shape)};
}

std::vector<float> random_values(std::size_t size, unsigned seed)
{
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<float> x(size);
    for (float& value : x) { value = normal(generator); }
    return x;
}

} // namespace

TEST_CASE("a Fisher comes back as it was, and merges")
{
    const scratch folder;
    const auto w = random_values(6, 1), b = random_values(3, 2);
    const const_model_ref model{{"b", tensor(b, {3})}, {"w", tensor(w, {2, 3})}};
    empirical_fisher_accumulator fisher(model);
    fisher.add(cpu{}, model);
    fisher.add(cpu{}, model);
    for (const auto storage : {dtype::f32, dtype::f64, dtype::bf16}) {
        write_statistics(folder / "f.safetensors", fisher, fingerprint(cpu{}, model), storage, durability::process);
        const statistics_file file(folder / "f.safetensors");
        file.require_fisher();
        CHECK_THROWS_AS(file.require_gram(), invalid_argument);
        check_statistics(cpu{}, file, model);
        CHECK(file.described());
        CHECK(file.info().kind == statistics_kind::empirical_fisher);
        CHECK(file.info().examples == 2);
        const auto values = reference::values_of(*file.model().find("w"));
        for (std::size_t i = 0; i < 6; ++i) {
            CHECK(values[i] == doctest::Approx(w[i] * w[i]).epsilon(storage == dtype::bf16 ? 4e-3 : 1e-6));
        }
        CHECK(file.model().find("w")->dtype == storage);
        std::vector<float> out_w(6), out_b(3);
        merge(cpu{}, fisher_options{.fishers = {file.model()}}, std::vector{model},
            model_ref{{"b", {out_b.data(), dtype::f32, {3}}}, {"w", {out_w.data(), dtype::f32, {2, 3}}}});
        CHECK(out_w[4] == doctest::Approx(w[4]));
    }
    expected_fisher_accumulator expected(model);
    expected.add(cpu{}, std::vector{model}, std::vector{1.0});
    write_statistics(folder / "e.safetensors", expected, {}, dtype::f32, durability::process);
    CHECK(statistics_file(folder / "e.safetensors").info().kind == statistics_kind::expected_fisher);
    CHECK_FALSE(statistics_file(folder / "e.safetensors").info().fingerprint);
    CHECK_THROWS_AS(
        write_statistics(folder / "none.safetensors", empirical_fisher_accumulator(model)), invalid_argument);
    CHECK_FALSE(std::filesystem::exists(folder / "none.safetensors"));
}

TEST_CASE("Grams come back as they were, with the layouts of their weights")
{
    const scratch folder;
    const auto x = random_values(40, 3);
    std::map<std::string, gram_accumulator> grams;
    grams.emplace("fc1.weight", gram_accumulator(4));
    grams.emplace("c_fc.weight", gram_accumulator(8));
    grams.at("fc1.weight").add(cpu{}, matrix_view<const float>(x.data(), 10, 4, matrix_order::row_major));
    grams.at("c_fc.weight").add(cpu{}, matrix_view<const float>(x.data(), 5, 8, matrix_order::row_major));
    write_statistics(folder / "g.safetensors", grams, 77, {"c_fc.weight"}, dtype::f64, durability::process);
    const statistics_file file(folder / "g.safetensors");
    file.require_gram();
    CHECK_THROWS_WITH_AS(file.require_fisher(),
        ("'" + file.path().string() + "' holds gram; expected a diagonal Fisher").c_str(), invalid_argument);
    CHECK(file.info().examples == 10);
    CHECK(file.info().fingerprint == 77);
    CHECK(file.layout("c_fc.weight") == weight_layout::in_out);
    CHECK(file.layout("fc1.weight") == weight_layout::out_in);
    const auto g = reference::values_of(*file.model().find("c_fc.weight"));
    for (std::size_t i = 0; i < 64; ++i) { CHECK(g[i] == grams.at("c_fc.weight")(i / 8, i % 8)); }
    const auto w = random_values(4, 1);
    const const_model_ref other{{"w", tensor(w, {4})}};
    CHECK_THROWS_AS(check_statistics(cpu{}, file, other, "other.safetensors"), invalid_argument);
    CHECK_THROWS_AS(write_statistics(folder / "h.safetensors", grams, 77, {"unknown"}), invalid_argument);
    for (const auto& shape : {extents{4}, extents{4, 1}}) {
        CHECK_THROWS_AS(write_statistics(folder / "h.safetensors", const_model_ref{{"w", tensor(w, shape)}},
                            {.kind = statistics_kind::gram}),
            shape_mismatch);
    }
    CHECK_THROWS_WITH_AS(write_statistics(folder / "h.safetensors", const_model_ref{{"w", {w.data(), dtype::i32, {4}}}},
                             {.kind = statistics_kind::gram}),
        doctest::Contains("statistics of 'w' have dtype I32; expected "), dtype_mismatch);
    CHECK_THROWS_WITH_AS(
        write_statistics(folder / "h.safetensors", empirical_fisher_accumulator(other), statistics_kind::gram),
        "a Fisher accumulator holds no Gram matrices", invalid_argument);
    CHECK_FALSE(std::filesystem::exists(folder / "h.safetensors"));
}

TEST_CASE("parts of the data join to what one collection would have given")
{
    const scratch folder;
    const auto a = random_values(6, 1), b = random_values(6, 2), c = random_values(6, 3);
    const auto model = [](const std::vector<float>& v) { return const_model_ref{{"w", tensor(v, {6})}}; };
    empirical_fisher_accumulator whole(model(a)), left(model(a)), right(model(a));
    for (const auto* gradient : {&a, &b, &c}) {
        whole.add(cpu{}, model(*gradient));
        (gradient == &c ? right : left).add(cpu{}, model(*gradient));
    }
    write_statistics(folder / "l", left, 5, dtype::f64, durability::process);
    write_statistics(folder / "r", right, 5, dtype::f64, durability::process);
    combine_statistics({folder / "l", folder / "r"}, folder / "both", durability::process);
    const statistics_file both(folder / "both");
    CHECK(both.info().examples == 3);
    CHECK(both.info().fingerprint == 5);
    const auto expected = whole.fisher(0), found = reference::values_of(both.model()[0].tensor);
    for (std::size_t i = 0; i < 6; ++i) { CHECK(found[i] == doctest::Approx(expected[i]).epsilon(1e-14)); }

    const auto gram = [&](const std::vector<float>& x, const char* file, std::uint64_t model_stamp = 5) {
        std::map<std::string, gram_accumulator> grams;
        grams.emplace("w", gram_accumulator(3));
        grams.at("w").add(cpu{}, matrix_view<const float>(x.data(), 2, 3, matrix_order::row_major));
        write_statistics(folder / file, grams, model_stamp, {}, dtype::f64, durability::process);
        return grams.at("w");
    };
    auto sum = gram(a, "ga");
    sum.add(gram(b, "gb"));
    combine_statistics({folder / "ga", folder / "gb"}, folder / "gab", durability::process);
    const statistics_file gab(folder / "gab");
    const auto g = reference::values_of(gab.model()[0].tensor);
    for (std::size_t i = 0; i < 9; ++i) { CHECK(g[i] == doctest::Approx(sum(i / 3, i % 3)).epsilon(1e-14)); }
    CHECK(statistics_file(folder / "gab").info().examples == 4);

    (void)gram(c, "other", 6);
    CHECK_THROWS_AS(combine_statistics({folder / "ga", folder / "other"}, folder / "x"), invalid_argument);
    CHECK_THROWS_AS(combine_statistics({folder / "ga", folder / "l"}, folder / "x"), invalid_argument);
    CHECK_THROWS_AS(combine_statistics({}, folder / "x"), invalid_argument);
    write_safetensors(folder / "plain", model(a), {}, durability::process);
    CHECK_THROWS_AS(combine_statistics({folder / "plain"}, folder / "x"), invalid_argument);
    // Parts that are alike but for one thing.
    const auto part = [&](const char* name, const const_model_ref& tensors, std::uint64_t examples = 1,
                          std::vector<std::string> in_out = {}, statistics_kind kind = statistics_kind::gram) {
        write_statistics(folder / name, tensors, {.kind = kind, .examples = examples, .in_out = std::move(in_out)},
            durability::process);
    };
    const std::vector<float> square(16, 1.0f);
    part("one", {{"v", tensor(square, {2, 2})}, {"w", tensor(square, {3, 3})}});
    const auto differs = [&](const char* words) {
        CHECK_THROWS_WITH(combine_statistics({folder / "one", folder / "two"}, folder / "x"), doctest::Contains(words));
    };
    part("two", {{"v", tensor(square, {2, 2})}, {"w", tensor(square, {3, 3})}}, 1, {"w"});
    differs("disagree about the layout of weights");
    part("two", {{"v", tensor(square, {2, 2})}});
    differs("hold different tensors");
    part("two", {{"u", tensor(square, {2, 2})}, {"w", tensor(square, {3, 3})}});
    differs("hold different tensors");
    part("two", {{"v", tensor(square, {2, 2})}, {"w", tensor(square, {4, 4})}});
    differs("'w' has shape [4, 4] in ");
    part("two", {{"v", tensor(square, {2, 2})}, {"w", tensor(square, {3, 3})}}, ~std::uint64_t{0});
    differs("more than 2^64-1 examples together");
    part("one", {{"w", tensor(square, {2})}}, 0, {}, statistics_kind::empirical_fisher);
    part("two", {{"w", tensor(square, {2})}}, 0, {}, statistics_kind::empirical_fisher);
    differs("the Fishers to join come from no examples");
    CHECK_FALSE(std::filesystem::exists(folder / "x"));
}

TEST_CASE("what a file says must be true; a plain file is taken as it is")
{
    const scratch folder;
    const auto a = random_values(6, 1);
    const auto write = [&](metadata_map metadata, extents shape = {6}) {
        write_safetensors(folder / "s", const_model_ref{{"w", tensor(a, std::move(shape))}}, std::move(metadata),
            durability::process);
    };
    const auto good = [](std::string key = {}, std::string value = {}) {
        metadata_map metadata{{"schema", "taskvec.statistics.1"}, {"kind", "gram"}, {"examples", "3"},
            {"fingerprint", "xxh64:0000000000000007"}};
        if (!key.empty()) { metadata[key] = value; }
        return metadata;
    };
    const std::vector<float> square(4);
    const auto refused = [&](metadata_map metadata, extents shape = {6}) {
        write(std::move(metadata), std::move(shape));
        CHECK_THROWS_AS(statistics_file(folder / "s"), format_error);
    };
    write({});
    {
        const statistics_file plain(folder / "s");
        CHECK_FALSE(plain.described());
        plain.require_fisher();
        plain.require_gram();
        check_statistics(cpu{}, plain, {});
    }
    refused(good()); // a Gram that is not square
    refused(good(), {2, 3});
    const auto refused_for = [&](const std::string& key, const std::string& value, const std::string& what) {
        CAPTURE(value);
        write_safetensors(
            folder / "s", const_model_ref{{"w", tensor(square, {2, 2})}}, good(key, value), durability::process);
        CHECK_THROWS_WITH_AS(statistics_file(folder / "s"), doctest::Contains(what.c_str()), format_error);
    };
    refused_for("schema", "taskvec.statistics.9", "has schema 'taskvec.statistics.9'");
    refused_for("kind", "hessian", "has kind 'hessian'");
    for (const char* count : {"many", "", "-3", "3 ", "18446744073709551616"}) {
        refused_for("examples", count, "has examples '");
    }
    refused_for("fingerprint", "7", "has the fingerprint '7'");
    write_safetensors(
        folder / "s", const_model_ref{{"w", tensor(square, {2, 2})}}, good("in_out", "[\"w\"]"), durability::process);
    CHECK(statistics_file(folder / "s").layout("w") == weight_layout::in_out);
    for (const char* list : {"[\"v\"]", "\"w\"", "[1]", "[", "{}"}) {
        write_safetensors(
            folder / "s", const_model_ref{{"w", tensor(square, {2, 2})}}, good("in_out", list), durability::process);
        CHECK_THROWS_AS(statistics_file(folder / "s"), format_error);
    }
    const std::vector<std::int64_t> whole(2);
    write_safetensors(folder / "s", const_model_ref{{"w", {whole.data(), dtype::i64, {2}}}}, {}, durability::process);
    CHECK_THROWS_AS(statistics_file(folder / "s"), format_error);
}
