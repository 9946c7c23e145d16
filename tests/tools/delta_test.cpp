// taskvec prune, apply and peru-fft, against plain loops.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <taskvec/formats/delta.hpp>

#include <nlohmann/json.hpp>

using namespace tools_test;

namespace {

struct delta_models {
    scratch folder;
    values_model base = sample_base(), first = sample_task(base, 20), second = sample_task(base, 21);

    delta_models()
    {
        write_values(folder / "base.safetensors", base);
        write_values(folder / "first.safetensors", first);
        write_values(folder / "second.safetensors", second);
    }
};

/// A base plus the kept entries of a task vector.
values_model pruned(const values_model& base, const values_model& task, double density, float scale = 1)
{
    auto vector = task_vector(base, task);
    keep_top(vector, density);
    return add_scaled(base, vector, scale);
}

} // namespace

TEST_CASE("prune and apply equal plain loops")
{
    const delta_models m;
    for (const std::string density : {"0.1", "0.01", "1", "0.0001"}) {
        REQUIRE(run(m.folder,
                    {"prune", "--base", "base.safetensors", "--task", "first.safetensors", "--density", density,
                        "--out", "d.safetensors"})
                    .code
            == 0);
        REQUIRE(
            run(m.folder, {"apply", "--base", "base.safetensors", "--delta", "d.safetensors", "--out", "o.safetensors"})
                .code
            == 0);
        CHECK(same(read_values(m.folder / "o.safetensors"), pruned(m.base, m.first, std::stod(density))));
        REQUIRE(run(m.folder,
                    {"apply", "--base", "base.safetensors", "--delta", "d.safetensors", "--scale", "-0.5", "--out",
                        "o.safetensors"})
                    .code
            == 0);
        CHECK(same(read_values(m.folder / "o.safetensors"), pruned(m.base, m.first, std::stod(density), -0.5f)));
    }
    REQUIRE(run(m.folder,
                {"prune", "--base", "base.safetensors", "--task", "first.safetensors", "--out", "default", "--report",
                    "r.json"})
                .code
        == 0);
    CHECK(taskvec::kept_entries(taskvec::read_delta(m.folder / "default").tensors) == 471); // floor(0.1 * 4719)
    const auto report = nlohmann::json::parse(slurp(m.folder / "r.json"));
    CHECK(report["tasks"][0]["kept"] == 471);
    std::uint64_t total = 0;
    for (const auto& tensor : report["tensors"]) { total += tensor["kept"].get<std::uint64_t>(); }
    CHECK(total == 471);
    CHECK(report["bytes_written"] == std::filesystem::file_size(m.folder / "default"));
}

TEST_CASE("apply works in place, into a directory and into shards")
{
    const delta_models m;
    REQUIRE(
        run(m.folder, {"prune", "--base", "base.safetensors", "--task", "first.safetensors", "--out", "d"}).code == 0);
    const auto expected = pruned(m.base, m.first, 0.1);
    REQUIRE(run(m.folder,
                {"apply", "--base", "base.safetensors", "--delta", "d", "--out", "sharded", "--shard-size", "3000"})
                .code
        == 0);
    CHECK(std::filesystem::exists(m.folder / "sharded/model.safetensors.index.json"));
    REQUIRE(
        run(m.folder, {"apply", "--base", "base.safetensors", "--delta", "d", "--out", "base.safetensors"}).code == 0);
    CHECK(same(read_values(m.folder / "base.safetensors"), expected));
    const auto again =
        run(m.folder, {"apply", "--base", "base.safetensors", "--delta", "d", "--out", "base.safetensors"});
    CHECK(again.code == 1); // the base is no longer the one that the delta was made for
    CHECK(again.err.find("fingerprint") != std::string::npos);
    CHECK(same(read_values(m.folder / "base.safetensors"), expected));
}

