// GGUF adapters: beside those that PyPI's gguf wrote (tests/data/gguf), and what is wrong with a file is named.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/adapter_convert.hpp>

#include "scratch.hpp"

#include "../capture.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace gguf_test {

using namespace taskvec;
using namespace std::string_literals;

const std::filesystem::path data = std::filesystem::path(TASKVEC_TEST_DIR) / "data" / "gguf";

template <class T>
std::string bytes_of(T value)
{
    return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}
std::string u32(std::uint64_t value)
{
    return bytes_of(static_cast<std::uint32_t>(value));
}
std::string u64(std::uint64_t value)
{
    return bytes_of(value);
}
std::string text(const std::string& words)
{
    return u64(words.size()) + words;
}

/// A GGUF file, piece by piece.
struct file_of {
    std::string magic = "GGUF", version = u32(3);
    std::vector<std::string> keys{text("general.architecture") + u32(8) + text("llama"),
        text("general.type") + u32(8) + text("adapter"), text("adapter.type") + u32(8) + text("lora"),
        text("adapter.lora.alpha") + u32(6) + bytes_of(2.0f), text("list") + u32(9) + u32(4) + u64(2) + u32(7) + u32(8),
        text("words") + u32(9) + u32(8) + u64(1) + text("x")};
    std::vector<std::string> tensors{
        tensor("blk.1.attn_v.weight.lora_a", {3, 2}, 0, 0), tensor("blk.1.attn_v.weight.lora_b", {2, 4}, 0, 32)};
    std::string body = std::string(64, '\0');
    std::uint64_t tensor_count = ~std::uint64_t{0}, key_count = ~std::uint64_t{0};

    static std::string tensor(
        const std::string& name, const std::vector<std::uint64_t>& extents, std::uint64_t type, std::uint64_t offset)
    {
        std::string made = text(name) + u32(extents.size());
        for (const auto extent : extents) { made += u64(extent); }
        return made + u32(type) + u64(offset);
    }
    [[nodiscard]] std::string bytes() const
    {
        const auto none = ~std::uint64_t{0};
        std::string made = magic + version + u64(tensor_count == none ? tensors.size() : tensor_count)
            + u64(key_count == none ? keys.size() : key_count);
        for (const auto& one : keys) { made += one; }
        for (const auto& one : tensors) { made += one; }
        return made + std::string((32 - made.size() % 32) % 32, '\0') + body;
    }
};

std::string refused(const file_of& file)
{
    const scratch folder;
    spill(folder / "x.gguf", file.bytes());
    try {
        const auto map = mapped_file(folder / "x.gguf");
        (void)parse_gguf(map.bytes(), "x.gguf");
        (void)read_gguf_adapter<float>(folder / "x.gguf");
    }
    catch (const error& problem) {
        return problem.what();
    }
    return "nothing";
}

bool says(const std::string& found, const std::string& wanted)
{
    CAPTURE(found);
    CHECK(found.find(wanted) != found.npos);
    return found.find(wanted) != found.npos;
}

/// The tensors of a file as bytes, with their dtypes and extents.
std::map<std::string, std::pair<std::string, std::string>> tensors_of(const safetensors_file& file)
{
    std::map<std::string, std::pair<std::string, std::string>> all;
    for (const auto& entry : file.entries()) {
        const auto tensor = file.tensor(entry);
        all[entry.name] = {message(to_string(entry.dtype), to_string(entry.shape)),
            std::string(static_cast<const char*>(tensor.data), entry.bytes)};
    }
    return all;
}

template <class T>
bool same(const matrix<T>& x, const matrix<T>& y)
{
    return x.rows() == y.rows() && x.cols() == y.cols() && std::equal(x.data(), x.data() + x.size(), y.data());
}

