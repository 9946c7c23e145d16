// Models with quantised layers: every verb computes with their numbers, as it does with the same model in F32; results
// are numbers, or quantised again by the same scheme; a layer is never taken apart.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <taskvec/formats/quantised.hpp>

#include <nlohmann/json.hpp>

#include <map>
#include <random>

namespace quantised_tools {

using namespace tools_test;
using words = std::vector<std::string>;

bool says(const std::string& text, const std::string& part)
{
    return text.find(part) != std::string::npos;
}
words with(words list, const words& more)
{
    list.insert(list.end(), more.begin(), more.end());
    return list;
}
bool refuses(const outcome& result, const words& parts, int code = 1)
{
    bool all = result.code == code && is_error_line(result.err);
    for (const auto& part : parts) { all = all && says(result.err, part); }
    if (!all) { MESSAGE("exit ", result.code, ": ", result.err); }
    return all;
}

/// Tensors as bytes, to be written and read.
struct stored_tensor {
    taskvec::dtype dtype = taskvec::dtype::f32;
    taskvec::extents shape{};
    std::string bytes{};
    bool operator==(const stored_tensor&) const = default;
};
using stored_model = std::map<std::string, stored_tensor>;

stored_tensor floats(taskvec::extents shape, const std::vector<float>& values)
{
    return {taskvec::dtype::f32, std::move(shape),
        std::string(reinterpret_cast<const char*>(values.data()), 4 * values.size())};
}
void write_stored(
    const std::filesystem::path& path, const stored_model& model, const taskvec::metadata_map& metadata = {})
{
    std::filesystem::create_directories(path.parent_path());
    taskvec::const_model_ref views;
    for (const auto& [name, tensor] : model) {
        views.insert(name, taskvec::const_tensor_ref{tensor.bytes.data(), tensor.dtype, tensor.shape});
    }
    taskvec::write_safetensors(path, views, metadata, taskvec::durability::process);
}
stored_model read_stored(const std::filesystem::path& path)
{
    const taskvec::safetensors_file file(path);
    stored_model model;
    for (const auto& [name, tensor] : file.model()) {
        model[name] = {tensor.dtype, tensor.shape, {static_cast<const char*>(tensor.data), tensor.bytes()}};
    }
    return model;
}

/// Every layer as F32, by the library's own decoder (which is held to the definitions elsewhere).
stored_model as_numbers(const stored_model& model)
{
    taskvec::const_model_ref views;
    for (const auto& [name, tensor] : model) {
        views.insert(name, taskvec::const_tensor_ref{tensor.bytes.data(), tensor.dtype, tensor.shape});
    }
    const taskvec::quantised_layers layers(views);
    stored_model result;
    for (const auto& [name, tensor] : layers.model()) {
        if (!tensor.source) {
            result[name] = model.at(name);
            continue;
        }
        std::vector<float> values(tensor.size());
        tensor.source->read(0, values.size(), values.data());
        result[name] = floats(tensor.shape, values);
    }
    return result;
}

/// A model of three layers (one scale, one for each row, blocks of 128 × 128), and a norm that is not quantised.
stored_model quantised(unsigned seed, unsigned noise = 0)
{
    stored_model model;
    std::mt19937 random(seed);
    const auto add = [&](const std::string& name, const std::string& scale, taskvec::extents shape,
                         taskvec::extents grid) {
        stored_tensor codes{taskvec::dtype::f8_e4m3, shape, {}};
        for (std::size_t i = 0; i < taskvec::element_count(shape); ++i) {
            codes.bytes += static_cast<char>((random() % 128) % 0x7f | (random() % 2) << 7);
        }
        std::vector<float> scales;
        for (std::size_t i = 0; i < taskvec::element_count(grid); ++i) {
            scales.push_back(0.001f * static_cast<float>(1 + random() % 100));
        }
        if (noise) { // a task near the base: other codes and scales for nearly the same numbers
            std::mt19937 other(noise);
            for (auto& code : codes.bytes) {
                const unsigned bits = static_cast<unsigned char>(code), bump = other() % 2;
                code = static_cast<char>((bits & 7u) < 6 ? bits + bump : bits);
            }
            for (auto& factor : scales) { factor *= 1.0f + 0.01f * static_cast<float>(other() % 10); }
        }
        model[name] = codes;
        model[name.substr(0, name.size() - 6) + scale] = floats(grid, scales);
    };
    add("layers.0.weight", "weight_scale", {40, 24}, {});
    add("layers.1.weight", "weight_scale", {40, 24}, {40, 1});
    add("layers.2.weight", "weight_scale_inv", {130, 140}, {2, 2});
    std::vector<float> norm;
    for (int i = 0; i < 5; ++i) { norm.push_back(static_cast<float>((random() + noise) % 1000) / 500 - 1); }
    model["norm"] = floats({5}, norm);
    return model;
}

/// q*: quantised; f*: the same numbers in F32.
struct quantised_models {
    scratch folder;
    stored_model base = quantised(1), first = quantised(1, 7), second = quantised(1, 8);
    quantised_models()
    {
        const std::map<std::string, const stored_model*> all{{"base", &base}, {"first", &first}, {"second", &second}};
        for (const auto& [name, model] : all) {
            write_stored(folder / ("q/" + name + ".safetensors"), *model);
            write_stored(folder / ("f/" + name + ".safetensors"), as_numbers(*model));
        }
    }
    /// The same command line with quantised models and with numbers: both end in 0. `@` is the folder.
    std::pair<outcome, outcome> both(const words& line) const
    {
        outcome results[2];
        for (int i = 0; i < 2; ++i) {
            auto mine = line;
            for (auto& word : mine) {
                if (const auto at = word.find('@'); at != word.npos) { word.replace(at, 1, i == 0 ? "q" : "f"); }
            }
            results[i] = run(folder, mine);
            CHECK_MESSAGE(results[i].code == 0, results[i].err);
        }
        return {results[0], results[1]};
    }
    [[nodiscard]] bool same_files(const std::string& name) const
    {
        return read_stored(folder / ("q/" + name)) == read_stored(folder / ("f/" + name));
    }
};
const words trio{"--base", "@/base.safetensors", "--task", "@/first.safetensors", "--task", "@/second.safetensors"};
const words pair{"--base", "@/base.safetensors", "--task", "@/first.safetensors"};

TEST_CASE("every verb computes with the numbers of quantised layers")
{
    const quantised_models m;
    for (const words& how : std::vector<words>{{"average"}, {"task-arithmetic"}, {"ties", "--density", "0.3"},
             {"dare-ties", "--density", "0.4"}, {"model-stock"}, {"sce"}, {"breadcrumbs"}, {"ram"}, {"karcher"},
             {"multi-slerp"}}) {
        CAPTURE(how[0]);
        m.both(with(with({"merge", "--method"}, how), with(trio, {"--out", "@/o.safetensors"})));
        CHECK(m.same_files("o.safetensors"));
    }
    m.both({"merge", "--method", "slerp", "--task", "@/first.safetensors", "--task", "@/second.safetensors", "--out",
        "@/o.safetensors", "--dtype", "bf16"});
    CHECK(m.same_files("o.safetensors"));
    m.both(with(with({"prune"}, pair), {"--density", "0.2", "--out", "@/d.safetensors"}));
    CHECK(m.same_files("d.safetensors"));
    m.both({"apply", "--base", "@/base.safetensors", "--delta", "@/d.safetensors", "--out", "@/a.safetensors"});
    CHECK(m.same_files("a.safetensors"));
    // A delta belongs to the numbers of its base, however these are stored.
    REQUIRE(run(m.folder,
                {"apply", "--base", "q/base.safetensors", "--delta", "f/d.safetensors", "--out", "q/b.safetensors"})
                .code
        == 0);
    CHECK(read_stored(m.folder / "q/b.safetensors") == read_stored(m.folder / "f/a.safetensors"));
    m.both(with(with({"peru-fft", "--method", "ties"}, trio), {"--density", "0.1", "--out", "@/p", "--no-card"}));
    for (const std::string file : {"merged.safetensors", "first.delta.safetensors", "second.delta.safetensors"}) {
        CHECK(m.same_files("p/" + file));
    }
    const auto [q, f] = m.both(with({"similarity"}, trio));
    CHECK(q.out == f.out);
    m.both(with(with({"extract-lora"}, pair), {"--rank", "4", "--out", "@/lora"}));
    CHECK(m.same_files("lora/adapter_model.safetensors"));
    m.both(with(with({"sweep", "--method", "task-arithmetic"}, trio),
        {"--lambdas", "0.5,1", "--score", "cksum {} | cut -d ' ' -f 1", "--csv", "@/s.csv", "--out",
            "@/o.safetensors"}));
    CHECK(slurp(m.folder / "q/s.csv") == slurp(m.folder / "f/s.csv"));
    CHECK(m.same_files("o.safetensors"));
    const auto diff = run(m.folder, {"inspect", "q/base.safetensors", "--diff", "f/base.safetensors"});
    CHECK(diff.code == 0);
    CHECK(says(diff.out, "4 tensors equal, 0 differ"));
}

TEST_CASE("a base in numbers and a task in scaled FP8, and the other way round")
{
    const quantised_models m;
    const auto line = [](const std::string& base, const std::string& task, const std::string& out) {
        return words{"merge", "--method", "task-arithmetic", "--lambda", "0.5", "--base", base, "--task", task, "--out",
            out, "--dtype", "keep"};
    };
    REQUIRE(run(m.folder, line("f/base.safetensors", "q/first.safetensors", "mixed.safetensors")).code == 0);
    REQUIRE(run(m.folder, line("f/base.safetensors", "f/first.safetensors", "plain.safetensors")).code == 0);
    CHECK(read_stored(m.folder / "mixed.safetensors") == read_stored(m.folder / "plain.safetensors"));
    REQUIRE(run(m.folder, line("q/base.safetensors", "f/first.safetensors", "mixed.safetensors")).code == 0);
    REQUIRE(run(m.folder, line("q/base.safetensors", "q/first.safetensors", "again.safetensors")).code == 0);
    CHECK(read_stored(m.folder / "mixed.safetensors") == read_stored(m.folder / "again.safetensors"));
    CHECK(read_stored(m.folder / "mixed.safetensors").size() == m.base.size());
}

TEST_CASE("--dtype keep quantises again by the same scheme, within the codes' own error")
{
    quantised_models m;
    const auto one = [&](const std::string& folder, const std::string& dtype, const std::string& out) {
        words line{"merge", "--method", "average", "--task", folder + "/first.safetensors", "--task",
            folder + "/second.safetensors", "--out", out, "--report", out + ".json"};
        if (!dtype.empty()) { line.insert(line.end(), {"--dtype", dtype}); }
        const auto result = run(m.folder, line);
        REQUIRE_MESSAGE(result.code == 0, result.err);
        return result.err;
    };
    CHECK(says(one("q", "", "n.safetensors"), "3 quantised layers of 'q/first.safetensors' are written as numbers"));
    CHECK(one("q", "keep", "k.safetensors").empty());
    const auto numbers = read_stored(m.folder / "n.safetensors"), kept = read_stored(m.folder / "k.safetensors");
    CHECK(numbers.size() == 4);
    REQUIRE(kept.size() == m.first.size());
    for (const auto& [name, tensor] : kept) {
        CHECK(tensor.dtype == m.first.at(name).dtype);
        CHECK(tensor.shape == m.first.at(name).shape);
    }
    const auto back = as_numbers(kept);
    for (const auto& [name, tensor] : numbers) {
        const auto* const wanted = reinterpret_cast<const float*>(tensor.bytes.data());
        const auto* const found = reinterpret_cast<const float*>(back.at(name).bytes.data());
        float largest = 0, worst = 0;
        for (std::size_t i = 0; i < tensor.bytes.size() / 4; ++i) {
            largest = std::max(largest, std::abs(wanted[i]));
            worst = std::max(worst, std::abs(found[i] - wanted[i]));
        }
        CHECK(worst <= (name == "norm" ? 0 : largest * 16.01f / 448));
        CHECK(largest > 0);
    }
    const auto report = nlohmann::json::parse(slurp(m.folder / "k.safetensors.json"));
    CHECK(report["tensors"].size() == 4);
    // Quantising what was quantised changes nothing more: the largest magnitude of a group stays.
    REQUIRE(
        run(m.folder,
            {"merge", "--method", "average", "--task", "k.safetensors", "--out", "k2.safetensors", "--dtype", "keep"})
            .code
        == 0);
    CHECK(as_numbers(read_stored(m.folder / "k2.safetensors")).size() == 4);
    // Shards, threads and little memory make no difference.
    REQUIRE(run(m.folder,
                {"merge", "--method", "average", "--task", "q/first.safetensors", "--task", "q/second.safetensors",
                    "--out", "shards", "--dtype", "keep", "--shard-size", "2kB", "--threads", "3", "--memory", "1MB"})
                .code
        == 0);
    const auto shards = taskvec::open_model(m.folder / "shards");
    for (const auto& [name, tensor] : shards.stored()) {
        CHECK(kept.at(name).bytes == std::string(static_cast<const char*>(tensor.data), tensor.bytes()));
    }
}

TEST_CASE("sums of 0 that a negative majority decides are settled before layers are quantised again")
{
    const scratch folder;
    const auto write = [&](const std::string& name,
                           const std::vector<int>& values) { // scale 1
        stored_tensor codes{taskvec::dtype::f8_e4m3, {4, 6}, {}};
        const std::map<int, int> code_of{{0, 0}, {1, 0x38}, {2, 0x40}, {3, 0x44}, {4, 0x48}, {8, 0x50}};
        for (const int value : values) {
            codes.bytes += static_cast<char>(code_of.at(std::abs(value)) | (value < 0 ? 0x80 : 0));
        }
        write_stored(folder / name, {{"l.weight", codes}, {"l.weight_scale", floats({}, {1})}});
    };
    std::vector<int> first, second;
    for (int i = 0; i < 24; ++i) {
        first.push_back(i % 4 + 1);
        second.push_back(i % 3 == 0 ? -8 : -first.back());
    }
    write("base.safetensors", std::vector<int>(24, 0));
    write("first.safetensors", first);
    write("second.safetensors", second);
    const auto merge = [&](const std::string& out, const std::string& dtype) {
        const auto done = run(folder,
            {"merge", "--method", "ties", "--density", "1", "--base", "base.safetensors", "--task", "first.safetensors",
                "--task", "second.safetensors", "--dtype", dtype, "--out", out});
        REQUIRE_MESSAGE(done.code == 0, done.err);
        return as_numbers(read_stored(folder / out)).at("l.weight");
    };
    const auto numbers = merge("n.safetensors", "f32"), kept = merge("k.safetensors", "keep");
    for (std::size_t i = 0; i < 24; ++i) {
        float wanted = 0, found = 0;
        std::memcpy(&wanted, numbers.bytes.data() + 4 * i, 4);
        std::memcpy(&found, kept.bytes.data() + 4 * i, 4);
        CHECK(wanted < 0);
        CHECK(std::abs(found - wanted) <= 0.07F * -wanted);
    }
}

TEST_CASE("directories: block sizes from the configuration, which goes with the codes and not without them")
{
    const scratch folder;
    stored_model model;
    model["l.weight"] = {taskvec::dtype::f8_e4m3, {6, 6}, std::string(36, '\x38')};
    model["l.weight_scale_inv"] = floats({2, 2}, {1, 2, 3, 4});
    model["l.input_scale"] = floats({}, {0.5f});
    write_stored(folder / "m/model.safetensors", model);
    const std::string config = R"({"model_type": "x", "quantization_config": {"weight_block_size": [4, 4]}})";
    spill(folder / "m/config.json", config);
    spill(folder / "m/hf_quant_config.json", "{}");
    const words line{"merge", "--method", "average", "--task", "m", "--no-card"};
    auto result = run(folder, with(line, {"--out", "kept", "--dtype", "keep"}));
    REQUIRE_MESSAGE(result.code == 0, result.err);
    CHECK(says(result.err, "scales of the inputs of 1 layer stay those of 'm'"));
    CHECK(scratch::names_in(folder / "kept")
        == std::set<std::string>{"model.safetensors", "config.json", "hf_quant_config.json"});
    CHECK(nlohmann::json::parse(slurp(folder / "kept/config.json")) == nlohmann::json::parse(config));
    const auto kept = read_stored(folder / "kept/model.safetensors");
    CHECK(kept.at("l.input_scale") == model.at("l.input_scale"));
    const auto opened = taskvec::open_model(folder / "kept");
    std::vector<float> values(36);
    opened.model().find("l.weight")->source->read(0, 36, values.data());
    for (std::size_t i = 0; i < 36; ++i) {
        const float expected = static_cast<float>(1 + i / 24 * 2 + i % 6 / 4);
        CHECK(values[i] == doctest::Approx(expected).epsilon(1e-6));
    }
    result = run(folder, with(line, {"--out", "plain", "--dtype", "bf16"}));
    REQUIRE_MESSAGE(result.code == 0, result.err);
    CHECK(says(result.err, "'l.input_scale') is left out"));
    CHECK(scratch::names_in(folder / "plain") == std::set<std::string>{"model.safetensors", "config.json"});
    CHECK(nlohmann::json::parse(slurp(folder / "plain/config.json"))
        == nlohmann::json::parse(R"({"model_type": "x", "torch_dtype": "bfloat16"})"));
    CHECK(read_stored(folder / "plain/model.safetensors").size() == 1);
    // A configuration that the shapes contradict.
    spill(folder / "m/config.json", R"({"quantization_config": {"weight_block_size": [128, 128]}})");
    CHECK(refuses(run(folder, with(line, {"--out", "no"})), {"'l.weight'", "[2, 2]", "128 × 128", "m/config.json"}));
    CHECK_FALSE(std::filesystem::exists(folder / "no"));
}

/// Blocks of 128 × 128 as DeepSeek has them, with the last ones cut: each number within the quantiser's own error of
/// the merge in F32, which is half a unit of E4M3's last place, or of its least number, times the block's scale.
TEST_CASE("a model in DeepSeek's FP8 is merged within the error of its own codes")
{
    const scratch folder;
    const std::string config =
        R"({"model_type": "deepseek_v3", "torch_dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})";
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    const std::size_t rows = 300, columns = 200;
    std::vector<float> base;
    for (std::size_t i = 0; i < rows * columns; ++i) { // blocks of very different magnitudes, and outliers
        base.push_back(normal(random) * (i / columns < 128 ? 0.02f : 3) * (i % 97 == 0 ? 40 : 1));
    }
    for (const std::string name : {"base", "first", "second"}) {
        auto values = base;
        if (name != "base") {
            for (auto& value : values) { value += 0.05f * normal(random); }
        }
        stored_model model;
        std::vector<float> scales(6, 0);
        const auto block = [&](std::size_t i) { return i / columns / 128 * 2 + i % columns / 128; };
        for (std::size_t i = 0; i < values.size(); ++i) {
            scales[block(i)] = std::max(scales[block(i)], std::abs(values[i]) / 448);
        }
        stored_tensor codes{taskvec::dtype::f8_e4m3, {300, 200}, {}};
        for (std::size_t i = 0; i < values.size(); ++i) {
            codes.bytes += static_cast<char>(taskvec::f32_to_e4m3(values[i] / scales[block(i)]));
        }
        model["model.layers.0.mlp.down_proj.weight"] = codes;
        model["model.layers.0.mlp.down_proj.weight_scale_inv"] = floats({3, 2}, scales);
        model["model.norm.weight"] = floats({3}, {1, 2, 3});
        write_stored(folder / name / "model.safetensors", model);
        write_stored(folder / ("f32 " + name) / "model.safetensors", as_numbers(model));
        spill(folder / name / "config.json", config);
    }
    const auto merge = [&](const std::string& prefix, const words& more) {
        const auto done = run(folder,
            with({"merge", "--method", "task-arithmetic", "--lambda", "0.5", "--base", prefix + "base", "--task",
                     prefix + "first", "--task", prefix + "second"},
                more));
        REQUIRE_MESSAGE(done.code == 0, done.err);
    };
    merge("f32 ", {"--out", "numbers"});
    merge("", {"--out", "codes", "--dtype", "keep"});
    merge("", {"--out", "plain"});
    const auto exact = read_stored(folder / "numbers/model.safetensors");
    CHECK(read_stored(folder / "plain/model.safetensors") == exact);
    const auto stored = read_stored(folder / "codes/model.safetensors");
    const std::string name = "model.layers.0.mlp.down_proj.weight";
    REQUIRE(stored.at(name + "_scale_inv").shape == taskvec::extents{3, 2});
    const auto* const scales = reinterpret_cast<const float*>(stored.at(name + "_scale_inv").bytes.data());
    const auto decoded = as_numbers(stored);
    const auto* const found = reinterpret_cast<const float*>(decoded.at(name).bytes.data());
    const auto* const wanted = reinterpret_cast<const float*>(exact.at(name).bytes.data());
    std::vector<float> largest(6, 0);
    for (std::size_t i = 0; i < rows * columns; ++i) {
        const auto block = i / columns / 128 * 2 + i % columns / 128;
        largest[block] = std::max(largest[block], std::abs(wanted[i]));
        const double bound = std::max(std::abs(wanted[i]) * 0x1p-4, scales[block] * 0x1p-10) * (1 + 1e-6);
        REQUIRE(std::abs(double{found[i]} - double{wanted[i]}) <= bound);
    }
    for (std::size_t b = 0; b < 6; ++b) { CHECK(scales[b] == doctest::Approx(largest[b] / 448)); }
    CHECK(nlohmann::json::parse(slurp(folder / "codes/config.json")) == nlohmann::json::parse(config));
    const auto plain = nlohmann::json::parse(slurp(folder / "plain/config.json"));
    CHECK_FALSE(plain.contains("quantization_config"));
    CHECK(plain["torch_dtype"] == "float32");
}

