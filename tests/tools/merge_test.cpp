// taskvec merge, against plain loops.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <taskvec/core/random.hpp>
#include <taskvec/formats/checkpoint.hpp>

#include <nlohmann/json.hpp>

using namespace tools_test;

namespace {

struct merge_models {
    scratch folder;
    values_model base = sample_base();
    std::vector<values_model> tasks;

    merge_models()
    {
        for (unsigned seed : {10u, 11u, 12u}) { tasks.push_back(sample_task(base, seed)); }
        write_values(folder / "base.safetensors", base, {{"origin", "test"}});
        write_values(folder / "a.safetensors", tasks[0]);
        write_values(folder / "b.safetensors", tasks[1]);
        std::filesystem::create_directory(folder / "c");
        write_values(folder / "c/model.safetensors", tasks[2]);
    }
    outcome merge(const std::string& method, std::vector<std::string> more) const
    {
        std::vector<std::string> arguments{"merge", "--method", method, "--base", "base.safetensors", "--task",
            "a.safetensors", "--task", "b.safetensors=0.5", "--task", "c=2e0", "--out", "out.safetensors"};
        arguments.insert(arguments.end(), more.begin(), more.end());
        return run(folder, arguments);
    }
    std::vector<std::vector<float>> vectors() const
    {
        std::vector<std::vector<float>> result;
        for (const auto& task : tasks) { result.push_back(task_vector(base, task)); }
        return result;
    }
};

const std::vector<float> weights{1.0f, 0.5f, 2.0f};

/// TIES as the papers define it: elect and merge over trimmed task vectors, everything in f32, one operation at a time.
std::vector<float> elect_and_merge(const std::vector<std::vector<float>>& trimmed)
{
    const std::size_t n = trimmed[0].size();
    std::vector<float> sums(n);
    std::vector<int> signs(n);
    long total = 0;
    for (std::size_t i = 0; i < n; ++i) {
        float sum = 0;
        for (std::size_t t = 0; t < trimmed.size(); ++t) {
            const float product = weights[t] * trimmed[t][i];
            sum = sum + product;
        }
        sums[i] = sum;
        signs[i] = sum > 0 ? 1 : sum < 0 ? -1 : 0;
        total += signs[i];
    }
    std::vector<float> merged(n);
    for (std::size_t i = 0; i < n; ++i) {
        const int sign = signs[i] != 0 ? signs[i] : total > 0 ? 1 : total < 0 ? -1 : 0;
        float sum = 0, weight = 0;
        for (std::size_t t = 0; t < trimmed.size(); ++t) {
            const float value = trimmed[t][i];
            if ((value > 0 && sign > 0) || (value < 0 && sign < 0)) {
                const float product = weights[t] * value;
                sum = sum + product;
                weight = weight + weights[t];
            }
        }
        merged[i] = weight > 0 ? sum / weight : 0;
    }
    return merged;
}

} // namespace

TEST_CASE("ties equals plain loops, element for element")
{
    const merge_models m;
    for (const double density : {0.2, 0.01, 0.5, 1.0}) {
        for (const float lambda : {1.0f, 0.7f}) {
            auto vectors = m.vectors();
            for (auto& vector : vectors) { keep_top(vector, density); }
            const auto expected = add_scaled(m.base, elect_and_merge(vectors), lambda);
            const auto result =
                m.merge("ties", {"--density", std::to_string(density), "--lambda", lambda == 1.0f ? "1" : "0.7"});
            CAPTURE(result.err);
            REQUIRE(result.code == 0);
            CHECK(same(read_values(m.folder / "out.safetensors"), expected));
        }
    }
    auto vectors = m.vectors();
    for (auto& vector : vectors) { keep_top(vector, 0.2); }
    REQUIRE(m.merge("ties", {}).code == 0); // the defaults: 0.2, 1, the model's scope
    CHECK(same(read_values(m.folder / "out.safetensors"), add_scaled(m.base, elect_and_merge(vectors), 1.0f)));
}

