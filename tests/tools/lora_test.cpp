// taskvec peru-lora, extract-lora and merge-lora, against dense updates that plain loops make of the files.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include "reference/adapters.hpp"
#include "reference/ties.hpp"

#include "../capture.hpp"

#include <taskvec/formats/peft.hpp>

#include <nlohmann/json.hpp>

using namespace tools_test;
using reference::normal_update;
using reference::plain_matrix;

namespace {

using adapter = taskvec::peft_adapter<float>;

const std::string weights_file = "adapter_model.safetensors", config_file = "adapter_config.json";

nlohmann::json json_of(const std::filesystem::path& path)
{
    return nlohmann::json::parse(slurp(path));
}
nlohmann::json config_of(const std::filesystem::path& directory)
{
    return json_of(directory / config_file);
}

/// Two layers of rank 4 and one of rank 2, with scalings 0.5, 0.5 and 3.
adapter three_layers(std::uint64_t seed = 1)
{
    adapter made;
    made.updates["layers.0.q"] = normal_update<float>(9, 7, 4, seed, 0.5);
    made.updates["layers.0.v"] = normal_update<float>(6, 7, 4, seed + 1, 0.5);
    made.updates["layers.1.q"] = normal_update<float>(8, 8, 2, seed + 2, 3);
    return made;
}

/// The updates of an adapter directory, dense, by the rules of its configuration and no code of the library but the
/// file reader.
std::map<std::string, plain_matrix> dense_updates(const std::filesystem::path& directory)
{
    const auto config = config_of(directory);
    const auto tensors = read_values(directory / weights_file);
    std::map<std::string, plain_matrix> updates;
    const std::string prefix = "base_model.model.", a_end = ".lora_A.weight", b_end = ".lora_B.weight";
    for (const auto& [name, a] : tensors) {
        if (!name.ends_with(a_end)) { continue; }
        const auto module = name.substr(prefix.size(), name.size() - prefix.size() - a_end.size());
        const auto& b = tensors.at(prefix + module + b_end);
        const auto out = static_cast<std::size_t>(b.shape[0]), rank = static_cast<std::size_t>(b.shape[1]),
                   in = static_cast<std::size_t>(a.shape[1]);
        REQUIRE(a.shape[0] == b.shape[1]);
        CHECK(config["rank_pattern"].value(module, config["r"].get<std::size_t>()) == rank);
        const double scaling =
            config["alpha_pattern"].value(module, config["lora_alpha"].get<double>()) / static_cast<double>(rank);
        auto& x = updates[module] = reference::zeros(out, in);
        for (std::size_t i = 0; i < out; ++i) {
            for (std::size_t j = 0; j < in; ++j) {
                for (std::size_t k = 0; k < rank; ++k) {
                    x[i][j] += scaling * b.values[i * rank + k] * a.values[k * in + j];
                }
            }
        }
    }
    CHECK(config["peft_type"] == "LORA");
    CHECK(config["use_rslora"] == false);
    return updates;
}

/// √Σσ² beyond the first q.
double tail(const plain_matrix& x, std::size_t q)
{
    const auto sigma = reference::singular_values(x);
    double sum = 0;
    for (std::size_t i = q; i < sigma.size(); ++i) { sum += sigma[i] * sigma[i]; }
    return std::sqrt(sum);
}

void check_close(const std::map<std::string, plain_matrix>& found, const std::map<std::string, plain_matrix>& expected,
    double tolerance = 1e-5)
{
    REQUIRE(found.size() == expected.size());
    for (const auto& [name, x] : expected) {
        CAPTURE_BOUND(name);
        REQUIRE(found.contains(name));
        CHECK(reference::distance(found.at(name), x) <= tolerance * (1 + reference::norm(x)));
    }
}

std::vector<std::string> with(std::vector<std::string> arguments, const std::vector<std::string>& more)
{
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
}

const std::vector<std::string> peru{"peru-lora", "--adapter", "task", "--out", "out"};
const std::vector<std::string> extract{
    "extract-lora", "--base", "base.safetensors", "--task", "task.safetensors", "--out", "out"};
const std::vector<std::string> merge_two{"merge-lora", "--adapter", "a", "--adapter", "b", "--out", "out"};

void write_pair(const scratch& folder)
{
    taskvec::write_peft(folder / "a", three_layers(1));
    taskvec::write_peft(folder / "b", three_layers(20));
}

values_tensor tensor(std::int64_t rows, std::int64_t cols, std::uint64_t seed,
    taskvec::dtype type = taskvec::dtype::f32, float scale = 1)
{
    values_tensor x{type, {rows, cols}, {}};
    const taskvec::random_stream stream(seed, 0);
    for (std::size_t i = 0; i < taskvec::element_count(x.shape); ++i) {
        x.values.push_back(rounded(type, scale * static_cast<float>(stream.normal(i))));
    }
    return x;
}

plain_matrix difference(const values_tensor& a, const values_tensor& b)
{
    const auto rows = static_cast<std::size_t>(a.shape[0]), cols = static_cast<std::size_t>(a.shape[1]);
    auto x = reference::zeros(rows, cols);
    for (std::size_t i = 0; i < rows * cols; ++i) {
        x[i / cols][i % cols] = static_cast<double>(a.values[i]) - static_cast<double>(b.values[i]);
    }
    return x;
}

/// A base and a task that differ in two matrices, a bias and a table whose name does not end in ".weight".
std::pair<values_model, values_model> two_models()
{
    values_model base{{"layers.0.weight", tensor(20, 30, 1)}, {"layers.1.weight", tensor(12, 10, 2)},
        {"layers.2.weight", tensor(5, 5, 3)}, {"layers.0.bias", {taskvec::dtype::f32, {20}, std::vector<float>(20, 1)}},
        {"table", tensor(4, 4, 4)}};
    values_model task = base;
    for (const auto* name : {"layers.0.weight", "layers.1.weight"}) {
        const auto noise = tensor(base[name].shape[0], base[name].shape[1], 9, taskvec::dtype::f32, 0.1f);
        for (std::size_t i = 0; i < noise.values.size(); ++i) { task[name].values[i] += noise.values[i]; }
    }
    task["layers.0.bias"].values[3] = 2;
    task["table"].values[0] += 1;
    return {base, task};
}

std::map<std::string, plain_matrix> changes(const values_model& base, const values_model& task)
{
    return {{"layers.0", difference(task.at("layers.0.weight"), base.at("layers.0.weight"))},
        {"layers.1", difference(task.at("layers.1.weight"), base.at("layers.1.weight"))}};
}

} // namespace

TEST_CASE("peru-lora writes the best approximation of every layer, keeps layers of smaller rank whole, and reports "
          "what was lost")
{
    const scratch folder;
    taskvec::write_peft(folder / "task", three_layers());
    const auto before = dense_updates(folder / "task");
    const auto result = run(folder, with(peru, {"--rank", "3", "--report", "r.json"}));
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    CHECK(result.out.find("1 of smaller rank kept whole") != std::string::npos);
    const auto after = dense_updates(folder / "out");
    const auto report = json_of(folder / "r.json");
    REQUIRE(report["layers"].size() == 3);
    double norm = 0, error = 0;
    for (const auto& layer : report["layers"]) {
        const auto name = layer["name"].get<std::string>();
        CAPTURE(name);
        const auto& x = before.at(name);
        const bool whole = name == "layers.1.q";
        const double best = whole ? 0 : tail(x, 3), size = reference::norm(x);
        CHECK(reference::distance(x, after.at(name)) == doctest::Approx(best).epsilon(1e-5));
        CHECK(layer["whole"] == whole);
        CHECK(layer["rank_before"] == (whole ? 2 : 4));
        CHECK(layer["rank"] == (whole ? 2 : 3));
        CHECK(layer["shape"][0] == x.size());
        CHECK(layer["shape"][1] == x[0].size());
        CHECK(layer["relative_error"].get<double>() == doctest::Approx(best / size).epsilon(1e-5));
        CHECK(layer["energy"].get<double>() == doctest::Approx(1 - best * best / (size * size)).epsilon(1e-5));
        norm += size * size;
        error += best * best;
    }
    CHECK(report["relative_error"].get<double>() == doctest::Approx(std::sqrt(error / norm)).epsilon(1e-5));
    CHECK(report["parameters"] == 3 * (9 + 7 + 1) + 3 * (6 + 7 + 1) + 2 * (8 + 8));
    for (const char* field : {"seconds", "bytes_read", "bytes_written", "peak_memory"}) {
        CHECK(report[field].get<double>() > 0);
    }
    // Kept whole means bit for bit.
    const auto was = read_values(folder / "task" / weights_file), is = read_values(folder / "out" / weights_file);
    for (const auto* side :
        {"base_model.model.layers.1.q.lora_A.weight", "base_model.model.layers.1.q.lora_B.weight"}) {
        CHECK(was.at(side).values == is.at(side).values);
    }
}

TEST_CASE("peru-lora --energy takes the smallest rank that keeps the share, layer by layer")
{
    const scratch folder;
    taskvec::write_peft(folder / "task", three_layers());
    REQUIRE(run(folder, with(peru, {"--energy", "0.8", "--report", "r.json"})).code == 0);
    const auto before = dense_updates(folder / "task"), after = dense_updates(folder / "out");
    const auto report = json_of(folder / "r.json");
    for (const auto& layer : report["layers"]) {
        const auto& x = before.at(layer["name"]);
        const auto rank = layer["rank"].get<std::size_t>();
        const double size = reference::norm(x), allowed = std::sqrt(0.2) * size;
        CHECK(tail(x, rank) <= allowed);
        if (rank > 1) { CHECK(tail(x, rank - 1) > allowed); }
        CHECK(reference::distance(x, after.at(layer["name"]))
            == doctest::Approx(tail(x, rank)).epsilon(1e-5).scale(size));
    }
}

TEST_CASE("peru-lora keeps dtypes, biases and the configuration; --dtype changes the factors")
{
    const scratch folder;
    auto given = three_layers();
    given.config = {{"bias", "all"}, {"target_modules", "layers\\..*"}, {"lora_dropout", 0.25}, {"use_rslora", true},
        {"base_model_name_or_path", "some/base"}};
    given.others["layers.0.q.bias"] = {taskvec::dtype::f32, {1}, std::vector<std::byte>(4)};
    taskvec::write_peft(folder / "task", given, {.output = taskvec::dtype::bf16});
    REQUIRE(run(folder, with(peru, {"--rank", "1"})).code == 0);
    const auto config = config_of(folder / "out");
    CHECK(config["target_modules"] == "layers\\..*");
    CHECK(config["lora_dropout"] == 0.25);
    CHECK(config["base_model_name_or_path"] == "some/base");
    CHECK(config["r"] == 1);
    for (const auto& [name, x] : read_values(folder / "out" / weights_file)) {
        CHECK(x.dtype == (name.ends_with("bias") ? taskvec::dtype::f32 : taskvec::dtype::bf16));
    }
    REQUIRE(run(folder, with(peru, {"--rank", "1", "--dtype", "F16"})).code == 0);
    CHECK(read_values(folder / "out" / weights_file).at("base_model.model.layers.0.q.lora_A.weight").dtype
        == taskvec::dtype::f16);
}

TEST_CASE("peru-lora refuses ranks that no layer has, and says the highest; --clamp lowers them")
{
    const scratch folder;
    taskvec::write_peft(folder / "task", three_layers());
    refused(
        folder, with(peru, {"--rank", "5"}), 1, "'task': rank 5 asked for, but the ranks of its layers are at most 4");
    refused(folder, with(peru, {"--rank", "0"}), 2, "--rank is 0");
    refused(folder, with(peru, {"--energy", "0"}), 2, "--energy is 0");
    refused(folder, with(peru, {"--energy", "1.5"}), 2, "--energy is 1.5");
    refused(folder, with(peru, {"--rank", "2", "--memory", "much"}), 2, "--memory");
    refused(folder, peru, 2, "--rank");
    refused(folder, with(peru, {"--rank", "2", "--energy", "0.5"}), 2, "--energy");
    refused(folder, with(peru, {"--rank", "two"}), 2, "--rank");
    refused(folder, with(peru, {"--rank=-1"}), 2, "--rank");
    refused(folder, {"peru-lora", "--rank", "2", "--out", "out"}, 2, "--adapter");
    refused(folder, {"peru-lora", "--rank", "2", "--adapter", "none", "--out", "out"}, 1, "none");
    CHECK(run(folder, {"peru-lora", "--help"}).out.find("Example:") != std::string::npos);
    REQUIRE(run(folder, with(peru, {"--rank", "5", "--clamp"})).code == 0);
    check_close(dense_updates(folder / "out"), dense_updates(folder / "task"));
}

TEST_CASE("peru-lora refuses by name what is not a sound LoRA adapter")
{
    const scratch folder;
    const auto attempt = [&](auto&& spoil, const std::string& because) {
        std::filesystem::remove_all(folder / "task");
        taskvec::write_peft(folder / "task", three_layers());
        spoil();
        refused(folder, with(peru, {"--rank", "1"}), 1, because);
    };
    const auto configured = [&](const char* field, const nlohmann::json& value) {
        auto config = config_of(folder / "task");
        config[field] = value;
        spill(folder / "task" / config_file, config.dump());
    };
    const auto stored = [&](auto&& change) {
        auto tensors = read_values(folder / "task" / weights_file);
        change(tensors);
        write_values(folder / "task" / weights_file, tensors);
    };
    const std::string half = "base_model.model.layers.0.q.lora_B.weight";
    attempt([&] { configured("peft_type", "LOHA"); }, "LOHA");
    attempt([&] { configured("use_dora", true); }, "use_dora");
    attempt([&] { configured("modules_to_save", {"head"}); }, "modules_to_save");
    attempt([&] { configured("rank_pattern", {{"no_such_module", 3}, {"layers.1.q", 2}}); }, "no_such_module");
    attempt([&] { configured("r", 7); }, "rank 4");
    attempt([&] { stored([&](auto& x) { x.erase(half); }); }, "half of its update is missing");
    attempt([&] { stored([&](auto& x) { x.at(half).values[5] = std::nanf(""); }); }, "layers.0.q");
    attempt([&] { stored([&](auto& x) { x.at(half).values[5] = INFINITY; }); }, "infinity");
    attempt([&] { stored([&](auto& x) { x.at(half) = tensor(9, 3, 1); }); }, "ranks differ");
    attempt(
        [&] {
            configured("bias", "all");
            stored([&](auto& x) {
                x["base_model.model.layers.0.q.bias"] = {taskvec::dtype::f32, {2}, {1, std::nanf("")}};
            });
        },
        "tensor 'layers.0.q.bias' holds NaN at entry 1");
    attempt([&] { configured("r", -4); }, "r is -4");
    attempt([&] { configured("lora_alpha", nullptr); }, "lora_alpha is null");
    attempt([&] { configured("target_modules", 3); }, "target_modules is 3");
    attempt([&] { spill(folder / "task" / weights_file, "no"); }, weights_file);
    attempt([&] { std::filesystem::remove(folder / "task" / config_file); }, config_file);
}

