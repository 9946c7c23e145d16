// taskvec inspect, and what all verbs say about themselves.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <nlohmann/json.hpp>

using namespace tools_test;

TEST_CASE("inspect lists tensors, totals and metadata")
{
    const scratch folder;
    write_values(folder / "m.safetensors", sample_base(), {{"note", "line\nbreak"}});
    const auto result = run(folder, {"inspect", "m.safetensors"});
    CHECK(result.code == 0);
    CHECK(result.err.empty());
    for (const char* part : {"layers.1.weight  BF16   [64, 65]  8,320\n", "layers.0.bias    F16    [31]         62\n",
             "scale            F32    []            4\n",
             "5 tensors, 4,719 elements, 10,494 bytes (10.5 kB) in 1 file\n", "  format: pt\n",
             "  note: line\\x0abreak\n"}) {
        CAPTURE(result.out);
        CHECK(result.out.find(part) != std::string::npos);
    }
}

TEST_CASE("inspect --json is what scripts rely on")
{
    const scratch folder;
    write_values(folder / "m.safetensors", sample_base(), {{"note", "line\nbreak"}});
    const auto result = run(folder, {"inspect", "--json", "m.safetensors"});
    CHECK(result.code == 0);
    const auto json = nlohmann::json::parse(result.out);
    REQUIRE(json["tensors"].size() == 5);
    CHECK(json["tensors"][2]
        == nlohmann::json{{"name", "layers.1.weight"}, {"dtype", "BF16"}, {"shape", {64, 65}}, {"bytes", 8320}});
    CHECK(json["tensors"][3]["shape"].size() == 0);
    CHECK(json["metadata"] == nlohmann::json{{"format", "pt"}, {"note", "line\nbreak"}});
    spill(folder / "e.safetensors", safetensors_bytes("{}"));
    const auto empty = nlohmann::json::parse(run(folder, {"inspect", "e.safetensors", "--json"}).out);
    CHECK(empty["tensors"] == nlohmann::json::array());
    CHECK(empty["metadata"] == nlohmann::json::object());
    CHECK(empty["totals"]["tensors"] == 0);
}

TEST_CASE("inspect --json says what the table says: totals, layers, architecture, ties and quantised layers")
{
    const scratch folder;
    const auto zeros = [](taskvec::extents shape, taskvec::dtype type) {
        const auto size = static_cast<std::size_t>(taskvec::element_count(shape));
        return values_tensor{type, std::move(shape), std::vector<float>(size, 1)};
    };
    using taskvec::dtype;
    std::filesystem::create_directories(folder / "m");
    write_values(folder / "m/model.safetensors",
        {{"model.embed_tokens.weight", zeros({4, 2}, dtype::bf16)},
            {"model.layers.0.q.weight", zeros({2, 2}, dtype::f32)}, {"model.layers.1.b.weight", zeros({2}, dtype::f32)},
            {"model.layers.1.q.weight", zeros({2, 2}, dtype::bf16)}});
    spill(folder / "m/config.json",
        R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": true})");
    const auto json = nlohmann::json::parse(run(folder, {"inspect", "m", "--json"}).out);
    CHECK(json["tensors"].size() == 4);
    const auto counts = [](int tensors, int elements) {
        return nlohmann::json{{"tensors", tensors}, {"elements", elements}};
    };
    CHECK(json["totals"]
        == nlohmann::json{{"tensors", 4}, {"elements", 18}, {"bytes", 48}, {"files", 1},
            {"by_dtype", {{"F32", counts(2, 6)}, {"BF16", counts(2, 12)}}}});
    CHECK(json["layers"]["lists"]
        == nlohmann::json::array(
            {{{"name", "model.layers"}, {"layers", 2}, {"least", counts(1, 4)}, {"most", counts(2, 6)}}}));
    CHECK(json["layers"]["outside"] == counts(1, 8));
    CHECK(json["architecture"] == nlohmann::json{{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}});
    CHECK(json["tied"] == "the head is 'model.embed_tokens.weight' (config.json: tie_word_embeddings)");
    CHECK(json["quantised"].is_null());
}

