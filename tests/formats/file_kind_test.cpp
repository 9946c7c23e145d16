// Files that are no safetensors files are called what they are.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/file_kind.hpp>

#include "scratch.hpp"

#include <doctest/doctest.h>

using namespace taskvec;
using namespace std::string_literals;

namespace {

std::string kind_of(const std::string& content)
{
    const auto kind = what_is_this_file(std::as_bytes(std::span(content)));
    return kind ? kind->sentence() : "";
}

bool says(const std::string& content, const std::string& words)
{
    return kind_of(content).find(words) != std::string::npos;
}

template <class Error>
std::string refusal(const std::filesystem::path& path)
{
    try {
        (void)open_model(path);
    }
    catch (const Error& found) {
        return found.what();
    }
    return "";
}

} // namespace

TEST_CASE("content says what a file is")
{
    CHECK(says("", "is empty (0 bytes): fetch it again"));
    CHECK(says("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4947392496\n",
        "is a Git LFS pointer, not the file that it stands for: fetch a file of 4947392496 bytes"));
    CHECK(says("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"));
    CHECK(says("\n  <!DOCTYPE html>\n<html lang=\"en\"><head><title>Sign in", "is a page of HTML"));
    CHECK(says("<HTML><body>404</body></HTML>", "is a page of HTML"));
    CHECK(says("<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code></Error>", "is a page of XML"));
    CHECK(says("{\"error\": \"Repository not found\"}", "is JSON ({\"error\": \"Repository not found\"})"));
    CHECK(says("Entry not found", "is a text ('Entry not found')"));
    CHECK(says("PK\x03\x04\0\0\x08\x08"s + std::string(200, '\0'), "PyTorch"));
    CHECK(says("PK\x03\x04\0\0\x08\x08"s + "archive/data.pkl" + std::string(70000, 'x') + "archive/data.pklPK\x05\x06",
        "is a PyTorch file (a zip archive with a pickle): convert it"));
    CHECK(says("PK\x03\x04\0\0\x08\x08"s + "archive/data.pkl" + std::string(70000, 'x'),
        "the end of a zip archive is missing"));
    CHECK(says("PK\x03\x04"s + "weights.npyPK\x05\x06", "NumPy"));
    CHECK(says("PK\x03\x04"s + "m/data.pkl m/constants.pkl PK\x05\x06", "TorchScript"));
    CHECK(says("\x80\x02\x8a\nl\xfc\x9c\x46\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."s, "PyTorch file of the old kind"));
    CHECK(says("\x80\x04\x95\x10\0\0\0\0\0\0\0}"s, "is a Python pickle"));
    CHECK(says("GGUF\x03\0\0\0"s, "GGUF"));
    CHECK(says("\x89HDF\r\n\x1a\n"s + std::string(20, '\0'), "HDF5"));
    CHECK(says("\x93NUMPY\x01\0v\0"s, "NumPy array"));
    CHECK(says("\x1f\x8b\x08\0\0\0\0\0"s, "compressed by gzip: unpack it"));
    CHECK(says("\x28\xb5\x2f\xfd\0\0"s, "zstd"));
    CHECK(says(std::string(100000, '\0'), "zeros from its first byte on"));
    CHECK(says("\x83\xa6params\x81\xa5model"s, "Flax"));
    CHECK(says("version https://git-lfs.github.com/spec/v1\nsize many\n", "fetch the real one, by 'git lfs pull'"));
    CHECK(says("PK\x05\x06"s + std::string(18, '\0'), "is a zip archive")); // an empty one
    CHECK(says("PK\x03\x04"s + "m/code/model.py" + std::string(70000, 'x') + "PK\x05\x06", "TorchScript"));
    CHECK(says("PK\x03\x04"s + std::string(70000, 'x') + "m/code/PK\x05\x06", "TorchScript"));
    CHECK(says("algg\1\0\0\0"s, "is an adapter of llama.cpp before GGUF (ggla)"));
    CHECK(says("FUGG\0\0\0\3"s, "is a GGUF file in another order of bytes"));
    for (const char* magic : {"lmgg", "tjgg", "fmgg"}) { CHECK(says(magic, "is a GGML file (llama.cpp of old)")); }
    CHECK(says("\x1c\0\0\0TFL3\x14\0"s, "is a TensorFlow Lite model"));
    CHECK(says("model/w.bin" + std::string(246, '\0') + "ustar\0"s, "is a tar archive: unpack it"));
    CHECK(says("\x08\x07\x12\x07pytorch\x1a\x05" + "2.1.0 onnx.export"s, "is an ONNX model"));
    CHECK(kind_of("\x08\x07\x12\x07pytorch\x1a\x05" + "2.1.0 another thing"s).empty());
    CHECK(kind_of("\x80\x06 a pickle of no known protocol\x01"s).empty());
    CHECK(kind_of("\x80\x01 nor this\x01"s).empty());
    CHECK(says("\xef\xbb\xbf<head><title>Sign in", "is a page of HTML"));
    CHECK(says("\xef\xbb\xbf{\"error\": 404}", "is JSON ({\"error\": 404})"));
    CHECK(says("[1, 2]", "is JSON ([1, 2])"));
    CHECK(says(" \n\t ", "is a text"));
    CHECK(says(std::string(100000, 'x'), "is a text ('" + std::string(60, 'x') + " …')"));
    CHECK(says("a text with\ttabs\r\nand lines \n", "is a text ('a text with tabs  and lines'), not a model"));
    CHECK(kind_of("no text: \x7f"s).empty());
    CHECK(kind_of("\xc1\xff\xfe\x01\x02 whatever\x03"s).empty());
}