TEST_CASE("GGUF adapters of eight families are written as gguf's writer has them, and read back bit for bit")
{
    std::size_t families = 0;
    for (const auto& entry : std::filesystem::directory_iterator(data)) {
        const auto& folder = entry.path();
        CAPTURE(folder.filename().string());
        ++families;
        const auto adapter = read_adapter<float>(folder);
        const auto config = parse_json(slurp(folder / "config.json"), "config.json");
        const auto target = gguf_target_of(config, "config.json");
        const auto made = converted_adapter(adapter, adapter_dialect::gguf, {.target = target});
        const scratch place;
        write_adapter(place / "made.gguf", made);
        CHECK(place.names() == std::set<std::string>{"made.gguf"});
        const auto expected = tensors_of(open_gguf(folder / "expected.gguf"));
        CHECK(tensors_of(open_gguf(place / "made.gguf")) == expected);
        const mapped_file own(place / "made.gguf"), peer(folder / "expected.gguf");
        const auto ours = parse_gguf(own.bytes(), "made.gguf"), theirs = parse_gguf(peer.bytes(), "expected.gguf");
        for (const char* key : {"general.architecture", "general.type", "adapter.type", "general.file_type"}) {
            CHECK(ours.metadata.at(key) == theirs.metadata.at(key));
        }
        CHECK(*ours.number("adapter.lora.alpha") == *theirs.number("adapter.lora.alpha"));

        // gguf's file counts no heads; ours does where rows are paired.
        for (const bool from_peer : {false, true}) {
            auto read = read_adapter<float>(from_peer ? folder / "expected.gguf" : place / "made.gguf");
            CHECK(read.dialect == adapter_dialect::gguf);
            CHECK(read.target.architecture == target.architecture);
            const bool paired = std::any_of(
                read.modules.begin(), read.modules.end(), [](const auto& one) { return one.second.paired_rows; });
            CHECK(paired == (from_peer && target.pairs_rows()));
            if (paired) {
                CHECK(says(
                    [&] {
                        try {
                            unpair_rows(read, 0, 0);
                        }
                        catch (const format_error& problem) {
                            return std::string(problem.what());
                        }
                        return "nothing"s;
                    }(),
                    "nothing says how many heads there are"));
                unpair_rows(read, target.heads, target.kv_heads);
            }
            REQUIRE(read.modules.size() == adapter.modules.size());
            for (const auto& [module, one] : adapter.modules) {
                CAPTURE_BOUND(module);
                REQUIRE(read.modules.contains(module));
                const auto& back = read.modules.at(module);
                CHECK(same(back.update.a, one.update.a));
                CHECK(same(back.update.b, one.update.b));
                CHECK(back.embedding == one.embedding);
                CHECK(back.stored == one.stored);
                CHECK(back.update.scaling == doctest::Approx(one.update.scaling).epsilon(1e-7));
            }
        }
    }
    CHECK(families == 8);
}

TEST_CASE("GGUF has one alpha: what is left of other scalings goes into lora_b")
{
    adapter_contents<float> adapter;
    adapter.label = "'two'";
    for (const std::string module : {"model.layers.0.self_attn.v_proj", "base.layers.11.mlp.up_proj"}) {
        auto& made = adapter.modules[module];
        made.update = {matrix<float>(4, 2, matrix_order::row_major), matrix<float>(2, 3, matrix_order::row_major), 0.5};
        for (std::size_t i = 0; i < 8; ++i) { made.update.b.data()[i] = static_cast<float>(i) - 3.5f; }
        for (std::size_t i = 0; i < 6; ++i) { made.update.a.data()[i] = static_cast<float>(i) / 4; }
    }
    adapter.modules["model.layers.0.self_attn.v_proj"].update.scaling = 4;
    const scratch folder;
    write_adapter(
        folder / "x.gguf", converted_adapter(adapter, adapter_dialect::gguf, {.target = {.architecture = "qwen2"}}));
    const auto back = read_adapter<double>(folder / "x.gguf");
    REQUIRE(back.modules.size() == 2);
    for (const auto& [module, made] : adapter.modules) {
        const auto& found = back.modules.at("model" + module.substr(module.find('.')));
        for (std::size_t i = 0; i < 8; ++i) {
            CHECK(found.update.scaling * found.update.b.data()[i]
                == made.update.scaling * static_cast<double>(made.update.b.data()[i]));
        }
    }
}