TEST_CASE("ties in tensor scope trims each tensor by itself")
{
    const merge_models m;
    std::vector<std::vector<float>> trimmed;
    std::vector<std::size_t> sizes;
    for (const auto& [name, tensor] : m.base) { sizes.push_back(tensor.values.size()); }
    for (const auto& whole : m.vectors()) {
        std::vector<float> joined;
        std::size_t at = 0;
        for (const auto size : sizes) {
            std::vector<float> piece(whole.begin() + static_cast<std::ptrdiff_t>(at),
                whole.begin() + static_cast<std::ptrdiff_t>(at + size));
            if (size) { keep_top(piece, 0.2); }
            joined.insert(joined.end(), piece.begin(), piece.end());
            at += size;
        }
        trimmed.push_back(joined);
    }
    const auto result = m.merge("ties", {"--scope", "tensor"});
    REQUIRE(result.code == 0);
    // No election sum here is exactly 0 with entries present, so the majority's scope does not matter.
    CHECK(same(read_values(m.folder / "out.safetensors"), add_scaled(m.base, elect_and_merge(trimmed), 1.0f)));
}

TEST_CASE("average and task arithmetic equal plain loops")
{
    const merge_models m;
    REQUIRE(m.merge("average", {}).code == 0);
    auto expected = m.base;
    for (auto& [name, tensor] : expected) {
        for (std::size_t i = 0; i < tensor.values.size(); ++i) {
            float sum = 0;
            for (std::size_t t = 0; t < 3; ++t) {
                const float product = weights[t] * m.tasks[t].at(name).values[i];
                sum = sum + product;
            }
            tensor.values[i] = rounded(tensor.dtype, sum / 3.5f);
        }
    }
    CHECK(same(read_values(m.folder / "out.safetensors"), expected));
    CHECK(run(m.folder,
              {"merge", "--method", "average", "--task", "a.safetensors", "--task", "b.safetensors=0.5", "--task",
                  "c=2", "--out", "free.safetensors"})
              .code
        == 0);
    CHECK(same(read_values(m.folder / "free.safetensors"), expected)); // it needs no base

    const auto vectors = m.vectors();
    std::vector<float> sum(vectors[0].size());
    for (std::size_t i = 0; i < sum.size(); ++i) {
        for (std::size_t t = 0; t < 3; ++t) {
            const float product = weights[t] * vectors[t][i];
            sum[i] = sum[i] + product;
        }
    }
    REQUIRE(m.merge("task-arithmetic", {}).code == 0);
    CHECK(same(read_values(m.folder / "out.safetensors"), add_scaled(m.base, sum, 0.3f)));
    REQUIRE(m.merge("task-arithmetic", {"--lambda", "-0.5"}).code == 0);
    CHECK(same(read_values(m.folder / "out.safetensors"), add_scaled(m.base, sum, -0.5f)));
}

TEST_CASE("dare and dare-ties equal plain loops over the documented draws")
{
    const merge_models m;
    auto vectors = m.vectors();
    for (std::size_t t = 0; t < 3; ++t) {
        std::size_t at = 0;
        for (const auto& [name, tensor] : m.base) {
            const taskvec::random_stream stream(7, static_cast<std::uint32_t>(t), name);
            for (std::size_t i = 0; i < tensor.values.size(); ++i, ++at) {
                const bool kept = stream.word(i) < taskvec::keep_below(0.25);
                vectors[t][at] = kept ? vectors[t][at] / 0.25f : 0.0f;
            }
        }
    }
    std::vector<float> sum(vectors[0].size());
    for (std::size_t i = 0; i < sum.size(); ++i) {
        for (std::size_t t = 0; t < 3; ++t) {
            const float product = weights[t] * vectors[t][i];
            sum[i] = sum[i] + product;
        }
    }
    REQUIRE(m.merge("dare", {"--density", "0.25", "--seed", "7"}).code == 0);
    CHECK(same(read_values(m.folder / "out.safetensors"), add_scaled(m.base, sum, 1.0f)));
    REQUIRE(m.merge("dare-ties", {"--density", "0.25", "--seed", "7", "--lambda", "0.5"}).code == 0);
    CHECK(same(read_values(m.folder / "out.safetensors"), add_scaled(m.base, elect_and_merge(vectors), 0.5f)));
    const auto seven = slurp(m.folder / "out.safetensors");
    REQUIRE(m.merge("dare-ties", {"--density", "0.25", "--seed", "8", "--lambda", "0.5"}).code == 0);
    CHECK(slurp(m.folder / "out.safetensors") != seven);
}