TEST_CASE("a reader says it, and a sound file is not asked")
{
    const scratch folder;
    const auto refused = [&](const std::string& content) {
        spill(folder / "m.safetensors", content);
        return refusal<format_error>(folder / "m.safetensors");
    };
    CHECK(refused("").find("m.safetensors: is empty") != std::string::npos);
    CHECK(refused("GGUF\x03\0\0\0\x10\0\0\0\0\0\0\0"s).find("GGUF") != std::string::npos);
    CHECK(refused("abc\x01"s).find("has 4 bytes; a safetensors file has at least 8") != std::string::npos);
    CHECK(refused("\x10\0\0\0\0\0\0\0{}"s).find("the file is cut short; fetch it again") != std::string::npos);
    // A header of 0x04034b50 bytes would begin with zip's letters.
    CHECK(refused("PK\x03\x04\0\0\0\0"s + std::string(100, ' ')).find("zip") != std::string::npos);
    spill(folder / "sound.safetensors", "\x02\0\0\0\0\0\0\0{}"s);
    CHECK(open_model(folder / "sound.safetensors").data_bytes() == 0);
}

TEST_CASE("a directory without a model says what it holds instead")
{
    const auto says_of = [](const std::vector<std::pair<std::string, std::string>>& files) {
        const scratch folder;
        for (const auto& [name, content] : files) {
            std::filesystem::create_directories((folder / name).parent_path());
            spill(folder / name, content);
        }
        return refusal<io_error>(folder.path());
    };
    const auto has = [](const std::string& text, const std::string& words) { return text.find(words) != text.npos; };
    CHECK(has(says_of({{"weights.bin", "PK\x03\x04\0\0\x08\x08"s}, {"training_args.bin", "x"}}),
        "holds no safetensors file, but 'weights.bin': that is a zip archive, as PyTorch's"));
    CHECK(has(says_of({{"weights.bin.index.json", "{}"}}),
        "'weights.bin.index.json': the weights lie in files of another format"));
    CHECK(has(says_of({{"model.gguf", "GGUF\x03"}}), "GGUF"));
    CHECK(has(says_of({{"adapter_model.safetensors", "x"}, {"adapter_config.json", "{}"}}), "holds an adapter"));
    CHECK(has(says_of({{"unet/diffusion_pytorch_model.safetensors", "x"}, {"model_index.json", "{}"}}),
        "holds no model itself, but its folders do ('unet')"));
    CHECK(has(says_of({{"a.safetensors", "x"}, {"b.safetensors", "x"}}),
        "several files ('a.safetensors', 'b.safetensors'): name the file"));
    CHECK(has(says_of({{"config.json", "{}"}}), "holds neither 'model.safetensors' nor"));
}