TEST_CASE("quantization_config is that of what the result holds, where models are mixed")
{
    const scratch folder;
    const std::string plain = R"({"model_type": "x", "torch_dtype": "bfloat16"})",
                      scaled = R"({"model_type": "x", "quantization_config": {"quant_method": "fp8"}})";
    stored_model codes;
    for (const std::string layer : {"a", "b"}) {
        codes[layer + ".weight"] = {taskvec::dtype::f8_e4m3, {2, 2}, "\x38\x38\x38\x40"};
        codes[layer + ".weight_scale"] = floats({}, {0.5f});
    }
    write_stored(folder / "fp8/model.safetensors", codes);
    spill(folder / "fp8/config.json", scaled);
    values_model numbers;
    for (const std::string layer : {"a", "b"}) {
        numbers[layer + ".weight"] = {taskvec::dtype::bf16, {2, 2}, {0.5f, 0.5f, 0.5f, 1}};
    }
    std::filesystem::create_directories(folder / "bf16");
    write_values(folder / "bf16/model.safetensors", numbers);
    spill(folder / "bf16/config.json", plain);
    const auto merge = [&](const std::string& first, const std::string& second, const words& more) {
        std::filesystem::remove_all(folder / "out");
        const auto done = run(folder,
            with({"merge", "--method", "average", "--task", first, "--task", second, "--out", "out", "--no-card"},
                more));
        REQUIRE_MESSAGE(done.code == 0, done.err);
        return nlohmann::json::parse(slurp(folder / "out/config.json"));
    };
    const auto type = [&](const std::string& name) {
        return read_stored(folder / "out/model.safetensors").at(name).dtype;
    };
    // The first model decides.
    CHECK(merge("bf16", "fp8", {}) == nlohmann::json::parse(plain));
    CHECK(merge("bf16", "fp8", {"--dtype", "keep"}) == nlohmann::json::parse(plain));
    CHECK(type("a.weight") == taskvec::dtype::bf16);
    CHECK_FALSE(merge("fp8", "bf16", {}).contains("quantization_config"));
    CHECK(type("a.weight") == taskvec::dtype::f32);
    CHECK(merge("fp8", "bf16", {"--dtype", "bf16"}) == nlohmann::json::parse(plain));
    CHECK(merge("fp8", "bf16", {"--dtype", "keep"}) == nlohmann::json::parse(scaled));
    CHECK(type("a.weight") == taskvec::dtype::f8_e4m3);
    // Somebody else's configuration says of these tensors what is so, too.
    CHECK_FALSE(merge("bf16", "bf16", {"--copy-from", "fp8"}).contains("quantization_config"));
    CHECK(merge("fp8", "bf16", {"--dtype", "keep", "--copy-from", "bf16"})["quantization_config"]["quant_method"]
        == "fp8");
    // Layers of both kinds in one result.
    const auto mixed = merge("fp8", "bf16", {"--exclude", "^a"});
    CHECK(type("a.weight") == taskvec::dtype::f8_e4m3);
    CHECK(type("b.weight") == taskvec::dtype::f32);
    CHECK(mixed["quantization_config"]["modules_to_not_convert"] == nlohmann::json::array({"b"}));
}