TEST_CASE("the same bytes for any number of threads, kept metadata, no other file")
{
    const merge_models m;
    for (const char* method : {"average", "task-arithmetic", "ties", "dare", "dare-ties"}) {
        REQUIRE(m.merge(method, {"--threads", "1"}).code == 0);
        const auto one = slurp(m.folder / "out.safetensors");
        REQUIRE(m.merge(method, {"--threads", "3"}).code == 0);
        CHECK(slurp(m.folder / "out.safetensors") == one);
        CHECK(taskvec::safetensors_file(m.folder / "out.safetensors").metadata()
            == taskvec::metadata_map{{"format", "pt"}, {"origin", "test"}});
        CHECK(m.folder.names()
            == std::set<std::string>{"a.safetensors", "b.safetensors", "base.safetensors", "c", "out.safetensors"});
    }
}

TEST_CASE("input and output may be the same file")
{
    const merge_models m;
    REQUIRE(m.merge("ties", {}).code == 0);
    const auto expected = slurp(m.folder / "out.safetensors");
    for (const char* name : {"base.safetensors", "a.safetensors"}) {
        const auto before = slurp(m.folder / name);
        REQUIRE(m.merge("ties", {"--out", name}).code != 0); // --out twice is wrong usage
        CHECK(slurp(m.folder / name) == before);
        REQUIRE(run(m.folder,
                    {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors", "--task",
                        "b.safetensors=0.5", "--task", "c=2", "--out", name})
                    .code
            == 0);
        CHECK(slurp(m.folder / name) == expected);
        spill(m.folder / name, before);
    }
    // A directory as output is its model.safetensors.
    REQUIRE(run(m.folder,
                {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors", "--task",
                    "b.safetensors=0.5", "--task", "c=2", "--out", "c"})
                .code
        == 0);
    CHECK(slurp(m.folder / "c/model.safetensors") == expected);
}

TEST_CASE("shards hold the same model, and are read as one")
{
    const merge_models m;
    REQUIRE(m.merge("ties", {}).code == 0);
    const auto expected = read_values(m.folder / "out.safetensors");
    REQUIRE(run(m.folder,
                {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors", "--task",
                    "b.safetensors=0.5", "--task", "c=2", "--out", "sharded", "--shard-size", "3kB"})
                .code
        == 0);
    CHECK(std::filesystem::exists(m.folder / "sharded/model.safetensors.index.json"));
    CHECK(std::filesystem::exists(m.folder / "sharded/model-00001-of-00003.safetensors"));
    REQUIRE(
        run(m.folder, {"merge", "--method", "average", "--task", "sharded", "--out", "joined.safetensors"}).code == 0);
    CHECK(same(read_values(m.folder / "joined.safetensors"), expected));
}

TEST_CASE("sums of 0 that a negative majority decides come out the same in shards")
{
    const scratch folder;
    values_model base, first, second;
    for (const auto* name : {"a", "b", "c"}) {
        values_tensor tensor{taskvec::dtype::bf16, {500}, std::vector<float>(500, 0.0F)};
        base[name] = tensor;
        for (std::size_t i = 0; i < 500; ++i) { tensor.values[i] = static_cast<float>(i % 5 + 1); }
        first[name] = tensor;
        for (std::size_t i = 0; i < 500; ++i) { tensor.values[i] = i % 3 == 0 ? -8.0F : -tensor.values[i]; }
        second[name] = tensor;
    }
    write_values(folder / "base.safetensors", base);
    write_values(folder / "first.safetensors", first);
    write_values(folder / "second.safetensors", second);
    const auto merge = [&](const std::vector<std::string>& more) {
        std::vector<std::string> line{"merge", "--method", "ties", "--density", "1", "--base", "base.safetensors",
            "--task", "first.safetensors", "--task", "second.safetensors"};
        line.insert(line.end(), more.begin(), more.end());
        const auto done = run(folder, line);
        REQUIRE_MESSAGE(done.code == 0, done.err);
    };
    merge({"--out", "one.safetensors"});
    CHECK(read_values(folder / "one.safetensors").at("b").values[1] == -2.0F);
    for (const auto* threads : {"1", "3"}) {
        std::filesystem::remove_all(folder / "shards");
        merge({"--out", "shards", "--shard-size", "1kB", "--threads", threads});
        CHECK(std::filesystem::exists(folder / "shards/model-00003-of-00003.safetensors"));
        merge({"--out", "again.safetensors"});
        const auto shards = taskvec::open_model(folder / "shards");
        const auto one = taskvec::open_model(folder / "one.safetensors");
        for (const auto& [name, tensor] : one.model()) {
            CHECK(std::memcmp(tensor.data, shards.model().find(name)->data, tensor.bytes(name)) == 0);
        }
    }
}