TEST_CASE("apply writes the dtype that it is told")
{
    const delta_models m;
    REQUIRE(
        run(m.folder, {"prune", "--base", "base.safetensors", "--task", "first.safetensors", "--out", "d"}).code == 0);
    REQUIRE(run(m.folder,
                {"apply", "--base", "base.safetensors", "--delta", "d", "--dtype", "bf16", "--out", "o.safetensors"})
                .code
        == 0);
    const auto expected = pruned(m.base, m.first, 0.1);
    for (const auto& [name, tensor] : read_values(m.folder / "o.safetensors")) {
        CHECK(tensor.dtype == taskvec::dtype::bf16);
        REQUIRE(tensor.values.size() == expected.at(name).values.size());
        for (std::size_t i = 0; i < tensor.values.size(); ++i) {
            CHECK(
                tensor.values[i] == taskvec::widen<float>(taskvec::narrow<taskvec::bf16>(expected.at(name).values[i])));
        }
    }
}

TEST_CASE("peru-fft: the merge, and for each task what prune makes of it")
{
    const delta_models m;
    for (const std::string method : {"task-arithmetic", "ties", "average"}) {
        const auto result = run(m.folder,
            {"peru-fft", "--method", method, "--base", "base.safetensors", "--task", "first.safetensors", "--task",
                "second.safetensors", "--density", "0.05", "--out", "reuse", "--report", "r.json"});
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(scratch::names_in(m.folder / "reuse")
            == std::set<std::string>{"first.delta.safetensors", "merged.safetensors", "second.delta.safetensors"});
        REQUIRE(run(m.folder,
                    {"merge", "--method", method, "--base", "base.safetensors", "--task", "first.safetensors", "--task",
                        "second.safetensors", "--out", "merged"})
                    .code
            == 0);
        CHECK(slurp(m.folder / "reuse/merged.safetensors") == slurp(m.folder / "merged"));
        const auto merged = read_values(m.folder / "merged");
        for (const auto& [name, task] :
            std::map<std::string, const values_model*>{{"first", &m.first}, {"second", &m.second}}) {
            REQUIRE(
                run(m.folder,
                    {"prune", "--base", "merged", "--task", name + ".safetensors", "--density", "0.05", "--out", "d"})
                    .code
                == 0);
            CHECK(slurp(m.folder / "d") == slurp(m.folder / ("reuse/" + name + ".delta.safetensors")));
            REQUIRE(run(m.folder,
                        {"apply", "--base", "reuse/merged.safetensors", "--delta",
                            "reuse/" + name + ".delta.safetensors", "--out", "o"})
                        .code
                == 0);
            CHECK(same(read_values(m.folder / "o"), pruned(merged, *task, 0.05)));
        }
        const auto report = nlohmann::json::parse(slurp(m.folder / "r.json"));
        CHECK(report["tasks"][1]["stored"] == 235); // floor(0.05 * 4719)
        CHECK(report["parameters"] == 4719 + 2 * 235);
    }
    // --density is the residual's, --merge-density the merge's.
    REQUIRE(run(m.folder,
                {"peru-fft", "--method", "ties", "--base", "base.safetensors", "--task", "first.safetensors",
                    "--merge-density", "0.7", "--out", "r2"})
                .code
        == 0);
    REQUIRE(run(m.folder,
                {"merge", "--method", "ties", "--density", "0.7", "--base", "base.safetensors", "--task",
                    "first.safetensors", "--out", "merged"})
                .code
        == 0);
    CHECK(slurp(m.folder / "r2/merged.safetensors") == slurp(m.folder / "merged"));
    CHECK(taskvec::kept_entries(taskvec::read_delta(m.folder / "r2/first.delta.safetensors").tensors) == 471);
}