TEST_CASE(
    "extract-lora: base plus adapter is the fine-tuned weight within the predicted error, which is the best there is")
{
    const scratch folder;
    const auto [base, task] = two_models();
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    for (const bool randomized : {false, true}) {
        CAPTURE(randomized);
        const auto result =
            run(folder, with(extract, {"--rank", "4", "--report", "r.json", randomized ? "--randomized" : "--quiet"}));
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(result.err.find("'layers.0.bias' changed") != std::string::npos);
        CHECK(result.err.find("'table' changed") != std::string::npos);
        const auto report = json_of(folder / "r.json");
        CHECK(report["left_out"] == nlohmann::json({"layers.0.bias", "table"}));
        CHECK(report["left_out_norm"].get<double>() == doctest::Approx(std::sqrt(2.0)));
        CHECK(report["unchanged"] == nlohmann::json({"layers.2.weight"}));
        CHECK(report["parameters"] == 4 * (20 + 30 + 1) + 4 * (12 + 10 + 1));
        const auto found = dense_updates(folder / "out");
        CHECK(found.size() == 2);
        for (const auto& [name, x] : changes(base, task)) {
            const double best = tail(x, 4), error = reference::distance(found.at(name), x);
            CHECK(error >= best * (1 - 1e-5));
            CHECK(error <= best * (randomized ? 1.02 : 1 + 1e-5));
            const auto& layer = report["layers"][name == "layers.0" ? 0 : 1];
            CHECK(layer["name"] == name);
            CHECK(layer["relative_error"].get<double>() == doctest::Approx(error / reference::norm(x)).epsilon(1e-4));
        }
        const auto config = config_of(folder / "out");
        CHECK(config["target_modules"] == nlohmann::json({"layers.0", "layers.1"}));
        CHECK(config["r"] == 4);
        CHECK(config["lora_alpha"] == 4);
    }
    // At full rank the adapter is the change itself.
    REQUIRE(run(folder, with(extract, {"--energy", "1"})).code == 0);
    check_close(dense_updates(folder / "out"), changes(base, task));
    // A layer smaller than the rank is kept whole.
    REQUIRE(run(folder, with(extract, {"--rank", "15", "--report", "r.json"})).code == 0);
    const auto report = json_of(folder / "r.json");
    CHECK(report["layers"][0]["rank"] == 15);
    CHECK(report["layers"][0]["whole"] == false);
    CHECK(report["layers"][1]["rank"] == 10);
    CHECK(report["layers"][1]["whole"] == true);
    CHECK(config_of(folder / "out")["rank_pattern"]["layers.1"] == 10);
}

TEST_CASE("extract-lora of a change of low rank finds it: extracting undoes applying")
{
    const scratch folder;
    taskvec::write_peft(folder / "source", three_layers());
    const auto updates = dense_updates(folder / "source");
    values_model base, task;
    for (const auto& [name, x] : updates) {
        auto& weight = base[name + ".weight"] =
            tensor(static_cast<std::int64_t>(x.size()), static_cast<std::int64_t>(x[0].size()), 7);
        auto& tuned = task[name + ".weight"] = weight;
        for (std::size_t i = 0; i < weight.values.size(); ++i) {
            tuned.values[i] += static_cast<float>(x[i / x[0].size()][i % x[0].size()]);
        }
    }
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    REQUIRE(run(folder, with(extract, {"--rank", "4"})).code == 0);
    check_close(dense_updates(folder / "out"), updates);
}

TEST_CASE("extract-lora keeps the base's dtype, and --include and --exclude choose tensors")
{
    const scratch folder;
    values_model base{
        {"a.weight", tensor(8, 9, 1, taskvec::dtype::bf16)}, {"b.weight", tensor(8, 9, 2, taskvec::dtype::f16)}},
        task = base;
    for (auto& [name, x] : task) {
        for (auto& value : x.values) { value = rounded(x.dtype, 2 * value); }
    }
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    REQUIRE(run(folder, with(extract, {"--rank", "8"})).code == 0);
    auto found = read_values(folder / "out" / weights_file);
    CHECK(found.at("base_model.model.a.lora_A.weight").dtype == taskvec::dtype::bf16);
    CHECK(found.at("base_model.model.b.lora_B.weight").dtype == taskvec::dtype::f16);
    REQUIRE(run(folder, with(extract, {"--rank", "8", "--dtype", "f32", "--exclude", "^b"})).code == 0);
    found = read_values(folder / "out" / weights_file);
    CHECK(found.size() == 2);
    CHECK(found.at("base_model.model.a.lora_A.weight").dtype == taskvec::dtype::f32);
    check_close(dense_updates(folder / "out"), {{"a", difference(task.at("a.weight"), base.at("a.weight"))}});
    refused(folder, with(extract, {"--rank", "2", "--include", "nothing"}), 1, "--include 'nothing'");
    refused(folder, with(extract, {"--rank", "2", "--exclude", "nothing"}), 1, "--exclude 'nothing'");
    refused(folder, with(extract, {"--rank", "2", "--embedding", "nothing"}), 1, "--embedding 'nothing'");
    refused(folder, with(extract, {"--rank", "2", "--include", "("}), 2, "regular expression");
    task["added.weight"] = tensor(3, 3, 5); // as a head for another task has it
    write_values(folder / "task.safetensors", task);
    refused(
        folder, with(extract, {"--rank", "2"}), 1, "'added.weight' of 'task.safetensors' is not in 'base.safetensors'");
    REQUIRE(run(folder, with(extract, {"--rank", "2", "--include", "^[ab][.]"})).code == 0);
}

TEST_CASE("extract-lora --sparse-rest keeps what no LoRA can hold, as a delta that goes with the adapter")
{
    const scratch folder;
    values_model base{{"a.weight", tensor(8, 9, 1)}, {"a.bias", tensor(8, 1, 2)}, {"norm", tensor(5, 1, 3)},
        {"same", tensor(4, 1, 4)}},
        task = base;
    for (auto& value : task.at("a.weight").values) { value *= 2; }
    for (auto& value : task.at("a.bias").values) { value *= 2; } // doubling is exact
    task.at("norm").values[3] *= 2;
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    const auto rest = folder / "out/rest.delta.safetensors";
    REQUIRE(run(folder, with(extract, {"--rank", "8", "--sparse-rest", "--report", "r.json"})).code == 0);
    CHECK(json_of(folder / "r.json")["rest"]["entries"] == 9);
    REQUIRE(
        run(folder, {"apply", "--base", "base.safetensors", "--delta", rest.string(), "--out", "rested.safetensors"})
            .code
        == 0);
    const auto rested = read_values(folder / "rested.safetensors");
    CHECK(rested.at("a.bias").values == task.at("a.bias").values);
    CHECK(rested.at("norm").values == task.at("norm").values);
    CHECK(rested.at("same").values == base.at("same").values);
    CHECK(rested.at("a.weight").values == base.at("a.weight").values);
    // The adapter and its rest are read side by side, and change together.
    REQUIRE(
        run(folder, {"fuse", "--base", "rested.safetensors", "--adapter", "out", "--out", "o.safetensors"}).code == 0);
    const auto fused = read_values(folder / "o.safetensors");
    for (std::size_t i = 0; i < 72; ++i) {
        CHECK(fused.at("a.weight").values[i] == doctest::Approx(task.at("a.weight").values[i]).epsilon(1e-4));
    }
    REQUIRE(run(folder, with(extract, {"--rank", "8"})).code == 0);
    CHECK_FALSE(std::filesystem::exists(rest));
    const auto none = run(folder, with(extract, {"--rank", "8", "--sparse-rest", "--include", "weight$"}));
    CHECK(none.code == 0);
    CHECK(none.err.find("nothing else changed") != std::string::npos);
    CHECK_FALSE(std::filesystem::exists(rest));
}

TEST_CASE("extract-lora turns embeddings, and with --fan-in-fan-out all weights, the way that PEFT factors them")
{
    const scratch folder;
    values_model base{{"embed_tokens.weight", tensor(11, 4, 1)}, {"own_table.weight", tensor(7, 4, 2)},
        {"c_attn.weight", tensor(4, 12, 3)}},
        task = base;
    for (auto& [name, x] : task) {
        for (std::size_t i = 0; i < x.values.size(); ++i) { x.values[i] += static_cast<float>(i % 7) - 3; }
    }
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    REQUIRE(run(folder, with(extract, {"--energy", "1", "--fan-in-fan-out", "--embedding", "^own_table$"})).code == 0);
    CHECK(config_of(folder / "out")["fan_in_fan_out"] == true);
    const auto found = taskvec::read_peft((folder / "out").string());
    CHECK(found.embeddings == std::set<std::string>{"embed_tokens", "own_table"});
    for (const auto& [name, update] : found.updates) {
        CAPTURE_BOUND(name);
        const auto change = difference(task.at(name + ".weight"), base.at(name + ".weight"));
        const auto made = reference::dense(update);
        REQUIRE(made.size() == change[0].size());
        for (std::size_t i = 0; i < change.size(); ++i) {
            for (std::size_t j = 0; j < change[0].size(); ++j) {
                CHECK(made[j][i] == doctest::Approx(change[i][j]).epsilon(1e-4).scale(10));
            }
        }
    }
}

TEST_CASE(
    "extract-lora says where PEFT does not find the experts of a model, and that parameters of several are left out")
{
    const scratch folder;
    const std::string name = "layers.0.mlp.experts.1.up_proj.weight", stack = "layers.1.mlp.experts.down_proj";
    values_model base{{name, tensor(4, 5, 1)}, {stack, tensor(6, 4, 2)}},
        task{{name, tensor(4, 5, 3)}, {stack, tensor(6, 4, 4)}};
    base[stack].shape = task[stack].shape = {2, 3, 4};
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    const auto done = run(folder, with(extract, {"--rank", "2"}));
    REQUIRE_MESSAGE(done.code == 0, done.err);
    CHECK(done.err.find(
              "'layers.0.mlp.experts.1.up_proj' is one of the experts that transformers 5 keeps as one parameter")
        != std::string::npos);
    CHECK(done.err.find("left out: '" + stack + "'") != std::string::npos);
    CHECK(run(folder, {"fuse", "--base", "base.safetensors", "--adapter", "out", "--out", "fused.safetensors"}).code
        == 0);
}

TEST_CASE("extract-lora refuses models that do not fit, ranks that no layer has, and models that do not differ")
{
    const scratch folder;
    const auto [base, task] = two_models();
    write_values(folder / "base.safetensors", base);
    const auto attempt = [&, &task = task](auto&& spoil, const std::string& because) {
        auto spoilt = task;
        spoil(spoilt);
        write_values(folder / "task.safetensors", spoilt);
        refused(folder, with(extract, {"--rank", "2"}), 1, because);
    };
    attempt([](auto& model) { model.erase("layers.1.weight"); }, "layers.1.weight");
    attempt([](auto& model) { model["layers.9.weight"] = tensor(2, 2, 1); }, "layers.9.weight");
    attempt([](auto& model) { model["layers.1.weight"] = tensor(10, 12, 1); }, "layers.1.weight");
    attempt([](auto& model) { model["layers.1.weight"].values[7] = std::nanf(""); },
        "tensor 'layers.1.weight' of 'task.safetensors' holds NaN at index 7");
    attempt([](auto& model) { model["layers.0.bias"].values[2] = INFINITY; },
        "tensor 'layers.0.bias' of 'task.safetensors' holds infinity at index 2");
    attempt([&base = base](auto& model) { model = base; }, "do not differ");
    write_values(folder / "task.safetensors", task);
    refused(folder, with(extract, {"--rank", "21"}), 1,
        "'task.safetensors': rank 21 asked for, but the ranks of its layers are at most 20");
    refused(folder, with(extract, {"--rank", "2", "--embedding", "("}), 2, "--embedding: '('");
    refused(folder, with(extract, {"--rank", "0"}), 2, "--rank is 0");
    refused(folder, extract, 2, "--rank");
    refused(folder, with(extract, {"--rank", "2", "--device", "cuda"}), 2, "--device");
    refused(folder, {"extract-lora", "--base", "base.safetensors", "--rank", "1", "--out", "out"}, 2, "--task");
}

TEST_CASE("extract-lora goes past tensors that one model has more, and past integers that are saved no more")
{
    const scratch folder;
    const auto [base, task] = two_models();
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    REQUIRE(run(folder, with(extract, {"--rank", "2"})).code == 0);
    const auto expected = slurp(folder / "out/adapter_model.safetensors");
    const auto extracted = [&] {
        std::filesystem::remove_all(folder / "out");
        const auto done = run(folder, with(extract, {"--rank", "2", "--exclude", "^v_head"}));
        CHECK_MESSAGE(done.code == 0, done.err);
        return done.code == 0 && slurp(folder / "out/adapter_model.safetensors") == expected;
    };
    auto more = task;
    more["v_head.weight"] = tensor(1, 4, 1);
    write_values(folder / "task.safetensors", more);
    std::filesystem::remove_all(folder / "out");
    refused(folder, with(extract, {"--rank", "2"}), 1, "the tool: --exclude");
    CHECK(extracted());
    write_values(folder / "task.safetensors", task);
    auto mine = base;
    mine["v_head.weight"] = tensor(1, 4, 1);
    write_values(folder / "base.safetensors", mine);
    CHECK(extracted());
    refused(folder, with(extract, {"--rank", "2", "--exclude", "nowhere"}), 1,
        "matches no tensor of 'base.safetensors' and 'task.safetensors'");
    // A buffer of integers in the base alone.
    write_values(folder / "base.safetensors", base);
    {
        const auto plain = taskvec::open_model(folder / "base.safetensors");
        auto model = plain.model();
        const std::vector<std::int64_t> ids{0, 1};
        model.insert("position_ids", taskvec::const_tensor_ref{ids.data(), taskvec::dtype::i64, {2}});
        taskvec::write_safetensors(folder / "buffered.safetensors", model, {}, taskvec::durability::process);
    }
    std::filesystem::remove_all(folder / "out");
    auto line = with(extract, {"--rank", "2"});
    std::replace(line.begin(), line.end(), std::string("base.safetensors"), std::string("buffered.safetensors"));
    const auto done = run(folder, line);
    REQUIRE_MESSAGE(done.code == 0, done.err);
    CHECK(slurp(folder / "out/adapter_model.safetensors") == expected);
}

