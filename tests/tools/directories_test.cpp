// A directory in, a directory out: what a result needs to be loaded lies beside its weights.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/fingerprint.hpp>

#include <nlohmann/json.hpp>

using namespace tools_test;

namespace {

struct model_directories {
    scratch folder;

    model_directories()
    {
        for (const std::string place : {"base", "math"}) {
            std::filesystem::create_directories(folder / place / "1_Pooling");
            write_values(folder / place / "model.safetensors",
                {{"model.embed_tokens.weight",
                    {taskvec::dtype::f32, {3, 2}, {1, 2, 3, 4, 5, place == "base" ? 6.0f : 7.0f}}}});
            spill(folder / place / "config.json",
                R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float32", "vocab_size": 3})");
            spill(folder / place / "tokenizer.json", "{\"of\": \"" + place + "\"}");
            spill(folder / place / "tokenizer.model", std::string("\0\1", 2));
            spill(folder / place / "generation_config.json", "{}");
            spill(folder / place / "chat_template.jinja", "{{ x }}");
            spill(folder / place / "1_Pooling/config.json", "{\"pooling\": 1}");
            spill(folder / place / "modeling.py", "print('no')");
            spill(folder / place / "trainer_state.json", "{}");
            spill(folder / place / "README.md", "somebody's");
            spill(folder / place / "notes.txt", "private");
        }
    }
    outcome merge(std::vector<std::string> more) const
    {
        std::vector<std::string> all{"merge", "--method", "average", "--task", "base", "--task", "math=0.5"};
        all.insert(all.end(), more.begin(), more.end());
        return run(folder, all);
    }
};

const std::set<std::string> whole{"1_Pooling", "README.md", "chat_template.jinja", "config.json",
    "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"};

bool has(const std::string& text, const std::string& part)
{
    return text.find(part) != std::string::npos;
}

} // namespace

TEST_CASE("what loads a model is copied beside its weights, and says what is so")
{
    const model_directories m;
    REQUIRE(m.merge({"--out", "out", "--dtype", "bf16"}).code == 0);
    CHECK(scratch::names_in(m.folder / "out") == whole);
    const auto config = nlohmann::json::parse(slurp(m.folder / "out/config.json"));
    CHECK(config["torch_dtype"] == "bfloat16");
    CHECK(config["rms_norm_eps"] == 1e-05);
    CHECK(slurp(m.folder / "out/tokenizer.model") == std::string("\0\1", 2));
    CHECK(has(slurp(m.folder / "out/tokenizer.json"), "base"));
    CHECK(slurp(m.folder / "out/1_Pooling/config.json") == "{\"pooling\": 1}");
    const auto card = slurp(m.folder / "out/README.md");
    CHECK(card.starts_with(
        "---\nbase_model:\n- base\n- math\nlibrary_name: transformers\ntags:\n- merge\n- taskvec\n- average\n---\n"));
    CHECK(has(card, "taskvec merge --method average --task base --task math=0.5 --out out --dtype bf16"));
    CHECK(has(card, "| math | task | 0.5 | `xxh64:"));
    for (const std::string model : {"base", "math"}) {
        const auto opened = taskvec::open_model(m.folder / model);
        CHECK(has(card, "`" + taskvec::fingerprint_text(taskvec::fingerprint(taskvec::cpu{}, opened.model())) + "`"));
        CHECK(has(run(m.folder, {"inspect", model, "--verify", "out"}).out, "has the fingerprint"));
    }
    // The same dtype: bytes as they were.
    REQUIRE(m.merge({"--out", "same"}).code == 0);
    CHECK(slurp(m.folder / "same/config.json") == slurp(m.folder / "base/config.json"));
}