TEST_CASE("dtypes, included and excluded tensors")
{
    const merge_models m;
    REQUIRE(m.merge("task-arithmetic", {}).code == 0);
    const auto all = read_values(m.folder / "out.safetensors");
    REQUIRE(m.merge("task-arithmetic", {"--include", "^layers\\.", "--exclude", "bias"}).code == 0);
    const auto some = read_values(m.folder / "out.safetensors");
    for (const auto& [name, tensor] : some) {
        const bool taken = name == "layers.0.weight" || name == "layers.1.weight";
        CHECK(tensor.values == (taken ? all : m.base).at(name).values);
    }
    for (const auto& [option, type] : std::map<std::string, taskvec::dtype>{
             {"f32", taskvec::dtype::f32}, {"BF16", taskvec::dtype::bf16}, {"f16", taskvec::dtype::f16}}) {
        REQUIRE(m.merge("task-arithmetic", {"--dtype", option}).code == 0);
        for (const auto& [name, tensor] : read_values(m.folder / "out.safetensors")) { CHECK(tensor.dtype == type); }
    }
    const auto none = m.merge("task-arithmetic", {"--include", "^layer\\."});
    CHECK(none.code == 1);
    CHECK(none.err.find("--include '^layer\\.' matches no tensor") != std::string::npos);
}

TEST_CASE("presets are what the peers do, and explicit flags override them")
{
    const merge_models m;
    std::map<std::string, std::string> bytes;
    for (const char* semantics : {"paper", "ties-merging", "mergekit", "peft"}) {
        const auto result = m.merge("ties", {"--semantics", semantics});
        REQUIRE(result.code == 0);
        bytes[semantics] = slurp(m.folder / "out.safetensors");
    }
    CHECK(bytes["paper"] != bytes["ties-merging"]);
    CHECK(bytes["mergekit"] != bytes["peft"]);
    CHECK(bytes["paper"] != bytes["mergekit"]);
    // mergekit's semantics differ from the paper's by scope and by the sign of a zero sum, of which there is none here.
    REQUIRE(m.merge("ties", {"--semantics", "mergekit", "--scope", "model"}).code == 0);
    CHECK(slurp(m.folder / "out.safetensors") == bytes["paper"]);
}

TEST_CASE("weights: the last '=' splits, and only before a number")
{
    const merge_models m;
    for (const char* name : {"x=1", "y=z", "e="}) { write_values(m.folder / name, m.tasks[0]); }
    const auto merged = [&](const std::string& task) {
        const auto result = run(m.folder,
            {"merge", "--method", "task-arithmetic", "--lambda", "1", "--base", "base.safetensors", "--task", task,
                "--out", "w.safetensors", "--report", "r.json"});
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        return nlohmann::json::parse(slurp(m.folder / "r.json"))["tasks"][0];
    };
    CHECK(merged("a.safetensors=-0.25")["weight"] == -0.25);
    CHECK(merged("a.safetensors=1e-1")["weight"] == 0.1);
    CHECK(merged("x=1=0.5")["path"] == "x=1");
    CHECK(merged("x=1=0.5")["weight"] == 0.5);
    CHECK(merged("y=z")["path"] == "y=z");
    CHECK(merged("y=z")["weight"] == 1.0);
    CHECK(merged("e=")["path"] == "e=");
    CHECK(merged("./c/")["name"] == "c");
    CHECK(merged("c/model.safetensors")["name"] == "c");
    CHECK(merged("c/../a.safetensors")["name"] == "a");
}