TEST_CASE(
    "merge-lora linear is exact: the weighted sum of the updates, of different ranks and targets, negative weights too")
{
    const scratch folder;
    auto a = three_layers(1), b = three_layers(20);
    b.updates.erase("layers.0.v");
    b.updates["layers.0.q"] = normal_update<float>(9, 7, 1, 30, 4);
    b.updates["head"] = normal_update<float>(3, 9, 2, 31, 0.5);
    a.config["target_modules"] = "layers.*";
    taskvec::write_peft(folder / "a", a);
    taskvec::write_peft(folder / "b", b);
    auto expected = dense_updates(folder / "a");
    for (auto& [name, x] : expected) {
        for (auto& row : x) {
            for (auto& value : row) { value *= 0.5 * 0.75; }
        }
    }
    for (const auto& [name, x] : dense_updates(folder / "b")) {
        auto& sum = expected.emplace(name, reference::zeros(x.size(), x[0].size())).first->second;
        reference::add(sum, x, 0.5 * -2);
    }
    const std::vector<std::string> merge{"merge-lora", "--method", "linear", "--adapter", "a=0.75", "--adapter", "b=-2",
        "--lambda", "0.5", "--out", "out"};
    const auto result = run(folder, with(merge, {"--report", "r.json"}));
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    check_close(dense_updates(folder / "out"), expected);
    auto report = json_of(folder / "r.json");
    CHECK(report["layers"].size() == 4);
    CHECK(report["layers"][1]["rank"] == 5); // layers.0.q: 4 and 1
    CHECK(report["relative_error"] == 0);
    CHECK(report["adapters"][1]["weight"] == -2);
    CHECK(config_of(folder / "out")["target_modules"].size()
        == 4); // all of them, since no pattern of one adapter names the other's

    REQUIRE(run(folder, with(merge, {"--rank", "3", "--report", "r.json"})).code == 0);
    const auto found = dense_updates(folder / "out");
    report = json_of(folder / "r.json");
    for (const auto& layer : report["layers"]) {
        const auto name = layer["name"].get<std::string>();
        CAPTURE(name);
        const auto& x = expected.at(name);
        CHECK(reference::distance(found.at(name), x)
            == doctest::Approx(tail(x, 3)).epsilon(1e-5).scale(reference::norm(x)));
        CHECK(layer["relative_error"].get<double>() == doctest::Approx(tail(x, 3) / reference::norm(x)).epsilon(1e-5));
        CHECK(layer["rank"] == std::min<std::size_t>(3, layer["rank_before"]));
    }
    refused(folder, with(merge, {"--rank", "9"}), 1, "at most 5");
    refused(folder, with(merge, {"--rank", "0"}), 2, "--rank is 0");
}

TEST_CASE("merge-lora ties merges the dense updates as TIES is defined, and decomposes the result")
{
    const scratch folder;
    std::vector<adapter> adapters{three_layers(1), three_layers(20), three_layers(40)};
    std::vector<float> base;
    std::vector<std::vector<float>> tasks(3);
    std::vector<std::size_t> sizes;
    for (std::size_t t = 0; t < 3; ++t) {
        for (auto& [name, update] :
            adapters[t].updates) { // whole numbers: the products are exact, with many equal magnitudes
            update.scaling = 0.5;
            for (auto* factor : {&update.a, &update.b}) {
                for (std::size_t i = 0; i < factor->size(); ++i) { factor->data()[i] = std::round(factor->data()[i]); }
            }
        }
        taskvec::write_peft(folder / std::string(1, static_cast<char>('a' + t)), adapters[t]);
        sizes.clear();
        for (const auto& [name, x] : dense_updates(folder / std::string(1, static_cast<char>('a' + t)))) {
            sizes.push_back(x.size() * x[0].size());
            for (const auto& row : x) { tasks[t].insert(tasks[t].end(), row.begin(), row.end()); }
        }
    }
    base.assign(tasks[0].size(), 0);
    const auto attempt = [&](const std::vector<std::string>& more, taskvec::ties_options options) {
        options.weights = {1, 2, 0.5};
        const auto vector = reference::ties<float>(base, tasks, sizes, options);
        const auto result = run(folder,
            with({"merge-lora", "--method", "ties", "--adapter", "a", "--adapter", "b=2", "--adapter", "c=0.5",
                     "--energy", "1", "--out", "out"},
                more));
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        std::size_t at = 0;
        for (const auto& [name, x] : dense_updates(folder / "out")) {
            for (const auto& row : x) {
                for (const double value : row) {
                    CHECK(value == doctest::Approx(vector[at++]).epsilon(1e-4).scale(10));
                }
            }
        }
        CHECK(at == vector.size());
    };
    attempt({}, {});
    attempt({"--density", "0.5", "--lambda", "0.7", "--merge-weights", "sum"},
        {.density = 0.5, .lambda = 0.7, .combine = taskvec::disjoint_merge::sum});
    attempt({"--scope", "tensor", "--randomized"}, {.scope = taskvec::scope::tensor});
    attempt({"--semantics", "peft", "--density", "0.4"}, [] {
        auto options = taskvec::ties_options::as_in_peft();
        options.density = 0.4;
        return options;
    }());
    REQUIRE(run(folder,
                {"merge-lora", "--method", "ties", "--adapter", "a", "--adapter", "b", "--rank", "2", "--out", "out",
                    "--report", "r.json"})
                .code
        == 0);
    const auto report = json_of(folder / "r.json");
    for (const auto& layer : report["layers"]) { CHECK(layer["rank"] == 2); }
    refused(folder, {"merge-lora", "--method", "ties", "--adapter", "a", "--adapter", "b", "--out", "o"}, 2, "--rank");
    refused(folder, {"merge-lora", "--method", "ties", "--adapter", "a", "--adapter", "b", "--out", "o", "--rank", "9"},
        1, "at most 8");
    refused(folder,
        {"merge-lora", "--method", "ties", "--adapter", "a", "--adapter", "b=-1", "--out", "o", "--rank", "1"}, 1,
        "negative");
    refused(folder, {"merge-lora", "--method", "ties", "--adapter", "a", "--density", "0", "--out", "o", "--rank", "1"},
        2, "--density");
}

TEST_CASE("merge-lora --space phi merges the parameters around the initialisation, and fold-llora makes a plain "
          "adapter of the result")
{
    const scratch folder;
    const auto init = three_layers(1);
    auto a = three_layers(20), b = three_layers(40);
    taskvec::write_peft(folder / "init", init);
    taskvec::write_peft(folder / "a", a);
    taskvec::write_peft(folder / "b", b);
    const std::vector<std::string> merge{
        "merge-lora", "--space", "phi", "--init", "init", "--adapter", "a=2", "--adapter", "b=-1", "--out", "out"};
    const auto phi0 = read_values(folder / "init" / weights_file), phi_a = read_values(folder / "a" / weights_file),
               phi_b = read_values(folder / "b" / weights_file);
    const auto result = run(folder, with(merge, {"--lambda", "0.25", "--report", "r.json"}));
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    const auto merged = read_values(folder / "out" / weights_file);
    REQUIRE(merged.size() == phi0.size());
    for (const auto& [name, x] : merged) {
        for (std::size_t i = 0; i < x.values.size(); ++i) {
            const double from = phi0.at(name).values[i];
            CHECK(x.values[i]
                == doctest::Approx(
                    from + 0.25 * (2 * (phi_a.at(name).values[i] - from) - (phi_b.at(name).values[i] - from)))
                    .epsilon(1e-5));
        }
    }
    CHECK(json_of(folder / "r.json")["layers"][2]["rank"] == 2);

    // Linearized layers add up: the fold of the merged adapter is B0·A0 plus λ times the weighted changes, each to
    // first order.
    REQUIRE(run(folder, {"fold-llora", "--init", "init", "--adapter", "out", "--out", "plain"}).code == 0);
    std::map<std::string, plain_matrix> expected;
    for (const auto& [name, start] : init.updates) {
        auto& x = expected[name] = reference::zeros(start.out(), start.in());
        for (std::size_t i = 0; i < start.out(); ++i) {
            for (std::size_t j = 0; j < start.in(); ++j) {
                for (std::size_t k = 0; k < start.rank(); ++k) {
                    const double b0 = start.b(i, k), a0 = start.a(k, j);
                    const auto change = [&, &name = name](const adapter& task) {
                        return b0 * (task.updates.at(name).a(k, j) - a0) + (task.updates.at(name).b(i, k) - b0) * a0;
                    };
                    x[i][j] += start.scaling * (b0 * a0 + 0.25 * (2 * change(a) - change(b)));
                }
            }
        }
    }
    check_close(dense_updates(folder / "plain"), expected);

    REQUIRE(run(folder, with(merge, {"--method", "average"})).code == 0);
    for (const auto& [name, x] : read_values(folder / "out" / weights_file)) {
        for (std::size_t i = 0; i < x.values.size(); ++i) {
            CHECK(x.values[i]
                == doctest::Approx(2 * phi_a.at(name).values[i] - phi_b.at(name).values[i]).epsilon(1e-5).scale(1));
        }
    }
    REQUIRE(run(folder,
                {"merge-lora", "--space", "phi", "--init", "init", "--adapter", "a", "--adapter", "b", "--out", "out",
                    "--method", "ties", "--density", "0.5"})
                .code
        == 0);
    std::vector<std::vector<float>> tasks(2);
    std::vector<float> base;
    std::vector<std::size_t> sizes;
    // Names sort by module and then A before B here as in the file.
    for (const auto& [name, x] : phi0) {
        base.insert(base.end(), x.values.begin(), x.values.end());
        tasks[0].insert(tasks[0].end(), phi_a.at(name).values.begin(), phi_a.at(name).values.end());
        tasks[1].insert(tasks[1].end(), phi_b.at(name).values.begin(), phi_b.at(name).values.end());
        sizes.push_back(x.values.size());
    }
    const auto vector = reference::ties<float>(base, tasks, sizes, {.density = 0.5});
    std::size_t at = 0;
    for (const auto& [name, x] : read_values(folder / "out" / weights_file)) {
        for (const float value : x.values) {
            CHECK(value == doctest::Approx(vector[at]).epsilon(1e-5).scale(1));
            ++at;
        }
    }
}

TEST_CASE("merge-lora --semantics peft makes what PEFT's add_weighted_adapter made")
{
    const scratch folder;
    const std::filesystem::path data = TASKVEC_TEST_DIR "/data/peft_merge";
    const auto index = json_of(data / "index.json");
    std::size_t cases = 0;
    for (const auto& [name, one] : index.items()) {
        CAPTURE_BOUND(name);
        ++cases;
        auto method = one["combination"].get<std::string>();
        const bool by_products = method.ends_with("svd");
        std::replace(method.begin(), method.end(), '_', '-');
        std::vector<std::string> arguments{"merge-lora", "--semantics", "peft", "--method", method, "--out", name};
        const auto adapters = one["adapters"].get<std::string>();
        for (std::size_t t = 0; t < adapters.size(); ++t) {
            arguments.insert(arguments.end(),
                {"--adapter", (data / adapters.substr(t, 1)).string() + "=" + one["weights"][t].dump()});
        }
        if (!one["density"].is_null()) { arguments.insert(arguments.end(), {"--density", one["density"].dump()}); }
        if (!one["rank"].is_null()) { arguments.insert(arguments.end(), {"--rank", one["rank"].dump()}); }
        if (one["majority_sign"] != "total") {
            arguments.insert(arguments.end(), {"--majority-sign", one["majority_sign"]});
        }
        const auto result = run(folder, arguments);
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(result.out.find("as PEFT") != std::string::npos);
        const auto found = read_values(folder / name / weights_file),
                   expected = read_values(data / (name + ".safetensors"));
        const auto factor = [&](const std::string& module, const std::string& side) {
            const auto stem = "base_model.model." + module + ".lora_";
            return found.at(
                found.contains(stem + side + ".weight") ? stem + side + ".weight" : stem + "embedding_" + side);
        };
        if (!by_products) {
            CHECK(found.size() == expected.size());
            for (const auto& [key, tensor] : expected) {
                CAPTURE_BOUND(key);
                const auto dot = key.rfind(".lora_");
                const auto made = factor(key.substr(0, dot), key.substr(dot + 6));
                CHECK(made.shape == tensor.shape);
                CHECK(made.values == tensor.values);
            }
            continue;
        }
        CHECK(found.size() == 2 * expected.size());
        for (const auto& [module, tensor] : expected) {
            CAPTURE_BOUND(module);
            const auto a = factor(module, "A"), b = factor(module, "B");
            const auto rank = static_cast<std::size_t>(a.shape[0]), in = a.values.size() / rank,
                       out = b.values.size() / rank;
            REQUIRE(tensor.values.size() == out * in);
            for (std::size_t i = 0; i < out * in; ++i) {
                double sum = 0;
                for (std::size_t k = 0; k < rank; ++k) {
                    sum += double{b.values[i / in * rank + k]} * double{a.values[k * in + i % in]};
                }
                CHECK(sum == doctest::Approx(tensor.values[i]).epsilon(2e-5));
            }
        }
    }
    CHECK(cases == 14);

    // Two ways to ask for one thing; DARE is the seed's alone; what does not go together.
    taskvec::write_peft(folder / "a", three_layers(1));
    taskvec::write_peft(folder / "b", three_layers(20));
    const auto must = [&](const std::vector<std::string>& more) {
        const auto result = run(folder, with(merge_two, more));
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        return slurp(folder / "out" / weights_file);
    };
    const auto once = must({"--semantics", "peft", "--method", "dare-ties", "--density", "0.5", "--seed", "3"});
    CHECK(must({"--semantics", "peft", "--method", "dare-ties", "--density", "0.5", "--seed", "3", "--threads", "3"})
        == once);
    CHECK(must({"--semantics", "peft", "--method", "dare-ties", "--density", "0.5", "--seed", "4"}) != once);
    CHECK(must({"--semantics", "peft", "--method", "svd", "--rank", "3"}).size()
        == must({"--method", "linear", "--rank", "3"}).size());
    const auto noted = run(folder, with(merge_two, {"--semantics", "peft", "--method", "linear", "--density", "0.5"}));
    CHECK(noted.err.find("--density has no effect on --method linear of PEFT") != std::string::npos);
    std::filesystem::remove_all(folder / "out");
    const auto usage = [&](const std::vector<std::string>& more, const std::string& words) {
        refused(folder, with(merge_two, more), 2, words);
    };
    usage({"--method", "cat"}, "say so by --semantics peft");
    usage({"--method", "dare-linear-svd", "--semantics", "mergekit"}, "say so by --semantics peft");
    usage({"--semantics", "peft", "--method", "magnitude-prune"}, "needs --density");
    usage({"--semantics", "peft", "--method", "ties"}, "needs --density");
    usage({"--semantics", "peft", "--method", "cat", "--rank", "3"}, "--method svd takes one");
    usage({"--semantics", "peft", "--method", "dare-ties", "--density", "0.5", "--rank", "3"},
        "--method dare-ties-svd takes one");
    usage({"--semantics", "peft", "--method", "svd", "--energy", "0.9"}, "knows ranks alone");
    usage({"--method", "linear", "--majority-sign", "frequency"}, "--majority-sign is of PEFT's");
    usage({"--semantics", "peft", "--method", "ties", "--density", "1.5"}, "density");
    auto other = three_layers(30);
    other.updates["layers.0.q"] = normal_update<float>(9, 7, 2, 40);
    taskvec::write_peft(folder / "b", other);
    refused(folder, with(merge_two, {"--semantics", "peft", "--method", "linear"}), 1,
        "'layers.0.q' has rank 2 in adapter 2 and 4 in adapter 1: PEFT merges factors of one rank");
}

