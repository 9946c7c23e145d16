// taskvec merge by the methods that look at data (fisher, regmean) or at angles (slerp, model-stock), against plain
// loops.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include "../capture.hpp"

#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/statistics.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <functional>

using namespace tools_test;

namespace {

struct models_with_statistics {
    scratch folder;
    values_model base = sample_base();
    std::vector<values_model> tasks{sample_task(base, 21), sample_task(base, 22), sample_task(base, 23)};
    std::vector<values_model> fishers;
    std::vector<std::vector<float>> inputs; ///< of layers.0.weight (17 out, 31 in), for each task: 60 rows of 31

    models_with_statistics()
    {
        std::mt19937 random(5);
        std::normal_distribution<float> normal;
        write_values(folder / "base.safetensors", base);
        for (std::size_t t = 0; t < 3; ++t) {
            write_values(folder / (letter(t) + ".safetensors"), tasks[t]);
            fishers.push_back(base);
            for (auto& [name, tensor] : fishers[t]) {
                tensor.dtype = taskvec::dtype::f32;
                for (auto& value : tensor.values) {
                    const float draw = normal(random);
                    value = random() % 8 == 0 ? 0.0f : draw * draw;
                }
            }
            for (auto& task : fishers) { task.at("layers.0.bias").values[3] = 0; } // nobody knows: the average
            write_fisher(letter(t) + ".fisher.safetensors", t, letter(t) + ".safetensors");
            inputs.emplace_back();
            for (std::size_t i = 0; i < 60 * 31; ++i) { inputs[t].push_back(normal(random)); }
            write_gram(letter(t) + ".gram.safetensors", "layers.0.weight", t, letter(t) + ".safetensors");
        }
    }
    static std::string letter(std::size_t t) { return std::string(1, static_cast<char>('a' + t)); }