TEST_CASE("what GGUF cannot say of an adapter is refused by name")
{
    const auto problem_of = [](const std::function<void(adapter_contents<float>&, gguf_target&)>& change) {
        auto adapter = read_adapter<float>(data / "llama");
        gguf_target target{"llama", 2, 1, false};
        change(adapter, target);
        try {
            (void)converted_adapter(adapter, adapter_dialect::gguf, {.target = target});
        }
        catch (const format_error& problem) {
            return std::string(problem.what());
        }
        return "nothing"s;
    };
    const auto first = [](auto& adapter) -> auto& { return adapter.modules.begin()->second; };
    CHECK(problem_of([](auto&, auto&) { }) == "nothing");
    says(problem_of([](auto&, auto& target) { target = {}; }), "which architecture its model has");
    says(problem_of([](auto&, auto& target) { target.heads = 0; }), "num_attention_heads");
    says(problem_of([](auto&, auto& target) { target.heads = 3; }), "8 rows are no 3 heads of an even size");
    says(problem_of([](auto&, auto& target) { target.tied = true; }), "lm_head");
    says(problem_of([](auto&, auto& target) { target.architecture = "phi3"; }),
        "what llama.cpp's architecture phi3 calls it is not known here");
    says(problem_of([&](auto& adapter, auto&) { first(adapter).magnitude.assign(9, 1.0); }), "it is DoRA's");
    says(problem_of([&](auto& adapter, auto&) { first(adapter).kernel = {1, 1}; }), "it is a convolution");
    says(problem_of([&](auto& adapter, auto&) { first(adapter).stored = dtype::f64; }), "its factors are F64");
    says(problem_of([&](auto& adapter, auto&) { first(adapter).embedding = true; }), "as an embedding");
    says(problem_of([&](auto& adapter, auto&) { adapter.wholes["norm.weight"]; }), "it was trained whole");
    says(problem_of([&](auto& adapter, auto&) { adapter.modules["other.lm_head"] = first(adapter); }),
        "another module is 'output.weight' too");

    const auto config_problem = [](const std::string& config) {
        try {
            (void)gguf_target_of(parse_json(config, "config.json"), "config.json");
        }
        catch (const format_error& problem) {
            return std::string(problem.what());
        }
        return "nothing"s;
    };
    says(config_problem("{}"), "has no \"architectures\"");
    says(config_problem(R"({"architectures":["BertModel"]})"), "names the architecture BertModel");
    const auto vision = gguf_target_of(
        parse_json(
            R"({"architectures":["Gemma3ForConditionalGeneration"],"text_config":{"num_attention_heads":8,"num_key_value_heads":4}})",
            "config.json"),
        "config.json");
    CHECK(vision.architecture == "gemma3");
    CHECK(vision.kv_heads == 4);
    CHECK(vision.tied);
}