TEST_CASE("merge-lora averages A and B separately only when asked by that name, and says what does not go together")
{
    const scratch folder;
    write_pair(folder);
    const auto first = read_values(folder / "a" / weights_file), second = read_values(folder / "b" / weights_file);
    REQUIRE(run(folder, with(merge_two, {"--method", "average-factors"})).code == 0);
    for (const auto& [name, x] : read_values(folder / "out" / weights_file)) {
        for (std::size_t i = 0; i < x.values.size(); ++i) {
            CHECK(x.values[i]
                == doctest::Approx(0.5 * (static_cast<double>(first.at(name).values[i]) + second.at(name).values[i]))
                    .epsilon(1e-5)
                    .scale(1));
        }
    }
    const auto noted = run(folder, with(merge_two, {"--method", "average-factors", "--lambda", "2"}));
    CHECK(noted.code == 0);
    CHECK(noted.err.find("--lambda has no effect") != std::string::npos);
    std::filesystem::remove_all(folder / "out");
    refused(folder, with(merge_two, {"--method", "average"}), 2, "average-factors");
    refused(folder, with(merge_two, {"--method", "average-factors", "--rank", "1"}), 2, "--rank");
    refused(folder, with(merge_two, {"--method", "average-factors", "--space", "phi", "--init", "a"}), 2,
        "--method average");
    refused(folder, with(merge_two, {"--space", "phi"}), 2, "--init");
    refused(folder, with(merge_two, {"--init", "a"}), 2, "--space phi");
    refused(folder, with(merge_two, {"--space", "phi", "--init", "a", "--rank", "2"}), 2, "--rank");
    refused(folder, with(merge_two, {"--method", "mean"}), 2, "--method");
    refused(folder, {"merge-lora", "--adapter", "=2", "--out", "out"}, 2, "--adapter");
    refused(folder, {"merge-lora", "--out", "out"}, 2, "--adapter");
    refused(folder,
        {"merge-lora", "--method", "average-factors", "--adapter", "a=1", "--adapter", "b=-1", "--out", "out"}, 1,
        "sum to 0");
    CHECK(run(folder, {"merge-lora", "--help"}).out.find("Example:") != std::string::npos);
}

TEST_CASE("merge-lora: GPT-2's adapter of its head says fan_in_fan_out false, and is of the same base")
{
    const scratch folder;
    const std::string layer = "transformer.h.0.attn.c_attn";
    adapter a, b;
    a.updates.emplace(layer, normal_update<float>(12, 4, 2, 1));
    a.config["fan_in_fan_out"] = true;
    b.updates.emplace(layer, normal_update<float>(12, 4, 2, 2));
    b.updates.emplace("lm_head", normal_update<float>(9, 4, 2, 3));
    b.config["fan_in_fan_out"] = false;
    taskvec::write_peft(folder / "a", a);
    taskvec::write_peft(folder / "b", b);
    for (const auto& order : {std::pair("a", "b"), std::pair("b", "a")}) {
        CAPTURE(order.first);
        std::filesystem::remove_all(folder / "out");
        const auto done =
            run(folder, {"merge-lora", "--adapter", order.first, "--adapter", order.second, "--out", "out"});
        REQUIRE_MESSAGE(done.code == 0, done.err);
        CHECK(config_of(folder / "out")["fan_in_fan_out"] == true);
        CHECK(read_values(folder / "out" / weights_file).at("base_model.model.lm_head.lora_B.weight").shape
            == taskvec::extents{9, 2});
    }
}

TEST_CASE("merge-lora refuses adapters that do not belong together")
{
    const scratch folder;
    const auto attempt = [&](auto&& spoil, const std::vector<std::string>& more, const std::string& because) {
        auto b = three_layers(20);
        spoil(b);
        std::filesystem::remove_all(folder / "b");
        taskvec::write_peft(folder / "b", b);
        refused(folder, with(merge_two, more), 1, because);
    };
    auto a = three_layers(1);
    a.config["base_model_name_or_path"] = "one/base";
    a.config["task_type"] = "CAUSAL_LM";
    taskvec::write_peft(folder / "a", a);
    attempt([](adapter& x) { x.updates["layers.0.q"] = normal_update<float>(9, 8, 4, 3); }, {}, "layers.0.q");
    attempt([](adapter& x) { x.config["base_model_name_or_path"] = "other/base"; }, {}, "other/base");
    attempt([](adapter& x) { x.config["fan_in_fan_out"] = true; }, {}, "fan_in_fan_out");
    attempt([](adapter& x) { x.embeddings.insert("layers.0.q"); }, {}, "embedding");
    attempt(
        [](adapter& x) {
            x.config["bias"] = "all";
            x.others["layers.0.q.bias"] = {taskvec::dtype::f32, {1}, std::vector<std::byte>(4)};
        },
        {}, "layers.0.q.bias");
    a.others["layers.0.q.base_layer.weight"] = {taskvec::dtype::f32, {9, 7}, std::vector<std::byte>(4 * 9 * 7)};
    taskvec::write_peft(folder / "a", a);
    attempt(
        [](adapter& x) {
            x.others["layers.0.q.base_layer.weight"] = {
                taskvec::dtype::f32, {9, 7}, std::vector<std::byte>(4 * 9 * 7, std::byte{1})};
        },
        {}, "different base weights 'layers.0.q.base_layer.weight'");
    attempt([](adapter& x) { x.updates.erase("layers.0.q"); }, {"--method", "average-factors"}, "layers.0.q");
    attempt([](adapter& x) { x.updates["layers.0.q"].scaling = 9; }, {"--method", "average-factors"}, "scaling");
    attempt([](adapter& x) { x.updates.erase("layers.0.q"); }, {"--space", "phi", "--init", "a"}, "layers.0.q");
    attempt([](adapter& x) { x.updates["layers.0.q"].scaling = 9; }, {"--space", "phi", "--init", "a"}, "scaling");
    attempt([](adapter&) { }, {"--space", "phi", "--init", "none"}, "none");
    auto other = three_layers(20);
    other.config["base_model_name_or_path"] = "other/base";
    std::filesystem::remove_all(folder / "b");
    taskvec::write_peft(folder / "b", other);
    CHECK(run(folder, with(merge_two, {"--any-base"})).code == 0);

    // An adapter that names no base does not hide another's; a base weight that only one carries is kept.
    std::filesystem::remove_all(folder / "b");
    taskvec::write_peft(folder / "b", three_layers(20));
    REQUIRE(run(folder, {"merge-lora", "--adapter", "b", "--adapter", "a", "--out", "out"}).code == 0);
    CHECK(config_of(folder / "out")["base_model_name_or_path"] == "one/base");
    CHECK(config_of(folder / "out")["task_type"] == "CAUSAL_LM");
    CHECK(read_values(folder / "out" / weights_file).contains("base_model.model.layers.0.q.base_layer.weight"));
    // Every two must agree, not only each with the first.
    auto linear = three_layers(1), table = three_layers(20);
    linear.updates["shared"] = normal_update<float>(6, 5, 2, 7);
    table.updates["shared"] = normal_update<float>(6, 5, 2, 8);
    table.embeddings.insert("shared");
    taskvec::write_peft(folder / "c", linear);
    taskvec::write_peft(folder / "d", table);
    std::filesystem::remove_all(folder / "out");
    refused(folder, {"merge-lora", "--adapter", "b", "--adapter", "c", "--adapter", "d", "--out", "out"}, 1,
        "'shared' is an embedding");
}

TEST_CASE("merge-lora refuses adapters that share no module, and counts the modules where they share few")
{
    const scratch folder;
    const auto with_modules = [&](const std::string& name, const std::vector<std::string>& modules) {
        adapter made;
        unsigned seed = 1;
        for (const auto& module : modules) { made.updates[module] = normal_update<float>(6, 5, 2, seed++); }
        std::filesystem::remove_all(folder / name);
        taskvec::write_peft(folder / name, made);
    };
    with_modules("a", {"layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v"});
    with_modules("b", {"layers.0.up", "layers.1.up"});
    refused(folder, merge_two, 1,
        "'b' shares no module with the adapters before it: it has 'layers.0.up' and 'layers.1.up', and they have "
        "'layers.0.q', 'layers.0.v' and 2 more");
    const auto both = run(folder, with(merge_two, {"--disjoint"}));
    CAPTURE(both.err);
    REQUIRE(both.code == 0);
    CHECK(both.err.find("'b' shares none of its 2 modules") != std::string::npos);
    CHECK(dense_updates(folder / "out").size() == 6);
    std::filesystem::remove_all(folder / "out");
    with_modules("b", {"model.layers.0.q", "model.layers.0.v", "model.layers.1.q", "model.layers.1.v"});
    const auto prefixed = run(folder, merge_two); // which may be meant, and the note says what is not
    REQUIRE(prefixed.code == 0);
    CHECK(prefixed.err.find("'b' shares none of its 4 modules") != std::string::npos);
    CHECK(prefixed.err.find("--match-prefixes") != std::string::npos);
    CHECK(dense_updates(folder / "out").size() == 8);
    REQUIRE(run(folder, with(merge_two, {"--match-prefixes"})).code == 0);
    CHECK(dense_updates(folder / "out").size() == 4);
    with_modules("b", {"layers.0.q", "layers.1.up", "layers.2.up"});
    const auto few = run(folder, merge_two);
    REQUIRE(few.code == 0);
    CHECK(few.err.find("'b' shares 1 of its 3 modules with the adapters before it") != std::string::npos);
    with_modules("b", {"layers.0.q", "layers.1.q"});
    CHECK(run(folder, merge_two).err.find("shares") == std::string::npos);
}

TEST_CASE("merge-lora names the rule for vocabularies that differ")
{
    const scratch folder;
    const auto write = [&](const std::string& name, std::int64_t rows, bool factored) {
        adapter made;
        const auto size = static_cast<std::size_t>(rows);
        made.updates["layers.0.q"] = normal_update<float>(6, 5, 2, 1);
        if (factored) {
            made.updates["model.embed_tokens"] = normal_update<float>(5, size, 2, 2);
            made.embeddings.insert("model.embed_tokens");
        }
        else {
            made.config["modules_to_save"] = {"lm_head"};
            made.others["lm_head.weight"] = {taskvec::dtype::f32, {rows, 5}, std::vector<std::byte>(size * 5 * 4)};
        }
        std::filesystem::remove_all(folder / name);
        taskvec::write_peft(folder / name, made);
    };
    write("a", 12, true);
    write("b", 14, true);
    refused(folder, merge_two, 1, "tensor 'model.embed_tokens.weight' has 14 rows in 'b' and 12 in 'a'");
    refused(folder, merge_two, 1, "--vocabulary base, union or truncate lines the rows up");
    write("a", 12, false);
    write("b", 14, false);
    for (const std::string how : {"equal", "average"}) {
        refused(folder, with(merge_two, {"--modules-to-save", how}), 1, "--vocabulary");
    }
}