    std::optional<std::uint64_t> stamp(const std::string& model) const
    {
        if (model.empty()) { return std::nullopt; }
        const auto opened = taskvec::open_model(folder / model);
        return taskvec::fingerprint(taskvec::cpu{}, opened.model());
    }
    void write_fisher(const std::string& file, std::size_t t, const std::string& of) const
    {
        write_fisher(file, fishers[t], of);
    }
    void write_fisher(const std::string& file, const values_model& values, const std::string& of) const
    {
        taskvec::statistics_info info{.kind = taskvec::statistics_kind::expected_fisher,
            .examples = 10,
            .fingerprint = stamp(of),
            .in_out = {},
            .metadata = {}};
        write_values(folder / file, values, taskvec::detail::statistics_metadata(info));
    }
    void write_gram(const std::string& file, const std::string& weight, std::size_t t, const std::string& of,
        const std::vector<std::string>& in_out = {}) const
    {
        std::map<std::string, taskvec::gram_accumulator> grams;
        grams.emplace(weight, 31)
            .first->second.add(taskvec::cpu{},
                taskvec::matrix_view<const float>(inputs[t].data(), 60, 31, taskvec::matrix_order::row_major));
        taskvec::write_statistics(folder / file, grams, stamp(of), in_out);
    }
    outcome merge(const std::string& method, const std::vector<std::string>& more, std::size_t count = 3) const
    {
        std::vector<std::string> arguments{"merge", "--method", method, "--out", "out.safetensors"};
        for (std::size_t t = 0; t < count; ++t) {
            arguments.push_back("--task");
            arguments.push_back(letter(t) + ".safetensors");
        }
        arguments.insert(arguments.end(), more.begin(), more.end());
        return run(folder, arguments);
    }
    values_model result() const { return read_values(folder / "out.safetensors"); }
};

const std::vector<std::string> three_fishers{
    "--fisher", "a.fisher.safetensors", "--fisher", "b.fisher.safetensors", "--fisher", "c.fisher.safetensors"};
const std::vector<std::string> three_grams{
    "--gram", "a.gram.safetensors", "--gram", "b.gram.safetensors", "--gram", "c.gram.safetensors"};

std::vector<std::string> join(std::vector<std::string> a, const std::vector<std::string>& b)
{
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

/// The largest difference of two models, relative to what an entry's dtype can tell apart near 1.
double largest_difference(const values_model& a, const values_model& b)
{
    double worst = 0;
    REQUIRE(a.size() == b.size());
    for (const auto& [name, tensor] : a) {
        const double unit = tensor.dtype == taskvec::dtype::bf16 ? 8e-3
            : tensor.dtype == taskvec::dtype::f16                ? 1e-3
                                                                 : 1e-6;
        REQUIRE(tensor.values.size() == b.at(name).values.size());
        for (std::size_t i = 0; i < tensor.values.size(); ++i) {
            const double x = tensor.values[i], y = b.at(name).values[i];
            worst = std::max(worst, std::abs(x - y) / (unit * std::max(1.0, std::abs(y))));
        }
    }
    return worst;
}

/// A model made entry by entry.
values_model each(const values_model& like, const std::function<double(const std::string&, std::size_t)>& entry)
{
    auto model = like;
    for (auto& [name, tensor] : model) {
        for (std::size_t i = 0; i < tensor.values.size(); ++i) {
            tensor.values[i] = static_cast<float>(entry(name, i));
        }
    }
    return model;
}

/// Solves a·x = b in place by elimination with pivots; a is n×n, b is n×m, both row-major.
void solve(std::vector<double>& a, std::vector<double>& b, std::size_t n, std::size_t m)
{
    for (std::size_t k = 0; k < n; ++k) {
        std::size_t pivot = k;
        for (std::size_t i = k; i < n; ++i) {
            if (std::abs(a[i * n + k]) > std::abs(a[pivot * n + k])) { pivot = i; }
        }
        for (std::size_t j = 0; j < n; ++j) { std::swap(a[k * n + j], a[pivot * n + j]); }
        for (std::size_t j = 0; j < m; ++j) { std::swap(b[k * m + j], b[pivot * m + j]); }
        for (std::size_t i = 0; i < n; ++i) {
            if (i == k) { continue; }
            const double factor = a[i * n + k] / a[k * n + k];
            for (std::size_t j = k; j < n; ++j) { a[i * n + j] -= factor * a[k * n + j]; }
            for (std::size_t j = 0; j < m; ++j) { b[i * m + j] -= factor * b[k * m + j]; }
        }
    }
    for (std::size_t k = 0; k < n; ++k) {
        for (std::size_t j = 0; j < m; ++j) { b[k * m + j] /= a[k * n + k]; }
    }
}

} // namespace

TEST_CASE("fisher is the importance-weighted mean, the plain one where nobody knows")
{
    const models_with_statistics m;
    const auto expected = [&](const std::vector<double>& factors, double floor) {
        return each(m.tasks[0], [&, floor](const std::string& name, std::size_t i) {
            double above = 0, below = 0, plain = 0;
            for (std::size_t t = 0; t < 3; ++t) {
                const double f = factors[t] * m.fishers[t].at(name).values[i], x = m.tasks[t].at(name).values[i];
                above += f * x;
                below += f;
                plain += x / 3;
            }
            return below < floor ? plain : above / below;
        });
    };
    const auto done = m.merge("fisher", join(three_fishers, {"--report", "r.json"}));
    CAPTURE(done.err);
    REQUIRE(done.code == 0);
    CHECK(largest_difference(m.result(), expected({1, 1, 1}, 1e-12)) < 2);
    std::uint64_t models = 0, fishers = 0;
    for (const auto& [name, tensor] : m.base) {
        models += 3 * tensor.values.size() * (tensor.dtype == taskvec::dtype::f32 ? 4 : 2);
        fishers += 3 * tensor.values.size() * 4;
    }
    CHECK(nlohmann::json::parse(slurp(m.folder / "r.json"))["bytes_read"]
        == 2 * models + fishers); // once for the fingerprints
    std::vector<double> norms;
    for (const auto& fisher : m.fishers) {
        double square = 0;
        for (const auto& [name, tensor] : fisher) {
            for (const double f : tensor.values) { square += f * f; }
        }
        norms.push_back(1 / std::sqrt(square));
    }
    REQUIRE(m.merge("fisher", join(three_fishers, {"--normalize", "--report", "r.json"})).code == 0);
    CHECK(largest_difference(m.result(), expected(norms, 1e-12)) < 2);
    const auto report = nlohmann::json::parse(slurp(m.folder / "r.json"));
    CHECK(report["bytes_read"] == 2 * models + 2 * fishers); // the second walk is over the Fishers alone
    CHECK(report["walks"] == 1);
    REQUIRE(m.merge("fisher", join(three_fishers, {"--floor", "0.5"})).code == 0);
    CHECK(largest_difference(m.result(), expected({1, 1, 1}, 0.5)) < 2);
    // Equal Fishers are the average.
    REQUIRE(m.merge("fisher",
                 {"--fisher", "a.fisher.safetensors", "--fisher", "a2.safetensors", "--fisher", "a2.safetensors"})
                .code
        == 1); // no such file
    m.write_fisher("same.safetensors", each(m.fishers[0], [](const auto&, std::size_t) { return 2.0; }), "");
    REQUIRE(m.merge("fisher",
                 {"--fisher", "same.safetensors", "--fisher", "same.safetensors", "--fisher", "same.safetensors"})
                .code
        == 0);
    const auto fisher = m.result();
    REQUIRE(m.merge("average", {}).code == 0);
    CHECK(same(m.result(), fisher));
}

TEST_CASE("regmean solves the normal equations of its layers and averages the rest, in either layout")
{
    const models_with_statistics m;
    const std::string weight = "layers.0.weight";
    const auto merged_layer = [&](double alpha,
                                  bool transposed) { // [17][31], or 31 in × 17 out read from the same numbers
        const std::size_t in = transposed ? 17 : 31, out = transposed ? 31 : 17;
        std::vector<double> left(in * in, 0.0), right(in * out, 0.0);
        for (std::size_t t = 0; t < 3; ++t) {
            const std::size_t rows = 60 * 31 / in;
            std::vector<double> gram(in * in, 0.0);
            for (std::size_t r = 0; r < rows; ++r) {
                for (std::size_t i = 0; i < in; ++i) {
                    for (std::size_t j = 0; j < in; ++j) {
                        gram[i * in + j] += static_cast<double>(m.inputs[t][r * in + i]) * m.inputs[t][r * in + j];
                    }
                }
            }
            for (std::size_t i = 0; i < in; ++i) {
                for (std::size_t j = 0; j < in; ++j) {
                    const double g = (i == j ? 1.0 : alpha) * gram[i * in + j];
                    left[i * in + j] += g;
                    for (std::size_t o = 0; o < out; ++o) {
                        right[i * out + o] += g * m.tasks[t].at(weight).values[transposed ? j * out + o : o * in + j];
                    }
                }
            }
        }
        solve(left, right, in, out);
        return right;
    };
    const auto check = [&](double alpha, bool transposed) {
        const std::size_t in = transposed ? 17 : 31, out = transposed ? 31 : 17;
        const auto layer = merged_layer(alpha, transposed);
        const auto expected = each(m.tasks[0], [&](const std::string& name, std::size_t i) {
            if (name == weight) { return layer[transposed ? i : i % in * out + i / in]; }
            return (static_cast<double>(m.tasks[0].at(name).values[i]) + m.tasks[1].at(name).values[i]
                       + m.tasks[2].at(name).values[i])
                / 3;
        });
        CHECK(largest_difference(m.result(), expected) < 2);
    };
    const auto done = m.merge("regmean", join(three_grams, {"--report", "r.json"}));
    CAPTURE(done.err);
    REQUIRE(done.code == 0);
    check(0.9, false);
    CHECK(nlohmann::json::parse(slurp(m.folder / "r.json"))["bytes_read"].get<std::uint64_t>() > 3 * 2 * 31 * 31 * 8);
    REQUIRE(m.merge("regmean", join(three_grams, {"--alpha", "1"})).code == 0);
    check(1, false);
    REQUIRE(m.merge("regmean", join(three_grams, {"--threads", "3", "--alpha", "0"})).code == 0);
    check(0, false);

    // Stored in×out: 17 inputs. Said on the command line, or by the file.
    std::vector<std::string> by_option, by_file;
    for (std::size_t t = 0; t < 3; ++t) {
        const std::size_t rows = 60 * 31 / 17;
        for (const bool said : {false, true}) {
            std::map<std::string, taskvec::gram_accumulator> grams;
            grams.emplace(weight, 17)
                .first->second.add(taskvec::cpu{},
                    taskvec::matrix_view<const float>(m.inputs[t].data(), rows, 17, taskvec::matrix_order::row_major));
            const auto file = models_with_statistics::letter(t) + (said ? ".said" : ".unsaid") + ".safetensors";
            taskvec::write_statistics(
                m.folder / file, grams, {}, said ? std::vector<std::string>{weight} : std::vector<std::string>{});
            auto& list = said ? by_file : by_option;
            list.push_back("--gram");
            list.push_back(file);
        }
    }
    REQUIRE(m.merge("regmean", join(by_option, {"--conv1d", "layers\\.0\\.weight"})).code == 0);
    check(0.9, true);
    REQUIRE(m.merge("regmean", by_file).code == 0);
    check(0.9, true);
    const auto guessed = m.merge("regmean", by_option);
    CHECK(guessed.code == 1);
    CHECK(guessed.err.find("in×out") != std::string::npos); // it is named, not guessed
    const auto disagree = m.merge(
        "regmean", {"--gram", "a.said.safetensors", "--gram", "b.unsaid.safetensors", "--gram", "c.said.safetensors"});
    CHECK(disagree.code == 1);
    CHECK(disagree.err.find("disagree") != std::string::npos);
}

TEST_CASE("slerp goes along the arc, from the base or between two tasks")
{
    const models_with_statistics m;
    const auto arc = [&](const values_model& a, const values_model& b, double t) {
        auto expected = a;
        for (auto& [name, tensor] : expected) {
            double aa = 0, bb = 0, ab = 0;
            for (std::size_t i = 0; i < tensor.values.size(); ++i) {
                const double x = tensor.values[i], y = b.at(name).values[i];
                aa += x * x;
                bb += y * y;
                ab += x * y;
            }
            const double cosine = ab / std::sqrt(aa * bb);
            double of_a = 1 - t, of_b = t;
            if (std::abs(cosine) <= 0.9995) {
                of_a = std::sin((1 - t) * std::acos(cosine)) / std::sin(std::acos(cosine));
                of_b = std::sin(t * std::acos(cosine)) / std::sin(std::acos(cosine));
            }
            for (std::size_t i = 0; i < tensor.values.size(); ++i) {
                tensor.values[i] = static_cast<float>(of_a * tensor.values[i] + of_b * b.at(name).values[i]);
            }
        }
        return expected;
    };
    REQUIRE(m.merge("slerp", {}, 2).code == 0);
    CHECK(largest_difference(m.result(), arc(m.tasks[0], m.tasks[1], 0.5)) < 2);
    REQUIRE(m.merge("slerp", {"--t", "0.2"}, 2).code == 0);
    CHECK(largest_difference(m.result(), arc(m.tasks[0], m.tasks[1], 0.2)) < 2);
    REQUIRE(m.merge("slerp", {"--t", "0.7", "--base", "base.safetensors"}, 1).code == 0);
    CHECK(largest_difference(m.result(), arc(m.base, m.tasks[0], 0.7)) < 2);
    REQUIRE(m.merge("slerp", {"--t", "0"}, 2).code == 0);
    CHECK(same(m.result(), m.tasks[0]));
}

TEST_CASE("model-stock goes as far from the base as the task vectors agree")
{
    const models_with_statistics m;
    for (const bool clamp : {true, false}) {
        auto expected = m.base;
        for (auto& [name, tensor] : expected) {
            double dots[3][3] = {};
            for (std::size_t s = 0; s < 3; ++s) {
                for (std::size_t t = 0; t < 3; ++t) {
                    for (std::size_t i = 0; i < tensor.values.size(); ++i) {
                        const double start = tensor.values[i];
                        dots[s][t] += (m.tasks[s].at(name).values[i] - start) * (m.tasks[t].at(name).values[i] - start);
                    }
                }
            }
            const auto cosine = [&](int s, int t) {
                return dots[s][s] * dots[t][t] == 0 ? 0.0 : dots[s][t] / std::sqrt(dots[s][s] * dots[t][t]);
            };
            const double c = (cosine(0, 1) + cosine(0, 2) + cosine(1, 2)) / 3;
            double ratio = 3 * c / (1 + 2 * c);
            if (clamp) { ratio = std::clamp(ratio, 0.0, 1.0); }
            for (std::size_t i = 0; i < tensor.values.size(); ++i) {
                const double start = tensor.values[i];
                double mean = 0;
                for (const auto& task : m.tasks) { mean += (task.at(name).values[i] - start) / 3; }
                tensor.values[i] = static_cast<float>(start + ratio * mean);
            }
        }
        // The scalar's cosines are ±1: their mean is 1 or -1/3, where the unclamped ratio is far from the others.
        auto arguments = std::vector<std::string>{"--base", "base.safetensors", "--exclude", "scale"};
        expected.at("scale") = m.base.at("scale");
        if (!clamp) { arguments.push_back("--unclamped"); }
        const auto done = m.merge("model-stock", arguments);
        CAPTURE(done.err);
        REQUIRE(done.code == 0);
        CHECK(largest_difference(m.result(), expected) < 2);
    }
}

TEST_CASE("statistics that are wrong: one line that names what is, and the old output untouched")
{
    const models_with_statistics m;
    auto values = m.fishers[1];
    values.at("layers.0.weight").values[7] = -0.5f;
    m.write_fisher("negative.safetensors", values, "");
    values.at("layers.0.weight").values[7] = std::numeric_limits<float>::quiet_NaN();
    m.write_fisher("nan.safetensors", values, "");
    values = m.fishers[1];
    values.erase("scale");
    m.write_fisher("lacks.safetensors", values, "");
    values = m.fishers[1];
    values.at("layers.0.weight").shape = {31, 17};
    m.write_fisher("shape.safetensors", values, "");
    const auto write_gram = [&](const std::string& file, std::size_t n,
                                const std::function<float(std::size_t, std::size_t)>& entry) {
        values_model gram{{"layers.0.weight",
            {taskvec::dtype::f32, {static_cast<std::int64_t>(n), static_cast<std::int64_t>(n)}, {}}}};
        for (std::size_t i = 0; i < n * n; ++i) { gram.at("layers.0.weight").values.push_back(entry(i / n, i % n)); }
        write_values(m.folder / file, gram);
    };
    write_gram("skew.safetensors", 31, [](std::size_t i, std::size_t j) {
        return i == j ? 2.0f : i < j ? 0.5f : 0.25f;
    });
    write_gram("short.safetensors", 30, [](std::size_t i, std::size_t j) { return i == j ? 2.0f : 0.0f; });
    write_gram("singular.safetensors", 31, [](std::size_t, std::size_t) { return 1.0f; });
    m.write_gram("stranger.safetensors", "elsewhere.weight", 1, "");
    spill(m.folder / "out.safetensors", "old");
    const auto names = m.folder.names();

    const auto fishers = [](const char* second) {
        return std::vector<std::string>{
            "--fisher", "a.fisher.safetensors", "--fisher", second, "--fisher", "c.fisher.safetensors"};
    };
    const auto grams = [](const char* second) {
        return std::vector<std::string>{
            "--gram", "a.gram.safetensors", "--gram", second, "--gram", "c.gram.safetensors"};
    };
    struct bad {
        std::string method;
        std::vector<std::string> arguments;
        std::vector<std::string> parts;
        int code = 1;
        std::size_t tasks = 3;
    };
    const std::vector<std::string> same_singular{
        "--gram", "singular.safetensors", "--gram", "singular.safetensors", "--gram", "singular.safetensors"};
    const std::vector<bad> cases{
        {"fisher", fishers("negative.safetensors"), {"negative.safetensors", "'layers.0.weight'", "-0.5", "7"}},
        {"fisher", fishers("nan.safetensors"), {"nan.safetensors", "'layers.0.weight'", "NaN", "7"}},
        {"fisher", fishers("lacks.safetensors"), {"lacks.safetensors", "'scale'", "missing"}},
        {"fisher", fishers("shape.safetensors"), {"shape.safetensors", "[31, 17]", "[17, 31]"}},
        {"fisher", fishers("c.fisher.safetensors"),
            {"c.fisher.safetensors", "another model", "b.safetensors", "fingerprint"}},
        {"fisher", fishers("b.gram.safetensors"), {"b.gram.safetensors", "gram", "Fisher"}},
        {"fisher", fishers("absent"), {"absent", "No such file"}},
        {"fisher", join(three_fishers, {"--floor", "-1"}), {"floor", "-1"}, 2},
        {"fisher", join(three_fishers, {"--floor", "nan"}), {"--floor", "nan"}, 2},
        {"fisher", {"--fisher", "a.fisher.safetensors"}, {"--fisher", "1 for 3 tasks"}, 2},
        {"fisher", {}, {"--fisher", "0 for 3 tasks"}, 2},
        {"regmean", grams("skew.safetensors"), {"skew.safetensors", "not symmetric", "'layers.0.weight'"}},
        {"regmean", grams("short.safetensors"), {"short.safetensors", "[30, 30]", "[31, 31]"}},
        {"regmean", grams("stranger.safetensors"), {"stranger.safetensors", "'elsewhere.weight'"}},
        {"regmean", grams("c.gram.safetensors"), {"c.gram.safetensors", "another model", "b.safetensors"}},
        {"regmean", grams("b.fisher.safetensors"), {"b.fisher.safetensors", "fisher", "Gram"}},
        {"regmean", join(same_singular, {"--alpha", "1"}), {"'layers.0.weight'", "singular", "ridge"}},
        {"regmean", join(three_grams, {"--alpha", "1.5"}), {"alpha", "1.5"}, 2},
        {"regmean", join(three_grams, {"--ridge", "-1"}), {"ridge", "-1"}, 2},
        {"regmean", join(three_grams, {"--conv1d", "nothing"}), {"--conv1d", "nothing"}},
        {"regmean", join(three_grams, {"--conv1d", "("}), {"--conv1d", "regular expression"}, 2},
        {"regmean", {"--gram", "a.gram.safetensors", "--gram", "a.gram.safetensors"}, {"--gram", "2 for 3 tasks"}, 2},
        {"slerp", {}, {"two models"}, 2},
        {"slerp", {}, {"two models"}, 2, 1},
        {"slerp", {"--t", "inf"}, {"--t is inf"}, 2, 2},
        {"slerp", {"--task", "b.safetensors=0.5"}, {"weight 0.5", "--t"}, 2, 1},
        {"model-stock", {"--base", "base.safetensors"}, {"two or more"}, 2, 1},
        {"model-stock", {}, {"--base"}, 2},
        {"model-stock", {"--base", "base.safetensors", "--task", "b.safetensors=2"}, {"weight 2"}, 2, 1},
    };
    for (const auto& [method, arguments, parts, code, tasks] : cases) {
        const auto result = m.merge(method, arguments, tasks);
        CAPTURE_BOUND(method);
        CAPTURE(result.err);
        CHECK(result.code == code);
        CHECK(is_error_line(result.err));
        for (const auto& part : parts) { CHECK(result.err.find(part) != std::string::npos); }
        CHECK(slurp(m.folder / "out.safetensors") == "old");
        CHECK(m.folder.names() == names);
        // A dry run finds all of it but what only the values say.
        const bool in_values = std::any_of(arguments.begin(), arguments.end(), [](const std::string& argument) {
            return argument == "negative.safetensors" || argument == "nan.safetensors" || argument == "skew.safetensors"
                || argument == "singular.safetensors";
        });
        CHECK(m.merge(method, join(arguments, {"--dry-run"}), tasks).code == (in_values ? 0 : code));
    }
    // What the message suggests helps.
    CHECK(m.merge("regmean", join(same_singular, {"--alpha", "1", "--ridge", "1e-6"})).code == 0);
}