TEST_CASE("fp8 without scales stays fp8 with --dtype keep, and becomes numbers without")
{
    const scratch folder;
    // E4M3: 1, 1.125, 448, −2 and their like.
    write_stored(folder / "base.safetensors",
        {{"a", {taskvec::dtype::f8_e4m3, {4}, "\x38\x39\x7e\xc0"}}, {"b", floats({2}, {1, 2})}});
    write_stored(folder / "task.safetensors",
        {{"a", {taskvec::dtype::f8_e4m3, {4}, "\x3a\x39\x7e\xc1"}}, {"b", floats({2}, {3, 4})}});
    const words line{"merge", "--method", "task-arithmetic", "--base", "base.safetensors", "--task", "task.safetensors",
        "--out", "o.safetensors"};
    const auto merged = [&](const words& more) {
        const auto done = run(folder, with(line, more));
        REQUIRE_MESSAGE(done.code == 0, done.err);
        return read_stored(folder / "o.safetensors");
    };
    const auto kept = merged({"--lambda", "1", "--dtype", "keep"});
    CHECK(kept.at("a").dtype == taskvec::dtype::f8_e4m3);
    CHECK(kept.at("a").bytes == "\x3a\x39\x7e\xc1");
    CHECK(kept.at("b") == floats({2}, {3, 4}));
    CHECK(merged({"--lambda", "1"}).at("a") == floats({4}, {1.25f, 1.125f, 448, -2.25f}));
    // −2 − 1000·0.25 is −252: between −240 and −256, to the nearer; 1 + 1000·0.25 = 251 is 256.
    CHECK(merged({"--lambda", "1000", "--dtype", "keep"}).at("a").bytes == "\x78\x39\x7e\xf8");
    const auto far = with(line, {"--lambda", "4000", "--dtype", "keep"}); // 1001
    CHECK(refuses(run(folder, far), {"tensor 'a' would hold 1001 at index 0", "F8_E4M3"}));
    const auto saturated =
        merged({"--lambda", "4000", "--dtype", "keep", "--overflow", "saturate", "--report", "r.json"});
    CHECK(saturated.at("a").bytes == "\x7e\x39\x7e\xfe");
    CHECK(nlohmann::json::parse(slurp(folder / "r.json"))["saturated"] == 2);
    CHECK(
        merged({"--lambda", "4000", "--dtype", "keep", "--overflow", "propagate"}).at("a").bytes == "\x7f\x39\x7e\xff");
}