TEST_CASE("merge-lora lines up the rows of tokens of factors and of what comes with them whole")
{
    const scratch folder;
    using words = std::vector<std::string>;
    constexpr std::size_t width = 3;
    // Every number tells the token that it is of, the adapter and the column: a row of factors is known anywhere.
    const auto value = [](const std::string& token, double adapter, std::size_t column) {
        double sum = 0;
        for (const char c : token) { sum = 2 * sum + c; }
        return static_cast<float>(sum / 64 + 10 * adapter + static_cast<double>(column) / 4);
    };
    const auto directory = [&](const std::string& name, double number, std::size_t rank, const words& tokens,
                               bool tokenizer, bool whole = false) {
        adapter made;
        made.config["task_type"] = "CAUSAL_LM";
        made.updates["model.layers.0.q"] = normal_update<float>(5, 4, rank, static_cast<std::uint64_t>(number));
        auto embedding = normal_update<float>(width, tokens.size(), rank, 10 + static_cast<std::uint64_t>(number)),
             head = normal_update<float>(tokens.size(), width, rank, 20 + static_cast<std::uint64_t>(number));
        taskvec::peft_tensor saved{taskvec::dtype::f32, {static_cast<std::int64_t>(tokens.size()), 2}, {}},
            copy = saved;
        std::vector<float> own, base;
        for (std::size_t i = 0; i < tokens.size(); ++i) {
            for (std::size_t k = 0; k < rank; ++k) {
                embedding.a(k, i) = value(tokens[i], number, k);
                head.b(i, k) = value(tokens[i], number + 0.5, k);
            }
            for (std::size_t k = 0; k < 2; ++k) {
                own.push_back(value(tokens[i], number + 0.25, k));
                base.push_back(value(tokens[i], 0, k)); // of one base
            }
        }
        saved.bytes.resize(4 * own.size());
        std::memcpy(saved.bytes.data(), own.data(), saved.bytes.size());
        copy.bytes.resize(4 * base.size());
        std::memcpy(copy.bytes.data(), base.data(), copy.bytes.size());
        made.updates["model.embed_tokens"] = std::move(embedding);
        made.embeddings.insert("model.embed_tokens");
        if (whole) {
            made.config["modules_to_save"] = {"lm_head"};
            made.others["lm_head.weight"] = saved;
        }
        else {
            made.updates["lm_head"] = std::move(head);
        }
        std::filesystem::remove_all(folder / name);
        taskvec::write_peft(folder / name, made);
        if (!tokenizer) { return; }
        nlohmann::json vocabulary = nlohmann::json::object();
        for (std::size_t i = 0; i < tokens.size(); ++i) { vocabulary[tokens[i]] = i; }
        spill(folder / name / "tokenizer.json",
            nlohmann::json{{"added_tokens", nlohmann::json::array()},
                {"model", {{"type", "WordLevel"}, {"vocab", vocabulary}, {"unk_token", "a"}}}}
                .dump());
        spill(folder / name / "tokenizer_config.json", R"({"model_max_length": 7})");
    };
    struct result {
        std::map<std::string, plain_matrix> updates; ///< of the embedding as tokens×dimensions
        values_model tensors;
    };
    const auto merged = [&](const words& more) {
        const auto done =
            run(folder, with({"merge-lora", "--adapter", "a=2", "--adapter", "b=-1", "--out", "out"}, more));
        REQUIRE_MESSAGE(done.code == 0, done.err);
        result made{dense_updates(folder / "out"), read_values(folder / "out" / weights_file)};
        const auto &a = made.tensors.at("base_model.model.model.embed_tokens.lora_embedding_A"),
                   &b = made.tensors.at("base_model.model.model.embed_tokens.lora_embedding_B");
        const auto tokens = static_cast<std::size_t>(a.shape[1]), rank = static_cast<std::size_t>(a.shape[0]);
        const auto config = config_of(folder / "out");
        const double scaling = config["alpha_pattern"].value("model.embed_tokens", config["lora_alpha"].get<double>())
            / static_cast<double>(rank);
        auto& x = made.updates["model.embed_tokens"] = reference::zeros(tokens, width);
        for (std::size_t i = 0; i < tokens; ++i) {
            for (std::size_t j = 0; j < width; ++j) {
                for (std::size_t k = 0; k < rank; ++k) {
                    x[i][j] += scaling * a.values[k * tokens + i] * b.values[j * rank + k];
                }
            }
        }
        return made;
    };
    /// Σ weight·ΔW over the tokens of the result, each adapter's row where it has the token.
    const auto expected = [&](const std::string& module, const words& result_tokens, const words& of_a,
                              const words& of_b) {
        auto sum = reference::zeros(result_tokens.size(), width);
        for (const bool second : {false, true}) {
            const auto& tokens = second ? of_b : of_a;
            const std::size_t rank = second ? 3 : 2;
            const auto made = read_values(folder / (second ? "b" : "a") / weights_file);
            const bool head = module == "lm_head";
            const auto& other =
                made.at("base_model.model." + module + (head ? ".lora_A.weight" : ".lora_embedding_B")); // r×in, out×r
            for (std::size_t i = 0; i < result_tokens.size(); ++i) {
                if (std::find(tokens.begin(), tokens.end(), result_tokens[i]) == tokens.end()) { continue; }
                for (std::size_t j = 0; j < width; ++j) {
                    for (std::size_t k = 0; k < rank; ++k) {
                        sum[i][j] += (second ? -1.0 : 2.0)
                            * double{value(result_tokens[i], (second ? 2 : 1) + (head ? 0.5 : 0), k)}
                            * double{other.values[head ? k * width + j : j * rank + k]};
                    }
                }
            }
        }
        return sum;
    };
    const auto agree = [&](const result& made, const words& tokens, const words& of_a, const words& of_b) {
        for (const std::string module : {"model.embed_tokens", "lm_head"}) {
            CAPTURE(module);
            const auto sum = expected(module, tokens, of_a, of_b);
            REQUIRE(made.updates.at(module).size() == tokens.size());
            CHECK(reference::distance(made.updates.at(module), sum) <= 1e-5 * reference::norm(sum));
        }
    };
    const words of_a{"a", "b", "c", "d"}, of_b{"d", "x", "a", "b", "y"};
    directory("a", 1, 2, of_a, true);
    directory("b", 2, 3, of_b, true);
    refused(folder, merge_two, 1, "--vocabulary base, union or truncate");
    agree(merged({"--vocabulary", "base"}), of_a, of_a, of_b);
    CHECK(slurp(folder / "out/tokenizer.json") == slurp(folder / "a/tokenizer.json"));
    CHECK(slurp(folder / "out/tokenizer_config.json") == slurp(folder / "a/tokenizer_config.json"));
    agree(merged({"--vocabulary", "union"}), {"a", "b", "c", "d", "x", "y"}, of_a, of_b);
    CHECK(json_of(folder / "out/tokenizer.json")["model"]["vocab"]
        == nlohmann::json{{"a", 0}, {"b", 1}, {"c", 2}, {"d", 3}, {"x", 4}, {"y", 5}});
    CHECK(json_of(folder / "out/tokenizer_config.json")["model_max_length"] == 7);
    directory("a", 1, 2, {"a", "b", "d", "c"}, true);
    agree(merged({"--vocabulary", "truncate"}), {"a", "b", "d"}, {"a", "b", "d", "c"}, of_b);
    CHECK(json_of(folder / "out/tokenizer.json")["model"]["vocab"] == nlohmann::json{{"a", 0}, {"b", 1}, {"d", 2}});

    // By index where one has no tokenizer, which is said.
    directory("b", 2, 3, {"a", "b", "d", "c", "z"}, false);
    const words by_index{"a", "b", "d", "c"}, longer{"a", "b", "d", "c", "z"};
    agree(merged({"--vocabulary", "base"}), by_index, by_index, longer);
    directory("a", 1, 2, by_index, false);
    agree(merged({"--vocabulary", "union"}), longer, by_index, longer);
    CHECK_FALSE(std::filesystem::exists(folder / "out/tokenizer.json"));
    agree(merged({"--vocabulary", "truncate"}), by_index, by_index, longer);
    const auto said = run(folder, with(merge_two, {"--vocabulary", "base"}));
    CHECK(said.err.find("no tokenizer.json beside 'a', 'b': rows of the vocabulary are lined up by index")
        != std::string::npos);

    // What is saved whole has every row: that of another adapter stands for one that is lacking.
    directory("a", 1, 2, of_a, true, true);
    directory("b", 2, 3, of_b, true, true);
    const auto rows = [&](const std::string& how, const std::string& vocabulary) {
        const auto done = run(folder,
            with({"merge-lora", "--adapter", "a=3", "--adapter", "b=1", "--out", "out"},
                {"--modules-to-save", how, "--vocabulary", vocabulary}));
        REQUIRE_MESSAGE(done.code == 0, done.err);
        return read_values(folder / "out" / weights_file).at("base_model.model.lm_head.weight");
    };
    const words all{"a", "b", "c", "d", "x", "y"};
    for (const bool mean : {false, true}) {
        const auto found = rows(mean ? "average" : "first", "union");
        REQUIRE(found.shape == taskvec::extents{6, 2});
        for (std::size_t i = 0; i < all.size(); ++i) {
            const bool in_a = i < 4, in_b = all[i] != "c";
            for (std::size_t k = 0; k < 2; ++k) {
                const double first = value(all[i], in_a ? 1.25 : 2.25, k),
                             second = value(all[i], in_b ? 2.25 : 1.25, k);
                CHECK(std::abs(found.values[2 * i + k] - (mean ? (3 * first + second) / 4 : first)) < 1e-5);
            }
        }
    }
    CHECK(rows("first", "base").shape == taskvec::extents{4, 2});

    // Around an initialisation its vocabulary is the first, and a row that an adapter lacks is its own.
    directory("init", 4, 2, of_a, true);
    directory("a", 1, 2, of_a, true);
    directory("b", 2, 2, of_b, true);
    const auto phi = run(folder,
        {"merge-lora", "--space", "phi", "--init", "init", "--method", "average", "--adapter", "a=1", "--adapter",
            "b=1", "--out", "out", "--vocabulary", "union"});
    REQUIRE_MESSAGE(phi.code == 0, phi.err);
    const auto factors = read_values(folder / "out" / weights_file).at("base_model.model.lm_head.lora_B.weight");
    REQUIRE(factors.shape == taskvec::extents{6, 2});
    for (std::size_t i = 0; i < all.size(); ++i) {
        const double first = i < 4 ? 1.5 : 2.5, second = all[i] == "c" ? 4.5 : 2.5;
        for (std::size_t k = 0; k < 2; ++k) {
            CHECK(
                std::abs(factors.values[2 * i + k] - (value(all[i], first, k) + value(all[i], second, k)) / 2) < 1e-4);
        }
    }
}

TEST_CASE("the adapter verbs name what goes on for adapters that are no plain low-rank update of PEFT's")
{
    const scratch folder;
    const auto attempt = [&](const std::string& words) {
        refused(folder, {"merge-lora", "--adapter", "a", "--out", "out"}, 1, words);
        refused(folder, {"peru-lora", "--adapter", "a", "--rank", "1", "--out", "out"}, 1, words);
        refused(folder, {"fold-llora", "--init", "a", "--adapter", "a", "--out", "out"}, 1, words);
    };
    taskvec::write_peft(folder / "a", three_layers());
    const auto sound = config_of(folder / "a");
    auto config = sound;
    config["use_dora"] = true;
    spill(folder / "a" / config_file, config.dump());
    attempt("taskvec extract-lora");
    for (const std::string kind : {"LOHA", "LOKR", "ADALORA"}) {
        config = sound;
        config["peft_type"] = kind;
        spill(folder / "a" / config_file, config.dump());
        attempt("taskvec convert --as peft");
    }
    std::filesystem::rename(folder / "a" / weights_file, folder / "a" / "adapters.safetensors"); // as MLX calls it
    attempt("taskvec convert --as peft");
    std::filesystem::rename(folder / "a" / "adapters.safetensors", folder / "kohya.safetensors");
    std::filesystem::remove_all(folder / "a");
    std::filesystem::rename(folder / "kohya.safetensors", folder / "a");
    attempt("taskvec convert --as peft");
}

TEST_CASE("weights of 0 are counted and named, in the report too")
{
    const scratch folder;
    const auto [base, task] = two_models();
    write_values(folder / "base.safetensors", base);
    write_values(folder / "x.safetensors", task);
    write_values(folder / "y.safetensors", task);
    write_pair(folder);
    const auto check = [&](const std::vector<std::string>& arguments, const std::string& words) {
        const auto result = run(folder, with(arguments, {"--report", "r.json"}));
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        CHECK(result.err.find(words) != std::string::npos);
        CHECK(json_of(folder / "r.json")["notes"].dump().find(words) != std::string::npos);
    };
    check({"merge", "--method", "task-arithmetic", "--base", "base.safetensors", "--task", "x.safetensors=0", "--task",
              "y.safetensors", "--out", "m.safetensors"},
        "1 of 2 tasks has the weight 0 ('x.safetensors'): it adds nothing");
    check({"merge", "--method", "task-arithmetic", "--base", "base.safetensors", "--task", "x.safetensors", "--lambda",
              "0", "--out", "m.safetensors"},
        "--lambda is 0: no task adds anything");
    check({"merge-lora", "--adapter", "a=0", "--adapter", "b=0", "--out", "out"},
        "2 of 2 adapters have the weight 0 ('a', 'b'): they add nothing");
    const auto plain = run(folder,
        {"merge", "--method", "task-arithmetic", "--base", "base.safetensors", "--task", "x.safetensors", "--out",
            "m.safetensors"});
    CHECK(plain.err.find("adds") == std::string::npos);
}

TEST_CASE("the adapter verbs compute f64 adapters in f64, whatever the threads")
{
    const scratch folder;
    taskvec::peft_adapter<double> wide;
    wide.updates["layer"] = normal_update<double>(9, 7, 4, 3, 0.5);
    taskvec::write_peft(folder / "task", wide);
    REQUIRE(run(folder, with(peru, {"--rank", "4", "--threads", "1"})).code == 0);
    const auto bytes = slurp(folder / "out" / weights_file);
    const auto found = taskvec::read_peft<double>(folder / "out");
    CHECK(found.stored.at("layer") == taskvec::dtype::f64);
    CHECK(reference::distance(reference::dense(found.updates.at("layer")), reference::dense(wide.updates.at("layer")))
        < 1e-13);
    REQUIRE(run(folder, with(peru, {"--rank", "4", "--threads", "3"})).code == 0);
    CHECK(slurp(folder / "out" / weights_file) == bytes);
}

TEST_CASE("the adapter verbs' --dry-run writes nothing, and a failure leaves a former output as it was")
{
    const scratch folder;
    write_pair(folder);
    taskvec::write_peft(folder / "task", three_layers());
    const auto [base, task] = two_models();
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    const auto before = folder.names();
    for (const auto& command : {with(peru, {"--rank", "2"}), with(extract, {"--rank", "2"}), merge_two,
             with(merge_two, {"--method", "ties", "--rank", "2"}), with(merge_two, {"--method", "average-factors"}),
             with({"merge-lora", "--space", "phi", "--init", "a", "--adapter", "b", "--out", "out"}, {})}) {
        const auto result = run(folder, with(command, {"--dry-run", "--report", "r.json"}));
        CAPTURE(result.err);
        CHECK(result.code == 0);
        CHECK(result.out.find("would ") != std::string::npos);
        CHECK(folder.names() == before);
    }
    refused(folder, with(extract, {"--rank", "99", "--dry-run"}), 1, "at most 20");
    refused(folder, with(extract, {"--rank", "1", "--report", "no/such/folder/r.json"}), 1, "no/such/folder");

    REQUIRE(run(folder, merge_two).code == 0);
    const auto weights = slurp(folder / "out" / weights_file), config = slurp(folder / "out" / config_file);
    CHECK(run(folder, with(merge_two, {"--rank", "99"})).code == 1);
    auto huge = three_layers();
    huge.updates["layers.0.q"].scaling = 1e30;
    taskvec::write_peft(folder / "task", huge);
    CHECK(run(folder, with(peru, {"--rank", "1", "--dtype", "f16"})).code == 1);
    CHECK(slurp(folder / "out" / weights_file) == weights);
    CHECK(slurp(folder / "out" / config_file) == config);
}

TEST_CASE("a factor that its dtype cannot hold is an error, its largest number or infinity, in every verb on adapters")
{
    const scratch folder;
    auto large = three_layers();
    large.updates.at("layers.1.q").b(2, 1) = -70000;
    taskvec::write_peft(folder / "a", large);
    auto initial = large;
    for (auto& [name, update] : initial.updates) {
        std::fill(update.b.data(), update.b.data() + update.b.size(), 0.0f);
    }
    taskvec::write_peft(folder / "init", initial);
    const std::vector<std::vector<std::string>> lines{{"merge-lora", "--adapter", "a"},
        {"peru-lora", "--adapter", "a", "--rank", "4"}, {"fold-llora", "--init", "init", "--adapter", "a"},
        {"convert", "a", "--as", "peft"}, {"convert", "a", "--as", "mlx"}};
    for (const auto& line : lines) {
        CAPTURE(line[0]);
        const auto all = with(line, {"--dtype", "f16", "--out", "out"});
        refused(folder, all, 1, "let it saturate or propagate (overflow)");
        const auto stored = [&](const std::string& how) {
            std::filesystem::remove_all(folder / "out");
            const auto done = run(folder, with(all, {"--overflow", how, "--report", "r.json"}));
            CHECK_MESSAGE(done.code == 0, done.err);
            float least = 0;
            for (const auto& file : std::filesystem::directory_iterator(folder / "out")) {
                if (file.path().extension() != ".safetensors") { continue; }
                for (const auto& [name, factor] : read_values(file.path())) {
                    for (const float value : factor.values) { least = std::min(least, value); }
                }
            }
            return least;
        };
        CHECK(stored("saturate") == -65504);
        CHECK(json_of(folder / "r.json")["saturated"] == 1);
        CHECK(stored("propagate") == -HUGE_VALF);
    }
    refused(folder, with(lines[0], {"--dtype", "f16", "--out", "out", "--overflow", "clip"}), 2, "--overflow");
}

TEST_CASE("extract-lora refuses factors of adapters as models")
{
    const scratch folder;
    for (const float shift : {0.0F, 1.0F}) {
        write_values(folder / (shift == 0 ? "a.safetensors" : "b.safetensors"),
            {{"base_model.model.q.lora_A.weight", {taskvec::dtype::f32, {2, 2}, {1, 2, 3, 4 + shift}}},
                {"base_model.model.q.lora_B.weight", {taskvec::dtype::f32, {2, 2}, {1, 2, 3, 4 - shift}}}});
    }
    const auto done = run(
        folder, {"extract-lora", "--base", "a.safetensors", "--task", "b.safetensors", "--rank", "1", "--out", "o"});
    CHECK(done.code == 1);
    CHECK(is_error_line(done.err));
    CHECK(done.err.find("holds factors of an adapter") != std::string::npos);
    CHECK_FALSE(std::filesystem::exists(folder / "o"));
}

TEST_CASE("ranks: 0 is wrong usage, one too high names the flag that lowers it, and what was made is what is said")
{
    const scratch folder;
    taskvec::write_peft(folder / "in", three_layers());
    const std::vector<std::string> peru{"peru-lora", "--adapter", "in", "--out", "out"};
    const auto with_rank = [&](std::vector<std::string> more) {
        auto words = peru;
        words.insert(words.end(), more.begin(), more.end());
        return words;
    };
    refused(folder, with_rank({"--rank", "0"}), 2, "--rank is 0");
    refused(folder, with_rank({"--rank", "99"}), 1, "(--clamp)");
    const auto clamped = run(folder, with_rank({"--rank", "1000", "--clamp"}));
    REQUIRE(clamped.code == 0);
    CHECK(clamped.out.find("at rank 4, the highest there is") != std::string::npos);
    CHECK(run(folder, {"extract-lora", "--help"}).out.find("Excludes:") == std::string::npos);
}