TEST_CASE("bad deltas and bad options: one line, exit code 1 or 2, nothing written")
{
    const delta_models m;
    REQUIRE(
        run(m.folder, {"prune", "--base", "base.safetensors", "--task", "first.safetensors", "--out", "d"}).code == 0);
    auto damaged = slurp(m.folder / "d");
    spill(m.folder / "short", damaged.substr(0, damaged.size() - 1));
    auto nan = m.base;
    nan["scale"].values[0] = std::numeric_limits<float>::quiet_NaN();
    write_values(m.folder / "nan.safetensors", nan);
    const auto names = m.folder.names();
    const std::vector<std::pair<std::vector<std::string>, std::string>> cases{
        {{"apply", "--base", "second.safetensors", "--delta", "d", "--out", "o"}, "fingerprint"},
        {{"apply", "--base", "base.safetensors", "--delta", "first.safetensors", "--out", "o"}, "is not a delta"},
        {{"apply", "--base", "base.safetensors", "--delta", "short", "--out", "o"}, "short"},
        {{"apply", "--base", "base.safetensors", "--delta", "absent", "--out", "o"}, "absent"},
        {{"apply", "--base", "base.safetensors", "--delta", "d", "--scale", "nan", "--out", "o"}, "--scale"},
        {{"prune", "--base", "base.safetensors", "--task", "nan.safetensors", "--out", "o"}, "'scale'"},
        {{"prune", "--base", "base.safetensors", "--task", "first.safetensors", "--density", "0", "--out", "o"},
            "--density is 0"},
        {{"prune", "--base", "base.safetensors", "--task", "first.safetensors", "--out", "base.safetensors"},
            "only a model may replace it"},
        {{"prune", "--base", "base.safetensors", "--task", "first.safetensors", "--out", "first.safetensors"},
            "only a model may replace it"},
        {{"peru-fft", "--method", "ties", "--base", "base.safetensors", "--task", "nan.safetensors", "--out", "o"},
            "'scale'"},
        {{"peru-fft", "--method", "ties", "--base", "base.safetensors", "--task", "first.safetensors",
             "--merge-density", "7", "--out", "o"},
            "--merge-density is 7"},
        {{"peru-fft", "--method", "ties", "--base", "base.safetensors", "--task", "first.safetensors", "--out", "d"},
            "d"},
    };
    const auto base = slurp(m.folder / "base.safetensors");
    for (const auto& [arguments, part] : cases) {
        const auto result = run(m.folder, arguments);
        CAPTURE(result.err);
        // What is wrong with an option is wrong usage.
        const bool usage = part.starts_with("--");
        CHECK(result.code == (usage ? 2 : 1));
        CHECK(is_error_line(result.err));
        CHECK(result.err.find(part) != std::string::npos);
        CHECK(m.folder.names() == names);
        CHECK(slurp(m.folder / "base.safetensors") == base);
    }
}

TEST_CASE("dry runs write nothing")
{
    const delta_models m;
    const auto names = m.folder.names();
    CHECK(
        run(m.folder, {"prune", "--base", "base.safetensors", "--task", "first.safetensors", "--out", "d", "--dry-run"})
            .code
        == 0);
    CHECK(run(m.folder,
              {"peru-fft", "--method", "ties", "--base", "base.safetensors", "--task", "first.safetensors", "--out",
                  "o", "--dry-run"})
              .code
        == 0);
    CHECK(m.folder.names() == names);
}