TEST_CASE("the report says what was done")
{
    const merge_models m;
    REQUIRE(m.merge("ties", {"--report", "r.json"}).code == 0);
    const auto report = nlohmann::json::parse(slurp(m.folder / "r.json"));
    CHECK(report["method"] == "ties");
    CHECK(report["seconds"].get<double>() > 0);
    CHECK(report["bytes_written"] == std::filesystem::file_size(m.folder / "out.safetensors"));
    CHECK(report["bytes_read"].get<std::uint64_t>() >= 4 * 10494u);
    CHECK(report["peak_memory"].get<std::uint64_t>() > 1'000'000);
    REQUIRE(report["tasks"].size() == 3);
    CHECK(report["tasks"][1]["name"] == "b");
    CHECK(report["tasks"][1]["weight"] == 0.5);
    CHECK(report["tasks"][2]["name"] == "c");
    CHECK(report["tasks"][0]["kept"] == 943); // floor(0.2 * 4719)
    CHECK(report["tasks"][0]["conflicting"].get<int>() > 0);
    REQUIRE(report["tensors"].size() == 5);
    const auto merged = read_values(m.folder / "out.safetensors");
    double norm = 0, change = 0;
    for (std::size_t i = 0; i < merged.at("layers.1.weight").values.size(); ++i) {
        const double x = merged.at("layers.1.weight").values[i], y = m.base.at("layers.1.weight").values[i];
        norm += x * x;
        change += (x - y) * (x - y);
    }
    CHECK(report["tensors"][2]["name"] == "layers.1.weight");
    CHECK(report["tensors"][2]["norm"].get<double>() == doctest::Approx(std::sqrt(norm)).epsilon(1e-6));
    CHECK(report["tensors"][2]["change"].get<double>() == doctest::Approx(std::sqrt(change)).epsilon(1e-4));
}

TEST_CASE("the report counts for every method what took part")
{
    const merge_models m;
    const auto vectors = m.vectors();
    const auto changed =
        static_cast<std::size_t>(std::count_if(vectors[0].begin(), vectors[0].end(), [](float x) { return x != 0; }));
    for (const std::string method : {"task-arithmetic", "dare", "model-stock"}) {
        std::vector<std::string> arguments{"merge", "--method", method, "--base", "base.safetensors", "--task",
            "a.safetensors", "--task", "b.safetensors", "--out", "o", "--report", "r.json"};
        REQUIRE(run(m.folder, arguments).code == 0);
        const auto tasks = nlohmann::json::parse(slurp(m.folder / "r.json"))["tasks"];
        REQUIRE(tasks.size() == 2);
        if (method == "dare") {
            CHECK(tasks[0]["kept"].get<double>() == doctest::Approx(0.5 * static_cast<double>(changed)).epsilon(0.1));
        }
        else {
            CHECK(tasks[0]["kept"] == changed);
        }
        CHECK(tasks[1]["conflicting"] == 0);
    }
}

TEST_CASE("a dry run checks everything and writes nothing")
{
    const merge_models m;
    const auto before = m.folder.names();
    const auto good = m.merge("ties", {"--dry-run", "--report", "r.json"});
    CHECK(good.code == 0);
    CHECK(good.out.find("would merge 3 tasks by ties") != std::string::npos);
    CHECK(m.folder.names() == before);
    CHECK(m.merge("ties", {"--dry-run", "--density", "2"}).code == 2);
    CHECK(m.merge("ties", {"--dry-run", "--report", "no/such/folder/r.json"}).code == 1);
    CHECK(run(m.folder,
              {"merge", "--method", "average", "--task", "a.safetensors", "--out", "no/such/folder/o", "--dry-run"})
              .code
        == 1);
    CHECK(
        run(m.folder,
            {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "missing", "--out", "o", "--dry-run"})
            .code
        == 1);
}