TEST_CASE("adapters: outputs are checked in a dry run as in a run, and before any work")
{
    const scratch folder;
    taskvec::write_peft(folder / "in", three_layers());
    spill(folder / "file", "x");
    const std::vector<std::vector<std::string>> verbs{{"peru-lora", "--adapter", "in", "--rank", "2"},
        {"merge-lora", "--adapter", "in"}, {"fold-llora", "--init", "in", "--adapter", "in"}};
    for (const auto& verb : verbs) {
        for (const auto& [outputs, code] :
            std::vector<std::pair<std::vector<std::string>, int>>{{{"--out", "file/x"}, 1}, {{"--out", "file"}, 1},
                {{"--out", "o", "--report", "absent/r.json"}, 1}, {{"--out", "o", "--report", "in"}, 1},
                {{"--out", "o", "--report", "in/adapter_config.json"}, 1}, {{"--out", ""}, 2}}) {
            auto words = verb;
            words.insert(words.end(), outputs.begin(), outputs.end());
            refused(folder, words, code, code == 2 ? "--out is empty" : "");
            words.emplace_back("--dry-run");
            refused(folder, words, code, "");
        }
        auto words = verb;
        words.insert(words.end(), {"--out", "o", "--device", "cuda"});
        refused(folder, words, 2, "--device cuda");
    }
}

TEST_CASE("convert names the adapter and the tensor that is not finite, and reports what it took")
{
    const scratch folder;
    auto made = three_layers();
    taskvec::write_peft(folder / "good", made);
    made.updates.at("layers.0.v").a.data()[3] = std::nanf("");
    taskvec::write_peft(folder / "bad", made, {.on_overflow = taskvec::overflow::propagate});
    for (const std::string overflow : {"error", "saturate"}) {
        refused(folder, {"convert", "bad", "--as", "peft", "--out", "o", "--overflow", overflow}, 1,
            "tensor 'base_model.model.layers.0.v.lora_A.weight' of 'bad' holds NaN at index 3");
    }
    CHECK(run(folder, {"convert", "bad", "--as", "peft", "--out", "nan", "--overflow", "propagate"}).code == 0);
    REQUIRE(run(folder, {"convert", "good", "--as", "peft", "--out", "o", "--report", "r.json"}).code == 0);
    const auto report = json_of(folder / "r.json");
    for (const char* key : {"seconds", "bytes_read", "bytes_written", "peak_memory", "peak_anonymous_memory"}) {
        CAPTURE(key);
        CHECK(report[key] > 0);
    }
    refused(folder, {"convert", "good", "--as", "peft", "--out", "p", "--device", "cuda"}, 2, "--device cuda");
}

TEST_CASE("extract-lora makes of convolutions what PEFT does, and fuse puts it back")
{
    const scratch folder;
    const auto shaped = [](taskvec::extents shape, std::uint64_t seed) {
        auto x = tensor(static_cast<std::int64_t>(taskvec::element_count(shape)), 1, seed);
        x.shape = std::move(shape);
        return x;
    };
    values_model base{{"conv.weight", shaped({6, 3, 2, 2}, 1)}, {"line.weight", shaped({4, 2, 3}, 2)},
        {"deep.weight", shaped({5, 1, 3, 3}, 3)}, {"norm.weight", shaped({5}, 4)}},
        task = base;
    std::uint64_t seed = 10;
    for (auto& [name, x] : task) {
        const auto change = tensor(static_cast<std::int64_t>(x.values.size()), 1, ++seed, taskvec::dtype::f32, 0.25f);
        for (std::size_t i = 0; i < x.values.size(); ++i) { x.values[i] += change.values[i]; }
    }
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    const auto made = run(folder, with(extract, {"--energy", "1", "--sparse-rest"}));
    CAPTURE(made.err);
    REQUIRE(made.code == 0);
    const auto factors = read_values(folder / "out" / weights_file);
    REQUIRE(factors.size() == 4);
    const std::string prefix = "base_model.model.";
    CHECK(factors.at(prefix + "conv.lora_A.weight").shape == taskvec::extents{6, 3, 2, 2});
    CHECK(factors.at(prefix + "conv.lora_B.weight").shape == taskvec::extents{6, 6, 1, 1});
    CHECK(factors.at(prefix + "line.lora_A.weight").shape == taskvec::extents{4, 2, 3});
    CHECK(factors.at(prefix + "line.lora_B.weight").shape == taskvec::extents{4, 4, 1});
    REQUIRE(run(folder,
                {"apply", "--base", "base.safetensors", "--delta", "out/rest.delta.safetensors", "--out",
                    "rested.safetensors"})
                .code
        == 0);
    REQUIRE(
        run(folder, {"fuse", "--base", "rested.safetensors", "--adapter", "out", "--out", "o.safetensors"}).code == 0);
    const auto fused = read_values(folder / "o.safetensors");
    for (const auto& [name, x] : task) {
        CAPTURE_BOUND(name);
        for (std::size_t i = 0; i < x.values.size(); ++i) {
            CHECK(std::abs(fused.at(name).values[i] - x.values[i]) < 1e-5);
        }
    }
    // Nothing that a LoRA could hold: the way on is named.
    for (const char* name : {"conv.weight", "line.weight"}) { task.at(name) = base.at(name); }
    write_values(folder / "task.safetensors", task);
    refused(folder, with(extract, {"--rank", "1", "--sparse-rest"}), 1, "taskvec prune --density 1");
}

TEST_CASE("extract-lora leaves out what models read past its module, unless it is called an embedding")
{
    const scratch folder;
    values_model base{{"a.weight", tensor(5, 4, 1)}, {"embed_positions.weight", tensor(7, 4, 2)}}, task = base;
    for (auto& [name, x] : task) { x.values[3] += 1; }
    write_values(folder / "base.safetensors", base);
    write_values(folder / "task.safetensors", task);
    const auto made = run(folder, with(extract, {"--rank", "1"}));
    REQUIRE(made.code == 0);
    CHECK(made.err.find("left out: 'embed_positions.weight'") != std::string::npos);
    CHECK(taskvec::read_peft((folder / "out").string()).updates.size() == 1);
    REQUIRE(run(folder, with(extract, {"--rank", "1", "--embedding", "embed_positions"})).code == 0);
    CHECK(taskvec::read_peft((folder / "out").string()).embeddings == std::set<std::string>{"embed_positions"});
}

namespace {

/// A directory of a model and its configuration, and one of it with every tensor changed by a matrix of rank 1.
void write_directories(const scratch& folder, const values_model& base, const std::string& config)
{
    auto tuned = base;
    for (auto& [name, x] : tuned) {
        const auto columns = static_cast<std::size_t>(x.shape.back());
        for (std::size_t i = 0; i < x.values.size(); ++i) {
            x.values[i] += 0.25f * static_cast<float>(i / columns + 1) * static_cast<float>(i % columns + 1);
        }
    }
    for (const std::string name : {"base", "tuned"}) {
        std::filesystem::create_directories(folder / name);
        write_values(folder / name / "model.safetensors", name == "base" ? base : tuned);
        spill(folder / name / "config.json", config);
    }
}
const std::vector<std::string> extract_directory{
    "extract-lora", "--base", "base", "--task", "tuned", "--rank", "1", "--out", "out"};

/// fuse of base and out gives tuned, with the tensors of the base alone.
void check_put_back(const scratch& folder)
{
    const auto fused = run(folder, {"fuse", "--base", "base", "--adapter", "out", "--out", "fused"});
    CAPTURE(fused.err);
    REQUIRE(fused.code == 0);
    const auto found = read_values(folder / "fused/model.safetensors"),
               tuned = read_values(folder / "tuned/model.safetensors");
    REQUIRE(found.size() == tuned.size());
    for (const auto& [name, x] : tuned) {
        CAPTURE_BOUND(name);
        for (std::size_t i = 0; i < x.values.size(); ++i) {
            CHECK(found.at(name).values[i] == doctest::Approx(x.values[i]).epsilon(1e-5));
        }
    }
    CHECK(slurp(folder / "fused/config.json") == slurp(folder / "base/config.json"));
}

std::map<std::string, taskvec::extents> shapes_in(const std::filesystem::path& adapter)
{
    std::map<std::string, taskvec::extents> shapes;
    for (const auto& [name, x] : read_values(adapter / weights_file)) { shapes[name.substr(17)] = x.shape; }
    return shapes;
}

} // namespace

TEST_CASE(
    "extract-lora gives an embedding's update to every module that is it in the model, and fuse takes them for one")
{
    using shapes = std::map<std::string, taskvec::extents>;
    {
        const scratch folder; // T5: the file has `shared` alone
        write_directories(folder,
            {{"shared.weight", tensor(9, 4, 1)}, {"encoder.block.0.q.weight", tensor(4, 4, 2)},
                {"decoder.block.0.q.weight", tensor(4, 4, 3)}},
            R"({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "tie_word_embeddings": true, "torch_dtype": "float32"})");
        const auto made = run(folder, extract_directory);
        REQUIRE(made.code == 0);
        CHECK(made.err.find(
                  "'shared' of 'base' is one matrix with 'encoder.embed_tokens', 'decoder.embed_tokens', 'lm_head'")
            != std::string::npos);
        CHECK(shapes_in(folder / "out")
            == shapes{{"encoder.embed_tokens.lora_embedding_A", {1, 9}},
                {"encoder.embed_tokens.lora_embedding_B", {4, 1}}, {"decoder.embed_tokens.lora_embedding_A", {1, 9}},
                {"decoder.embed_tokens.lora_embedding_B", {4, 1}}, {"lm_head.lora_A.weight", {1, 4}},
                {"lm_head.lora_B.weight", {9, 1}}, {"encoder.block.0.q.lora_A.weight", {1, 4}},
                {"encoder.block.0.q.lora_B.weight", {4, 1}}, {"decoder.block.0.q.lora_A.weight", {1, 4}},
                {"decoder.block.0.q.lora_B.weight", {4, 1}}});
        CHECK_FALSE(config_of(folder / "out").contains("ensure_weight_tying"));
        check_put_back(folder);
        // One of the names alone is another model than the file can hold.
        auto adapter = taskvec::read_peft((folder / "out").string());
        adapter.updates.erase("decoder.embed_tokens");
        adapter.embeddings.erase("decoder.embed_tokens");
        adapter.config.erase("target_modules");
        taskvec::write_peft(folder / "half", adapter);
        refused(folder, {"fuse", "--base", "base", "--adapter", "half", "--out", "no"}, 1,
            "changes 'encoder.embed_tokens' and not 'decoder.embed_tokens' alike");
    }
    {
        const scratch folder; // RoBERTa: the head's own name
        write_directories(folder,
            {{"roberta.embeddings.word_embeddings.weight", tensor(9, 4, 1)}, {"lm_head.dense.weight", tensor(4, 4, 2)}},
            R"({"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], "torch_dtype": "float32"})");
        REQUIRE(run(folder, extract_directory).code == 0);
        CHECK(shapes_in(folder / "out").at("lm_head.decoder.lora_B.weight") == taskvec::extents{9, 1});
        check_put_back(folder);
    }
    {
        const scratch folder; // a classifier has no head over words, whatever its configuration says
        write_directories(folder,
            {{"bert.embeddings.word_embeddings.weight", tensor(9, 4, 1)}, {"classifier.weight", tensor(3, 4, 2)}},
            R"({"model_type": "bert", "architectures": ["BertForSequenceClassification"], "tie_word_embeddings": true, "torch_dtype": "float32"})");
        REQUIRE(run(folder, extract_directory).code == 0);
        CHECK(shapes_in(folder / "out").size() == 4);
        check_put_back(folder);
    }
}

TEST_CASE(
    "extract-lora calls modules as the library does that wrote the configuration, and fuse finds them in the files")
{
    const std::string config =
        R"({"model_type": "vit", "architectures": ["ViTForImageClassification"], "torch_dtype": "float32"VERSION})";
    const auto with_version = [&](const std::string& version) {
        auto text = config;
        return text.replace(
            text.find("VERSION"), 7, version.empty() ? "" : ", \"transformers_version\": \"" + version + "\"");
    };
    const std::string stored = "vit.encoder.layer.0.attention.attention.query",
                      loaded = "vit.layers.0.attention.q_proj";
    for (const auto& version : {std::string("5.1.0"), std::string("4.57.1"), std::string()}) {
        CAPTURE(version);
        const scratch folder;
        write_directories(folder, {{stored + ".weight", tensor(4, 4, 1)}, {"classifier.weight", tensor(3, 4, 2)}},
            with_version(version));
        const auto made = run(folder, extract_directory);
        REQUIRE(made.code == 0);
        const auto& expected = version.starts_with("5") ? loaded : stored;
        CHECK(shapes_in(folder / "out").contains(expected + ".lora_A.weight"));
        CHECK((made.err.find("--rename") != std::string::npos) == !version.starts_with("5"));
        check_put_back(folder);
    }
}

TEST_CASE("extract-lora gives tied heads of names of their own what it gives the embedding")
{
    struct example {
        std::string config, embedding, head;
    };
    for (const auto& one :
        {example{R"({"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"], "torch_dtype": "float32"})",
             "transformer.word_embedding", "lm_loss"},
            example{R"({"model_type": "xlm", "architectures": ["XLMWithLMHeadModel"], "torch_dtype": "float32"})",
                "transformer.embeddings", "pred_layer.proj"},
            example{R"({"model_type": "marian", "architectures": ["MarianMTModel"], "torch_dtype": "float32"})",
                "model.shared", "lm_head"}}) {
        CAPTURE(one.config);
        const scratch folder;
        write_directories(folder,
            {{one.embedding + ".weight", tensor(9, 4, 1)}, {"model.encoder.layers.0.q.weight", tensor(4, 4, 2)}},
            one.config);
        REQUIRE(run(folder, extract_directory).code == 0);
        const auto found = shapes_in(folder / "out");
        CHECK(found.at(one.head + ".lora_A.weight") == taskvec::extents{1, 4});
        CHECK(found.at(one.head + ".lora_B.weight") == taskvec::extents{9, 1});
        check_put_back(folder);
    }
}

TEST_CASE("extract-lora calls the towers of models that see, SegFormer and DINOv3 as transformers 5 does")
{
    struct example {
        std::string type, architecture;
        std::map<std::string, std::string> names; // of the files, and when loaded
    };
    const std::string q = "self_attn.q_proj";
    for (const auto& one :
        {example{"llava", "LlavaForConditionalGeneration",
             {{"language_model.model.layers.0." + q, "model.language_model.layers.0." + q},
                 {"language_model.lm_head", "lm_head"},
                 {"vision_tower.vision_model.encoder.layers.0." + q, "model.vision_tower.encoder.layers.0." + q},
                 {"multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"}}},
            example{"gemma3", "Gemma3ForConditionalGeneration",
                {{"language_model.model.layers.0." + q, "model.language_model.layers.0." + q},
                    {"vision_tower.encoder.layers.0." + q, "model.vision_tower.encoder.layers.0." + q}}},
            example{"qwen2_vl", "Qwen2VLForConditionalGeneration",
                {{"model.layers.0." + q, "model.language_model.layers.0." + q},
                    {"visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"}, {"lm_head", "lm_head"}}},
            example{"qwen2", "Qwen2ForCausalLM", {{"model.layers.0." + q, "model.layers.0." + q}}},
            example{"segformer", "SegformerForImageClassification",
                {{"segformer.encoder.block.1.0.attention.self.query", "segformer.stages.1.blocks.0.attention.q_proj"},
                    {"segformer.encoder.block.0.12.mlp.dense1", "segformer.stages.0.blocks.12.mlp.fc1"},
                    {"segformer.encoder.patch_embeddings.1.proj", "segformer.stages.1.patch_embeddings.proj"}}},
            example{
                "dinov3_vit", "DINOv3ViTModel", {{"layer.0.attention.k_proj", "model.layer.0.attention.k_proj"}}}}) {
        CAPTURE(one.type);
        const scratch folder;
        values_model base;
        unsigned seed = 1;
        for (const auto& [stored, loaded] : one.names) { base[stored + ".weight"] = tensor(4, 4, seed++); }
        write_directories(folder, base,
            nlohmann::json{{"model_type", one.type}, {"architectures", {one.architecture}}, {"torch_dtype", "float32"},
                {"tie_word_embeddings", false}, {"transformers_version", "5.1.0"}}
                .dump());
        REQUIRE(run(folder, extract_directory).code == 0);
        const auto found = shapes_in(folder / "out");
        CHECK(found.size() == 2 * one.names.size());
        for (const auto& [stored, loaded] : one.names) { CHECK(found.contains(loaded + ".lora_A.weight")); }
        check_put_back(folder);
    }
}

