// taskvec combine-statistics.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <taskvec/formats/statistics.hpp>

using namespace tools_test;

namespace {

void write_part(const std::filesystem::path& path, taskvec::statistics_kind kind, std::uint64_t examples,
    std::vector<float> values, std::uint64_t model = 7)
{
    taskvec::statistics_info info{
        .kind = kind, .examples = examples, .fingerprint = model, .in_out = {}, .metadata = {}};
    write_values(
        path, {{"w", {taskvec::dtype::f32, {2, 2}, std::move(values)}}}, taskvec::detail::statistics_metadata(info));
}

} // namespace

TEST_CASE("Grams add up, Fishers are means weighted by their examples")
{
    using kind = taskvec::statistics_kind;
    const scratch folder;
    write_part(folder / "g1", kind::gram, 3, {2, 1, 1, 4});
    write_part(folder / "g2", kind::gram, 5, {1, 0.5f, 0.5f, 1});
    auto done = run(folder, {"combine-statistics", "--part", "g1", "--part", "g2", "--out", "g"});
    CAPTURE(done.err);
    REQUIRE(done.code == 0);
    CHECK(read_values(folder / "g").at("w").values == std::vector<float>{3, 1.5f, 1.5f, 5});
    CHECK(taskvec::statistics_file(folder / "g").info().examples == 8);
    CHECK(taskvec::statistics_file(folder / "g").info().fingerprint == 7);
    CHECK(done.out.find("8 examples") != std::string::npos);

    write_part(folder / "f1", kind::empirical_fisher, 1, {1, 0, 4, 8});
    write_part(folder / "f2", kind::empirical_fisher, 3, {5, 4, 0, 8});
    REQUIRE(run(folder, {"combine-statistics", "--part", "f1", "--part", "f2", "--out", "f1"}).code
        == 0); // over one of its inputs
    CHECK(read_values(folder / "f1").at("w").values == std::vector<float>{4, 3, 1, 8});
    CHECK(taskvec::statistics_file(folder / "f1").info().examples == 4);
}

TEST_CASE("parts that do not belong together: one line, and no file")
{
    using kind = taskvec::statistics_kind;
    const scratch folder;
    write_part(folder / "good", kind::expected_fisher, 2, {1, 2, 3, 4});
    write_part(folder / "other-kind", kind::empirical_fisher, 2, {1, 2, 3, 4});
    write_part(folder / "other-model", kind::expected_fisher, 2, {1, 2, 3, 4}, 8);
    write_part(folder / "negative", kind::expected_fisher, 2, {1, 2, -3, 4});
    write_part(folder / "gram", kind::gram, 2, {2, 1, 1, 2});
    write_part(folder / "asymmetric", kind::gram, 2, {2, 1, 0.5f, 2});
    write_part(folder / "no-gram", kind::gram, 2, {1, 3, 3, 2});
    write_part(folder / "negative-gram", kind::gram, 2, {2, 0, 0, -1});
    write_part(folder / "nan-gram", kind::gram, 2, {2, std::numeric_limits<float>::quiet_NaN(), 0, 1});
    write_part(folder / "nan", kind::expected_fisher, 2, {1, 2, 3, std::numeric_limits<float>::quiet_NaN()});
    write_values(folder / "plain", {{"w", {taskvec::dtype::f32, {2, 2}, {1, 2, 3, 4}}}});
    const auto names = folder.names();
    const std::vector<std::pair<std::string, std::vector<std::string>>> cases{{"other-kind", {"kinds", "other-kind"}},
        {"other-model", {"models", "other-model"}}, {"negative", {"'w'", "-3", "index 2"}},
        {"nan", {"'w'", "nan", "index 3"}}, {"plain", {"plain", "schema"}}, {"absent", {"absent", "No such file"}},
        {"asymmetric", {"'asymmetric'", "'w'", "not symmetric", "(1, 0)"}}, {"no-gram", {"'no-gram'", "diagonal"}},
        {"negative-gram", {"'negative-gram'", "-1", "negative"}}, {"nan-gram", {"'nan-gram'", "NaN", "index 1"}}};
    for (const auto& [part, words] : cases) {
        const bool gram = part == "asymmetric" || part.ends_with("-gram");
        const auto result =
            run(folder, {"combine-statistics", "--part", gram ? "gram" : "good", "--part", part, "--out", "out"});
        CAPTURE(result.err);
        CHECK(result.code == 1);
        CHECK(is_error_line(result.err));
        for (const auto& word : words) { CHECK(result.err.find(word) != std::string::npos); }
        CHECK(folder.names() == names);
    }
    CHECK(run(folder, {"combine-statistics", "--out", "out"}).code == 2);
}

TEST_CASE("sums and counts beyond their types are errors, and no file")
{
    using kind = taskvec::statistics_kind;
    const scratch folder;
    constexpr std::uint64_t half = std::uint64_t{1} << 63;
    write_part(folder / "large", kind::gram, 2, {3e38F, 0, 0, 1});
    write_part(folder / "many", kind::empirical_fisher, half, {1, 2, 3, 4});
    refused(folder, {"combine-statistics", "--part", "large", "--part", "large", "--out", "out"}, 1,
        "'w' of all parts together is beyond F32 at index 0");
    refused(folder, {"combine-statistics", "--part", "many", "--part", "many", "--out", "out"}, 1, "2^64-1 examples");
    write_values(folder / "beyond", {{"w", {taskvec::dtype::f32, {2, 2}, {1, 2, 3, 4}}}},
        {{"schema", "taskvec.statistics.1"}, {"kind", "empirical_fisher"}, {"examples", "18446744073709551616"}});
    refused(folder, {"combine-statistics", "--part", "beyond", "--out", "out"}, 1, "18446744073709551616");
}