TEST_CASE("a quantised embedding whose rows are lined up does not stay quantised, and it is said")
{
    const scratch folder;
    for (const auto& [name, rows] : std::map<std::string, std::size_t>{{"less", 3}, {"more", 4}}) {
        const auto count = static_cast<std::int64_t>(rows);
        const std::string layer = "model.embed_tokens.weight";
        std::filesystem::create_directory(folder / name);
        write_stored(folder / name / "model.safetensors",
            {{layer, {taskvec::dtype::f8_e4m3, {count, 2}, std::string(2 * rows, '\x38')}},
                {layer + "_scale", floats({count, 1}, std::vector<float>(rows, 2))}});
        spill(folder / name / "config.json",
            R"({"vocab_size": )" + std::to_string(rows)
                + R"(, "quantization_config": {"quant_method": "compressed-tensors"}})");
    }
    const auto merged = [&](const std::string& policy) {
        std::filesystem::remove_all(folder / "out");
        return run(folder,
            {"merge", "--method", "average", "--task", "less", "--task", "more", "--vocabulary", policy, "--dtype",
                "keep", "--out", "out"});
    };
    const std::string said = "'model.embed_tokens.weight' of 'less' does not stay scaled FP8";
    const auto grown = merged("union");
    REQUIRE_MESSAGE(grown.code == 0, grown.err);
    CHECK(grown.err.find(said) != std::string::npos);
    const auto result = read_values(folder / "out/model.safetensors");
    CHECK(result.size() == 1);
    CHECK(result.at("model.embed_tokens.weight").values == std::vector<float>(8, 2)); // 0x38 is 1
    // The base's own rows stay what they are.
    const auto kept = merged("base");
    REQUIRE_MESSAGE(kept.code == 0, kept.err);
    CHECK(kept.err.find(said) == std::string::npos);
    CHECK(taskvec::safetensors_file(folder / "out/model.safetensors").entries().size() == 2);
}

