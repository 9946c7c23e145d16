// PyTorch files: what torch.save() wrote is read as it was, and everything that builds more than tensors, or does not
// fit together, is refused by name.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/pytorch.hpp>

#include "scratch.hpp"

#include "../capture.hpp"

#include <doctest/doctest.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

namespace pytorch_test {

using namespace taskvec;
using namespace std::string_literals;

const std::filesystem::path data = std::filesystem::path(TASKVEC_TEST_DIR) / "formats" / "data" / "pytorch";

template <class T>
std::string bytes_of(T value)
{
    return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}
std::string u16(std::uint64_t value)
{
    return bytes_of(static_cast<std::uint16_t>(value));
}
std::string u32(std::uint64_t value)
{
    return bytes_of(static_cast<std::uint32_t>(value));
}

/// A zip archive of stored entries, and what may be wrong with it.
struct archive {
    struct entry {
        std::string name, content;
        std::uint64_t method = 0, flags = 0;
        std::string other_name{}; ///< where it lies
        std::uint64_t shift = 0; ///< of its place in the directory
        bool wide = false; ///< sizes in a 64-bit field
        std::string extra{}; ///< other fields, before that one
        std::uint64_t shown = 0; ///< the size in the directory, where it is another
    };
    std::vector<entry> entries;
    bool wide = false; ///< a 64-bit directory
    std::uint64_t count_more = 0;
    std::string comment{};