TEST_CASE("the card of large models has sketches, which take no second read of them")
{
    const scratch folder;
    constexpr std::uint64_t bytes = std::uint64_t{129} << 20; // two of them are above 256 MiB
    for (const std::string name : {"one", "two"}) {
        std::filesystem::create_directory(folder / name);
        std::string header =
            taskvec::message(R"({"w":{"dtype":"BF16","shape":[)", bytes / 2, R"(],"data_offsets":[0,)", bytes, "]}}");
        header.resize(128, ' ');
        spill(folder / name / "model.safetensors", std::string("\x80\0\0\0\0\0\0\0", 8) + header + name);
        std::filesystem::resize_file(folder / name / "model.safetensors", 8 + 128 + bytes); // zeros that take no space
    }
    REQUIRE(run(folder, {"merge", "--method", "average", "--task", "one", "--task", "two", "--out", "out"}).code == 0);
    const auto card = slurp(folder / "out/README.md");
    CHECK(has(card, "(a sketch)"));
    for (const std::string name : {"one", "two"}) {
        const auto opened = taskvec::open_model(folder / name);
        CHECK(has(card, "`" + taskvec::fingerprint_text(taskvec::fingerprint_sketch(opened.model())) + "`"));
        CHECK(has(run(folder, {"inspect", name, "--verify", "out"}).out, "has the sketch"));
    }
}

TEST_CASE("a Git LFS pointer beside the weights is called so, and is never copied")
{
    const std::string pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n";
    for (const std::string name : {"config.json", "tokenizer.json", "tokenizer.model"}) {
        const model_directories m;
        spill(m.folder / "base" / name, pointer);
        const auto refused = m.merge({"--out", "out"});
        CHECK(refused.code == 1);
        CHECK_MESSAGE(has(refused.err, name + ": is a Git LFS pointer"), refused.err);
        CHECK_FALSE(std::filesystem::exists(m.folder / "out"));
        if (name != "config.json") { CHECK(m.merge({"--out", "out", "--no-copy"}).code == 0); }
    }
    const model_directories m;
    spill(m.folder / "base/tokenizer.json", pointer);
    const auto refused = m.merge({"--out", "out", "--vocabulary", "union"});
    CHECK(refused.code == 1);
    CHECK_MESSAGE(has(refused.err, "is a Git LFS pointer"), refused.err);
}

TEST_CASE("options choose what is copied; files stay files")
{
    const model_directories m;
    REQUIRE(m.merge({"--out", "file.safetensors"}).code == 0);
    CHECK(std::filesystem::is_regular_file(m.folder / "file.safetensors"));
    REQUIRE(m.merge({"--out", "bare", "--no-copy", "--no-card"}).code == 0);
    CHECK(scratch::names_in(m.folder / "bare") == std::set<std::string>{"model.safetensors"});
    REQUIRE(m.merge({"--out", "other", "--copy-from", "math", "--no-card", "--copy-code"}).code == 0);
    CHECK(has(slurp(m.folder / "other/tokenizer.json"), "math"));
    CHECK(std::filesystem::exists(m.folder / "other/modeling.py"));
    CHECK_FALSE(std::filesystem::exists(m.folder / "other/README.md"));
    // Files in: a file out, whatever its name.
    REQUIRE(run(m.folder, {"merge", "--method", "average", "--task", "base/model.safetensors", "--out", "plain"}).code
        == 0);
    CHECK(std::filesystem::is_regular_file(m.folder / "plain"));
    CHECK(run(m.folder, {"merge", "--method", "average", "--task", "base", "--out", "x", "--copy-from", "absent"}).code
        == 1);
    CHECK_FALSE(std::filesystem::exists(m.folder / "x"));
}

TEST_CASE("an existing directory keeps what is not of the model, and somebody else's card")
{
    const model_directories m;
    std::filesystem::create_directory(m.folder / "out");
    spill(m.folder / "out/mine.txt", "mine");
    REQUIRE(m.merge({"--out", "out"}).code == 0);
    REQUIRE(m.merge({"--out", "out"}).code == 0); // its own card is replaced
    CHECK(slurp(m.folder / "out/mine.txt") == "mine");
    spill(m.folder / "out/README.md", "my own words");
    const auto result = m.merge({"--out", "out"});
    CHECK(result.code == 0);
    CHECK(has(result.err, "somebody else's"));
    CHECK(slurp(m.folder / "out/README.md") == "my own words");
}