TEST_CASE("bad input: one line that names what is wrong, exit code 1 or 2, and the old output untouched")
{
    const merge_models m;
    auto other = m.base;
    other["layers.0.weight"].shape = {31, 17};
    write_values(m.folder / "shape.safetensors", other);
    other = m.base;
    other.erase("scale");
    write_values(m.folder / "lacks.safetensors", other);
    other = m.base;
    other["extra"] = {taskvec::dtype::f32, {1}, {1.0f}};
    write_values(m.folder / "extra.safetensors", other);
    other = m.base;
    other["layers.1.weight"].values[77] = std::numeric_limits<float>::quiet_NaN();
    write_values(m.folder / "nan.safetensors", other);
    other = m.base;
    other["layers.0.weight"].values[5] = std::numeric_limits<float>::infinity();
    write_values(m.folder / "inf.safetensors", other);
    spill(m.folder / "broken.safetensors", slurp(m.folder / "a.safetensors").substr(0, 5000));
    std::filesystem::copy(m.folder / "a.safetensors", m.folder / "c/a.safetensors");
    spill(m.folder / "out.safetensors", "old");
    const auto names = m.folder.names();

    struct bad {
        std::vector<std::string> arguments;
        std::vector<std::string> parts;
        int code = 1;
    };
    const std::vector<bad> cases{
        {{"--task", "shape.safetensors"},
            {"'layers.0.weight'", "[31, 17]", "[17, 31]", "shape.safetensors", " [tensor-shape]\n"}},
        {{"--task", "lacks.safetensors"}, {"'scale'", "lacks.safetensors", "missing", " [tensor-missing]\n"}},
        {{"--task", "extra.safetensors"}, {"'extra'", "extra.safetensors", " [tensor-unexpected]\n"}},
        {{"--task", "nan.safetensors"}, {"'layers.1.weight'", "nan.safetensors", "NaN", "77", " [not-finite]\n"}},
        {{"--task", "inf.safetensors"}, {"'layers.0.weight'", "inf.safetensors", "infinity", "5"}},
        {{"--task", "broken.safetensors"}, {"broken.safetensors", "cut short", " [file-truncated]\n"}},
        {{"--task", "absent.safetensors"}, {"absent.safetensors", "No such file", " [file-not-found]\n"}},
        {{"--task", "a.safetensors=-1"},
            {"the weight of 'a.safetensors' is -1", "mergekit", "PEFT", "negative_weights"}},
        {{"--task", "a.safetensors", "--density", "0"}, {"--density is 0; expected a share above 0 and up to 1"}, 2},
        {{"--task", "a.safetensors", "--density", "1.5"}, {"--density is 1.5"}, 2},
        {{"--task", "a.safetensors", "--density", "20"}, {"--density is 20;"}, 2},
        {{"--task", "a.safetensors", "--density", "20%"}, {"--density is '20%'; expected a share"}, 2},
        {{"--task", "a.safetensors", "--zero-sign", "up"}, {"--zero-sign is 'up'", "majority"}, 2},
        {{"--task", "a.safetensors", "--density", "-0.1"}, {"--density is -0.1"}, 2},
        {{"--task", "a.safetensors", "--density", "nan"}, {"--density is nan"}, 2},
        {{"--task", "a.safetensors", "--lambda", "inf"}, {"--lambda is inf"}, 2},
        {{"--task", "a.safetensors", "--report", "no/such/folder/r.json"}, {"no/such/folder"}},
        {{"--task", "a.safetensors", "--shard-size", "1MB"}, {"out.safetensors", "directory"}, 2},
        {{"--task", "a.safetensors", "--report", "out.safetensors"}, {"--report", "out.safetensors", "--out"}},
        {{"--task", "a.safetensors", "--report", "c/../a.safetensors"}, {"--report", "a.safetensors", "read"}},
    };
    for (const auto& [more, parts, code] : cases) {
        std::vector<std::string> arguments{
            "merge", "--method", "ties", "--base", "base.safetensors", "--out", "out.safetensors"};
        arguments.insert(arguments.end(), more.begin(), more.end());
        const auto result = run(m.folder, arguments);
        CAPTURE(result.err);
        CHECK(result.code == code);
        CHECK(is_error_line(result.err));
        CHECK(result.err.ends_with("]\n") == (code == 1)); // a code, but for wrong usage
        for (const auto& part : parts) { CHECK(result.err.find(part) != std::string::npos); }
        CHECK(result.out.empty());
        CHECK(slurp(m.folder / "out.safetensors") == "old");
        CHECK(m.folder.names() == names);
    }
    for (const char* out : {"no/such/out.safetensors", "/dev/null"}) {
        const auto result = run(m.folder, {"merge", "--method", "average", "--task", "a.safetensors", "--out", out});
        CHECK(result.code == 1);
        CHECK(is_error_line(result.err));
    }
    // What the options allow is no error.
    CHECK(run(m.folder,
              {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "nan.safetensors", "--nonfinite",
                  "propagate", "--out", "o1"})
              .code
        == 0);
    CHECK(run(m.folder,
              {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "lacks.safetensors", "--missing",
                  "base", "--out", "o2"})
              .code
        == 0);
    CHECK(read_values(m.folder / "o2").at("scale").values == m.base.at("scale").values);
    CHECK(run(m.folder,
              {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "extra.safetensors", "--exclude",
                  "extra", "--out", "o4"})
              .code
        == 0);
    CHECK_FALSE(read_values(m.folder / "o4").contains("extra"));
    CHECK(run(m.folder,
              {"merge", "--method", "ties", "--base", "base.safetensors", "--task", "a.safetensors=-1", "--semantics",
                  "mergekit", "--out", "o3"})
              .code
        == 0);
}