    [[nodiscard]] std::string bytes() const
    {
        std::string file, directory;
        for (const auto& one : entries) {
            const std::uint64_t at = file.size(), size = one.content.size();
            const auto& name = one.other_name.empty() ? one.name : one.other_name;
            file += "PK\x03\x04"s + u16(0) + u16(one.flags) + u16(one.method) + u32(0) + u32(0) + u32(size) + u32(size)
                + u16(name.size()) + u16(0) + name + one.content;
            const auto extra = one.extra + (one.wide ? u16(1) + u16(16) + bytes_of(size) + bytes_of(size) : ""s);
            const std::uint64_t shown = one.wide ? 0xffffffffu : one.shown ? one.shown : size;
            directory += "PK\x01\x02"s + u16(0) + u16(0) + u16(one.flags) + u16(one.method) + u32(0) + u32(0)
                + u32(shown) + u32(shown) + u16(one.name.size()) + u16(extra.size()) + u16(0) + u16(0) + u16(0) + u32(0)
                + u32(at + one.shift) + one.name + extra;
        }
        const std::uint64_t begin = file.size(), count = entries.size() + count_more;
        file += directory;
        if (wide) {
            const std::uint64_t at = file.size();
            file += "PK\x06\x06"s + bytes_of(std::uint64_t{44}) + u16(0) + u16(0) + u32(0) + u32(0) + bytes_of(count)
                + bytes_of(count) + bytes_of(std::uint64_t{directory.size()}) + bytes_of(begin);
            file += "PK\x06\x07"s + u32(0) + bytes_of(at) + u32(1);
        }
        const std::uint64_t shown = wide ? 0xffffffffu : begin;
        return file + "PK\x05\x06"s + u16(0) + u16(0) + u16(count) + u16(count)
            + u32(wide ? 0xffffffffu : directory.size()) + u32(shown) + u16(comment.size()) + comment;
    }
};

// Pickles, in words.
std::string text(const std::string& words)
{
    return "X" + u32(words.size()) + words;
}
std::string global(const std::string& module, const std::string& name)
{
    return "c" + module + "\n" + name + "\n";
}
std::string number(std::int32_t value)
{
    return "J" + bytes_of(value);
}
std::string numbers(const std::vector<std::int32_t>& values)
{
    std::string all = "(";
    for (const auto value : values) { all += number(value); }
    return all + "t";
}
std::string storage(const std::string& key, std::int32_t count, const std::string& type = "FloatStorage")
{
    return "(" + text("storage") + global("torch", type) + text(key) + text("cpu") + number(count) + "tQ";
}
std::string tensor(const std::string& of, std::int32_t offset, const std::vector<std::int32_t>& shape,
    const std::vector<std::int32_t>& strides)
{
    return global("torch._utils", "_rebuild_tensor_v2") + "(" + of + number(offset) + numbers(shape) + numbers(strides)
        + "\x89" + global("collections", "OrderedDict") + ")RtR";
}
std::string dictionary(const std::vector<std::pair<std::string, std::string>>& items)
{
    std::string all = "}(";
    for (const auto& [key, value] : items) { all += text(key) + value; }
    return all + "u";
}
std::string pickle(const std::string& value)
{
    return "\x80\x02" + value + ".";
}
const std::string four = std::string(16, '\1');
archive file_of(const std::string& code, const std::string& content = four)
{
    return {{{"m/data.pkl", code}, {"m/byteorder", "little"}, {"m/data/0", content}}};
}

pytorch_contents read(const std::string& bytes)
{
    return parse_pytorch(std::as_bytes(std::span(bytes)), "m.bin");
}
std::string refusal(const std::string& bytes)
{
    try {
        (void)read(bytes);
    }
    catch (const format_error& failure) {
        return failure.what();
    }
    return "";
}

void check_same(const checkpoint& found, const std::filesystem::path& expected)
{
    const safetensors_file file(expected);
    const auto model = file.model();
    REQUIRE(found.model().size() == model.size());
    for (const auto& [name, tensor] : model) {
        CAPTURE_BOUND(name);
        const auto* const mine = found.model().find(name);
        REQUIRE(mine != nullptr);
        CHECK(mine->dtype == tensor.dtype);
        CHECK(mine->shape == tensor.shape);
        CHECK(std::memcmp(mine->data, tensor.data, tensor.bytes()) == 0);
    }
}

std::size_t tensors_of(const std::filesystem::path& path)
{
    const auto opened = open_model(path);
    return opened.model().size();
}

TEST_CASE("what PyTorch saved is read as it was")
{
    check_same(open_model(data / "pytorch_model.bin"), data / "expected.safetensors");
    const auto training = open_model(data / "training.pt");
    check_same(training, data / "training.safetensors");
    REQUIRE(training.notes().size() == 1);
    CHECK(training.notes()[0].ends_with("training.pt': its 'state_dict' is taken"));
    const auto tied = open_model(data / "pytorch_model.bin");
    const auto *const rows = tied.model().find("rows"), *const whole = tied.model().find("tied");
    CHECK(static_cast<const float*>(rows->data) == static_cast<const float*>(whole->data) + 6);
}

TEST_CASE("tensors that do not lie row by row are read as rows")
{
    const scratch folder;
    std::vector<float> values(5000);
    for (std::size_t i = 0; i < values.size(); ++i) { values[i] = static_cast<float>(i); }
    const std::string content(reinterpret_cast<const char*>(values.data()), 4 * values.size());
    const auto of = storage("0", 5000);
    struct turned {
        extents shape, strides;
        std::int32_t first;
    };
    const std::map<std::string, turned> tensors{{"matrix", {{70, 50}, {1, 70}, 0}}, {"columns", {{50, 9}, {100, 3}, 7}},
        {"three", {{3, 40, 37}, {1, 111, 3}, 40}}, {"vector", {{50}, {100}, 99}}, {"rows", {{4, 5}, {5, 1}, 3}},
        {"same", {{2, 3}, {0, 1}, 5}}, {"none", {{0, 3}, {1, 7}, 0}}, {"wide", {{3, 5000}, {0, 1}, 0}},
        {"windows", {{99, 60}, {50, 1}, 0}}, {"last", {{70}, {0}, 4999}}, {"four", {{2, 3, 4, 5}, {60, 1, 15, 3}, 0}}};
    std::vector<std::pair<std::string, std::string>> items;
    const auto small = [](const extents& list) { return std::vector<std::int32_t>(list.begin(), list.end()); };
    for (const auto& [name, one] : tensors) {
        items.emplace_back(name, tensor(of, one.first, small(one.shape), small(one.strides)));
    }
    spill(folder / "m.bin", file_of(pickle(dictionary(items)), content).bytes());
    const auto model = open_model(folder / "m.bin");
    REQUIRE(model.notes().size() == 1);
    CHECK(model.notes()[0].find("9 tensors ('columns' …) do not lie row by row") != std::string::npos);
    for (const auto& [name, one] : tensors) {
        CAPTURE_BOUND(name);
        const auto& found = *model.model().find(name);
        CHECK(found.shape == one.shape);
        REQUIRE(found.contiguous());
        for (std::size_t k = 0; k < found.size(); ++k) {
            std::int64_t place = one.first;
            auto rest = static_cast<std::int64_t>(k);
            for (std::size_t d = one.shape.size(); d-- > 0;) {
                place += rest % one.shape[d] * one.strides[d];
                rest /= one.shape[d];
            }
            REQUIRE(static_cast<const float*>(found.data)[k] == static_cast<float>(place));
        }
    }
    const auto saved = open_model(data / "turned.bin");
    CHECK(saved.model().find("turned")->shape == extents{3, 2});
    CHECK(saved.notes().size() == 1);
    for (const std::string type : {"Double", "Half", "Byte"}) {
        const std::size_t width = type == "Double" ? 8 : type == "Half" ? 2 : 1;
        std::string bytes;
        for (std::size_t i = 0; i < 6 * width; ++i) { bytes += static_cast<char>(i / width); }
        spill(folder / "t.bin",
            file_of(pickle(dictionary({{"t", tensor(storage("0", 6, type + "Storage"), 0, {3, 2}, {1, 3})}})), bytes)
                .bytes());
        const auto one = open_model(folder / "t.bin");
        std::string turned;
        for (const char k : std::string("\0\3\1\4\2\5", 6)) { turned += std::string(width, k); }
        CHECK(std::string(static_cast<const char*>(one.model().find("t")->data), 6 * width) == turned);
    }
}

TEST_CASE("tensors whose numbers are not their bytes are refused by name")
{
    const auto with = [](const std::string& function, const std::string& metadata) {
        const bool typed = function == "_rebuild_tensor_v3";
        return refusal(file_of(pickle(dictionary({{"w",
                                   global("torch._utils", function) + "(" + storage("0", 4) + number(0) + numbers({4})
                                       + numbers({1}) + "\x89" + global("collections", "OrderedDict") + ")R"
                                       + (typed ? global("torch", "float32") : ""s) + metadata + "tR"}})))
                .bytes());
    };
    for (const std::string function : {"_rebuild_tensor_v2", "_rebuild_tensor_v3"}) {
        CAPTURE(function);
        for (const auto& harmless :
            {""s, "N"s, "}"s, "\x89"s, number(0), dictionary({{"neg", "\x89"}, {"conj", "\x89"}})}) {
            CHECK(with(function, harmless).empty());
        }
        const auto negated = with(function, dictionary({{"conj", "\x89"}, {"neg", "\x88"}}));
        CHECK_MESSAGE(negated.find("tensor 'w' is a view that is negated as it is read") != negated.npos, negated);
        CHECK(negated.find(".resolve_neg()") != negated.npos);
        const auto conjugated = with(function, dictionary({{"conj", "\x88"}}));
        CHECK_MESSAGE(conjugated.find("tensor 'w' is a view that is conjugated") != conjugated.npos, conjugated);
        const auto other = with(function, dictionary({{"scale", "\x89"}}));
        CHECK_MESSAGE(other.find("says 'scale' of tensor 'w'") != other.npos, other);
        for (const auto& odd : {number(1), text("neg"), "]"s}) {
            CHECK(with(function, odd).find("says more of tensor 'w'") != std::string::npos);
        }
        CHECK(with(function, "}" + number(1) + "\x89s").find("says '' of tensor 'w'") != std::string::npos);
        CHECK(with(function, dictionary({{"neg", text("no")}})).find("is negated") != std::string::npos);
    }
}

TEST_CASE("directories and indexes of PyTorch files")
{
    const scratch folder;
    std::filesystem::copy_file(data / "pytorch_model.bin", folder / "pytorch_model.bin");
    check_same(open_model(folder.path()), data / "expected.safetensors");
    std::filesystem::rename(folder / "pytorch_model.bin", folder / "pytorch_model-00001-of-00002.bin");
    spill(folder / "pytorch_model-00002-of-00002.bin",
        file_of(pickle(dictionary({{"more", tensor(storage("0", 4), 0, {2, 2}, {2, 1})}}))).bytes());
    std::string map;
    const safetensors_file expected(data / "expected.safetensors");
    for (const auto& [name, unused] : expected.model()) {
        map += "\"" + name + "\": \"pytorch_model-00001-of-00002.bin\", ";
    }
    const std::string index = "pytorch_model.bin.index.json";
    spill(folder / index, "{\"weight_map\": {" + map + "\"more\": \"pytorch_model-00002-of-00002.bin\"}}");
    CHECK(tensors_of(folder.path()) == 16);
    CHECK(tensors_of(folder / index) == 16);
    spill(folder / index, "{\"weight_map\": {" + map + "\"less\": \"pytorch_model-00002-of-00002.bin\"}}");
    CHECK_THROWS_AS((void)open_model(folder.path()), format_error);
    // Without an index a whole set is taken, and a part of one is not.
    std::filesystem::remove(folder / index);
    const auto whole = open_model(folder.path());
    CHECK(whole.model().size() == 16);
    REQUIRE(whole.notes().size() >= 1);
    CHECK(whole.notes()[0].find("holds no index: all 2 shards are taken") != std::string::npos);
    std::filesystem::rename(folder / "pytorch_model-00002-of-00002.bin", folder / "other");
    CHECK_THROWS_WITH_AS((void)open_model(folder.path()), doctest::Contains("holds 1 of 2 shards"), io_error);
    // The only file of weights is the model, whatever it is called.
    for (const std::string name : {"model.pt", "consolidated.00.pth", "pytorch_model.fp16.bin", "last.ckpt"}) {
        const scratch other;
        std::filesystem::copy_file(data / "pytorch_model.bin", other / name);
        spill(other / "training_args.bin", "x");
        const auto one = open_model(other.path());
        CHECK(one.model().size() == 15);
        CHECK(one.notes().at(0).find("'" + name + "' is taken, its only weights") != std::string::npos);
        std::filesystem::copy_file(data / "pytorch_model.bin", other / "second.pt");
        CHECK_THROWS_WITH_AS((void)open_model(other.path()), doctest::Contains("several of PyTorch's ('"), io_error);
    }
    // safetensors come first.
    std::filesystem::copy_file(data / "training.safetensors", folder / "model.safetensors");
    check_same(open_model(folder.path()), data / "training.safetensors");
}

TEST_CASE("what is no plain state_dict is refused by name, and nothing runs")
{
    const auto says = [](const std::string& name, const std::string& words) {
        std::string found;
        try {
            (void)open_model(data / name);
        }
        catch (const format_error& failure) {
            found = failure.what();
        }
        CHECK_MESSAGE(found.find(words) != std::string::npos, found);
        CHECK(found.find(name == "command.bin" ? "do not load this file" : "save_pretrained()") != std::string::npos);
    };
    says("old.bin", "a PyTorch file of the old kind");
    says("command.bin", "whose pickle names 'posix.system'");
    says("sparse.bin", "whose pickle names 'torch._utils._rebuild_sparse_tensor'");
    says("tensor.pt", "holds no dictionary of tensors");
    CHECK_FALSE(std::filesystem::exists("taskvec-ran-this"));
}

TEST_CASE("objects beside a state_dict are not built, and keep their hands off it")
{
    const auto w = tensor(storage("0", 4), 0, {4}, {1});
    const auto state = dictionary({{"w", w}});
    const auto space = global("argparse", "Namespace") + ")\x81" + dictionary({{"lr", number(1)}}) + "b";
    const auto scalar = global("numpy.core.multiarray", "scalar") + "(" + global("numpy", "dtype") + "(" + text("f8")
        + "\x89\x88tR(" + number(3) + text("<") + "NNNtbC\x02xytR";
    const auto device = global("torch", "device") + text("cuda") + "\x85R";
    const auto set = global("__builtin__", "set") + "](" + number(1) + number(2) + "e\x85R";
    const auto quantised = tensor(storage("1", 4, "QInt8Storage"), 0, {4}, {1});
    const std::vector<std::pair<std::string, std::string>> beside{{"args", space}, {"loss", scalar}, {"device", device},
        {"seen", set}, {"new set", "\x8f("s + number(1) + "\x90"}, {"frozen", "("s + number(1) + "\x91"},
        {"bytes", "B" + u32(3) + "abc"}, {"generator", "\x8a\x09" + std::string(9, '\1')},
        {"extended", global("a", "B") + ")}\x92"},
        {"counter", global("collections", "Counter") + "}" + text("k") + number(2) + "s\x85R"},
        {"filled",
            global("collections", "defaultdict") + global("__builtin__", "int") + "\x85R" + text("k") + number(2)
                + "s"},
        {"optimizer", dictionary({{"inner", quantised}})},
        {"ema", global("torch.nn.parameter", "Buffer") + "(" + w + "tR"}};
    for (const auto& one : beside) {
        CAPTURE(one.first);
        for (const bool first : {true, false}) {
            const std::pair<std::string, std::string> model{"state_dict", state};
            const auto code = pickle(dictionary(first ? std::vector{one, model} : std::vector{model, one}));
            const auto found = read(file_of(code).bytes());
            REQUIRE(found.header.entries.size() == 1);
            CHECK(found.header.entries[0].name == "w");
            REQUIRE(found.notes.size() == 1);
            CHECK(found.notes[0].find("its 'state_dict' is taken") != std::string::npos);
        }
    }
    const auto note = read(file_of(pickle(dictionary({{"args", space}, {"model", state}}))).bytes()).notes.at(0);
    CHECK(note == "'m.bin': its 'model' is taken; what lies beside it names 'argparse.Namespace', and was not built");
    // What the model holds, is, or was given to must be known.
    const auto kept = state + "q\5";
    const auto says = [](const std::string& code, const std::string& words) {
        const auto found = refusal(file_of(pickle(code)).bytes());
        CHECK_MESSAGE(found.find(words) != std::string::npos, found);
    };
    says(space, "holds no dictionary");
    says(dictionary({{"args", space}}), "names 'argparse.Namespace'");
    says(dictionary({{"w", w}, {"args", space}}), "names 'argparse.Namespace'");
    says(dictionary({{"w", w}, {"more", dictionary({{"v", device}})}}), "names 'torch.device'");
    says(dictionary({{"state_dict", dictionary({{"w", w}, {"v", quantised}})}}), "names 'torch.QInt8Storage'");
    says(dictionary({{"state_dict", global("my", "Dict") + ")R" + text("w") + w + "s"}, {"model", state}}),
        "names 'my.Dict'");
    says(dictionary({{"state_dict",
             dictionary({{"w", global("torch._utils", "_rebuild_parameter") + "(" + device + "\x88}tR"}})}}),
        "names 'torch.device'");
    const std::string gives = "gives the model's tensors to ";
    says(dictionary(
             {{"state_dict", kept}, {"x", global("operator", "setitem") + "(h\5" + text("w") + number(0) + "tR"}}),
        gives + "'operator.setitem'");
    says(dictionary({{"state_dict", kept}, {"x", global("a", "B") + "(h\5t\x81"}}), gives + "'a.B'");
    says(dictionary({{"state_dict", kept}, {"x", global("a", "B") + ")R]h\5ab"}}), gives + "'a.B'");
    says(dictionary({{"state_dict", kept}, {"x", global("a", "B") + ")Rh\5a"}}), gives + "'a.B'");
    says(dictionary({{"state_dict", dictionary({{"w", w + "q\5"}})}, {"x", global("a", "B") + "(h\5tR"}}),
        gives + "'a.B'");
    says(dictionary({{"state_dict", dictionary({{"w", w + "q\5"}})}, {"x", "(h\5\x91"}}), gives);
    // The collection is given first and filled later.
    says(dictionary({{"x", global("a", "B") + "(]q\6tR"}, {"state_dict", kept}, {"y", "h\6h\5a"}}), gives + "'a.B'");
}

TEST_CASE("names by which pickles run code are refused wherever they stand")
{
    const auto state = dictionary({{"w", tensor(storage("0", 4), 0, {4}, {1})}});
    for (const auto& [module, name] :
        std::vector<std::pair<std::string, std::string>>{{"os", "system"}, {"posix", "system"}, {"nt", "system"},
            {"builtins", "eval"}, {"__builtin__", "exec"}, {"builtins", "__import__"}, {"builtins", "getattr"},
            {"subprocess", "Popen"}, {"importlib", "import_module"}, {"runpy", "_run_code"}, {"shutil", "rmtree"},
            {"urllib.request", "urlopen"}, {"torch.hub", "load"}}) {
        CAPTURE_BOUND(module);
        const auto call = global(module, name) + "(" + text("touch x") + "tR";
        for (const auto& code :
            {dictionary({{"state_dict", state}, {"x", call}}), dictionary({{"x", call}, {"state_dict", state}}),
                dictionary({{"model", state}, {"optimizer", dictionary({{"y", global(module, name)}})}})}) {
            const auto found = refusal(file_of(pickle(code)).bytes());
            CHECK_MESSAGE(
                found.find("names '" + module + "." + name + "', which no model needs") != std::string::npos, found);
        }
    }
    // Names of data that begin like those.
    for (const auto& beside : {global("oslo", "Thing"), global("builtins", "set"), global("pathlib", "PosixPath")}) {
        CHECK(read(file_of(pickle(dictionary({{"state_dict", state}, {"x", beside}}))).bytes()).header.entries.size()
            == 1);
    }
}

TEST_CASE("the model of a training checkpoint is found where it lies")
{
    const auto one = tensor(storage("0", 4), 0, {4}, {1});
    const auto state = dictionary({{"w", one}, {"b", one}});
    const auto moments = "}" + number(0) + dictionary({{"exp_avg", one}}) + "s";
    const auto optimizer = dictionary({{"state", moments}, {"param_groups", "]"}});
    const auto found = [](const std::vector<std::pair<std::string, std::string>>& items) {
        const auto contents = read(file_of(pickle(dictionary(items))).bytes());
        std::string all;
        for (const auto& entry : contents.header.entries) { all += entry.name + " "; }
        REQUIRE(contents.notes.size() == 1);
        return all + contents.notes[0];
    };
    CHECK(found({{"state_dict", state}, {"best_acc1", one}})
        == "w b 'm.bin': its 'state_dict' is taken; beside it 1 tensor is left out");
    CHECK(found({{"state_dict", state}, {"best", one}, {"worst", one}})
        == "w b 'm.bin': its 'state_dict' is taken; beside it 2 tensors are left out");
    CHECK(found({{"rng_state", one}, {"epoch", number(3)}, {"model", state}, {"optimizer", optimizer}})
        == "w b 'm.bin': its 'model' is taken; beside it 1 tensor is left out");
    for (const std::string name : {"net", "network", "generator", "model_ema", "anything"}) {
        CHECK(found({{name, state}, {"optimizer", optimizer}, {"epoch", number(3)}})
            == "w b 'm.bin': its '" + name + "' is taken");
    }
    CHECK(found({{"model", dictionary({{"state_dict", state}})}}) == "w b 'm.bin': its 'model.state_dict' is taken");
    CHECK(found({{"module", dictionary({{"inner", state}, {"step", number(1)}})}})
        == "w b 'm.bin': its 'module.inner' is taken");
    // Not where two may be meant, or more tensors lie outside: with a way on that works.
    const auto says = [](const std::vector<std::pair<std::string, std::string>>& items, const std::string& words) {
        const auto text = refusal(file_of(pickle(dictionary(items))).bytes());
        CHECK_MESSAGE(text.find(words) != std::string::npos, text);
        CHECK(text.find("torch.load(FILE, weights_only=True)['") != std::string::npos);
    };
    says({{"generator", state}, {"discriminator", state}},
        "holds several dictionaries of tensors ('generator', 'discriminator')");
    says({{"a", one}, {"b", one}, {"c", one}, {"model", state}}, "holds tensors and, under 'model', more of them");
    // A dictionary that holds itself, many times.
    std::string knot = "}q\x09(";
    for (int i = 0; i < 300; ++i) { knot += text("k" + std::to_string(i)) + "h\x09"; }
    CHECK(refusal(file_of(pickle(knot + "u")).bytes()).find("holds no tensors") != std::string::npos);
}

TEST_CASE("archives that are sound in other ways")
{
    const auto code = pickle(dictionary({{"w", tensor(storage("0", 4), 1, {3}, {1})}}));
    auto made = file_of(code);
    CHECK(read(made.bytes()).header.entries.size() == 1);
    made.wide = true;
    made.entries[2].wide = true;
    made.comment = "a comment PK\x05\x06";
    const auto found = read(made.bytes());
    REQUIRE(found.header.entries.size() == 1);
    CHECK(found.header.entries[0].bytes == 12);
    CHECK(made.bytes().substr(found.header.entries[0].offset - 4, 16) == four);
    made.entries[2].extra = u16(0x7075) + u16(4) + "name" + u16(0x5455) + u16(0); // fields of others
    CHECK(read(made.bytes()).header.entries.size() == 1);
    made.entries[2].wide = false;
    made.entries[2].extra = u16(0x7075) + u16(100); // one that is cut
    CHECK(read(made.bytes()).header.entries.size() == 1);
    // Newer protocols: frames, short texts, memos by their order.
    const auto brief = [](const std::string& words) {
        return "\x8c"s + static_cast<char>(words.size()) + words + "\x94";
    };
    const auto newer = "\x80\x04\x95"s + std::string(8, '\0') + "}\x94(" + brief("w") + brief("torch._utils")
        + brief("_rebuild_tensor_v2") + "\x93(" + "(" + brief("storage") + brief("torch") + brief("FloatStorage")
        + "\x93" + brief("0") + brief("cpu") + "K\x04tQK\0"s + "K\x04\x85K\x01\x85\x89NtRu.";
    CHECK(read(file_of(newer).bytes()).header.entries.size() == 1);
    // An older function with fewer arguments, another type than the storage's, numbers of a byte and of none.
    const auto older = global("torch._utils", "_rebuild_tensor") + "(" + storage("0", 4)
        + "\x8a\x01\x02\x8a\x01\x02\x85" + "\x8a\x01\x01\x85" + "tR";
    const auto half = read(file_of(pickle(dictionary({{"w", older}}))).bytes());
    REQUIRE(half.header.entries.size() == 1);
    CHECK(half.header.entries[0].bytes == 8);
    const auto zero = global("torch._utils", "_rebuild_tensor") + "(" + storage("0", 4) + "\x8a"s + '\0' + "))tR";
    CHECK(read(file_of(pickle(dictionary({{"w", zero}}))).bytes()).header.entries[0].shape.empty());
    const auto typed = global("torch._utils", "_rebuild_tensor_v3") + "(" + storage("0", 16, "ByteStorage") + number(1)
        + numbers({2}) + numbers({1}) + "\x89}" + global("torch", "float32") + "tR";
    CHECK(read(file_of(pickle(dictionary({{"w", typed}}))).bytes()).header.entries[0].dtype == dtype::f32);
    // Entries beside the model's folder, and values without names.
    auto more = file_of(pickle("}(" + text("w") + tensor(storage("0", 4), 0, {4}, {1}) + number(7) + text("x") + "u"));
    more.entries.push_back({"version", "3"});
    CHECK(read(more.bytes()).notes
        == std::vector<std::string>{"'m.bin': 1 value that is no tensor ('a number') is left out"});
    CHECK(read(file_of(pickle("}(" + number(7) + text("x") + text("w") + tensor(storage("0", 4), 0, {4}, {1})
                           + text("y") + "Nu"))
                   .bytes())
              .notes
        == std::vector<std::string>{"'m.bin': 2 values that are no tensors ('a number' …) are left out"});
    // Names of every length in UTF-8.
    const std::string names = "a\u00e9\u20ac\xed\x9f\xbf\xee\x80\x80\U00010000\U0010ffff";
    CHECK(read(file_of(pickle(dictionary({{names, tensor(storage("0", 4), 0, {4}, {1})}}))).bytes())
              .header.entries[0]
              .name
        == names);
    // Others than tensors are counted.
    const auto mixed = read(file_of(
        pickle(dictionary({{"w", tensor(storage("0", 4), 0, {4}, {1})}, {"step", number(3)}, {"name", text("x")}})))
            .bytes());
    CHECK(mixed.header.entries.size() == 1);
    CHECK(mixed.notes == std::vector<std::string>{"'m.bin': 2 values that are no tensors ('step' …) are left out"});
}

TEST_CASE("damaged archives")
{
    const auto code = pickle(dictionary({{"w", tensor(storage("0", 4), 0, {4}, {1})}}));
    const auto says = [&](const std::string& words, const std::function<void(archive&)>& break_it) {
        auto made = file_of(code);
        break_it(made);
        const auto found = refusal(made.bytes());
        CHECK_MESSAGE(found.find(words) != std::string::npos, found);
        CHECK(found.find("m.bin: ") == 0);
    };
    says("promises 4 entries and has 3", [](archive& a) { a.count_more = 1; });
    says("tensor 'w' compressed", [](archive& a) {
        a.entries[2].method = 8;
        a.entries[2].name = "m/data/0";
    });
    says("is compressed", [](archive& a) { a.entries[0].flags = 1; });
    says("is compressed", [](archive& a) { a.entries[0].method = 8; });
    says("has another name where it lies", [](archive& a) { a.entries[2].other_name = "m/data/1"; });
    says("is not where the directory says", [](archive& a) { a.entries[2].shift = 1; });
    says("is not where the directory says", [](archive& a) { a.entries[2].shift = 0xfffffff0; });
    for (const auto& field : {""s, u16(0x7075) + u16(16) + std::string(16, '\0'), u16(1) + u16(0), u16(1) + u16(99)}) {
        says("runs past the end", [&](archive& a) { // a size of 2^32 - 1 that no field of 64 bits replaces
            a.entries[2].shown = 0xffffffffu;
            a.entries[2].extra = field;
        });
    }
    says("has two sizes", [](archive& a) {
        a.entries[2].shown = 0xffffffffu;
        a.entries[2].extra = u16(1) + u16(8) + bytes_of(std::uint64_t{16});
    });
    says("occurs twice", [](archive& a) { a.entries.push_back(a.entries[2]); });
    says("big-endian", [](archive& a) { a.entries[1].content = "big"; });
    says("two pickles", [](archive& a) { a.entries.push_back({"n/data.pkl", pickle("}")}); });
    says("TorchScript", [](archive& a) { a.entries.push_back({"m/constants.pkl", pickle("}")}); });
    says("'data/0', which is not there", [](archive& a) { a.entries.pop_back(); });
    says("lies in a storage of 4 × 4 bytes, which has 15", [](archive& a) { a.entries[2].content.pop_back(); });
    says("zip archive", [](archive& a) { a.entries.erase(a.entries.begin()); });
    // An entry whose size reaches into the next one.
    auto made = file_of(code);
    made.entries[1].content = "little";
    auto bytes = made.bytes();
    const auto at = bytes.find("m/byteorder", bytes.find("PK\x01\x02"));
    for (const std::size_t field : {26u, 22u}) { bytes.replace(at - field, 4, u32(50)); }
    CHECK(refusal(bytes).find("share bytes") != std::string::npos);
    bytes = file_of(code).bytes();
    CHECK(
        refusal(bytes.substr(0, bytes.size() - 3)).find("its directory, at its end, is missing") != std::string::npos);
    CHECK(refusal("PK\x03\x04").find("is missing") != std::string::npos);
    CHECK(refusal("PK\x03\x04" + std::string(70'000, '\0')).find("is missing") != std::string::npos);
    made.wide = true; // a directory of 64 bits at the last bytes, beyond them, and where none is
    bytes = made.bytes();
    const auto place = bytes.find("PK\x06\x07") + 8;
    for (const auto& [where, words] :
        {std::pair<std::uint64_t, std::string>{bytes.size() - 2, "a record runs past its end"},
            {bytes.size() + 7, "a record runs past its end"}, {~std::uint64_t{0}, "a record runs past its end"},
            {0, "its 64-bit directory is not where it should be"}}) {
        auto other = bytes;
        other.replace(place, 8, bytes_of(where));
        const auto found = refusal(other);
        CHECK_MESSAGE(found.find(words) != std::string::npos, found);
    }
}

TEST_CASE("pickles that do more than build tensors, or build what does not fit")
{
    const auto good = storage("0", 4);
    const auto one = [](const std::string& value) { return pickle(dictionary({{"w", value}})); };
    const std::string deep(200'000, ']');
    struct fault {
        std::string code, words;
    };
    const std::vector<fault> faults{{one(global("os", "system")), "names 'os.system'"},
        {one(global("builtins", "eval")), "names 'builtins.eval'"},
        {one(text("a") + text("b") + "\x93"), "names 'a.b'"}, {pickle("}i"), "the instruction 'i'"},
        {pickle("}o"), "the instruction 'o'"}, {pickle("})\x81"), "the instruction 129"},
        {pickle(text("x") + "P"), "the instruction 'P'"}, {"\x80\x01}.", "protocol 1"},
        {one(text("f") + ")R"), "calls what is no function"},
        {one(global("torch", "FloatStorage") + ")R"), "calls what"}, {one(number(1) + "}b"), "sets the state"},
        {pickle("}"), ""}, {one("\x8a\x09" + std::string(9, '\1')), "number above 2^63"}, {"", "cut short"},
        {"\x80", "cut short"}, {pickle("X\xff\xff\xff\xff"), "cut short"}, {pickle("cos"), "cut short"},
        {pickle(""), "no single value"}, {pickle("}}"), "no single value"}, {pickle("(}"), "no single value"},
        {pickle("}h\5"), "never kept"}, {pickle("t"), "no mark"}, {pickle("s"), "more values than it has"},
        {pickle("}(s"), "more values than it has"}, {pickle("q\1"), "more values than it has"},
        {pickle(")" + number(1) + "a"), "no collection"}, {pickle("}(" + number(1) + "u"), "no collection"},
        {pickle("Q"), "more values"}, {pickle(")Q"), "storage"}, {pickle(number(1) + "."), "holds no dictionary"},
        {pickle(number(1)), "holds no dictionary"}, {one(number(7)), "holds no tensors by name"},
        {pickle("}(" + number(7) + tensor(good, 0, {4}, {1}) + "u"), "holds no tensors by name"},
        {one(tensor(good, 1, {4}, {1})), "runs past the end"}, {one(tensor(good, -1, {4}, {1})), "is none"},
        {one(tensor(good, 0, {-4}, {1})), "is none"}, {one(tensor(good, 0, {4}, {1, 1})), "is none"},
        {one(tensor(good, 0, {2, 2}, {1, 3})), "strides [1, 3] runs past"},
        {one(tensor(good, 1, {1, 3}, {1, 2})), "strides [1, 2] runs past"},
        {one(tensor(good, 0, {2, 1}, {2147483647, 7})), "runs past"},
        {one(tensor(good, 0, {4, 5}, {0, 1})), "strides [0, 1] runs past"},
        {one(tensor(good, 1, {4, 4}, {0, 1})), "strides [0, 1] runs past"},
        {one(tensor(good, 4, {2}, {0})), "runs past"}, {one(tensor(good, 5, {2}, {0})), "runs past"},
        {one(tensor(good, 0, {2147483647, 4}, {0, 1})), "expanded from 4 elements, and more than 1073741824 bytes"},
        {one(tensor(good, 0, {2147483647, 2147483647}, {0, 0})), "expanded from 4 elements"},
        {pickle(dictionary({{"v", tensor(good, 0, {200000000}, {0})}, {"w", tensor(good, 0, {200000000}, {0})}})),
            "tensor 'w' of F32 [200000000] expanded"},
        {one(tensor(good, 0, {2147483647, 2147483647, 2147483647}, {1, 1, 1})), "above 2^64"},
        {one(tensor(number(1), 0, {4}, {1})), "is none"}, {one(tensor(storage("0", 5), 0, {4}, {1})), "storage of 5"},
        {one(tensor(storage("0", -4), 0, {4}, {1})), "storage that is none"},
        {one(tensor(storage("0", 2, "DoubleStorage"), 0, {3}, {1})), "runs past"},
        {one(tensor(storage("../x", 4), 0, {4}, {1})), "'data/../x', which is not there"},
        {one(tensor(storage("0", 4, "QInt8Storage"), 0, {4}, {1})), "names 'torch.QInt8Storage'"},
        {pickle(dictionary({{"w", tensor(good, 0, {4}, {1})}, {"w", tensor(good, 0, {4}, {1})}})), "'w' twice"},
        {pickle(dictionary({{"", tensor(good, 0, {4}, {1})}})), "name is empty"},
        {pickle(dictionary({{"\xff", tensor(good, 0, {4}, {1})}})), "no UTF-8"},
        {pickle(dictionary({{"w", tensor(good, 0, {4}, {1})}, {"d", dictionary({{"v", tensor(good, 0, {4}, {1})}})}})),
            "more of them"},
        {pickle(deep), "no single value"}};
    const auto with = [&](const std::string& arguments, const std::string& function = "_rebuild_tensor_v2") {
        return one(global("torch._utils", function) + "(" + arguments + "tR");
    };
    const auto stored = [&](const std::string& id) { return one(tensor("(" + id + "tQ", 0, {4}, {1})); };
    const std::string type = global("torch", "FloatStorage"), rest = text("cpu") + number(4),
                      last = bytes_of(~0ull >> 1);
    std::vector<fault> more{// Storages, tensors, sizes and parameters of the wrong values.
        {stored(number(1) + type + text("0") + rest), "storage that is none"},
        {stored(text("other") + type + text("0") + rest), "storage that is none"},
        {stored(text("storage") + text("x") + text("0") + rest), "storage that is none"},
        {stored(text("storage") + global("torch", "Size") + text("0") + rest), "storage that is none"},
        {stored(text("storage") + type + number(0) + rest), "storage that is none"},
        {stored(text("storage") + type + text("0") + text("cpu") + text("4")), "storage that is none"},
        {stored(text("storage") + type + text("0") + text("cpu") + "\x88"), "storage that is none"},
        {stored(text("storage") + type + text("0") + text("cpu")), "storage that is none"},
        {with(good + number(0) + numbers({4})), "tensor that is none"},
        {with(good + text("0") + numbers({4}) + numbers({1})), "tensor that is none"},
        {with(good + "\x88" + numbers({4}) + numbers({1})), "tensor that is none"},
        {with(good + number(0) + number(4) + numbers({1})), "tensor that is none"},
        {with(good + number(0) + "(" + text("4") + "t" + numbers({1})), "tensor that is none"},
        {with(good + number(0) + "(\x88t" + numbers({1})), "tensor that is none"},
        {with(good + number(0) + numbers({4}) + numbers({1}) + "\x89}", "_rebuild_tensor_v3"), "tensor that is none"},
        {with(good + number(0) + numbers({4}) + numbers({1}) + "\x89}N", "_rebuild_tensor_v3"), "tensor of no type"},
        {with(good + number(0) + numbers({4}) + numbers({1}) + "\x89}" + global("torch", "Size"), "_rebuild_tensor_v3"),
            "tensor of no type"},
        {with("", "_rebuild_parameter"), "a parameter that is no tensor"},
        {with(number(1) + "\x88}", "_rebuild_parameter"), "a parameter that is no tensor"},
        {one(global("torch", "Size") + ")R"), "a size that is none"},
        {one(global("torch", "Size") + number(1) + "\x85R"), "a size that is none"},
        {one(global("collections", "OrderedDict") + number(1) + "\x85R"), "fills an OrderedDict by a call"},
        {one(global("collections", "OrderedDict") + number(1) + "R"), "calls what is no function"},
        {one(number(1) + text("a") + "\x93"), "names something by no text"},
        {one(text("a") + number(1) + "\x93"), "names something by no text"},
        {one("\x8a\x01\xff"), "holds no tensors by name"}, // -1
        {with(good + "\x8a\x01\xff" + numbers({4}) + numbers({1})), "tensor that is none"},
        {one(global("torch", "load") + ")R"), "names 'torch.load', which no model needs"},
        {one(global("anything", "runstring") + ")R"), "names 'anything.runstring', which no model needs"},
        // Strides whose products and sums leave 64 bits.
        {with(good + number(0) + numbers({4, 1}) + "(\x8a\x08" + last + number(1) + "t"), "runs past"},
        {with(good + number(0) + numbers({2, 2, 2}) + "(" + ("\x8a\x08" + last) + ("\x8a\x08" + last)
             + ("\x8a\x08" + last) + "t"),
            "runs past"},
        // More tensors under a number.
        {pickle("}(" + text("w") + tensor(good, 0, {4}, {1}) + number(7)
             + dictionary({{"v", tensor(good, 0, {4}, {1})}}) + "u"),
            "holds tensors and, under a number, more of them"},
        {pickle(dictionary({{"state_dict", "}"}})), "holds no tensors by name"}};
    for (const char* broken : {"\x80", "\xc1\x80", "\xc3", "\xc3z", "\xe0\x9f\xbf", "\xed\xa0\x80", "\xe2z\x80",
             "\xe2\x82z", "\xe2\x82", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80", "\xf1\x80\x80z", "\xf5\x80\x80\x80"}) {
        more.push_back({pickle(dictionary({{broken, tensor(good, 0, {4}, {1})}})), "no UTF-8"});
    }
    std::string deepest = tensor(good, 0, {4}, {1});
    for (int i = 0; i < 12; ++i) { deepest = dictionary({{"a", deepest}}); } // deeper than any checkpoint
    more.push_back({pickle(deepest), "holds no tensors by name"});
    std::string held = "}q\1";
    for (int i = 0; i < 5'000'000; ++i) { held += "h\1"; }
    more.push_back({pickle(held), "holds too many values at once"});
    more.insert(more.begin(), faults.begin(), faults.end());
    for (const auto& fault : more) {
        CAPTURE(fault.words);
        const auto found = refusal(file_of(fault.code).bytes());
        CHECK_MESSAGE((fault.words.empty() ? found.empty() : found.find(fault.words) != std::string::npos), found);
    }
    // Nothing recurses: lists in lists, and a list that holds itself.
    std::string nested;
    for (int i = 0; i < 100'000; ++i) { nested += "]"; }
    for (int i = 1; i < 100'000; ++i) { nested += "a"; }
    CHECK(refusal(file_of(pickle(nested)).bytes()).find("holds no dictionary") != std::string::npos);
    CHECK(refusal(file_of(pickle("]q\1h\1a")).bytes()).find("holds no dictionary") != std::string::npos);
}

} // namespace pytorch_test