TEST_CASE("metadata of every type of GGUF is read, and arrays are passed over")
{
    file_of file;
    const auto key = [](const std::string& name, std::uint32_t type, const std::string& value) {
        return text(name) + u32(type) + value;
    };
    file.keys = {key("u8", 0, "\xfe"), key("i8", 1, "\xfe"), key("u16", 2, bytes_of(std::uint16_t{65535})),
        key("i16", 3, bytes_of(std::int16_t{-300})), key("u32", 4, u32(4'000'000'000)),
        key("i32", 5, bytes_of(std::int32_t{-7})), key("f32", 6, bytes_of(0.5f)), key("true", 7, "\1"),
        key("false", 7, std::string(1, '\0')), key("text", 8, text("words")), key("u64", 10, u64(1ull << 40)),
        key("i64", 11, bytes_of(std::int64_t{-1} << 40)), key("f64", 12, bytes_of(0.1))};
    for (std::uint32_t type = 0; type < 13; ++type) { // two elements of each
        constexpr std::array<std::size_t, 13> sizes{1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
        if (type == 9) { continue; }
        file.keys.push_back(key(message("array of ", type), 9,
            u32(type) + u64(2) + (type == 8 ? text("a") + text("") : std::string(2 * sizes[type], '\1'))));
    }
    const std::string content = file.bytes();
    const auto header = parse_gguf(std::as_bytes(std::span(content)), "x.gguf");
    CHECK(header.metadata.size() == 25);
    CHECK(header.metadata.at("u8") == gguf_value(std::uint64_t{254}));
    CHECK(header.metadata.at("i8") == gguf_value(std::int64_t{-2}));
    CHECK(header.metadata.at("u16") == gguf_value(std::uint64_t{65535}));
    CHECK(header.metadata.at("i16") == gguf_value(std::int64_t{-300}));
    CHECK(header.metadata.at("u32") == gguf_value(std::uint64_t{4'000'000'000}));
    CHECK(header.metadata.at("i32") == gguf_value(std::int64_t{-7}));
    CHECK(header.metadata.at("true") == gguf_value(true));
    CHECK(header.metadata.at("false") == gguf_value(false));
    CHECK(header.metadata.at("array of 8") == gguf_value());
    CHECK(header.number("u64") == 0x1p40);
    CHECK(header.number("i64") == -0x1p40);
    CHECK(header.number("f32") == 0.5);
    CHECK(header.number("f64") == 0.1);
    CHECK(header.number("text") == std::nullopt);
    CHECK(header.number("missing") == std::nullopt);
    CHECK(header.text("text") == "words");
    CHECK(header.text("u8").empty());
    CHECK(header.text("missing").empty());
}

TEST_CASE("what a configuration leaves open takes what transformers and llama.cpp take")
{
    const auto target_of = [](const std::string& fields, bool as_text = false) {
        const auto inner = R"({"architectures":["LlamaForCausalLM"])" + (fields.empty() ? "" : "," + fields) + "}";
        return gguf_target_of(
            parse_json(as_text ? R"({"tie_word_embeddings":true,"text_config":)" + inner + "}" : inner, "config.json"),
            "config.json");
    };
    CHECK(target_of("").heads == 0);
    CHECK(target_of(R"("num_attention_heads":8)").kv_heads == 8); // as many as heads where nothing is said
    CHECK(target_of(R"("num_attention_heads":8,"num_key_value_heads":2)").kv_heads == 2);
    CHECK(target_of(R"("num_attention_heads":"8")").heads == 0);
    CHECK_FALSE(target_of("").tied);
    CHECK(target_of(R"("tie_word_embeddings":true)").tied);
    CHECK(target_of("", true).tied); // said outside
    CHECK_FALSE(target_of(R"("tie_word_embeddings":false)", true).tied);
    CHECK_FALSE(target_of(R"("tie_word_embeddings":"yes")").tied);
    CHECK(gguf_target_of(parse_json(R"({"architectures":["GemmaForCausalLM"],"text_config":5})", "f"), "f").tied);
    for (const char* wrong : {R"({"architectures":[]})", R"({"architectures":[7]})", R"({"architectures":"Llama"})"}) {
        CAPTURE(wrong);
        CHECK_THROWS_WITH_AS((void)gguf_target_of(parse_json(wrong, "f"), "f"),
            doctest::Contains("has no \"architectures\""), format_error);
    }
}

TEST_CASE("names of llama.cpp and of transformers are told from what looks like them")
{
    const gguf_target llama{"llama"}, moe{"qwen2moe"}, phi2{"phi2"};
    for (const auto& [module, name] : {std::pair("model.layers.3.self_attn.q_proj", "blk.3.attn_q.weight"),
             std::pair("layers.3.self_attn.q_proj", "blk.3.attn_q.weight"),
             std::pair("model.embed_tokens", "token_embd.weight"), std::pair("lm_head", "output.weight"),
             std::pair("model.layers.3.block_sparse_moe.gate", "blk.3.ffn_gate_inp.weight")}) {
        CHECK(gguf_tensor_name(module, llama) == name);
    }
    for (const char* module :
        {"model.layers.q_proj", "model.layers..self_attn.q_proj", "model.layers.x.self_attn.q_proj", "model.layers.3",
            "layers.", "my_lm_head", "model.norm", "model.layers.3.self_attn.dense", ""}) {
        CAPTURE(module);
        CHECK(gguf_tensor_name(module, llama).empty());
    }
    CHECK(gguf_tensor_name("model.layers.0.mlp.gate", moe) == "blk.0.ffn_gate_inp.weight");
    CHECK(gguf_module_name("blk.0.ffn_gate_inp.weight", moe) == "model.layers.0.mlp.gate");
    CHECK(gguf_module_name("blk.7.attn_output.weight", phi2) == "model.layers.7.self_attn.dense");
    CHECK(gguf_module_name("token_embd.weight", phi2) == "model.embed_tokens");
    CHECK(gguf_module_name("output.weight", phi2) == "lm_head");
    for (const char* tensor : {"output_norm.weight", "blk.7.attn_q.bias", "blk.attn_q.weight", "blk..attn_q.weight",
             "blk.x.attn_q.weight", "blk.7.weight", "blk.7.attn_sinks.weight", ""}) {
        CAPTURE(tensor);
        CHECK(gguf_module_name(tensor, phi2).empty());
    }
    CHECK_THROWS_WITH_AS((void)gguf_bytes({}, {{"w", dtype::u8, {4}}}, {std::vector<std::byte>(4)}),
        "tensor 'w' has dtype U8, which GGUF does not have", dtype_mismatch);
}

TEST_CASE("a GGUF file that is damaged, cut or of another kind is refused by name")
{
    const file_of sound;
    CHECK(refused(sound) == "nothing");
    const auto with = [](const std::function<void(file_of&)>& change) {
        file_of file;
        change(file);
        return refused(file);
    };
    says(with([](auto& f) { f.magic = "GGML"; }), "does not begin with 'GGUF'");
    says(with([](auto& f) { f.magic = "\1\2\xff\x7f"s; }), "but with the bytes 01 02 ff 7f: it is damaged");
    says(with([](auto& f) { f.magic = "\x1fGML"s; }), "but with the bytes 1f 47 4d 4c");
    says(with([](auto& f) { f.version = u32(0); }), "is GGUF of version 0");
    says(with([](auto& f) { f.version = u32(1); }), "is GGUF of version 1");
    says(with([](auto& f) { f.version = u32(4); }), "is GGUF of version 4");
    says(with([](auto& f) { f.version = "\0\0\0\3"s; }), "is a big-endian GGUF file");
    says(
        with([](auto& f) { f.tensor_count = std::uint64_t{1} << 60; }), "the number of tensors is 1152921504606846976");
    says(with([](auto& f) { f.key_count = std::uint64_t{1} << 60; }), "the number of metadata keys is");
    says(with([](auto& f) { f.keys[0] = u64(1 << 30); }), "metadata key 1 takes 1073741824 bytes");
    says(with([](auto& f) { f.keys[0] = text("\xff") + u32(4) + u32(1); }), "is no UTF-8");
    says(with([](auto& f) { f.keys[1] = f.keys[0]; }), "the metadata key 'general.architecture' stands twice");
    says(with([](auto& f) { f.keys[4] = text("k") + u32(13); }), "the value of 'k' is of type 13");
    says(with([](auto& f) { f.keys[4] = text("k") + u32(9) + u32(9) + u64(0); }), "of arrays");
    says(with([](auto& f) { f.keys[4] = text("k") + u32(9) + u32(77) + u64(0); }), "is an array of type 77");
    says(with([](auto& f) { f.keys[4] = text("k") + u32(9) + u32(4) + u64(std::uint64_t{1} << 62); }),
        "the length of the array 'k'");
    for (const auto alignment : {0u, 3u, 48u}) {
        says(with([&](auto& f) { f.keys[4] = text("general.alignment") + u32(4) + u32(alignment); }),
            message("general.alignment is ", alignment, "; expected a power of two"));
    }
    says(with([](auto& f) { f.keys[4] = text("general.alignment") + u32(8) + text("x"); }), "no unsigned number");
    says(with([](auto& f) { f.keys[4] = text("general.alignment") + u32(10) + u64(std::uint64_t{1} << 32); }),
        "general.alignment is 4294967296");
    const auto tensor = [&](const std::string& made) { return with([&](auto& f) { f.tensors[0] = made; }); };
    const std::string name = "blk.1.attn_v.weight.lora_a";
    says(tensor(file_of::tensor("\xff", {1}, 0, 0)), "the name of tensor 1 is no UTF-8");
    says(tensor(file_of::tensor(name, {}, 0, 0)), "has 0 extents");
    says(tensor(file_of::tensor(name, {1, 1, 1, 1, 1}, 0, 0)), "has 5 extents");
    says(tensor(file_of::tensor(name, {3, 0}, 0, 0)), "has an extent of 0");
    says(tensor(file_of::tensor(name, {std::uint64_t{1} << 40, std::uint64_t{1} << 40}, 0, 0)), "more elements");
    says(tensor(file_of::tensor(name, {3, 2}, 8, 0)), "is of ggml's type 8 (Q8_0)");
    says(tensor(file_of::tensor(name, {3, 2}, 99, 0)), "is of ggml's type 99;");
    says(tensor(file_of::tensor(name, {3, 2}, 0, 8)), "no multiple of the alignment 32");
    says(tensor(file_of::tensor(name, {3, 2}, 0, std::uint64_t{1} << 40)), "and the file has 64");
    says(tensor(file_of::tensor(name, {3, 2}, 0, 32)), "share bytes");
    says(tensor(file_of::tensor("blk.1.attn_v.weight.lora_b", {3, 2}, 0, 0)), "stands twice");
    says(with([](auto& f) { f.body.resize(40); }), "takes bytes 32 to 64 of the data");
    const auto whole = sound.bytes();
    for (std::size_t size = 0; size < whole.size(); ++size) { // cut anywhere
        const scratch folder;
        spill(folder / "x.gguf", whole.substr(0, size));
        const mapped_file map(folder / "x.gguf");
        CHECK_THROWS_AS((void)parse_gguf(map.bytes(), "x"), format_error);
    }

    // Sound files that are no such adapter.
    says(with([](auto& f) { f.keys[1] = text("general.type") + u32(8) + text("model"); }), "general.type is 'model'");
    says(with([](auto& f) { f.keys[2] = text("adapter.type") + u32(8) + text("cvec"); }), "adapter.type is 'cvec'");
    says(with([](auto& f) { f.keys[0] = text("general.architecture") + u32(8) + text("rwkv7"); }), "'rwkv7'");
    says(with([](auto& f) { f.keys[3] = text("adapter.lora.alpha") + u32(8) + text("2"); }), "no finite number");
    says(
        with([](auto& f) { f.keys[4] = text("adapter.alora.invocation_tokens") + u32(9) + u32(4) + u64(0); }), "aLoRA");
    says(tensor(file_of::tensor("blk.1.attn_v.weight", {3, 2}, 0, 0)), "is no half of an update");
    says(tensor(file_of::tensor("blk.1.attn_k.weight.lora_a", {3, 2}, 0, 0)), "half of its update is missing");
    says(tensor(file_of::tensor(name, {3, 1}, 0, 0)), "their ranks differ");
    says(with([](auto& f) {
        f.tensors = {file_of::tensor("blk.1.ffn_gate_exps.weight.lora_a", {3, 1, 2}, 0, 0),
            file_of::tensor("blk.1.ffn_gate_exps.weight.lora_b", {1, 3, 2}, 0, 32)};
    }),
        "experts are not read");
    says(with([](auto& f) {
        f.tensors = {file_of::tensor("blk.1.ssm_in.weight.lora_a", {3, 1}, 0, 0),
            file_of::tensor("blk.1.ssm_in.weight.lora_b", {1, 3}, 0, 32)};
    }),
        "is none that is known of the architecture llama");
    says(with([](auto& f) { f.tensors.clear(); }), "holds no factors");
}

TEST_CASE("what a GGUF adapter says of itself decides its scaling and its rows")
{
    const scratch folder;
    const auto read = [&](const std::function<void(file_of&)>& change) {
        file_of file;
        change(file);
        spill(folder / "x.gguf", file.bytes());
        return read_gguf_adapter<float>(folder / "x.gguf");
    };
    const auto key = [](const std::string& name, std::uint64_t count) { return text(name) + u32(4) + u32(count); };
    const std::string v = "model.layers.1.self_attn.v_proj", q = "model.layers.1.self_attn.q_proj";
    CHECK(read([](auto&) { }).modules.at(v).update.scaling == 1); // 2 by rank 2
    for (const bool absent : {true, false}) {
        const auto adapter = read([&](auto& f) {
            if (absent) { f.keys.erase(f.keys.begin() + 3); }
            else {
                f.keys[3] = text("adapter.lora.alpha") + u32(6) + bytes_of(0.0f);
            }
        });
        CHECK(adapter.modules.at(v).update.scaling == 1);
        REQUIRE(adapter.notes.size() == 1);
        says(adapter.notes[0], "gives no alpha");
    }
    for (const float wrong : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
        says(refused([&] {
            file_of file;
            file.keys[3] = text("adapter.lora.alpha") + u32(6) + bytes_of(wrong);
            return file;
        }()),
            "adapter.lora.alpha is no finite number");
    }
    const auto norms = [&](std::size_t count) {
        return read([&](auto& f) {
            for (std::size_t i = 0; i < count; ++i) {
                f.tensors.push_back(file_of::tensor(message("blk.", i, ".attn_norm.weight"), {4}, 0, 64 + 32 * i));
            }
            f.body = std::string(64 + 32 * count, '\0');
        });
    };
    says(norms(1).notes.at(0), "carries 1 norm of its own");
    says(norms(2).notes.at(0), "carries 2 norms of its own");
    says(refused([] {
        file_of file;
        file.tensors = {file_of::tensor("blk.1.attn_v.weight.lora_b", {2, 4}, 0, 0)};
        return file;
    }()),
        "has lora_b but no lora_a");
    // Rows of q lie in pairs until somebody says how many heads there are.
    const auto paired = [&](std::uint64_t heads) {
        return read([&](auto& f) {
            f.tensors = {file_of::tensor("blk.1.attn_q.weight.lora_a", {3, 2}, 0, 0),
                file_of::tensor("blk.1.attn_q.weight.lora_b", {2, 4}, 0, 32)};
            if (heads > 0) { f.keys.push_back(key("llama.attention.head_count", heads)); }
        });
    };
    for (const std::uint64_t unknown : {std::uint64_t{0}, std::uint64_t{65537}}) {
        CHECK(paired(unknown).modules.at(q).paired_rows);
    }
    CHECK_FALSE(paired(1).modules.at(q).paired_rows);
    CHECK_FALSE(paired(2).modules.at(q).paired_rows);
    CHECK_THROWS_WITH_AS((void)paired(3), doctest::Contains("4 rows are no 3 heads of an even size"), format_error);
    const auto none = read([&](auto& f) { f.keys.push_back(key("llama.attention.head_count", 0)); });
    CHECK(none.target.heads == 0);
    // The same in a file that is called as such, whatever it begins with.
    spill(folder / "y.gguf", "no GGUF");
    CHECK(is_gguf_file(folder / "y.gguf"));
    spill(folder / "y", "no GGUF");
    CHECK_FALSE(is_gguf_file(folder / "y"));
}

} // namespace gguf_test