TEST_CASE("a layer is excluded whole, and then copied as it is stored")
{
    const quantised_models m;
    const words line{"merge", "--method", "average", "--task", "q/first.safetensors", "--task", "q/second.safetensors",
        "--out", "o.safetensors"};
    for (const std::string dtype : {"keep", ""}) {
        auto mine = with(line, {"--exclude", "layers\\.0\\.weight$"});
        if (!dtype.empty()) { mine = with(mine, {"--dtype", dtype}); }
        REQUIRE(run(m.folder, mine).code == 0);
        const auto out = read_stored(m.folder / "o.safetensors");
        CHECK(out.at("layers.0.weight") == m.first.at("layers.0.weight"));
        CHECK(out.at("layers.0.weight_scale") == m.first.at("layers.0.weight_scale"));
        CHECK(out.contains("layers.1.weight_scale") == (dtype == "keep"));
    }
    REQUIRE(run(m.folder, with(line, {"--exclude", "layers.0", "--dtype", "f32"})).code == 0);
    const auto numbers = read_stored(m.folder / "o.safetensors");
    CHECK(numbers.size() == 4);
    CHECK(numbers.at("layers.0.weight") == as_numbers(m.first).at("layers.0.weight"));
    std::filesystem::remove(m.folder / "o.safetensors");
    CHECK(refuses(run(m.folder, with(line, {"--exclude", "layers.0.weight_scale"})),
        {"'layers.0.weight_scale'", "'layers.0.weight'", "the whole layer", "[layer-split]"}));
    CHECK(
        refuses(run(m.folder, with(line, {"--include", "weight_scale_inv"})), {"'layers.2.weight'", "[layer-split]"}));
    CHECK_FALSE(std::filesystem::exists(m.folder / "o.safetensors"));
}

TEST_CASE("MXFP4 is read, and written as numbers")
{
    const scratch folder;
    stored_model model;
    model["e.up_blocks"] = {taskvec::dtype::u8, {1, 2, 1, 16}, std::string(32, '\x22')};
    model["e.up_scales"] = {taskvec::dtype::u8, {1, 2, 1}, "\x7f\x80"};
    write_stored(folder / "m.safetensors", model);
    stored_model numbers;
    std::vector<float> values;
    for (int i = 0; i < 32; ++i) { values.insert(values.end(), {3, 4}); }
    numbers["e.up"] = floats({1, 32, 2}, values);
    write_stored(folder / "n.safetensors", numbers);
    const words line{
        "merge", "--method", "average", "--task", "m.safetensors", "--task", "n.safetensors", "--out", "o"};
    REQUIRE(run(folder, line).code == 0);
    for (auto& value : values) { value = value == 3 ? 2 : 3; }
    CHECK(read_stored(folder / "o").at("e.up") == floats({1, 32, 2}, values));
    CHECK(refuses(run(folder, with(line, {"--dtype", "keep"})), {"'e.up'", "MXFP4", "choose a dtype"}));
}

TEST_CASE("layers that nothing reads, and damaged ones, are refused by name in every verb")
{
    const scratch folder;
    stored_model gptq;
    gptq["l.qweight"] = {taskvec::dtype::i32, {1, 8}, std::string(32, '\1')};
    gptq["l.qzeros"] = {taskvec::dtype::i32, {1, 1}, std::string(4, '\1')};
    gptq["l.scales"] = floats({1, 8}, std::vector<float>(8, 1));
    gptq["l.g_idx"] = {taskvec::dtype::i32, {8}, std::string(32, '\0')};
    gptq["norm"] = floats({2}, {1, 2});
    auto other = gptq;
    other["norm"] = floats({2}, {3, 4});
    write_stored(folder / "a.safetensors", gptq);
    write_stored(folder / "b.safetensors", other);
    const words models{"--base", "a.safetensors", "--task", "b.safetensors"};
    const std::vector<words> verbs{with({"merge", "--method", "ties", "--out", "o"}, models),
        with({"prune", "--out", "o"}, models), with({"peru-fft", "--method", "ties", "--out", "o"}, models),
        with({"similarity"}, models), with({"extract-lora", "--rank", "1", "--out", "o"}, models),
        with({"sweep", "--method", "ties", "--lambdas", "1", "--score", "echo 1 {}", "--csv", "o"}, models)};
    for (const auto& verb : verbs) {
        CAPTURE(verb[0]);
        CHECK(refuses(run(folder, verb), {"a.safetensors: layer 'l' is quantised by GPTQ: ", "dequantise", "exclude"}));
    }
    CHECK(refuses(run(folder, with(verbs[0], {"--exclude", "qweight"})), {"'l.qweight'", "'l'", "[layer-split]"}));
    CHECK(refuses(run(folder, with(verbs[0], {"--rename", "^l=k", "--exclude", "^k"})), {"'l'"}));
    REQUIRE(run(folder, with(verbs[0], {"--exclude", "^l\\.", "--density", "1"})).code == 0);
    auto expected = other;
    CHECK(read_stored(folder / "o") == expected);
    const auto inspected = run(folder, {"inspect", "a.safetensors"});
    CHECK(inspected.code == 0);
    CHECK(says(inspected.out, "5 tensors"));
    CHECK(says(inspected.out, "quantised: 1 layer that is quantised by GPTQ"));

    stored_model damaged;
    damaged["l.weight"] = {taskvec::dtype::f8_e4m3, {2, 2}, "8888"};
    damaged["l.weight_scale"] = floats({}, {NAN});
    write_stored(folder / "c.safetensors", damaged);
    CHECK(refuses(run(folder, {"merge", "--method", "average", "--task", "c.safetensors", "--out", "n"}),
        {"c.safetensors: layer 'l.weight' has the scale nan", "expected a positive number"}));
    CHECK_FALSE(std::filesystem::exists(folder / "n"));
}

/// A model of one layer of 4 × 4 codes, which all are `code`, and a norm.
stored_model one_layer(char code, const stored_model& more = {})
{
    stored_model model{
        {"l.weight", {taskvec::dtype::f8_e4m3, {4, 4}, std::string(16, code)}}, {"norm", floats({2}, {1, 2})}};
    model.insert(more.begin(), more.end());
    return model;
}
constexpr char code_of_1 = '\x38', code_of_16th = '\x18'; // in E4M3