TEST_CASE("an option that a method does not use is noted, unless it shall be quiet")
{
    const merge_models m;
    const auto loud = m.merge("average", {"--density", "0.3", "--lambda", "2"});
    CHECK(loud.code == 0);
    CHECK(loud.err
        == "taskvec: note: --density has no effect on --method average\ntaskvec: note: --lambda has no effect on "
           "--method average\n");
    CHECK(m.merge("average", {"--density", "0.3", "--quiet"}).err.empty());
    CHECK(m.merge("average", {"--density", "3"}).code == 2); // out of range for every method
}

TEST_CASE("progress stays off what is not a terminal")
{
    const merge_models m;
    CHECK(m.merge("ties", {}).err.empty());
}

TEST_CASE("what is wrong with weights and results is said of the files, with what to do")
{
    const merge_models m;
    const auto says = [&](const std::vector<std::string>& words, const std::vector<std::string>& parts) {
        auto all = words;
        all.insert(all.end(), {"--out", "o.safetensors"});
        const auto result = run(m.folder, all);
        CAPTURE(result.err);
        CHECK(result.code == 1);
        CHECK(is_error_line(result.err));
        for (const auto& part : parts) { CHECK(result.err.find(part) != std::string::npos); }
        CHECK_FALSE(std::filesystem::exists(m.folder / "o.safetensors"));
    };
    says({"merge", "--method", "average", "--task", "a.safetensors=0.5", "--task", "b.safetensors=-0.5"},
        {"the weights of an average sum to 0 (0.5 of 'a.safetensors', -0.5 of 'b.safetensors')", "change one of them",
            "[weights-sum-zero]"});
    says({"merge", "--method", "task-arithmetic", "--normalize-weights", "--base", "base.safetensors", "--task",
             "a.safetensors", "--task", "b.safetensors=-1"},
        {"the weights sum to 0 (1 of 'a.safetensors', -1 of 'b.safetensors')", "do not normalize"});
    for (const std::string method : {"ties", "dare-ties"}) {
        says({"merge", "--method", method, "--base", "base.safetensors", "--task", "a.safetensors", "--task",
                 "b.safetensors=-1"},
            {"the weight of 'b.safetensors' is -1: ", "semantics of mergekit and PEFT", "(negative_weights)",
                "[parameter-out-of-range]"});
    }
    says({"merge", "--method", "karcher", "--base", "base.safetensors", "--task", "a.safetensors=-2", "--task",
             "b.safetensors"},
        {"the weight of 'a.safetensors' is -2: this method has no meaning for negative weights; give 0 or more"});
    const std::vector<std::string> large{
        "merge", "--method", "task-arithmetic", "--lambda", "1e39", "--base", "base.safetensors"};
    auto one = large, two = large;
    one.insert(one.end(), {"--task", "a.safetensors"});
    two.insert(two.end(), {"--task", "a.safetensors", "--task", "b.safetensors"});
    says(one,
        {"would hold ", " at index ", "though it is finite in 'base.safetensors' and 'a.safetensors': ",
            "smaller factors, or let it saturate or propagate (overflow) [result-overflow]"});
    says(two, {"though it is finite in 'base.safetensors' and the 2 tasks: "});
    REQUIRE(run(m.folder, {"prune", "--base", "base.safetensors", "--task", "a.safetensors", "--out", "d"}).code == 0);
    says({"apply", "--base", "base.safetensors", "--delta", "d", "--scale", "1e39"},
        {"though it is finite in 'base.safetensors' and 'd': "});
}