TEST_CASE("extract-lora factors embeddings of further names, and names those of which it cannot tell")
{
    const scratch folder;
    values_model base;
    const std::vector<std::string> embeddings{"embeddings.token_type_embeddings_0",
        "layout_embeddings.box_position_embeddings", "embeddings.visual_position_embeddings",
        "char_embeddings.HashBucketCodepointEmbedder_3", "encoder.layers.0.attention.rel_attn_embed",
        "embeddings.xpath_embeddings.xpath_tag_sub_embeddings.0", "encoder.embed_positions.pe_k"};
    unsigned seed = 1;
    for (const auto& name : embeddings) { base[name + ".weight"] = tensor(9, 4, seed++); }
    base["model.input_embedding.weight"] = tensor(9, 4, seed++); // PatchTST's: a linear layer
    base["model.input_embedding.bias"] = tensor(1, 9, seed++);
    base["model.tile_embed.weight"] = tensor(9, 4, seed++);
    write_directories(folder, base, R"({"torch_dtype": "float32"})");
    const auto made = run(folder, extract_directory);
    REQUIRE(made.code == 0);
    const auto found = shapes_in(folder / "out");
    for (const auto& name : embeddings) {
        CAPTURE(name);
        REQUIRE(found.contains(name + ".lora_embedding_A"));
        CHECK(found.at(name + ".lora_embedding_A") == taskvec::extents{1, 9});
    }
    CHECK(found.contains("model.input_embedding.lora_A.weight"));
    CHECK(found.contains("model.tile_embed.lora_A.weight"));
    CHECK(made.err.find("'model.tile_embed' is called as embeddings are") != std::string::npos);
    CHECK(made.err.find("'model.input_embedding'") == std::string::npos);
    const auto told = run(folder, with(extract_directory, {"--embedding", "tile_embed$"}));
    CHECK(told.err.find("called as embeddings are") == std::string::npos);
    CHECK(shapes_in(folder / "out").contains("model.tile_embed.lora_embedding_A"));
}

TEST_CASE("modules that a configuration says were saved whole, and the file lacks, are named by every verb")
{
    const scratch folder;
    auto given = three_layers();
    given.config = {{"modules_to_save", {"head"}}};
    taskvec::write_peft(folder / "a", given);
    for (const auto& line : {std::vector<std::string>{"merge-lora", "--adapter", "a", "--modules-to-save"},
             {"peru-lora", "--adapter", "a", "--rank", "1", "--modules-to-save"}, {"convert", "a", "--as", "peft"}}) {
        CAPTURE(line[0]);
        const auto result = run(folder, with(line, {"--out", "out"}));
        CHECK(result.code == 0);
        CHECK(result.err.find("modules_to_save of 'a' names 'head', and the file holds nothing of it")
            != std::string::npos);
    }
    // PEFT names two heads of classifiers, of which a model has one.
    given.config = {{"modules_to_save", {"classifier", "score"}}};
    given.others["score.weight"] = {taskvec::dtype::f32, {1}, std::vector<std::byte>(4)};
    taskvec::write_peft(folder / "b", given);
    const auto result = run(folder, {"merge-lora", "--adapter", "b", "--modules-to-save", "--out", "out"});
    CHECK(result.code == 0);
    CHECK(result.err.find("holds nothing of it") == std::string::npos);
}

namespace {

/// A tensor of floats that an adapter carries beside its factors.
taskvec::peft_tensor carried(taskvec::extents shape, const std::vector<float>& values)
{
    taskvec::peft_tensor made{taskvec::dtype::f32, std::move(shape), {}};
    made.bytes.resize(sizeof(float) * values.size());
    std::memcpy(made.bytes.data(), values.data(), made.bytes.size());
    return made;
}

/// What an adapter does to the embedding and to the head of a base that ties them, each tokens×width, as PEFT loads it.
std::pair<plain_matrix, plain_matrix> of_tokens(const std::filesystem::path& directory)
{
    const auto config = config_of(directory);
    const auto targets = config["target_modules"].get<std::set<std::string>>();
    const bool tied = config.value("ensure_weight_tying", false);
    const auto tensors = read_values(directory / weights_file);
    auto made = std::pair{reference::zeros(9, 4), reference::zeros(9, 4)};
    const auto add = [&](plain_matrix& x, const std::string& module, const std::string& a, const std::string& b) {
        const auto stem = "base_model.model." + module;
        if (!tensors.contains(stem + a)) { return false; }
        const bool turned = a == ".lora_embedding_A"; // r×tokens and width×r
        const auto &left = tensors.at(stem + (turned ? a : b)).values,
                   &right = tensors.at(stem + (turned ? b : a)).values;
        const auto rank = left.size() / 9;
        const double scaling = config["alpha_pattern"].value(module, config["lora_alpha"].get<double>())
            / config["rank_pattern"].value(module, config["r"].get<double>());
        for (std::size_t i = 0; i < 9; ++i) {
            for (std::size_t j = 0; j < 4; ++j) {
                for (std::size_t k = 0; k < rank; ++k) {
                    x[i][j] += scaling * double{left[turned ? k * 9 + i : i * rank + k]}
                        * double{right[turned ? j * rank + k : k * 4 + j]};
                }
            }
        }
        return true;
    };
    if (targets.contains("model.embed_tokens") || targets.contains("embed_tokens")) {
        add(made.first, "model.embed_tokens", ".lora_embedding_A", ".lora_embedding_B");
    }
    const bool head =
        (tied || targets.contains("lm_head")) && add(made.second, "lm_head", ".lora_A.weight", ".lora_B.weight");
    if (tied && !head) { made.second = made.first; }
    return made;
}

} // namespace

TEST_CASE("merge-lora of adapters that tie the head to the embedding, and of others, gives both what they do to each")
{
    const scratch folder;
    const auto write = [&](const std::string& name, std::uint64_t seed, bool embedding, bool head, bool tied,
                           nlohmann::json targets) {
        adapter made;
        made.updates["model.layers.0.q"] = normal_update<float>(4, 4, 3, seed, 0.5);
        if (embedding) {
            made.updates["model.embed_tokens"] = normal_update<float>(4, 9, 2, seed + 1, 0.5);
            made.embeddings.insert("model.embed_tokens");
        }
        if (head) { made.updates["lm_head"] = normal_update<float>(9, 4, 2, seed + 2, 0.5); }
        if (head && tied) {
            const auto& update = made.updates.at("model.embed_tokens");
            auto& turned = made.updates.at("lm_head");
            for (std::size_t k = 0; k < 2; ++k) {
                for (std::size_t i = 0; i < 9; ++i) { turned.b(i, k) = update.a(k, i); }
                for (std::size_t j = 0; j < 4; ++j) { turned.a(k, j) = update.b(j, k); }
            }
        }
        made.config = {{"target_modules", std::move(targets)}, {"ensure_weight_tying", tied}};
        taskvec::write_peft(folder / name, made);
    };
    write("plain", 10, false, false, false, {"q"});
    write("tied", 20, true, true, true, {"model.embed_tokens", "q", "embed_tokens"}); // as PEFT saves it
    write("extracted", 30, true, false, true, {"model.embed_tokens", "model.layers.0.q", "lm_head"});
    write("embedding", 40, true, false, false, {"q", "embed_tokens"});
    write("both", 50, true, true, false, {"q", "embed_tokens", "lm_head"});
    const std::vector<std::string> all{"plain", "tied", "extracted", "embedding", "both"};
    for (const auto& first : all) {
        for (const auto& second : all) {
            if (first == second) { continue; }
            CAPTURE(first + " " + second);
            std::filesystem::remove_all(folder / "out");
            const auto merged =
                run(folder, {"merge-lora", "--adapter", first + "=2", "--adapter", second, "--out", "out"});
            REQUIRE_MESSAGE(merged.code == 0, merged.err);
            CHECK(merged.err.find("are left out") == std::string::npos);
            const auto untied = [](const std::string& name) { return name == "embedding" || name == "both"; };
            const auto ties = [](const std::string& name) { return name == "tied" || name == "extracted"; };
            const bool mixed = (untied(first) && ties(second)) || (ties(first) && untied(second));
            CHECK((merged.err.find("the result ties nothing") != std::string::npos) == mixed);
            auto sum = of_tokens(folder / second);
            const auto more = of_tokens(folder / first), found = of_tokens(folder / "out");
            reference::add(sum.first, more.first, 2);
            reference::add(sum.second, more.second, 2);
            CHECK(reference::distance(found.first, sum.first) <= 1e-5 * (1 + reference::norm(sum.first)));
            CHECK(reference::distance(found.second, sum.second) <= 1e-5 * (1 + reference::norm(sum.second)));
        }
    }
    // Of what a tied adapter does to the head nothing else tells: the flag alone may be of a base that ties nothing.
    write("flag", 60, true, false, true, {"q", "embed_tokens"});
    std::filesystem::remove_all(folder / "out");
    for (const auto& other : {"both", "embedding"}) {
        refused(folder, {"merge-lora", "--adapter", other, "--adapter", "flag", "--out", "out"}, 1,
            "holds no factors of both");
    }
    REQUIRE(run(folder, {"merge-lora", "--adapter", "plain", "--adapter", "flag", "--out", "out"}).code == 0);
    CHECK(config_of(folder / "out")["ensure_weight_tying"] == true);
    CHECK_FALSE(read_values(folder / "out" / weights_file).contains("base_model.model.lm_head.lora_A.weight"));
    // PEFT ties what it finds by the names of embed_tokens and lm_head alone.
    {
        adapter made;
        made.updates["transformer.wte"] = normal_update<float>(4, 9, 2, 70, 0.5);
        made.embeddings.insert("transformer.wte");
        made.config = {{"target_modules", {"wte"}}, {"ensure_weight_tying", true}};
        taskvec::write_peft(folder / "wte", made);
        made.updates["lm_head"] = normal_update<float>(9, 4, 2, 71, 0.5);
        made.config = {{"target_modules", {"wte", "lm_head"}}};
        taskvec::write_peft(folder / "head", made);
        REQUIRE(run(folder, {"merge-lora", "--adapter", "wte", "--adapter", "head", "--out", "out"}).code == 0);
        CHECK(config_of(folder / "out")["ensure_weight_tying"] == false);
        const auto found = dense_updates(folder / "out").at("lm_head"),
                   expected = dense_updates(folder / "head").at("lm_head");
        CHECK(reference::distance(found, expected) <= 1e-5 * (1 + reference::norm(expected)));
    }
    // fuse adds what is one matrix once, and says nothing of factors that are lost.
    write_values(folder / "base.safetensors",
        {{"model.embed_tokens.weight", tensor(9, 4, 1)}, {"model.layers.0.q.weight", tensor(4, 4, 2)}});
    const auto fused =
        run(folder, {"fuse", "--base", "base.safetensors", "--adapter", "tied", "--out", "fused.safetensors"});
    REQUIRE_MESSAGE(fused.code == 0, fused.err);
    CHECK(fused.err.find("are left out") == std::string::npos);
    const auto change = difference(read_values(folder / "fused.safetensors").at("model.embed_tokens.weight"),
        read_values(folder / "base.safetensors").at("model.embed_tokens.weight"));
    const auto expected = of_tokens(folder / "tied").first;
    CHECK(reference::distance(change, expected) <= 1e-5 * (1 + reference::norm(expected)));
}

TEST_CASE("merge-lora refuses a module that comes whole with one adapter, and as factors with another")
{
    const scratch folder;
    auto whole = three_layers(1), factored = three_layers(20);
    whole.config["modules_to_save"] = {"score"};
    whole.others["score.weight"] = carried({2, 3}, {1, 2, 3, 4, 5, 6});
    factored.updates["score"] = normal_update<float>(2, 3, 1, 7);
    taskvec::write_peft(folder / "a", whole);
    taskvec::write_peft(folder / "b", factored);
    for (const auto& order : {std::pair{"a", "b"}, std::pair{"b", "a"}}) {
        for (const std::string how : {"equal", "average", "first"}) {
            CAPTURE(how);
            refused(folder,
                {"merge-lora", "--adapter", order.first, "--adapter", order.second, "--modules-to-save", how, "--out",
                    "out"},
                1, "module 'score' comes whole with 'a', and 'b' has factors of it");
        }
    }
    REQUIRE(run(folder, with(merge_two, {"--modules-to-save", "drop"})).code == 0);
    check_close({{"score", dense_updates(folder / "out").at("score")}},
        {{"score", reference::dense(factored.updates["score"])}});
}

TEST_CASE("merge-lora calls a bias as PEFT does where the result adapts its module, and averages one under two names")
{
    const scratch folder;
    const std::string prefix = "base_model.model.", plain = "layers.1.q.bias", within = "layers.1.q.base_layer.bias";
    auto all = three_layers(1), only = three_layers(20), none = three_layers(40);
    all.updates.erase("layers.1.q"); // whose bias was trained all the same
    all.config["bias"] = "all";
    all.others[plain] = carried({8}, {1, 2, 3, 4, 5, 6, 7, 8});
    only.config["bias"] = "lora_only";
    only.others[within] = carried({8}, {3, 2, 1, 0, -1, -2, -3, -4});
    taskvec::write_peft(folder / "all", all);
    taskvec::write_peft(folder / "only", only);
    taskvec::write_peft(folder / "none", none);
    write_values(folder / "base.safetensors",
        {{"layers.0.q.weight", tensor(9, 7, 1)}, {"layers.0.v.weight", tensor(6, 7, 2)},
            {"layers.1.q.weight", tensor(8, 8, 3)}, {plain, {taskvec::dtype::f32, {8}, std::vector<float>(8)}}});
    const std::vector<float> mean{2, 2, 2, 2, 2, 2, 2, 2};
    for (const auto& [first, second] : std::vector<std::pair<std::string, std::string>>{
             {"all", "none"}, {"none", "all"}, {"all", "only"}, {"only", "all"}}) {
        CAPTURE_BOUND(first);
        CAPTURE_BOUND(second);
        std::filesystem::remove_all(folder / "out");
        REQUIRE(
            run(folder,
                {"merge-lora", "--adapter", first, "--adapter", second, "--modules-to-save", "average", "--out", "out"})
                .code
            == 0);
        const bool two = first == "only" || second == "only";
        const auto found = read_values(folder / "out" / weights_file);
        CHECK_FALSE(found.contains(prefix + plain));
        REQUIRE(found.contains(prefix + within));
        const auto expected = two ? mean : std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8};
        CHECK(found.at(prefix + within).values == expected);
        CHECK(config_of(folder / "out")["bias"] == "all");
        REQUIRE(
            run(folder, {"fuse", "--base", "base.safetensors", "--adapter", "out", "--out", "fused.safetensors"}).code
            == 0);
        CHECK(read_values(folder / "fused.safetensors").at(plain).values == expected);
    }
    // Where nothing adapts the module the bias is its own.
    REQUIRE(run(folder, {"merge-lora", "--adapter", "all", "--out", "out"}).code == 0);
    CHECK(read_values(folder / "out" / weights_file).contains(prefix + plain));
    all.others[within] = only.others[within];
    taskvec::write_peft(folder / "twice", all);
    refused(folder, {"merge-lora", "--adapter", "twice", "--out", "no"}, 1, "are one bias");
}