TEST_CASE("code of a model's own is named where its configuration leads to it")
{
    const model_directories m;
    spill(m.folder / "base/config.json", R"({"model_type": "mine", "auto_map": {"AutoModel": "modeling.Mine"}})");
    const auto result = m.merge({"--out", "out"});
    CHECK(result.code == 0);
    CHECK(has(result.err, "--copy-code"));
}

TEST_CASE("apply and peru-fft make models to open")
{
    const model_directories m;
    REQUIRE(run(m.folder,
                {"peru-fft", "--method", "task-arithmetic", "--base", "base", "--task", "math", "--density", "1",
                    "--out", "p"})
                .code
        == 0);
    const auto names = scratch::names_in(m.folder / "p");
    for (const auto& name : whole) { CHECK((name == "model.safetensors" || names.contains(name))); }
    const auto opened = run(m.folder, {"inspect", "p"});
    CHECK(opened.code == 0);
    CHECK(has(opened.out, "1 tensor,"));
    const auto indexed = taskvec::open_model(m.folder / "p" / "model.safetensors.index.json");
    CHECK(indexed.model().size() == 1);
    REQUIRE(
        run(m.folder, {"apply", "--base", "p", "--delta", "p/math.delta.safetensors", "--out", "served"}).code == 0);
    CHECK(scratch::names_in(m.folder / "served") == whole);
    CHECK(same(read_values(m.folder / "served/model.safetensors"), read_values(m.folder / "math/model.safetensors")));
    // Without directories there is a merged file and deltas, as ever; its directory opens too.
    REQUIRE(run(m.folder,
                {"peru-fft", "--method", "ties", "--base", "base/model.safetensors", "--task", "math/model.safetensors",
                    "--out", "q"})
                .code
        == 0);
    CHECK(scratch::names_in(m.folder / "q") == std::set<std::string>{"math.delta.safetensors", "merged.safetensors"});
    CHECK(run(m.folder, {"inspect", "q"}).code == 0);
}

TEST_CASE("a head of one model's own unties the result")
{
    const scratch folder;
    const values_tensor table{taskvec::dtype::f32, {4, 2}, {1, 2, 3, 4, 5, 6, 7, 8}};
    auto head = table;
    const auto write = [&](const std::string& place, const values_tensor& its_head, const std::string& tied) {
        std::filesystem::create_directories(folder / place);
        write_values(
            folder / place / "model.safetensors", {{"model.embed_tokens.weight", table}, {"lm_head.weight", its_head}});
        spill(folder / place / "config.json",
            R"({"model_type": "llama", "vocab_size": 4, "tie_word_embeddings": )" + tied + "}");
    };
    write("base", table, "true");
    write("same", table, "true");
    head.values[3] += 1;
    write("other", head, "false");
    const auto tied = [&](const std::string& task, const std::string& verb) {
        std::filesystem::remove_all(folder / "out");
        const auto done =
            run(folder, {verb, "--method", "task-arithmetic", "--base", "base", "--task", task, "--out", "out"});
        CAPTURE(done.err);
        CHECK(done.code == 0);
        CHECK(has(done.err, "tie_word_embeddings is false") == (task == "other"));
        return nlohmann::json::parse(slurp(folder / "out/config.json"))["tie_word_embeddings"].get<bool>();
    };
    for (const std::string verb : {"merge", "peru-fft"}) {
        CHECK(tied("same", verb));
        CHECK_FALSE(tied("other", verb));
    }
}