TEST_CASE("values of a delta are what its base adds them in, whatever the task stores")
{
    const scratch folder;
    const std::vector<float> base{1, 2, 3, 4};
    const std::vector<double> task{1.25, 2, 3 + 0x1p-40, 4 + 1e-50};
    const auto write = [&](const char* name, const void* data, taskvec::dtype type) {
        taskvec::const_model_ref model;
        model.insert("w", {data, type, {4}, {}, taskvec::memory_space::host, 0});
        taskvec::write_safetensors(folder / name, model);
    };
    write("base", base.data(), taskvec::dtype::f32);
    write("task", task.data(), taskvec::dtype::f64);
    REQUIRE(run(folder, {"prune", "--base", "base", "--task", "task", "--density", "1", "--out", "d"}).code == 0);
    const auto content = taskvec::read_delta(folder / "d");
    const auto& sparse = std::get<taskvec::sparse_vector<float>>(content.tensors.at("w"));
    CHECK(sparse.indices == taskvec::index_list{0, 2}); // 1e-50 vanishes in f64 already
    CHECK(sparse.values == std::pmr::vector<float>{0.25f, 0x1p-40f});
    const auto applied = run(folder, {"apply", "--base", "base", "--delta", "d", "--out", "o"});
    CAPTURE(applied.err);
    REQUIRE(applied.code == 0);
    CHECK(read_values(folder / "o").at("w").values == std::vector<float>{1.25f, 2, 3, 4});
    REQUIRE(run(folder, {"prune", "--base", "task", "--task", "base", "--density", "1", "--out", "back"}).code == 0);
    CHECK(std::holds_alternative<taskvec::sparse_vector<double>>(taskvec::read_delta(folder / "back").tensors.at("w")));
    REQUIRE(run(folder, {"apply", "--base", "task", "--delta", "back", "--out", "o"}).code == 0);
    // What a merge stores narrower than its tasks can be served too.
    REQUIRE(
        run(folder, {"peru-fft", "--method", "average", "--task", "task", "--dtype", "bf16", "--out", "p"}).code == 0);
    CHECK(run(folder, {"apply", "--base", "p/merged.safetensors", "--delta", "p/task.delta.safetensors", "--out", "o"})
              .code
        == 0);
}

TEST_CASE("a task that lacks a tensor is served with the base's")
{
    const delta_models m;
    auto lacking = m.first;
    lacking.erase("layers.0.weight");
    write_values(m.folder / "lacking.safetensors", lacking);
    REQUIRE(run(m.folder,
                {"peru-fft", "--method", "task-arithmetic", "--missing", "base", "--density", "1", "--base",
                    "base.safetensors", "--task", "lacking.safetensors", "--task", "second.safetensors", "--out", "p"})
                .code
        == 0);
    REQUIRE(run(m.folder,
                {"apply", "--base", "p/merged.safetensors", "--delta", "p/lacking.delta.safetensors", "--out", "o"})
                .code
        == 0);
    const auto served = read_values(m.folder / "o").at("layers.0.weight").values;
    for (std::size_t i = 0; i < served.size(); ++i) {
        CHECK(served[i] == doctest::Approx(m.base.at("layers.0.weight").values[i]));
    }
}

TEST_CASE("apply refuses NaN and infinity in the delta and in the base, unless they shall propagate")
{
    const delta_models m;
    auto bad = m.first;
    bad["layers.1.weight"].values[70] = std::numeric_limits<float>::quiet_NaN();
    write_values(m.folder / "bad.safetensors", bad);
    REQUIRE(run(m.folder,
                {"prune", "--base", "base.safetensors", "--task", "bad.safetensors", "--nonfinite", "propagate",
                    "--density", "1", "--out", "d"})
                .code
        == 0);
    REQUIRE(run(m.folder,
                {"prune", "--base", "bad.safetensors", "--task", "first.safetensors", "--nonfinite", "propagate",
                    "--out", "e"})
                .code
        == 0);
    const auto names = m.folder.names();
    for (const auto& [base, delta] :
        std::map<std::string, std::string>{{"base.safetensors", "d"}, {"bad.safetensors", "e"}}) {
        const auto refused = run(m.folder, {"apply", "--base", base, "--delta", delta, "--out", "o"});
        CAPTURE(refused.err);
        CHECK(refused.code == 1);
        CHECK(is_error_line(refused.err));
        CHECK(refused.err.find("'layers.1.weight'") != std::string::npos);
        CHECK(refused.err.find("index 70") != std::string::npos);
        CHECK(m.folder.names() == names);
        REQUIRE(
            run(m.folder, {"apply", "--base", base, "--delta", delta, "--nonfinite", "propagate", "--out", "o"}).code
            == 0);
        CHECK(std::isnan(read_values(m.folder / "o").at("layers.1.weight").values[70]));
        std::filesystem::remove(m.folder / "o");
    }
}