TEST_CASE("heads of classifiers are known by the ends of their names, and dropped with the task type that wants them")
{
    const scratch folder;
    for (const std::string type : {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}) {
        CAPTURE(type);
        const std::string head = type == "QUESTION_ANS" ? "qa_outputs" : "classifier";
        auto made = three_layers();
        made.config = {{"task_type", type}, {"modules_to_save", {head}}, {"bias", "all"}};
        made.others["layers.0.q.base_layer.bias"] = carried({9}, std::vector<float>(9, 3));
        for (const auto& name : {head, "pre_" + head}) { // as DistilBERT's, which PEFT saves with it
            made.others[name + ".weight"] = carried({1, 2}, {1, 2});
            made.others[name + ".bias"] = carried({1}, {3});
        }
        std::filesystem::remove_all(folder / "a");
        taskvec::write_peft(folder / "a", made);
        for (const auto& verb : {std::vector<std::string>{"merge-lora"}, {"peru-lora", "--rank", "2"}}) {
            CAPTURE(verb[0]);
            const auto line = with(verb, {"--adapter", "a", "--out", "out", "--modules-to-save"});
            REQUIRE(run(folder, with(line, {"equal"})).code == 0);
            CHECK(shapes_in(folder / "out").at("pre_" + head + ".bias") == taskvec::extents{1});
            CHECK(config_of(folder / "out")["task_type"] == type);
            const auto dropped = run(folder, with(line, {"drop"}));
            REQUIRE_MESSAGE(dropped.code == 0, dropped.err);
            CHECK(dropped.err.find("of 'a' goes its task type, " + type) != std::string::npos);
            CHECK(config_of(folder / "out")["task_type"].is_null());
            CHECK(config_of(folder / "out")["modules_to_save"].is_null());
            const auto left = shapes_in(folder / "out");
            CHECK(left.size() == 7); // three pairs, and the bias that the configuration announces
            CHECK(left.contains("layers.0.q.base_layer.bias"));
            REQUIRE(run(folder, with(line, {"drop", "--task-type", "FEATURE_EXTRACTION"})).code == 0);
            CHECK(config_of(folder / "out")["task_type"] == "FEATURE_EXTRACTION");
            refused(folder, with(line, {"drop", "--task-type", type}), 2, "--modules-to-save drop leaves out");
        }
    }
    auto made = three_layers();
    made.updates["classifier"] = normal_update<float>(2, 3, 1, 7);
    taskvec::write_peft(folder / "b", made);
    for (const auto& line :
        {std::vector<std::string>{"merge-lora", "--adapter", "b"}, {"convert", "b", "--as", "peft"}}) {
        refused(folder, with(line, {"--task-type", "SEQ_CLS", "--out", "no"}), 2, "has factors of 'classifier'");
    }
}

TEST_CASE("extract-lora keeps the heads of classifiers whole where the task type has PEFT look for them")
{
    for (const std::string type : {"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"}) {
        CAPTURE(type);
        const std::string head = type == "QUESTION_ANS" ? "qa_outputs" : type == "SEQ_CLS" ? "score" : "classifier";
        const scratch folder;
        write_directories(folder,
            {{"layers.0.q.weight", tensor(4, 4, 1)}, {head + ".weight", tensor(3, 4, 2)},
                {head + ".bias", {taskvec::dtype::f32, {3}, {1, 2, 3}}}},
            R"({"torch_dtype": "float32"})");
        const auto made = run(folder, with(extract_directory, {"--task-type", type, "--sparse-rest"}));
        REQUIRE_MESSAGE(made.code == 0, made.err);
        CHECK(made.err.find("'" + head + ".bias' and what else is of the head are whole") != std::string::npos);
        CHECK(made.err.find("left out") == std::string::npos);
        const auto found = read_values(folder / "out" / weights_file),
                   tuned = read_values(folder / "tuned/model.safetensors");
        CHECK(found.size() == 4);
        for (const std::string end : {".weight", ".bias"}) {
            CHECK(found.at("base_model.model." + head + end).values == tuned.at(head + end).values);
        }
        const auto config = config_of(folder / "out");
        CHECK(config["task_type"] == type);
        CHECK(config["target_modules"] == nlohmann::json{"layers.0.q"});
        const auto saved = config["modules_to_save"].get<std::vector<std::string>>();
        CHECK(std::find(saved.begin(), saved.end(), head) != saved.end());
        CHECK_FALSE(std::filesystem::exists(folder / "out/rest.delta.safetensors"));
        check_put_back(folder);
        // What --exclude leaves out is the base's, and PEFT finds it all the same.
        REQUIRE(run(folder, with(extract_directory, {"--task-type", type, "--exclude", head})).code == 0);
        CHECK(read_values(folder / "out" / weights_file).at("base_model.model." + head + ".bias").values
            == std::vector<float>{1, 2, 3});
        // A head that the base lacks is the fine-tuned model's.
        auto base = read_values(folder / "base/model.safetensors");
        base.erase(head + ".weight");
        base.erase(head + ".bias");
        write_values(folder / "base/model.safetensors", base);
        refused(folder, with({"extract-lora", "--base", "base", "--task", "tuned"}, {"--rank", "1", "--out", "no"}), 1,
            "is not in 'base'");
        REQUIRE(run(folder, with(extract_directory, {"--task-type", type})).code == 0);
        CHECK(read_values(folder / "out" / weights_file).at("base_model.model." + head + ".weight").values
            == tuned.at(head + ".weight").values);
    }
}

TEST_CASE("extract-lora says of the model what an adapter that is the task says, and names what AutoPeftModel lacks")
{
    const scratch folder;
    write_directories(folder, {{"layers.0.q.weight", tensor(4, 4, 1)}}, R"({"torch_dtype": "float32"})");
    const auto missing = run(folder, extract_directory);
    REQUIRE(missing.code == 0);
    CHECK(missing.err.find("names no task type, by which AutoPeftModel loads it: --task-type gives it")
        != std::string::npos);
    CHECK(config_of(folder / "out")["base_model_name_or_path"] == "base");
    adapter given;
    given.updates["layers.0.q"] = normal_update<float>(4, 4, 2, 5);
    given.config = {{"task_type", "CAUSAL_LM"}, {"base_model_name_or_path", "of/the-hub"}};
    taskvec::write_peft(folder / "a", given);
    for (const std::string base : {"base", "base/model.safetensors"}) {
        CAPTURE(base);
        const auto made =
            run(folder, {"extract-lora", "--base", base, "--task-adapter", "a=0.5", "--rank", "2", "--out", "out"});
        REQUIRE_MESSAGE(made.code == 0, made.err);
        CHECK(made.err.find("AutoPeftModel") == std::string::npos);
        CHECK(config_of(folder / "out")["task_type"] == "CAUSAL_LM");
        CHECK(config_of(folder / "out")["base_model_name_or_path"] == (base == "base" ? "base" : "of/the-hub"));
    }
    REQUIRE(run(folder,
                {"extract-lora", "--base", "base", "--task-adapter", "a", "--rank", "2", "--task-type",
                    "FEATURE_EXTRACTION", "--out", "out"})
                .code
        == 0);
    CHECK(config_of(folder / "out")["task_type"] == "FEATURE_EXTRACTION");
}

TEST_CASE("extract-lora says of experts what PEFT makes of their factors")
{
    const auto noted = [](const std::string& type, bool both, bool every, bool shared) {
        const scratch folder;
        values_model base{{"model.layers.0.self_attn.q_proj.weight", tensor(8, 8, 9)}};
        unsigned seed = 1;
        for (const std::string expert : {"0", "1"}) {
            for (const std::string kind : {"gate_proj", "up_proj", "down_proj"}) {
                base["model.layers.0.mlp.experts." + expert + "." + kind + ".weight"] = tensor(8, 8, seed++);
            }
        }
        if (shared) { base["model.layers.0.mlp.shared_experts.up_proj.weight"] = tensor(8, 8, seed++); }
        write_directories(folder, base, R"({"torch_dtype": "float32", "model_type": ")" + type + "\"}");
        auto line = extract_directory;
        if (!both) { line = with(line, {"--exclude", "gate_proj"}); }
        if (!every) { line = with(line, {"--exclude", "experts\\.1\\."}); }
        const auto made = run(folder, line);
        REQUIRE_MESSAGE(made.code == 0, made.err);
        return made.err;
    };
    const auto says = [](const std::string& text, const std::string& what) { return text.find(what) != text.npos; };
    CHECK(says(noted("qwen3_moe", true, true, false), "PEFT 0.21 joins their factors as it loads the adapter"));
    CHECK_FALSE(says(noted("qwen3_moe", true, true, false), "does not find"));
    CHECK(says(noted("qwen3_moe", false, true, false), "only where 'gate_proj' and 'up_proj' are adapted together"));
    CHECK(says(noted("qwen3_moe", true, false, false), "only where all experts of 'model.layers.0.mlp.experts'"));
    CHECK(
        says(noted("glm4_moe", true, true, true), "loses the factors of 'model.layers.0.mlp.shared_experts.up_proj'"));
    CHECK(says(noted("phimoe", true, true, false), "where PEFT does not find it"));
    // Layers of which some have a rank above that of the experts.
    const scratch folder;
    values_model base{{"model.layers.0.q.weight", tensor(8, 8, 9)}}, tuned;
    for (const std::string kind : {"w1", "w2", "w3"}) {
        base["model.layers.0.block_sparse_moe.experts.0." + kind + ".weight"] = tensor(8, 8, 4);
    }
    write_directories(folder, base, R"({"torch_dtype": "float32", "model_type": "mixtral"})");
    tuned = read_values(folder / "tuned/model.safetensors");
    tuned["model.layers.0.q.weight"] = tensor(8, 8, 33);
    write_values(folder / "tuned/model.safetensors", tuned);
    const auto made =
        run(folder, {"extract-lora", "--base", "base", "--task", "tuned", "--energy", "0.999", "--out", "out"});
    REQUIRE_MESSAGE(made.code == 0, made.err);
    CHECK(says(made.err, "only where all are of the adapter's highest rank"));
}

TEST_CASE("extract-lora leaves routers out where transformers 5 keeps them as parameters, and names them otherwise")
{
    for (const std::string router : {"model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.router"}) {
        const auto experts = router.substr(0, router.rfind('.')) + ".experts.0.w1";
        for (const std::string version : {"5.1.0", "4.57.1"}) {
            CAPTURE(router + " " + version);
            const scratch folder;
            write_directories(folder,
                {{router + ".weight", tensor(3, 4, 1)}, {experts + ".weight", tensor(4, 4, 2)},
                    {"model.layers.0.gate.weight", tensor(4, 4, 3)}}, // no experts beside it
                R"({"torch_dtype": "float32", "transformers_version": ")" + version + "\"}");
            const auto made = run(folder, extract_directory);
            REQUIRE(made.code == 0);
            const auto found = shapes_in(folder / "out");
            const bool kept = version.starts_with("4");
            CHECK(found.contains(router + ".lora_A.weight") == kept);
            CHECK(found.contains("model.layers.0.gate.lora_A.weight"));
            CHECK(made.err.find(kept ? "is the router of a mixture of experts" : "1 router of the mixtures of experts")
                != std::string::npos);
            CHECK((made.err.find("left out: '" + router + ".weight' changed") != std::string::npos) == !kept);
            if (kept) { check_put_back(folder); }
        }
    }
}

TEST_CASE("adapters of initialisations that leave the base alone, or were saved converted, are plain ones")
{
    const scratch folder;
    taskvec::write_peft(folder / "a", three_layers());
    const auto sound = config_of(folder / "a");
    const auto before = dense_updates(folder / "a");
    for (const auto& more : {nlohmann::json{{"init_lora_weights", "mica"}},
             nlohmann::json{{"init_lora_weights", "velora"}, {"velora_config", {{"rank", 1}}}},
             nlohmann::json{{"init_lora_weights", true}, {"lora_ga_config", {{"direction", "ArB2r"}}}},
             nlohmann::json{{"init_lora_weights", true}, {"corda_config", {{"corda_method", "ipm"}}}}}) {
        CAPTURE(more.dump());
        auto config = sound;
        config.update(more);
        spill(folder / "a" / config_file, config.dump());
        const auto result = run(folder, {"merge-lora", "--adapter", "a", "--out", "out"});
        CAPTURE(result.err);
        REQUIRE(result.code == 0);
        check_close(dense_updates(folder / "out"), before);
    }
    auto tensors = read_values(folder / "a" / weights_file); // VeLoRA's training keeps this beside the factors
    tensors["base_model.model.layers.0.q.lora_velora_embed"] = tensor(1, 7, 3);
    write_values(folder / "a" / weights_file, tensors);
    spill(folder / "a" / config_file, sound.dump());
    REQUIRE(run(folder, {"merge-lora", "--adapter", "a", "--out", "out"}).code == 0);
    check_close(dense_updates(folder / "out"), before);
    for (const std::string init : {"lora_ga", "corda", "pissa"}) { // whose residual the adapter does not hold
        auto config = sound;
        config["init_lora_weights"] = init;
        spill(folder / "a" / config_file, config.dump());
        refused(folder, {"merge-lora", "--adapter", "a", "--out", "no"}, 1, "init_lora_weights is '" + init + "'");
    }
}

TEST_CASE("adapters under other names than PEFT's, or without a configuration, are sent to convert")
{
    const scratch folder;
    taskvec::write_peft(folder / "a", three_layers());
    const auto tensors = read_values(folder / "a" / weights_file);
    values_model named, bare;
    for (const auto& [name, x] : tensors) {
        named[name.substr(0, name.size() - 7) + ".default.weight"] = x;
        bare[name.substr(17)] = x;
    }
    const std::vector<std::string> line{"merge-lora", "--adapter", "a", "--out", "no"};
    for (const auto* other : {&named, &bare}) {
        write_values(folder / "a" / weights_file, *other);
        refused(folder, line, 1, "taskvec convert --as peft");
        REQUIRE(run(folder, {"convert", "a", "--as", "peft", "--out", "c"}).code == 0);
        CHECK(same(read_values(folder / "c" / weights_file), tensors));
    }
    write_values(folder / "a" / weights_file, tensors);
    std::filesystem::remove(folder / "a" / config_file);
    refused(folder, line, 1, "taskvec convert --as peft");
}