TEST_CASE("inspect refuses what is malformed with one line and exit code 1")
{
    const scratch folder;
    spill(folder / "short", "abc");
    spill(folder / "text", "this is a text file, not a model");
    spill(folder / "hole.safetensors",
        safetensors_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", "ab"));
    spill(folder / "two\nlines", safetensors_bytes(R"({"a\nb":{"dtype":"U9","shape":[1],"data_offsets":[0,1]}})", "a"));
    std::filesystem::create_directory(folder / "empty");
    for (const char* name : {"short", "text", "hole.safetensors", "two\nlines", "empty", "missing", "/dev/null"}) {
        const auto result = run(folder, {"inspect", name});
        CAPTURE(result.err);
        CHECK(result.code == 1);
        CHECK(is_error_line(result.err));
        CHECK(result.out.empty());
    }
    CHECK(run(folder, {"inspect", "hole.safetensors"}).err.find("tensor 'a' begins at byte 1 of the buffer; expected 0")
        != std::string::npos);
}

TEST_CASE("a full standard output is an error")
{
    const scratch folder;
    write_values(folder / "m.safetensors", sample_base());
    const auto command =
        std::string(TASKVEC_TOOL) + " inspect '" + (folder / "m.safetensors").string() + "' > /dev/full 2> /dev/null";
    const int status = std::system(command.c_str());
    CHECK(WEXITSTATUS(status) == 1);
}

TEST_CASE("every verb has help with an example, and the tool lists them all")
{
    const scratch folder;
    const auto whole = run(folder, {"--help"});
    CHECK(whole.code == 0);
    for (const char* verb : {"inspect", "merge", "prune", "apply", "peru-fft", "similarity"}) {
        CHECK(whole.out.find(std::string("\n  ") + verb + " ") != std::string::npos);
        const auto help = run(folder, {verb, "--help"});
        CHECK(help.code == 0);
        CHECK(help.err.empty());
        CHECK(help.out.find(std::string("Usage: taskvec ") + verb) != std::string::npos);
        CHECK(help.out.find(std::string("Example:\n  taskvec ") + verb) != std::string::npos);
    }
    for (const char* version : {"--version", "-V", "-v"}) {
        CHECK(run(folder, {version}).out == run(folder, {"--version"}).out);
    }
    CHECK(run(folder, {"--version"}).out.starts_with("taskvec 0."));
    CHECK(run(folder, {"help"}).out == whole.out);
    CHECK(run(folder, {"help", "merge"}).out == run(folder, {"merge", "--help"}).out);
    CHECK(run(folder, {"help", "mrege"}).code == 2);
}

TEST_CASE("wrong usage is exit code 2: a line that says what is wrong, with the usage")
{
    const scratch folder;
    write_values(folder / "m.safetensors", sample_base());
    const std::vector<std::vector<std::string>> wrong{{}, {"nonsense"}, {"inspect"},
        {"inspect", "m.safetensors", "extra"}, {"inspect", "--nonsense", "m.safetensors"}, {"merge"},
        {"merge", "--method", "ties", "--task", "m.safetensors", "--out", "o"},
        {"merge", "--method", "ties", "--base", "m.safetensors", "--out", "o"},
        {"merge", "--method", "nonsense", "--base", "m.safetensors", "--task", "m.safetensors", "--out", "o"},
        {"merge", "--method", "average", "--task", "m.safetensors"},
        {"merge", "--method", "average", "--task", "=2", "--out", "o"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--lambda", "much"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--scope", "world"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--dtype", "f8"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--include", "("},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--shard-size", "5 bananas"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--memory", "-1"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--threads", "-1"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--device", "tpu"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--seed", "1.5"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--seed", "-1"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", "o", "--seed", "18446744073709551616"},
        {"merge", "--method", "average", "--task", "m.safetensors", "--out", ""},
        {"prune", "--base", "m.safetensors", "--task", "m.safetensors=0.5", "--out", "o"},
        {"similarity", "--base", "m.safetensors", "--task", "m.safetensors=2"},
        {"prune", "--base", "m.safetensors", "--task", "m.safetensors", "--task", "m.safetensors", "--out", "o"}};
    for (const auto& arguments : wrong) {
        const auto result = run(folder, arguments);
        CAPTURE(result.err);
        CHECK(result.code == 2);
        CHECK(is_usage_error(result.err));
        CHECK(folder.names() == std::set<std::string>{"m.safetensors"});
    }
}

TEST_CASE("a word that is no verb is named")
{
    const scratch folder;
    CHECK(run(folder, {"mrege", "--out", "o"}).err.find("'mrege'") != std::string::npos);
}

TEST_CASE("names from files reach the terminal harmless")
{
    const scratch folder;
    spill(folder / "m.safetensors",
        safetensors_bytes(
            "{\"a\\u001b[31m\xc2\x9b\xe2\x80\xae\xce\xa9\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}"));
    const auto table = run(folder, {"inspect", "m.safetensors"});
    REQUIRE(table.code == 0);
    CHECK(table.out.find("a\\x1b[31m\\xc2\\x9b\\xe2\\x80\\xae\xce\xa9 ")
        != std::string::npos); // an escape, a C1 control, a turn of direction; then an omega
    const auto bytes = run(folder, {"inspect", "no\xff\xc3(.safetensors"});
    CHECK(bytes.code == 1);
    CHECK(bytes.err.starts_with("taskvec: error: no\\xff\\xc3(.safetensors: "));
}

TEST_CASE("inspect --diff says which tensors differ, and how much")
{
    const scratch folder;
    write_values(folder / "a.safetensors",
        {{"equal", {taskvec::dtype::f32, {2}, {1, 2}}}, {"w", {taskvec::dtype::f32, {2}, {3, 4}}},
            {"shape", {taskvec::dtype::f32, {1}, {1}}}, {"mine", {taskvec::dtype::f32, {1}, {1}}}});
    write_values(folder / "b.safetensors",
        {{"equal", {taskvec::dtype::bf16, {2}, {1, 2}}}, {"w", {taskvec::dtype::f32, {2}, {3, 0}}},
            {"shape", {taskvec::dtype::f32, {2}, {1, 1}}}});
    const auto json = run(folder, {"inspect", "a.safetensors", "--diff", "b.safetensors", "--json"});
    REQUIRE(json.code == 0);
    const auto diff = nlohmann::json::parse(json.out);
    CHECK(diff["equal"] == 1);
    REQUIRE(diff["differ"].size() == 1);
    CHECK(diff["differ"][0]["name"] == "w");
    CHECK(diff["differ"][0]["max"] == 4);
    CHECK(diff["differ"][0]["norm"] == 4);
    CHECK(diff["differ"][0]["relative"] == 0.8);
    CHECK(diff["differ"][0]["cosine"] == doctest::Approx(0.6));
    CHECK(diff["only_in_first"] == std::vector<std::string>{"mine"});
    CHECK(diff["not_comparable"][0]["name"] == "shape");
    const auto text = run(folder, {"inspect", "a.safetensors", "--diff", "b.safetensors"});
    CHECK(text.out.find("1 tensor equal, 1 differ, 1 in one model only, 1 do not compare") != std::string::npos);
    CHECK(text.out.find("w       4     4       0.8  0.600000") != std::string::npos);
}

TEST_CASE("inspect --diff says which tensors have two dtypes, whether their values differ or not")
{
    const scratch folder;
    using taskvec::dtype;
    write_values(folder / "a.safetensors",
        {{"equal", {dtype::f32, {2}, {1, 2}}}, {"other", {dtype::f32, {2}, {1, 2}}}, {"same", {dtype::f32, {1}, {3}}},
            {"shape", {dtype::f32, {1}, {3}}}, {"half", {dtype::f16, {1}, {1}}}});
    write_values(folder / "b.safetensors",
        {{"equal", {dtype::bf16, {2}, {1, 2}}}, {"other", {dtype::bf16, {2}, {1, 4}}}, {"same", {dtype::f32, {1}, {3}}},
            {"shape", {dtype::bf16, {2}, {3, 3}}}, {"half", {dtype::f32, {1}, {1}}}});
    const auto json = run(folder, {"inspect", "a.safetensors", "--diff", "b.safetensors", "--json"});
    REQUIRE(json.code == 0);
    const auto diff = nlohmann::json::parse(json.out);
    CHECK(diff["equal"] == 3); // in their values: "equal", "half" and "same"
    REQUIRE(diff["differ"].size() == 1);
    CHECK(diff["differ"][0]["name"] == "other");
    CHECK(diff["dtypes_differ"] == nlohmann::json::parse(R"([{"name": "equal", "first": "F32", "second": "BF16"},
            {"name": "half", "first": "F16", "second": "F32"}, {"name": "other", "first": "F32", "second": "BF16"}])"));
    const auto text = run(folder, {"inspect", "a.safetensors", "--diff", "b.safetensors"}).out;
    CHECK(text.find("F32 in 'a.safetensors', BF16 in 'b.safetensors': equal and 1 other\n") != std::string::npos);
    CHECK(text.find("F16 in 'a.safetensors', F32 in 'b.safetensors': half\n") != std::string::npos);
    CHECK(
        text.ends_with("3 tensors equal, 1 differ, 0 in one model only, 1 do not compare; 3 tensors of two dtypes\n"));
    const auto none = run(folder, {"inspect", "a.safetensors", "--diff", "a.safetensors"}).out;
    CHECK(none == "5 tensors equal, 0 differ, 0 in one model only\n");
}

TEST_CASE("long metadata is abridged in the table, and whole in JSON")
{
    const scratch folder;
    const std::string value(5000, 'x');
    write_values(folder / "a.safetensors", {{"w", {taskvec::dtype::f32, {1}, {1}}}}, {{"config", value}});
    const auto table = run(folder, {"inspect", "a.safetensors"});
    CHECK(table.out.find(std::string(161, 'x')) == std::string::npos);
    CHECK(table.out.find("(5,000 bytes, whole with --json)") != std::string::npos);
    CHECK(run(folder, {"inspect", "a.safetensors", "--json"}).out.find(value) != std::string::npos);
}

TEST_CASE("of many keys of metadata the table shows the first, and counts the rest")
{
    const scratch folder;
    std::map<std::string, std::string> metadata;
    for (int i = 100; i < 400; ++i) { metadata["key" + std::to_string(i)] = "x"; }
    write_values(folder / "a.safetensors", {{"w", {taskvec::dtype::f32, {1}, {1}}}}, metadata);
    const auto table = run(folder, {"inspect", "a.safetensors"});
    CHECK(table.out.find("key148: x") != std::string::npos); // the first is "format"
    CHECK(table.out.find("key149") == std::string::npos);
    CHECK(table.out.find("… and 251 keys more, all with --json") != std::string::npos);
    CHECK(run(folder, {"inspect", "a.safetensors", "--json"}).out.find("key399") != std::string::npos);
}

TEST_CASE("inspect says what layers hold, what the model is called, and what is tied")
{
    const scratch folder;
    std::filesystem::create_directory(folder / "m");
    const values_tensor square{taskvec::dtype::f32, {4, 4}, std::vector<float>(16, 1.5F)};
    values_model model{{"model.embed_tokens.weight", {taskvec::dtype::f32, {8, 4}, std::vector<float>(32, 2.0F)}},
        {"model.norm.weight", {taskvec::dtype::f32, {4}, {1, 2, 3, 4}}}};
    for (const auto* layer : {"0", "1", "2"}) {
        model[std::string("model.layers.") + layer + ".mlp.weight"] = square;
        model[std::string("model.layers.") + layer + ".attn.weight"] = square;
    }
    const auto table = [&] {
        write_values(folder / "m/model.safetensors", model);
        const auto result = run(folder, {"inspect", "m"});
        CHECK(result.code == 0);
        return result.out;
    };
    const auto says = [](const std::string& text, const std::string& part) {
        INFO(text);
        CHECK_MESSAGE(text.find(part) != std::string::npos, part);
    };
    auto text = table();
    says(text, "\n  model.layers: 3 layers, each of 2 tensors and 32 elements\n");
    says(text, "\n  outside of layers: 2 tensors, 36 elements\n");
    CHECK(text.find("architecture") == std::string::npos);
    CHECK(text.find("tied") == std::string::npos);
    spill(folder / "m/config.json",
        R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": true})");
    model["model.layers.1.mlp.bias"] = {taskvec::dtype::f32, {4}, {1, 2, 3, 4}};
    text = table();
    says(text, "\n  model.layers: 3 layers, each of 2 to 3 tensors and 32 to 36 elements\n");
    says(text, "\narchitecture: LlamaForCausalLM (llama)\n");
    says(text, "\ntied: the head is 'model.embed_tokens.weight' (config.json: tie_word_embeddings)\n");
    model["lm_head.weight"] = model["model.embed_tokens.weight"];
    says(table(), "\ntied: 'lm_head.weight' has the bytes of 'model.embed_tokens.weight'\n");
    model["lm_head.weight"].values[5] = 7;
    CHECK(table().find("tied") == std::string::npos);
}

TEST_CASE("inspect --verify tells the model that a file names from others")
{
    const scratch folder;
    auto task = sample_base();
    task.begin()->second.values[0] += 1;
    write_values(folder / "base.safetensors", sample_base());
    write_values(folder / "task.safetensors", task);
    REQUIRE(run(folder, {"prune", "--base", "base.safetensors", "--task", "task.safetensors", "--out", "d.safetensors"})
                .code
        == 0);
    const auto verify = [&](const std::string& model, const std::string& what) {
        const auto result = run(folder, {"inspect", model, "--verify", what});
        CAPTURE(result.err);
        CHECK(result.err.empty() == (result.code == 0));
        if (result.code != 0) { CHECK(is_error_line(result.err)); }
        return std::pair(result.code, result.code == 0 ? result.out : result.err);
    };
    CHECK(verify("base.safetensors", "d.safetensors").first == 0);
    const auto other = verify("task.safetensors", "d.safetensors");
    CHECK(other.first == 1);
    CHECK(other.second.find("its fingerprint is xxh64:") != std::string::npos);
    const auto sketch = run(folder, {"inspect", "base.safetensors", "--sketch"}).out.substr(0, 22);
    CHECK(verify("base.safetensors", sketch).second.find("has the sketch") != std::string::npos);
    CHECK(verify("task.safetensors", sketch).first == 1);
    spill(folder / "README.md", "| base | `" + sketch + "` |\n| other | `xxh64:0123456789abcdef` |\n");
    CHECK(verify("base.safetensors", "README.md").first == 0);
    CHECK(verify("task.safetensors", "README.md").first == 1);
    spill(folder / "empty.md", "nothing of use: xxh64:12\n");
    CHECK(verify("base.safetensors", "empty.md").second.find("holds no fingerprint") != std::string::npos);
    CHECK(verify("base.safetensors", "base.safetensors").second.find("holds no fingerprint") != std::string::npos);
    CHECK(verify("base.safetensors", "missing.md").second.find("missing.md") != std::string::npos);
}

namespace {

/// A safetensors file of one tensor "w" of any dtype.
template <class T>
void write_w(const std::filesystem::path& path, taskvec::dtype type, const std::vector<T>& values)
{
    const taskvec::tensor_spec spec{"w", type, {static_cast<std::int64_t>(values.size())}};
    taskvec::safetensors_writer writer(path, std::vector{spec}, taskvec::metadata_map(), taskvec::durability::process);
    writer.write(0, 0, values.data(), values.size() * sizeof(T));
    writer.commit();
}

/// The one row of inspect --diff.
nlohmann::json row_of_diff(const scratch& folder)
{
    const auto result = run(folder, {"inspect", "a.safetensors", "--diff", "b.safetensors", "--json"});
    REQUIRE(result.code == 0);
    const auto diff = nlohmann::json::parse(result.out);
    CHECK(diff["equal"] == 0);
    CHECK(diff["not_comparable"].empty());
    REQUIRE(diff["differ"].size() == 1);
    return diff["differ"][0];
}

} // namespace

TEST_CASE("inspect --diff computes in f64 and in range, whatever the numbers are")
{
    const scratch folder;
    using taskvec::dtype;
    const auto compared = [&](dtype type, const auto& a, const auto& b) {
        write_w(folder / "a.safetensors", type, a);
        write_w(folder / "b.safetensors", type, b);
        return row_of_diff(folder);
    };
    using wide = std::vector<double>;
    // (3, 4) against (3, 0), by any factor: their squares are beyond f64 at both ends.
    for (const double unit : {1e-320, 1e-200, 1.0, 1e200, 4e307}) {
        const auto row = compared(dtype::f64, wide{3 * unit, 4 * unit}, wide{3 * unit, 0});
        CHECK(row["max"] == 4 * unit);
        CHECK(std::abs(row["norm"].get<double>() - 4 * unit) <= 1e-12 * 4 * unit);
        CHECK(row["relative"] == doctest::Approx(0.8).epsilon(1e-3));
        CHECK(row["cosine"] == doctest::Approx(0.6).epsilon(1e-3));
    }
    const auto large = compared(dtype::f32, std::vector<float>{-3e38F, 2}, std::vector<float>{3e38F, 2});
    CHECK(large["max"] == doctest::Approx(6e38).epsilon(1e-6));
    CHECK(large["norm"] == doctest::Approx(6e38).epsilon(1e-6));
    CHECK(large["cosine"] == doctest::Approx(-1));
    // NaN in the place of a number is a difference; NaN in both is none.
    const float nan = std::nanf(""), infinity = std::numeric_limits<float>::infinity();
    const auto lost = compared(dtype::f32, std::vector<float>{1, 2, nan}, std::vector<float>{1, nan, nan});
    CHECK(lost["max"].is_null());
    const auto text = run(folder, {"inspect", "a.safetensors", "--diff", "b.safetensors"}).out;
    CHECK(text.find("w     nan") != std::string::npos);
    CHECK(text.find("-nan") == std::string::npos);
    CHECK(compared(dtype::f32, std::vector<float>{1, infinity}, std::vector<float>{3, infinity})["max"] == 2);
}

TEST_CASE("inspect --diff counts integers and truths that differ, and what nothing computes with")
{
    const scratch folder;
    using taskvec::dtype;
    const auto compared = [&](dtype type, const auto& a, const auto& b) {
        write_w(folder / "a.safetensors", type, a);
        write_w(folder / "b.safetensors", type, b);
        return row_of_diff(folder);
    };
    const auto numbers = compared(dtype::i64, std::vector<std::int64_t>{1, 2}, std::vector<std::int64_t>{1, 3});
    CHECK(numbers["max"] == 1);
    CHECK(numbers["norm"] == 1);
    CHECK(numbers["cosine"] == doctest::Approx(7 / std::sqrt(50.0)));
    constexpr auto least = std::numeric_limits<std::int64_t>::min();
    CHECK(compared(dtype::i64, std::vector<std::int64_t>{least}, std::vector<std::int64_t>{least + 1})["max"] == 1);
    CHECK(compared(dtype::boolean, std::vector<std::uint8_t>{0, 1}, std::vector<std::uint8_t>{1, 1})["max"] == 1);
    CHECK(compared(dtype::c64, std::vector<std::uint64_t>{0}, std::vector<std::uint64_t>{1})["max"].is_null());
    write_w(folder / "a.safetensors", dtype::i32, std::vector<std::int32_t>{-1, 7});
    write_w(folder / "b.safetensors", dtype::i64, std::vector<std::int64_t>{-1, 7});
    CHECK(run(folder, {"inspect", "a.safetensors", "--diff", "b.safetensors"}).out.find("1 tensor equal, 0 differ")
        != std::string::npos);
}

TEST_CASE("inspect answers one question, as JSON too, and none about an empty name")
{
    const scratch folder;
    write_w(folder / "a.safetensors", taskvec::dtype::f32, std::vector<float>{1, 2});
    const auto sketch = run(folder, {"inspect", "a.safetensors", "--sketch"}).out;
    const auto word = sketch.substr(0, sketch.size() - 1);
    const auto json = [&](const std::vector<std::string>& words) {
        const auto result = run(folder, words);
        REQUIRE(result.code == 0);
        return nlohmann::json::parse(result.out);
    };
    CHECK(json({"inspect", "a.safetensors", "--sketch", "--json"})["sketch"] == word);
    CHECK(json({"inspect", "a.safetensors", "--verify", word, "--json"})["matches"] == "sketch");
    const std::vector<std::vector<std::string>> questions{
        {"--diff", "a.safetensors"}, {"--sketch"}, {"--verify", word}, {"--adapter"}};
    for (const auto& one : questions) {
        for (const auto& other : questions) {
            if (one == other) { continue; }
            std::vector<std::string> words{"inspect", "a.safetensors"};
            words.insert(words.end(), one.begin(), one.end());
            words.insert(words.end(), other.begin(), other.end());
            refused(folder, words, 2, "exclude each other");
        }
    }
    refused(folder, {"inspect", ""}, 2, "MODEL is empty");
    refused(folder, {"clean", ""}, 2, "DIR is empty");
    refused(folder, {"apply", "--base", "", "--delta", "d", "--out", "o"}, 2, "--base is empty");
    refused(folder, {"inspect", "a.safetensors", "--diff", ""}, 2, "--diff is empty");
    refused(folder, {"apply", "--base", "a", "--base", "b", "--delta", "d", "--out", "o"}, 2, "--base is given twice");
}