TEST_CASE("a difference that overflows is no delta, and prune has no weights")
{
    const scratch folder;
    write_values(folder / "b.safetensors", {{"w", {taskvec::dtype::f32, {3}, {1, -3e38F, 0}}}});
    write_values(folder / "t.safetensors", {{"w", {taskvec::dtype::f32, {3}, {2, 3e38F, 0}}}});
    const auto prune = [&](std::vector<std::string> more) {
        std::vector<std::string> words{
            "prune", "--base", "b.safetensors", "--task", "t.safetensors", "--density", "1", "--out", "d.safetensors"};
        words.insert(words.end(), more.begin(), more.end());
        return run(folder, words);
    };
    const auto done = prune({});
    CHECK(done.code == 1);
    CHECK(is_error_line(done.err));
    CHECK(done.err.find("tensor 'w' differs by infinity at index 1") != std::string::npos);
    CHECK_FALSE(std::filesystem::exists(folder / "d.safetensors"));
    CHECK(prune({"--overflow", "propagate"}).code == 0);
    const auto weighted = prune({"--weight", "w=2"});
    CHECK(weighted.code == 2);
    CHECK(weighted.err.find("--weight has no meaning for prune") != std::string::npos);
}

TEST_CASE("apply propagates an infinity that the delta holds, as merge does one of a task")
{
    const scratch folder;
    const float infinity = std::numeric_limits<float>::infinity();
    write_values(folder / "base.safetensors", {{"w", {taskvec::dtype::f32, {3}, {1, 2, 3}}}});
    write_values(folder / "task.safetensors", {{"w", {taskvec::dtype::f32, {3}, {infinity, 2, 3}}}});
    REQUIRE(run(folder,
                {"prune", "--base", "base.safetensors", "--task", "task.safetensors", "--nonfinite", "propagate",
                    "--density", "0.4", "--out", "d.safetensors"})
                .code
        == 0);
    const std::vector<std::string> apply{
        "apply", "--base", "base.safetensors", "--delta", "d.safetensors", "--out", "o.safetensors"};
    refused(folder, apply, 1, "infinity");
    for (const std::string overflow : {"error", "saturate"}) {
        auto words = apply;
        words.insert(words.end(), {"--nonfinite", "propagate", "--overflow", overflow});
        const auto result = run(folder, words);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(read_values(folder / "o.safetensors").at("w").values == std::vector<float>{infinity, 2, 3});
    }
}

TEST_CASE("a model is not put where peru-fft's would be opened no more; --scope of the deltas is an option with effect")
{
    const delta_models m;
    const std::vector<std::string> tasks{
        "--base", "base.safetensors", "--task", "first.safetensors", "--task", "second.safetensors"};
    auto words = tasks;
    words.insert(words.begin(), {"peru-fft", "--method", "average", "--scope", "tensor", "--out", "set"});
    const auto made = run(m.folder, words);
    REQUIRE(made.code == 0);
    CHECK(made.err.find("--scope") == std::string::npos);
    refused(m.folder, {"apply", "--base", "set", "--delta", "set/first.delta.safetensors", "--out", "set"}, 1,
        "merged.safetensors");
    refused(m.folder,
        {"apply", "--base", "set", "--delta", "set/first.delta.safetensors", "--out", "set/model.safetensors"}, 1,
        "merged.safetensors");
    auto merge = tasks;
    merge.insert(merge.begin(), {"merge", "--method", "average", "--out", "set"});
    refused(m.folder, merge, 1, "merged.safetensors");
    for (const std::string task : {"first", "second"}) {
        const auto applied = run(m.folder,
            {"apply", "--base", "set/merged.safetensors", "--delta", "set/" + task + ".delta.safetensors", "--out",
                task + ".pt"});
        CHECK(applied.code == 0);
        CHECK(applied.err.find("is written as safetensors") != std::string::npos);
    }
}