TEST_CASE("FP8 that lost its scale is refused where another model, the configuration or the index has it")
{
    const scratch folder;
    write_stored(folder / "scaled.safetensors", one_layer(code_of_1, {{"l.weight_scale", floats({}, {0.5f})}}));
    write_stored(folder / "lost.safetensors", one_layer(code_of_1));
    write_stored(folder / "also.safetensors", one_layer(code_of_1));
    const words average{"merge", "--method", "average", "--out", "o.safetensors"};
    const words said{"lost.safetensors: layer 'l.weight' is FP8 without a scale",
        "in 'scaled.safetensors' ('l.weight_scale')", "[quantised-layer]"};
    CHECK(refuses(run(folder, with(average, {"--task", "scaled.safetensors", "--task", "lost.safetensors"})), said));
    CHECK(refuses(run(folder, with(average, {"--task", "lost.safetensors", "--task", "scaled.safetensors"})), said));
    for (const words& verb :
        std::vector<words>{{"merge", "--method", "ties", "--out", "o"}, {"similarity"}, {"prune", "--out", "o"},
            {"extract-lora", "--rank", "1", "--out", "o"}, {"peru-fft", "--method", "ties", "--out", "o"}}) {
        CAPTURE(verb[0]);
        CHECK(refuses(run(folder, with(verb, {"--base", "scaled.safetensors", "--task", "lost.safetensors"})), said));
    }
    // Under the names that the models are lined up by.
    CHECK(refuses(run(folder,
                      with(average,
                          {"--task", "scaled.safetensors", "--rename", "^l=k", "--task", "lost.safetensors", "--rename",
                              "^l=k"})),
        {"layer 'k.weight'", "('l.weight_scale')"}));
    // Without the layer, and where no model has a scale, it goes on.
    const auto both = with(average, {"--task", "scaled.safetensors", "--task", "lost.safetensors"});
    REQUIRE(run(folder, with(both, {"--exclude", R"(^l\.weight$)"})).code == 0);
    CHECK(read_stored(folder / "o.safetensors") == read_stored(folder / "scaled.safetensors"));
    REQUIRE(run(folder, with(average, {"--task", "also.safetensors", "--task", "lost.safetensors"})).code == 0);
    CHECK(read_stored(folder / "o.safetensors").at("l.weight") == floats({4, 4}, std::vector<float>(16, 1)));

    for (const std::string config : {R"({"quantization_config": {"quant_method": "fp8"}})",
             R"({"text_config": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}})"}) {
        CAPTURE(config);
        write_stored(folder / "m/model.safetensors", one_layer(code_of_1));
        spill(folder / "m/config.json", config);
        CHECK(refuses(run(folder, {"merge", "--method", "average", "--task", "m", "--out", "om"}),
            {"m: layer 'l.weight' is FP8 without a scale ('l.weight_scale')", "m/config.json", R"(^l\.weight$)"}));
    }
    // ModelOpt's own file, where config.json says nothing.
    write_stored(folder / "o/model.safetensors", one_layer(code_of_1));
    spill(folder / "o/config.json", R"({"model_type": "x"})");
    spill(folder / "o/hf_quant_config.json",
        R"({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}})");
    CHECK(refuses(run(folder, {"merge", "--method", "average", "--task", "o", "--out", "oo"}),
        {"o: layer 'l.weight' is FP8 without a scale", "o/hf_quant_config.json"}));
    // An index that lists the scale, whose shard lacks it or is not there.
    write_stored(folder / "i/model-00001-of-00002.safetensors", one_layer(code_of_1));
    for (const bool there : {false, true}) {
        if (there) { write_stored(folder / "i/model-00002-of-00002.safetensors", {{"n", floats({1}, {1})}}); }
        spill(folder / "i/model.safetensors.index.json",
            R"({"weight_map": {"l.weight": "model-00001-of-00002.safetensors", "norm": "model-00001-of-00002.safetensors", "l.weight_scale": "model-00002-of-00002.safetensors", "n": "model-00002-of-00002.safetensors"}})");
        const auto result =
            run(folder, {"merge", "--method", "passthrough", "--task", "i", "--index", "lenient", "--out", "oi"});
        CHECK(result.code == 1);
        CHECK(says(result.err,
            "i: layer 'l.weight' is FP8 without its scale ('l.weight_scale'), which the index lists and no file has"));
    }
}

TEST_CASE("a parameter that is called a scale is none of the layer beside it")
{
    const scratch folder;
    write_stored(folder / "a.safetensors",
        one_layer(code_of_1, {{"l.weight_scale", floats({}, {0.5f})}, {"l.logit_scale", floats({}, {4.5f})}}));
    REQUIRE(run(folder, {"merge", "--method", "average", "--task", "a.safetensors", "--out", "o"}).code == 0);
    const auto out = read_stored(folder / "o");
    CHECK(out.at("l.weight") == floats({4, 4}, std::vector<float>(16, 0.5f)));
    CHECK(out.at("l.logit_scale") == floats({}, {4.5f}));
}

TEST_CASE("inspect --diff compares numbers, not codes whose scale is lost")
{
    const scratch folder;
    write_stored(folder / "a.safetensors", one_layer(code_of_1, {{"l.weight_scale", floats({}, {0.5f})}}));
    write_stored(folder / "lost.safetensors", one_layer(code_of_1));
    write_stored(folder / "other.safetensors", one_layer(code_of_16th, {{"l.weight_scale", floats({}, {8})}}));
    for (const auto& [first, second] :
        {std::pair{"a.safetensors", "lost.safetensors"}, std::pair{"lost.safetensors", "a.safetensors"}}) {
        const auto json = run(folder, {"inspect", first, "--diff", second, "--json"});
        REQUIRE(json.code == 0);
        const auto diff = nlohmann::json::parse(json.out);
        REQUIRE(diff["not_comparable"].size() == 1);
        CHECK(diff["not_comparable"][0]["name"] == "l.weight");
        CHECK(diff["not_comparable"][0][first[0] == 'a' ? "first" : "second"] == "codes with scales [4, 4]");
        CHECK(diff["not_comparable"][0][first[0] == 'a' ? "second" : "first"] == "F8_E4M3 [4, 4]");
    }
    const auto same = run(folder, {"inspect", "a.safetensors", "--diff", "other.safetensors", "--json"});
    REQUIRE(same.code == 0);
    CHECK(nlohmann::json::parse(same.out)["not_comparable"].empty());
    CHECK(nlohmann::json::parse(same.out)["differ"].empty()); // 1 · 0.5 is 1/16 · 8
}