TEST_CASE("a configuration with numbers that are Python's is read, and comes out as it was")
{
    const scratch folder;
    for (const std::string place : {"base", "task"}) {
        std::filesystem::create_directories(folder / place);
        write_values(folder / place / "model.safetensors",
            {{"w", {taskvec::dtype::f32, {2, 2}, {1, 2, 3, place == "base" ? 4.0F : 5.0F}}}});
        spill(folder / place / "config.json",
            R"({"model_type": "mamba2", "limit": [0.0, Infinity, -Infinity, NaN], "says": "Infinity \" NaN"})");
    }
    for (const std::string dtype : {"f32", "bf16"}) {
        const auto done = run(folder,
            {"merge", "--method", "average", "--task", "base", "--task", "task", "--dtype", dtype, "--out", dtype});
        CAPTURE(done.err);
        REQUIRE(done.code == 0);
        auto text = slurp(folder / dtype / "config.json");
        CHECK(has(text, R"("says": "Infinity \" NaN")"));
        text.erase(std::remove_if(text.begin(), text.end(), [](char c) { return c == '\n' || c == ' '; }), text.end());
        CHECK(has(text, "[0.0,Infinity,-Infinity,NaN]"));
        CHECK(has(text, dtype == "f32" ? "float32" : "bfloat16"));
    }
    CHECK(run(folder, {"similarity", "--base", "base", "--task", "task"}).code == 0);
    spill(folder / "task/config.json", R"({"limit": Infinite})");
    CHECK(has(run(folder, {"merge", "--method", "average", "--task", "task", "--task", "base", "--out", "x"}).err,
        "task/config.json: invalid JSON"));
}

TEST_CASE("peru-fft does not go beside a model that would be opened in its place")
{
    const model_directories m;
    REQUIRE(m.merge({"--out", "out"}).code == 0);
    const auto before = slurp(m.folder / "out/model.safetensors");
    const auto done =
        run(m.folder, {"peru-fft", "--method", "average", "--base", "base", "--task", "math", "--out", "out"});
    CHECK(done.code == 1);
    CHECK(has(done.err, "'out' holds model.safetensors, which would be opened in place of merged.safetensors"));
    CHECK(slurp(m.folder / "out/model.safetensors") == before);
    CHECK_FALSE(std::filesystem::exists(m.folder / "out/merged.safetensors"));

    for (const std::string index : {"model.safetensors.index.json", "other.safetensors.index.json"}) {
        std::filesystem::create_directories(m.folder / index);
        spill(m.folder / index / index, "{}");
        const auto beside =
            run(m.folder, {"peru-fft", "--method", "average", "--base", "base", "--task", "math", "--out", index});
        CHECK(beside.code == 1);
        CHECK(has(beside.err, "holds " + index + ", which would be opened in place of merged.safetensors"));
        CHECK_FALSE(std::filesystem::exists(m.folder / index / "merged.safetensors"));
    }
}

TEST_CASE("a model of diffusers comes out under diffusers' names")
{
    const scratch folder;
    for (const std::string place : {"base", "tuned"}) {
        std::filesystem::create_directories(folder / place);
        write_values(folder / place / "diffusion_pytorch_model.safetensors",
            {{"conv.weight", {taskvec::dtype::f32, {2, 2}, {1, 2, 3, place == "base" ? 4.0F : 6.0F}}},
                {"norm.weight", {taskvec::dtype::f32, {2}, {1, 2}}}});
        spill(folder / place / "config.json", R"({"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0"})");
    }
    const std::vector<std::string> line{"merge", "--method", "average", "--task", "base", "--task", "tuned", "--out"};
    const auto merge = [&](std::vector<std::string> more) {
        more.insert(more.begin(), line.begin(), line.end());
        const auto done = run(folder, more);
        REQUIRE_MESSAGE(done.code == 0, done.err);
    };
    merge({"out"});
    const std::string single = "diffusion_pytorch_model.safetensors";
    CHECK(scratch::names_in(folder / "out") == std::set<std::string>{"README.md", "config.json", single});
    CHECK(read_values(folder / "out" / single).at("conv.weight").values[3] == 5.0F);
    merge({"out", "--shard-size", "10"});
    CHECK(std::filesystem::exists(folder / "out/diffusion_pytorch_model.safetensors.index.json"));
    CHECK(std::filesystem::exists(folder / "out/diffusion_pytorch_model-00001-of-00002.safetensors"));
    CHECK_FALSE(std::filesystem::exists(folder / "out" / single));
    CHECK(run(folder, {"inspect", "out"}).out.find("2 tensors") != std::string::npos);
}
