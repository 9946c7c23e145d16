// The first paper's ordering of methods on LoRA adapters trained on real data, for one fixed seed; and the files that
// are left.
// SPDX-License-Identifier: Apache-2.0
#include "checkpoints.hpp"
#include "lora.hpp"
#include "low_rank.hpp"

#include <taskvec/core/error.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

using namespace digits;

namespace {

struct experiment {
    experiment()
        : out(std::filesystem::temp_directory_path() / "taskvec-digits-lora-test")
        , s(make_setting(load_images(DIGITS_DATA_FILE), 1))
        , initial(initial_adapter(s.seed))
        , adapters(fine_tune_adapters(s, initial, parameterisation::lora))
    {
        std::filesystem::remove_all(out);
        std::filesystem::create_directories(out);
        run_lora(s, adapters, out, results);
        write_lora(results, out);
    }
    ~experiment() { std::filesystem::remove_all(out); }

    std::filesystem::path out;
    setting s;
    adapter initial;
    std::vector<adapter> adapters;
    lora_results results;
};

/// Trained once for all test cases.
const experiment& run()
{
    static const experiment once;
    return once;
}

double average(const std::string& method)
{
    return run().results.methods[method].average();
}

std::string content(const std::filesystem::path& file)
{
    std::ifstream stream(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
}

double largest_difference(const encoder& a, const encoder& b)
{
    double largest = 0;
    for (std::size_t i = 0; i < encoder::size(); ++i) {
        largest = std::max(largest, std::abs(static_cast<double>(a.values()[i]) - b.values()[i]));
    }
    return largest;
}

} // namespace

TEST_CASE("the LoRA table has the papers' rows and parameter counts")
{
    const auto& t = run().results.methods;
    std::size_t next = 0;
    const std::vector<std::string> names{"Pre-Trained", "Single-Task", "Average", "Task Arithmetic", "TIES",
        "Fisher-Merging", "RegMean", "LoraHub", "PERU-LoRA (q=1)", "PERU-LoRA (q=2)", "PERU-LoRA (q=4)",
        "PERU-LoRA (q=8)", "PERU-LoRA (q=16)"};
    for (const auto& r : t.rows()) { next += next < names.size() && r.method == names[next]; }
    CHECK(next == names.size());
    CHECK(t["Single-Task"].parameters == 74368 + 8 * 32 * (128 + 64 + 512 + 128));
    CHECK(t["TIES"].parameters == 74368);
    for (const std::size_t q : table_ranks()) {
        CHECK(t[with_rank(q)].parameters == 74368 + 8 * q * ((128 + 64 + 1) + (512 + 128 + 1)));
    }
}

TEST_CASE("the papers' ordering of methods on LoRA")
{
    const double best =
        run().results.methods.best({"Average", "Task Arithmetic", "TIES", "Fisher-Merging", "RegMean", "LoraHub"})[0];
    CHECK(average("Single-Task") >= 0.93);
    CHECK(average("Single-Task") - average("PERU-LoRA (q=8)") <= 0.015);
    CHECK(average("PERU-LoRA (q=4)") >= best + 0.06);
}

TEST_CASE("the truncation's error falls with q, and vanishes at the adapter's rank")
{
    const auto& errors = run().results.errors;
    REQUIRE(errors.size() == curve_ranks().size());
    for (std::size_t i = 1; i < errors.size(); ++i) { CHECK(errors[i].total[0] < errors[i - 1].total[0]); }
    const auto eighth =
        static_cast<std::size_t>(std::ranges::find(curve_ranks(), std::size_t{8}) - curve_ranks().begin());
    CHECK(errors[eighth].total[0] <= 0.12);
    CHECK(curve_ranks().back() == rank);
    CHECK(errors.back().total[0] < 1e-4);
    CHECK(run().results.curve["PERU-LoRA (q=32)"].average() == doctest::Approx(average("Single-Task")).epsilon(1e-3));
}

TEST_CASE("the error's decay is fitted, and residuals of a merged model have the rank of all its tasks")
{
    const auto& [out, s, initial, adapters, results] = run();
    lora_results exact;
    exact.errors.resize(curve_ranks().size());
    for (std::size_t i = 0; i < curve_ranks().size(); ++i) {
        exact.errors[i].total = {2 * std::exp(-0.25 * static_cast<double>(curve_ranks()[i]))};
    }
    CHECK(fit_errors(exact)[0].rate == doctest::Approx(0.25));
    CHECK(fit_errors(exact)[0].intercept == doctest::Approx(std::log(2.0)));
    CHECK(fit_errors(exact)[0].r_squared == doctest::Approx(1.0));
    for (const auto& ranks : results.residual_ranks) { CHECK(ranks[0] >= 0.9); }
    CHECK(results.residual_text.starts_with("seed 1: 8/8 12/12"));
    CHECK(results.kept["A and B pruned (as q=4)"].average() < results.kept["product pruned (as q=4)"].average());
    CHECK(results.kept["product pruned (as q=4)"].parameters == 74368 + 8 * 834 * 4);
    CHECK(results.spectra[0].front() == doctest::Approx(1.0));
    CHECK(std::ranges::is_sorted(results.spectra[1], std::greater{}));
}

TEST_CASE("LoRA's claims are judged by the figures of the run, and name their place")
{
    std::size_t reproduced = 0;
    for (const auto& claim : lora_claims(run().results)) {
        CHECK((claim.place.empty() || claim.place.starts_with("P ")));
        reproduced += !claim.place.empty() && claim.holds();
    }
    CHECK(reproduced >= 5);
}

TEST_CASE("merges of updates are what they say, against the dense updates")
{
    const auto& [out, s, initial, adapters, results] = run();
    std::vector<updates> all;
    for (const auto& phi : adapters) { all.push_back(updates_of(phi)); }
    encoder zero, sum;
    for (std::size_t task = 0; task < tasks; ++task) {
        const encoder single = folded(s.base.body, all[task]);
        CHECK(largest_difference(single, adapted(s.base, initial, adapters[task], parameterisation::lora)) < 1e-5);
        const encoder delta = folded(zero, all[task]);
        for (std::size_t i = 0; i < encoder::size(); ++i) { sum.values()[i] += delta.values()[i]; }
    }
    CHECK(largest_difference(folded(zero, summed(all)), sum) < 1e-4);

    // At density 1 an entry is the mean of the entries that have the sign of their sum.
    const encoder merged = folded(zero, elected(all, 1.0));
    const std::vector<encoder> deltas = folded(zero, all);
    double largest = 0;
    for (std::size_t i = 0; i < encoder::size(); ++i) {
        double agreeing = 0, count = 0, total = 0;
        for (const auto& delta : deltas) { total += delta.values()[i]; }
        for (const auto& delta : deltas) {
            if (total * delta.values()[i] > 0) {
                agreeing += delta.values()[i];
                ++count;
            }
        }
        if (std::abs(total) > 1e-5) {
            largest = std::max(largest, std::abs((count > 0 ? agreeing / count : 0) - merged.values()[i]));
        }
    }
    CHECK(largest < 1e-3);
}

TEST_CASE("the adapter directories hold the models of the table")
{
    const auto& [out, s, initial, adapters, results] = run();
    const encoder base = load_encoder(out / "base.safetensors");
    double single = 0, served = 0;
    for (std::size_t task = 0; task < tasks; ++task) {
        single +=
            accuracy(folded(base, load_updates(out / "lora" / task_names[task])), s.base.head, s.test[task]) / tasks;
        const updates low = load_updates(out / "peru-lora" / task_names[task]);
        CHECK(low.at("fc1").rank() == 8);
        CHECK(low.at("fc2").rank() == 8);
        served += accuracy(folded(base, low), s.base.head, s.test[task]) / tasks;
    }
    CHECK(single == doctest::Approx(average("Single-Task")));
    CHECK(served == doctest::Approx(average("PERU-LoRA (q=8)")));
    CHECK(mean(evaluate(load_encoder(out / "merged-lora-ties.safetensors"), s.base.head, s.test)) == average("TIES"));
    updates other = load_updates(out / "lora" / task_names[0]);
    other.emplace("fc3", other.at("fc1"));
    CHECK_THROWS_AS(folded(base, other), taskvec::invalid_argument);
}

TEST_CASE("the LoRA table and curve are written as CSV")
{
    const std::string csv = content(run().out / "lora.csv");
    CHECK(csv.starts_with("method,#params,bytes,rot90,rot180,rot270,transpose,mirror,flip,invert,permute,Avg\nPre-"
                          "Trained,74368,297472,"));
    CHECK(csv.find("\nSingle-Task,287360,") != std::string::npos);
    const std::string curve = content(run().out / "accuracy-against-q.csv");
    CHECK(curve.starts_with("q,PERU-LoRA,#params,relative error,"));
    CHECK(static_cast<std::size_t>(std::ranges::count(curve, '\n')) == 1 + curve_ranks().size());
    CHECK(curve.find("\n8," + percent(average("PERU-LoRA (q=8)")) + ",127744,") != std::string::npos);
}