TEST_CASE("scales under other names are read with their codes, or refused by the layer's name")
{
    const scratch folder;
    // Both models hold 1 everywhere: codes and scales averaged apart would give 0.53 and 8.5.
    const auto make = [&](const std::string& name, const stored_tensor& small, const stored_tensor& large) {
        write_stored(folder / "a.safetensors", one_layer(code_of_1, {{name, small}}));
        write_stored(folder / "b.safetensors", one_layer(code_of_16th, {{name, large}}));
    };
    const std::vector<words> merges{
        {"merge", "--method", "average", "--task", "a.safetensors", "--task", "b.safetensors", "--out", "o"},
        {"merge", "--method", "task-arithmetic", "--base", "a.safetensors", "--task", "b.safetensors", "--out", "o"}};
    const auto is_one = [&] {
        const auto out = read_stored(folder / "o");
        return out.size() == 2 && out.at("l.weight") == floats({4, 4}, std::vector<float>(16, 1));
    };
    for (const std::string name : {"l.scale", "l.qscale_weight", "l.weight_scale"}) {
        CAPTURE(name);
        for (const taskvec::extents& shape : std::vector<taskvec::extents>{{}, {1}, {4}, {4, 1}}) {
            const auto count = taskvec::element_count(shape);
            make(name, floats(shape, std::vector<float>(count, 1)), floats(shape, std::vector<float>(count, 16)));
            for (const auto& line : merges) {
                REQUIRE(run(folder, line).code == 0);
                CHECK(is_one());
            }
        }
        make(name, {taskvec::dtype::f8_e8m0, {1, 1}, "\x7f"}, {taskvec::dtype::f8_e8m0, {1, 1}, "\x83"});
        REQUIRE(run(folder, merges[0]).code == 0);
        CHECK(is_one());
        REQUIRE(run(folder, with(merges[0], {"--dtype", "keep"})).code == 0);
        const auto kept = read_stored(folder / "o");
        CHECK(kept.at(name).dtype == taskvec::dtype::f8_e8m0);
        CHECK(as_numbers(kept).at("l.weight") == floats({4, 4}, std::vector<float>(16, 1)));
        CHECK(refuses(run(folder, with(merges[0], {"--exclude", name + "$"})), {"'" + name + "'", "'l.weight'"}));
    }
    for (const std::string name :
        {"l.weight.scale", "l.scales", "l.scale_inv", "l.weight_scale_2", "l.weight_s", "l.weight_global_scale"}) {
        CAPTURE(name);
        make(name, floats({1}, {1}), floats({1}, {16}));
        for (const auto& line : merges) {
            CHECK(
                refuses(run(folder, line), {"a.safetensors: layer 'l.weight' is FP8 with a scale", "'" + name + "'"}));
            CHECK(refuses(run(folder, with(line, {"--exclude", name + "$"})), {"'l.weight'", "[layer-split]"}));
        }
    }
}

TEST_CASE("blocks are of the size that config.json says, wherever and however it says it")
{
    const scratch folder;
    stored_model model; // of ones, in blocks of 64 × 32 that the edges cut: 4 and 5 of them
    model["l.weight"] = {taskvec::dtype::f8_e4m3, {200, 150}, std::string(30000, code_of_1)};
    std::vector<float> scales, expected;
    for (int i = 0; i < 20; ++i) { scales.push_back(static_cast<float>(i + 1)); }
    for (std::size_t i = 0; i < 30000; ++i) { expected.push_back(scales[i / 150 / 64 * 5 + i % 150 / 32]); }
    model["l.weight_scale"] = floats({4, 5}, scales);
    write_stored(folder / "m/model.safetensors", model);
    const words line{"merge", "--method", "passthrough", "--task", "m/model.safetensors", "--out", "o"};
    const std::string groups =
        R"({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "64x32"}}}})";
    for (const std::string& config : std::vector<std::string>{R"({"quantization_config": )" + groups + "}",
             R"({"compression_config": )" + groups + "}",
             R"({"text_config": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}}})"}) {
        CAPTURE(config);
        spill(folder / "m/config.json", config);
        REQUIRE(run(folder, line).code == 0);
        CHECK(read_stored(folder / "o").at("l.weight") == floats({200, 150}, expected));
    }
    std::filesystem::remove(folder / "m/config.json"); // 50 × 30 would divide the shape
    CHECK(refuses(run(folder, line), {"'l.weight'", "64 × 32", "50 × 30", "weight_block_size"}));
}

TEST_CASE("what config.json says of quantisation is brought up to date at any depth")
{
    const scratch folder;
    const auto model = one_layer(code_of_1, {{"l.weight_scale", floats({}, {2})}});
    const std::vector<std::pair<std::string, std::string>> configs{
        {R"({"model_type": "x", "text_config": {"model_type": "y", "quantization_config": {"quant_method": "fp8"}}})",
            R"({"model_type": "x", "text_config": {"model_type": "y"}, "torch_dtype": "float32"})"},
        {R"({"model_type": "x", "compression_config": {"quant_method": "compressed-tensors"}})",
            R"({"model_type": "x", "torch_dtype": "float32"})"},
        {R"({"model_type": "x", "a": {"b": {"quantization_config": {"quant_method": "fp8"}}}, "quantization_config": {}})",
            R"({"model_type": "x", "a": {"b": {}}, "torch_dtype": "float32"})"}};
    for (const auto& config : configs) {
        const auto& before = config.first;
        const auto& after = config.second;
        CAPTURE(before);
        write_stored(folder / "m/model.safetensors", model);
        spill(folder / "m/config.json", before);
        const words line{"merge", "--method", "average", "--task", "m", "--no-card", "--out", "o"};
        auto done = run(folder, line);
        REQUIRE_MESSAGE(done.code == 0, done.err);
        CHECK(nlohmann::json::parse(slurp(folder / "o/config.json")) == nlohmann::json::parse(after));
        done = run(folder, with(line, {"--dtype", "keep"}));
        REQUIRE_MESSAGE(done.code == 0, done.err);
        CHECK(nlohmann::json::parse(slurp(folder / "o/config.json")) == nlohmann::json::parse(before));
    }
    // Layers of both kinds: the list is where the rest is.
    write_stored(folder / "numbers/model.safetensors", as_numbers(model));
    auto two = model;
    two["k.weight"] = model.at("l.weight");
    two["k.weight_scale"] = model.at("l.weight_scale");
    write_stored(folder / "two/model.safetensors", two);
    spill(folder / "two/config.json", configs[0].first);
    const auto done = run(
        folder, {"merge", "--method", "average", "--task", "two", "--exclude", "^k", "--no-card", "--out", "mixed"});
    REQUIRE_MESSAGE(done.code == 0, done.err);
    const auto mixed = nlohmann::json::parse(slurp(folder / "mixed/config.json"));
    CHECK_FALSE(mixed.contains("quantization_config"));
    CHECK(mixed["text_config"]["quantization_config"]["modules_to_not_convert"] == nlohmann::json::array({"l"}));
}

