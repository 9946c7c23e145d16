// What dialects of adapters say beside their factors, and shapes that few of them have, against plain loops.
// SPDX-License-Identifier: Apache-2.0
#include "adapter_files.hpp"

using namespace tools_test;

namespace {

/// Runs the tool, which has to succeed.
outcome must_run(const scratch& folder, const std::vector<std::string>& arguments)
{
    auto result = run(folder, arguments);
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    return result;
}

} // namespace

TEST_CASE("a GGUF adapter with another magic or version is refused for that, in every verb")
{
    const scratch folder;
    write_text(folder / "base/config.json", R"({"architectures":["Qwen2ForCausalLM"]})");
    const std::string module = "model.layers.0.mlp.up_proj";
    write_values(folder / "base/model.safetensors", {{module + ".weight", random_tensor({8, 6}, 1)}});
    write_adapter_as(folder / "a", factors(module, 8, 6, 2));
    must_run(folder, {"convert", "a", "--as", "gguf", "--out", "a.gguf"});
    const auto sound = slurp(folder / "a.gguf");
    const auto attempt = [&](std::size_t at, const std::string& bytes, const std::string& words) {
        auto damaged = sound;
        damaged.replace(at, bytes.size(), bytes);
        write_text(folder / "b.gguf", damaged);
        refused(folder, {"fuse", "--base", "base", "--adapter", "b.gguf", "--out", "no"}, 1, words);
        refused(folder, {"convert", "b.gguf", "--as", "peft", "--out", "no"}, 1, words);
        refused(folder, {"inspect", "b.gguf"}, 1, words);
    };
    attempt(0, "GGUX", "does not begin with 'GGUF', the magic of GGUF files, but with 'GGUX'");
    attempt(0, std::string(4, '\1'), "but with the bytes 01 01 01 01");
    attempt(0, "FUGG", "another order of bytes");
    attempt(4, std::string(1, '\x63'), "is GGUF of version 99");
    attempt(4, std::string(1, '\1'), "is GGUF of version 1;");
}
