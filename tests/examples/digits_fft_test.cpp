// The first paper's ordering of methods on real data, for one fixed seed; and the files that the example leaves.
// SPDX-License-Identifier: Apache-2.0
#include "checkpoints.hpp"
#include "fft.hpp"
#include "merging.hpp"

#include <taskvec/formats/delta.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/ties.hpp>
#include <taskvec/select/sparse.hpp>

#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

using namespace digits;

namespace {

struct experiment {
    experiment()
        : out(std::filesystem::temp_directory_path() / "taskvec-digits-fft-test")
        , s(make_setting(load_images(DIGITS_DATA_FILE), 1))
    {
        std::filesystem::remove_all(out);
        std::filesystem::create_directories(out);
        run_fft(s, out, results);
        write_fft(results, out);
    }
    ~experiment() { std::filesystem::remove_all(out); }

    std::filesystem::path out;
    setting s;
    fft_results results;
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

bool same(const encoder& a, const encoder& b)
{
    return std::ranges::equal(a.values(), b.values());
}

} // namespace

TEST_CASE("the table has the papers' rows and parameter counts")
{
    const auto& rows = run().results.methods.rows();
    const std::vector<std::string> names{"Pre-Trained", "Single-Task", "Average", "Task Arithmetic", "TIES",
        "Fisher-Merging", "RegMean", "LoraHub", "Post-Pruning (1%)", "Post-Pruning (5%)", "Post-Pruning (10%)",
        "Post-Pruning (20%)", "PERU-FFT (1%)", "PERU-FFT (5%)", "PERU-FFT (10%)", "PERU-FFT (20%)"};
    std::vector<std::string> found;
    for (const auto& r : rows) {
        if (std::ranges::find(names, r.method) != names.end()) { found.push_back(r.method); }
    }
    CHECK(found == names);
    const auto& t = run().results.methods;
    CHECK(t["Pre-Trained"].parameters == 74368);
    CHECK(t["Single-Task"].parameters == 8 * 74368);
    CHECK(t["TIES"].parameters == 74368);
    CHECK(t["Post-Pruning (10%)"].parameters == 74368 + 8 * 7436);
    CHECK(t["PERU-FFT (1%)"].parameters == 74368 + 8 * 743);
}

TEST_CASE("the papers' ordering of methods on full fine-tuning")
{
    const double best =
        run().results.methods.best({"Average", "Task Arithmetic", "TIES", "Fisher-Merging", "RegMean", "LoraHub"})[0];
    CHECK(average("Single-Task") >= 0.93);
    for (const char* merge : {"Average", "Task Arithmetic", "TIES", "Fisher-Merging", "RegMean", "LoraHub"}) {
        CHECK(average(merge) >= average("Pre-Trained") + 0.01);
    }
    CHECK(average("Post-Pruning (10%)") >= best + 0.08);
    CHECK(average("PERU-FFT (1%)") >= best + 0.02);
    CHECK(average("PERU-FFT (1%)") >= average("Post-Pruning (1%)"));
    for (const double m : {0.05, 0.10, 0.20}) {
        CHECK(average(with_density("PERU-FFT", m)) >= average(with_density("Post-Pruning", m)) - 0.005);
    }
    CHECK(average("Single-Task") - average("PERU-FFT (10%)") <= 0.03);
}

TEST_CASE("at density 1 both ways of reuse serve the single-task models")
{
    const auto& curve = run().results.curve;
    CHECK(curve["Post-Pruning (100%)"].average() == doctest::Approx(average("Single-Task")).epsilon(1e-3));
    CHECK(curve["PERU-FFT (100%)"].average() == doctest::Approx(average("Single-Task")).epsilon(1e-3));
    // At density 0 they are the base and the merged model.
    CHECK(curve["Post-Pruning (0%)"].average() == average("Pre-Trained"));
    CHECK(curve["PERU-FFT (0%)"].average() == average("Task Arithmetic"));
    CHECK(curve["PERU-FFT (40%)"].average() <= curve["PERU-FFT (20%)"].average() + 0.005);
}

TEST_CASE("bytes are those of the files, but for their headers")
{
    const auto& [out, s, results] = run();
    std::uintmax_t stored = std::filesystem::file_size(out / "peru-fft" / "merged.safetensors");
    for (const auto task : task_names) {
        stored += std::filesystem::file_size(out / "peru-fft" / (std::string(task) + ".delta.safetensors"));
    }
    const std::size_t counted = results.methods["PERU-FFT (10%)"].bytes;
    CHECK(stored >= counted);
    CHECK(stored <= counted + (1 + tasks) * 2048);
}

TEST_CASE("the checkpoints hold the models of the table")
{
    const auto& [out, s, results] = run();
    CHECK(same(load_encoder(out / "base.safetensors"), s.base.body));
    CHECK(load_head(out / "head.safetensors") == s.base.head);
    std::vector<encoder> models;
    for (const auto task : task_names) { models.push_back(load_encoder(out / (std::string(task) + ".safetensors"))); }
    CHECK(mean(evaluate(models, s.base.head, s.test)) == average("Single-Task"));
    CHECK(mean(evaluate(load_encoder(out / "merged-ties.safetensors"), s.base.head, s.test)) == average("TIES"));
    CHECK(mean(evaluate(load_encoder(out / "merged-average.safetensors"), s.base.head, s.test)) == average("Average"));
    CHECK_THROWS_AS(load_head(out / "base.safetensors"), taskvec::format_error);
    CHECK_THROWS_AS(load_encoder(out / "head.safetensors"), taskvec::format_error);

    // The deltas serve what PERU-FFT (10%) scored.
    encoder live = load_encoder(out / "peru-fft" / "merged.safetensors");
    CHECK(same(live, load_encoder(out / "merged-task-arithmetic.safetensors")));
    double sum = 0;
    for (std::size_t task = 0; task < tasks; ++task) {
        const taskvec::delta delta =
            taskvec::read_delta(out / "peru-fft" / (std::string(task_names[task]) + ".delta.safetensors"));
        taskvec::check_base(taskvec::cpu{}, delta.base_fingerprint, live.model());
        const taskvec::saved_words saved = taskvec::apply(taskvec::cpu{}, delta.tensors, live.model());
        sum += accuracy(live, s.base.head, s.test[task]);
        taskvec::undo(taskvec::cpu{}, delta.tensors, saved, live.model());
    }
    CHECK(sum / tasks == average("PERU-FFT (10%)"));
}

TEST_CASE("tables and curves are written as CSV, with percent and two decimals")
{
    const std::string csv = content(run().out / "fft.csv");
    CHECK(csv.starts_with("method,#params,bytes,rot90,rot180,rot270,transpose,mirror,flip,invert,permute,Avg\nPre-"
                          "Trained,74368,297472,"));
    CHECK(csv.find("\nSingle-Task,594944,") != std::string::npos);
    CHECK(csv.find("," + percent(average("Single-Task")) + "\n") != std::string::npos);
    const std::string curve = content(run().out / "accuracy-against-m.csv");
    CHECK(static_cast<std::size_t>(std::ranges::count(curve, '\n')) == 1 + curve_densities().size());
    const auto bytes = [](std::string_view method) { return std::to_string(run().results.methods[method].bytes); };
    CHECK(curve.find("\n10," + percent(average("Post-Pruning (10%)")) + "," + percent(average("PERU-FFT (10%)"))
              + ",133856,133856," + bytes("Post-Pruning (10%)") + "," + bytes("PERU-FFT (10%)") + "\n")
        != std::string::npos);
}

TEST_CASE("claims are judged by the figures of the run")
{
    fft_results made_up;
    scores accuracies{};
    const auto add = [&](std::string_view method, double value) {
        accuracies.fill(value);
        made_up.methods.add(method, 1, accuracies);
    };
    for (const auto& r : run().results.methods.rows()) { add(r.method, 0.5); }
    for (const auto& r : run().results.curve.rows()) { made_up.curve.add(r.method, 1, accuracies); }
    for (const auto& claim : fft_claims(made_up)) {
        // Where all are equal, nothing is better than anything; only closeness holds.
        const bool closeness = claim.text.find("close to") != std::string::npos
            || claim.text.find("as good as") != std::string::npos || claim.text.find("saturated") != std::string::npos;
        CHECK_MESSAGE(claim.holds() == closeness, claim.text);
    }
    std::size_t reproduced = 0;
    for (const auto& claim : fft_claims(run().results)) { reproduced += !claim.place.empty() && claim.holds(); }
    CHECK(reproduced >= 7);
}

TEST_CASE("a claim whose sign hangs on noise says so, and what is no paper's claim is told apart")
{
    const claim firm{"firm", "P Table 1", {0.03, 0.02, 0.04}, "a 3, b 0"},
        noise{"noise", "P Table 1", {0.03, -0.02}, ""}, against_it{"against it", "L Figure 2", {-0.03, -0.02}, ""},
        once{"once", "L Table 1", {0.001}, ""}, seen{"seen", "", {0.03, 0.02}, ""};
    CHECK(firm.holds());
    CHECK(firm.decided());
    CHECK(noise.holds());
    CHECK_FALSE(noise.decided());
    CHECK(once.decided()); // one seed has no deviation
    CHECK(text({seen, firm, noise, against_it, once})
        == "  reproduced      firm [P Table 1]\n                  a 3, b 0\n"
           "  within noise    noise [P Table 1]\n                  \n"
           "  NOT reproduced  against it [L Figure 2]\n                  \n"
           "  reproduced      once [L Table 1]\n                  \n"
           "  Observed here; neither paper claims it:\n"
           "  so it is here   seen\n                  \n");
    // Every sentence that a paper is said to make names the place; the two that neither makes are gone.
    for (const auto& claim : fft_claims(run().results)) {
        CHECK((claim.place.empty() || claim.place.starts_with("P ")));
        CHECK(claim.text.find("every further task") == std::string::npos);
        CHECK(claim.text.find("every other merge") == std::string::npos);
    }
}