TEST_CASE("models of one stem are called by their endings, and are not one model given twice")
{
    const delta_models m;
    std::filesystem::create_directories(m.folder / "y");
    std::filesystem::rename(m.folder / "first.safetensors", m.folder / "y/model.safetensors");
    std::filesystem::rename(m.folder / "second.safetensors", m.folder / "y.safetensors");
    const std::vector<std::string> merge{"peru-fft", "--method", "average", "--base", "base.safetensors", "--task",
        "y.safetensors", "--task", "y", "--out", "set"};
    const auto result = run(m.folder, merge);
    REQUIRE(result.code == 0);
    CHECK(result.err.find("given twice") == std::string::npos);
    CHECK(std::filesystem::exists(m.folder / "set/y.delta.safetensors"));
    CHECK(std::filesystem::exists(m.folder / "set/y.safetensors.delta.safetensors"));
    const auto twice = run(m.folder, {"merge", "--method", "average", "--task", "y", "--task", "y", "--out", "o"});
    CHECK(twice.err.find("'y' is given twice") != std::string::npos);
}

TEST_CASE("prune --semantics ties-merging keeps one entry more and its equals, as the trim of TIES does")
{
    const scratch folder;
    write_values(folder / "base.safetensors", {{"x", {taskvec::dtype::f32, {10}, std::vector<float>(10, 0.0f)}}});
    write_values(folder / "task.safetensors", {{"x", {taskvec::dtype::f32, {10}, {1, 9, 5, 8, 5, 7, 5, 1, 5, 1}}}});
    const auto kept = [&](const std::vector<std::string>& more) {
        std::vector<std::string> words{"prune", "--base", "base.safetensors", "--task", "task.safetensors", "--density",
            "0.3", "--out", "d", "--report", "r.json"};
        words.insert(words.end(), more.begin(), more.end());
        const auto result = run(folder, words);
        REQUIRE(result.code == 0);
        CHECK(result.err.empty());
        const auto content = taskvec::read_delta(folder / "d");
        return std::get<taskvec::sparse_vector<float>>(content.tensors.at("x")).indices;
    };
    const taskvec::index_list paper{1, 3, 5}, code{1, 2, 3, 4, 5, 6, 8};
    CHECK(kept({}) == paper);
    CHECK(kept({"--semantics", "ties-merging"}) == code);
    CHECK(nlohmann::json::parse(slurp(folder / "r.json"))["options"]["trim"] == "reach-next");
    CHECK(kept({"--trim", "reach-next"}) == code);
    CHECK(kept({"--semantics", "ties-merging", "--trim", "exact"}) == paper); // what is given beside it wins
    CHECK(kept({"--semantics", "mergekit"}) == paper); // exactly k, of each tensor
    // So do the deltas of peru-fft; what this merge loses is half of the task vector.
    const auto residual = [&](const std::vector<std::string>& more) {
        std::vector<std::string> words{"peru-fft", "--method", "ties", "--merge-density", "1", "--lambda", "0.5",
            "--base", "base.safetensors", "--task", "task.safetensors", "--density", "0.3", "--out", "p"};
        words.insert(words.end(), more.begin(), more.end());
        REQUIRE(run(folder, words).code == 0);
        const auto content = taskvec::read_delta(folder / "p/task.delta.safetensors");
        return std::get<taskvec::sparse_vector<float>>(content.tensors.at("x")).indices;
    };
    CHECK(residual({}) == paper);
    CHECK(residual({"--semantics", "ties-merging"}) == code);
    CHECK(residual({"--trim", "reach-next"}) == code);
}