TEST_CASE("ComfyUI's marks go with the codes, and not without them")
{
    const scratch folder;
    const std::string mark = R"({"format": "float8_e4m3fn"})";
    const auto scaled = one_layer(code_of_1, {{"l.weight_scale", floats({}, {2})}});
    auto marked = scaled;
    marked["l.comfy_quant"] = {taskvec::dtype::u8, {static_cast<std::int64_t>(mark.size())}, mark};
    write_stored(folder / "q.safetensors", marked);
    write_stored(folder / "f.safetensors", as_numbers(scaled));
    const auto merged = [&](const words& more) {
        const auto done = run(folder, with({"merge", "--method", "average", "--out", "o.safetensors"}, more));
        REQUIRE_MESSAGE(done.code == 0, done.err);
        return read_stored(folder / "o.safetensors");
    };
    CHECK(merged({"--task", "q.safetensors"}) == as_numbers(scaled));
    CHECK(merged({"--task", "q.safetensors", "--task", "f.safetensors"}) == as_numbers(scaled));
    CHECK(merged({"--task", "f.safetensors", "--task", "q.safetensors"}) == as_numbers(scaled));
    const auto kept = merged({"--task", "q.safetensors", "--dtype", "keep"});
    CHECK(kept.at("l.comfy_quant") == marked.at("l.comfy_quant"));
    CHECK(kept.at("l.weight").bytes == std::string(16, '\x7e')); // the largest code, times 2 / 448

    const std::string header =
        R"({"format_version":"1.0","layers":{"k":{"format":"float8_e4m3fn"},"l":{"format":"float8_e4m3fn"}}})";
    auto two = scaled;
    two["k.weight"] = scaled.at("l.weight");
    two["k.weight_scale"] = scaled.at("l.weight_scale");
    write_stored(folder / "h.safetensors", two, {{"format", "pt"}, {"_quantization_metadata", header}});
    const auto metadata = [&](const words& more) {
        (void)merged(with({"--task", "h.safetensors"}, more));
        auto map = taskvec::safetensors_file(folder / "o.safetensors").metadata();
        CHECK(map.at("format") == "pt");
        return map["_quantization_metadata"];
    };
    CHECK(metadata({}).empty());
    CHECK(metadata({"--dtype", "bf16"}).empty());
    CHECK(metadata({"--dtype", "keep"}) == header);
    CHECK(metadata({"--exclude", "^k"}) == R"({"format_version":"1.0","layers":{"k":{"format":"float8_e4m3fn"}}})");
    const std::string other = R"({"layers":{"l":{"format":"mxfp8"}}})";
    write_stored(folder / "x.safetensors", scaled, {{"_quantization_metadata", other}});
    CHECK(refuses(run(folder, {"merge", "--method", "average", "--task", "x.safetensors", "--out", "n"}),
        {"'l.weight' is quantised by ComfyUI as 'mxfp8'"}));
}

TEST_CASE("the note on layers that became numbers names only what works")
{
    const scratch folder;
    stored_model blocks, packed;
    blocks["w_blocks"] = {taskvec::dtype::u8, {1, 2, 1, 16}, std::string(32, '\1')};
    blocks["w_scales"] = {taskvec::dtype::u8, {1, 2, 1}, "\x7f\x7f"};
    packed["l.weight_packed"] = {taskvec::dtype::u8, {2, 8}, std::string(16, '\1')};
    packed["l.weight_scale"] = {taskvec::dtype::f8_e4m3, {2, 1}, std::string(2, code_of_1)};
    packed["l.weight_global_scale"] = floats({1}, {1});
    auto mixed = one_layer(code_of_1, {{"l.weight_scale", floats({}, {2})}});
    mixed.insert(blocks.begin(), blocks.end());
    const std::map<std::string, stored_model> models{{"mxfp4", blocks}, {"nvfp4", packed}, {"mixed", mixed},
        {"fp8", one_layer(code_of_1, {{"l.weight_scale", floats({}, {2})}})}};
    for (const auto& one : models) {
        const auto& name = one.first;
        CAPTURE(name);
        write_stored(folder / name, one.second);
        const words line{"merge", "--method", "passthrough", "--task", name, "--out", "o"};
        const auto plain = run(folder, line), kept = run(folder, with(line, {"--dtype", "keep"}));
        CHECK(plain.code == 0);
        CHECK(says(plain.err, "--dtype bf16 takes half the space"));
        CHECK(says(plain.err, "--dtype keep") == (kept.code == 0));
        CHECK(run(folder, with(line, {"--dtype", "bf16"})).code == 0);
    }
}

TEST_CASE("the way to exclude a layer that a message gives excludes it, and its name alone says what is left")
{
    const scratch folder;
    const auto i32 = [](taskvec::extents shape) {
        const auto count = taskvec::element_count(shape);
        return stored_tensor{taskvec::dtype::i32, std::move(shape), std::string(4 * count, '\1')};
    };
    const stored_tensor byte{taskvec::dtype::u8, {4}, std::string(4, '\1')};
    struct refused_model {
        stored_model tensors;
        std::string name, part, rest;
    };
    const std::vector<refused_model> all{{{{"l.weight", {taskvec::dtype::f8_e4m3, {2, 2}, std::string(4, code_of_1)}},
                                              {"l.weight_scale", floats({}, {NAN})}},
                                             "l.weight", R"(^l\.weight$)", "l.weight_scale"},
        {{{"l.weight", {taskvec::dtype::u8, {8, 1}, std::string(8, '\1')}}, {"l.weight.absmax", floats({1}, {1})},
             {"l.weight.quant_map", floats({16}, std::vector<float>(16, 1))},
             {"l.weight.quant_state.bitsandbytes__nf4", byte}},
            "l.weight", R"(^l\.weight$)", "l.weight.absmax"},
        {{{"l.weight", {taskvec::dtype::i8, {2, 2}, std::string(4, '\1')}}, {"l.weight_scale", floats({2, 1}, {1, 2})}},
            "l.weight", R"(^l\.weight$)", "l.weight_scale"},
        {{{"l.weight_packed", i32({8, 2})}, {"l.scale_packed", floats({1, 8}, std::vector<float>(8, 1))},
             {"l.meta", {taskvec::dtype::i16, {8, 2}, std::string(32, '\1')}}},
            "l", "weight_packed", "l.scale_packed"},
        {{{"l.B", i32({8, 2})}, {"l.s", floats({1, 8}, std::vector<float>(8, 1))}}, "l", "B$", "l.s"},
        {{{"l.codes", {taskvec::dtype::i8, {8, 2, 1}, std::string(16, '\1')}},
             {"l.codebooks", floats({1, 4, 1, 8}, std::vector<float>(32, 1))},
             {"l.scales", floats({8, 1, 1, 1}, std::vector<float>(8, 1))}},
            "l", "codes$", "l.codebooks"}};
    for (const auto& one : all) {
        const auto &name = one.name, &rest = one.rest;
        CAPTURE(rest);
        auto first = one.tensors, second = one.tensors;
        first["n"] = floats({2}, {1, 2});
        second["n"] = floats({2}, {3, 6});
        for (auto& [tensor_name, tensor] : second) { // a fine-tune of the scales
            if (tensor_name == rest && tensor.dtype == taskvec::dtype::f32) { tensor.bytes[2] ^= 1; }
        }
        write_stored(folder / "a.safetensors", first);
        write_stored(folder / "b.safetensors", second);
        const words line{
            "merge", "--method", "average", "--task", "a.safetensors", "--task", "b.safetensors", "--out", "o"};
        const auto whole = run(folder, line);
        CHECK(refuses(whole, {"a.safetensors: layer '" + name + "' "}));
        const std::string option = "(the tool: --exclude '";
        const auto at = whole.err.find(option) + option.size(), last = whole.err.find("')", at);
        REQUIRE(at > option.size());
        CHECK(refuses(run(folder, with(line, {"--exclude", one.part})),
            {"'" + name + "'", "'" + rest + "'", "[layer-split]", whole.err.substr(at, last - at)}));
        const auto done = run(folder, with(line, {"--exclude", whole.err.substr(at, last - at)}));
        REQUIRE_MESSAGE(done.code == 0, done.err);
        first["n"] = floats({2}, {2, 4});
        CHECK(read_stored(folder / "o") == first);
    }
}

} // namespace quantised_tools
