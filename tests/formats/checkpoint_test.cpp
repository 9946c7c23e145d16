// Checkpoints: single files, directories, shards and their index.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/resumable_shards.hpp>

#include "../skip.hpp"
#include "scratch.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <numeric>
#include <thread>

#if !defined(_WIN32)
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

using namespace taskvec;

namespace {

/// `count` tensors t00, t01, … of i + 1 floats, each value 100 * seed + i.
std::size_t tensors(const std::filesystem::path& path)
{
    const auto opened = open_model(path);
    return opened.model().size();
}

struct sample {
    std::vector<tensor_spec> specs;
    std::vector<std::vector<float>> contents;

    explicit sample(std::size_t count, int seed = 1)
    {
        for (std::size_t i = 0; i < count; ++i) {
            specs.push_back(
                {(i < 10 ? "t0" : "t") + std::to_string(i), dtype::f32, {static_cast<std::int64_t>(i + 1)}});
            contents.emplace_back(i + 1, static_cast<float>(100 * seed) + static_cast<float>(i));
        }
    }
    void write(
        const std::filesystem::path& folder, std::uint64_t shard_size, durability mode = durability::process) const
    {
        sharded_writer writer(folder, specs, shard_size, {{"origin", "test"}}, mode);
        fill(writer);
        writer.commit();
    }
    /// Every tensor, the last one first.
    void fill(sharded_writer& writer) const
    {
        for (std::size_t i = specs.size(); i-- > 0;) { writer.write(i, 0, contents[i].data(), specs[i].bytes()); }
    }
    bool equals(const const_model_ref& model) const
    {
        if (model.size() != specs.size()) { return false; }
        for (std::size_t i = 0; i < specs.size(); ++i) {
            const auto* tensor = model.find(specs[i].name);
            if (!tensor || tensor->shape != specs[i].shape
                || std::memcmp(tensor->data, contents[i].data(), specs[i].bytes()) != 0) {
                return false;
            }
        }
        return true;
    }
};

/// body(0) … body(count - 1), on four threads.
template <class F>
void run_on_many(std::size_t count, F body)
{
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
        for (std::size_t i = 0; (i = next.fetch_add(1)) < count;) { body(i); }
    };
    std::vector<std::jthread> threads;
    for (int t = 0; t < 3; ++t) { threads.emplace_back(work); }
    work();
}

bool is_model(const std::filesystem::path& path, const sample& expected)
{
    const auto opened = open_model(path);
    return expected.equals(opened.model());
}

void write_one(const std::filesystem::path& path, const std::vector<std::string>& names)
{
    const float value = 1;
    const_model_ref model;
    for (const auto& name : names) { model.insert(name, {&value, dtype::f32, {1}, {}}); }
    write_safetensors(path, model, {}, durability::process);
}

} // namespace

TEST_CASE("a file and a directory with one file are the same model")
{
    const scratch folder;
    write_one(folder / "model.safetensors", {"b", "a"});
    const auto by_file = open_model(folder / "model.safetensors");
    const auto by_directory = open_model(folder.path());
    REQUIRE(by_file.model().size() == 2);
    CHECK(by_file.model()[0].name == "a");
    CHECK(by_directory.model().size() == 2);
    CHECK(by_directory.path() == folder.path());
    CHECK(by_directory.data_bytes() == 8);
    CHECK(by_directory.metadata().at("format") == "pt");
}

TEST_CASE("what is no model is an error that names it")
{
    const scratch folder;
    CHECK_THROWS_AS((void)open_model(folder / "missing"), io_error);
    CHECK_THROWS_AS((void)open_model(folder.path()), io_error);
    spill(folder / "text", "this is not a model");
    CHECK_THROWS_AS((void)open_model(folder / "text"), format_error);
}

TEST_CASE("models of every size go through shards of every size")
{
    const scratch folder;
    for (const std::size_t count : {0u, 1u, 2u, 13u}) {
        const sample model(count);
        for (const std::uint64_t size : {1u, 8u, 50u, 100u, 1'000'000u}) {
            const auto out = folder / (std::to_string(count) + "-" + std::to_string(size));
            model.write(out, size);
            const auto back = open_model(out);
            CHECK(model.equals(back.model()));
            CHECK(back.metadata().at("origin") == "test");
            for (const auto& file : back.files()) { CHECK((file.data_bytes() <= size || file.entries().size() == 1)); }
            if (back.files().size() > 1) {
                const auto json = nlohmann::json::parse(slurp(out / "model.safetensors.index.json"));
                CHECK(json["metadata"]["total_size"] == back.data_bytes());
                CHECK(json["weight_map"].size() == count);
            }
            else {
                CHECK(scratch::names_in(out) == std::set<std::string>{"model.safetensors"});
            }
        }
    }
    CHECK_THROWS_AS(sharded_writer(folder / "x", {}, 0), invalid_argument);
    CHECK_FALSE(std::filesystem::exists(folder / "x"));
}

TEST_CASE("shards have the usual names")
{
    const scratch folder;
    sample(3).write(folder / "m", 12);
    CHECK(scratch::names_in(folder / "m")
        == std::set<std::string>{
            "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"});
}

TEST_CASE("a directory is replaced by whatever is written to it, and keeps what is not a model's")
{
    const scratch folder;
    const sample first(9, 1), second(9, 2);
    const auto out = folder / "m";
    std::filesystem::create_directory(out);
    spill(out / "config.json", "{}");
    spill(out / "notes.safetensors", "mine");
    for (const std::uint64_t size : {20u, 20u, 30u, 1000u, 20u, 1000u, 1000u}) {
        for (const auto* model : {&first, &second}) {
#if defined(_WIN32)
            const std::unique_ptr<checkpoint> old; // what is mapped cannot be replaced there
#else
            const auto old = std::filesystem::exists(out / "model.safetensors")
                    || std::filesystem::exists(out / "model.safetensors.index.json")
                ? std::make_unique<checkpoint>(open_model(out))
                : nullptr;
#endif
            model->write(out, size);
            const auto back = open_model(out);
            CHECK(model->equals(back.model()));
            CHECK(slurp(out / "config.json") == "{}");
            CHECK(slurp(out / "notes.safetensors") == "mine");
            // Nothing of the earlier model is left.
            CHECK(scratch::names_in(out).size() == 2 + back.files().size() + (back.files().size() > 1));
            if (old) { CHECK(old->model().size() == 9); }
        }
    }
}

TEST_CASE("an index that names other files than a model's costs nobody those files")
{
    const scratch folder;
    const auto out = folder / "m";
    std::filesystem::create_directory(out);
    spill(out / "config.json", "{}");
    spill(out / "model.safetensors.index.json", R"({"weight_map":{"a":"config.json"}})");
    const sample model(3);
    model.write(out, 1000);
    CHECK(scratch::names_in(out) == std::set<std::string>{"config.json", "model.safetensors"});
    const auto back = open_model(out);
    CHECK(model.equals(back.model()));
}

TEST_CASE("a sharded writer that is dropped leaves no trace")
{
    const scratch folder;
    const sample model(5);
    {
        sharded_writer writer(folder / "m", model.specs, 8);
        writer.write(0, 0, model.contents[0].data(), 4);
        CHECK_FALSE(writer.temporaries().empty());
        CHECK_THROWS_AS(writer.commit(), invalid_argument); // incomplete
    }
    CHECK(folder.names().empty());
    CHECK_THROWS_AS(
        sharded_writer(folder / "m", {{"a", dtype::f32, {1}}, {"a", dtype::f32, {1}}}, 4), invalid_argument);
    CHECK(folder.names().empty());
}

TEST_CASE("shards whose index cannot take its name go again, and the earlier model stays")
{
    const scratch folder;
    const auto out = folder / "m";
    const sample first(9, 1), second(9, 2);
    first.write(out, 1000);
    {
        sharded_writer writer(out, second.specs, 20);
        second.fill(writer);
        std::filesystem::create_directory(out / "model.safetensors.index.json"); // no file takes this name
        CHECK_THROWS_AS(writer.commit(), io_error);
    }
    CHECK(scratch::names_in(out) == std::set<std::string>{"model.safetensors", "model.safetensors.index.json"});
    std::filesystem::remove(out / "model.safetensors.index.json");
    CHECK(is_model(out, first));
}

TEST_CASE("an earlier model that would be read instead of the new shards is an error where it stays")
{
    const scratch folder;
    const auto out = folder / "m";
    const sample first(9, 1), second(9, 2);
    first.write(out, 1000);
    sharded_writer writer(out, second.specs, 20);
    second.fill(writer);
    std::filesystem::remove(out / "model.safetensors");
    std::filesystem::create_directories(out / "model.safetensors/full"); // cannot be removed as a file can
    CHECK_THROWS_WITH_AS(writer.commit(), doctest::Contains("cannot be removed"), io_error);
    std::filesystem::remove_all(out / "model.safetensors");
    CHECK(is_model(out, second));
}

TEST_CASE("a second writer of a directory is an error, and changes nothing")
{
    const scratch folder;
    const auto out = folder / "m";
    const sample first(9, 1), second(9, 2);
    first.write(out, 20);
    {
        sharded_writer writer(out, second.specs, 20);
        CHECK_THROWS_WITH_AS(second.write(out, 20), doctest::Contains("written to by another process"), io_error);
    }
    CHECK(is_model(out, first));
    second.write(out, 20);
    CHECK(is_model(out, second));
}

TEST_CASE("shards that a killed writer left without an index are removed by the next one, and nothing else")
{
    const scratch folder;
    const auto out = folder / "m";
    const sample first(9, 1), second(9, 2);
    first.write(out, 20);
    const auto names = scratch::names_in(out);
    const std::string orphan = "model-00001-of-00007-2.safetensors", other = "model-00002-of-00009.safetensors";
    spill(out / orphan, "cut off");
    spill(out / other, "somebody's");
    spill(out / "notes.txt", "mine");
    spill(folder / "model-outside.safetensors", "mine");
    // As when it is killed between the shards' renames and the index's: it noted them in its lock.
    spill(out / ".taskvec-lock",
        orphan + "\n" + *names.begin() + "\nnotes.txt\n../model-outside.safetensors\nmodel-gone.safetensors\nmodel-");
    {
        const directory_lock lock(out);
        CHECK(orphan_shards(out, lock) == std::vector<std::string>{orphan, "model-gone.safetensors"});
        CHECK_THROWS_AS(directory_lock{out}, io_error);
    }
    spill(out / ".taskvec-lock", orphan + "\n");
    second.write(out, 20);
    const auto now = scratch::names_in(out);
    CHECK_FALSE(now.contains(orphan));
    CHECK(now.contains(other));
    CHECK(slurp(folder / "model-outside.safetensors") == "mine");
    CHECK_FALSE(now.contains(".taskvec-lock"));
    CHECK(is_model(out, second));
}

#if !defined(_WIN32)
TEST_CASE("more shards are written than files may be open")
{
    const scratch folder;
    const sample model(200);
    struct rlimit before{}, few{};
    REQUIRE(::getrlimit(RLIMIT_NOFILE, &before) == 0);
    few = before;
    few.rlim_cur = 30;
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &few) == 0);
    {
        sharded_writer writer(folder / "m", model.specs, 4);
        run_on_many(model.specs.size(), [&](std::size_t i) {
            const auto half = model.specs[i].bytes() / 8 * 4; // the first and the last bytes, and some twice opened
            const auto* bytes = reinterpret_cast<const std::byte*>(model.contents[i].data());
            writer.write(i, half, bytes + half, model.specs[i].bytes() - half);
            writer.write(i, 0, bytes, half);
        });
        writer.commit();
    }
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &before) == 0);
    CHECK(is_model(folder / "m", model));
}
#endif

TEST_CASE("shards that are whole may be written again, and the last bytes count")
{
    const scratch folder;
    const sample wrong(20, 2), right(20, 1);
    {
        sharded_writer writer(folder / "m", right.specs, 4);
        wrong.fill(writer);
        run_on_many(right.specs.size(), [&](std::size_t i) {
            const auto half = right.specs[i].bytes() / 8 * 4;
            const auto* bytes = reinterpret_cast<const std::byte*>(right.contents[i].data());
            writer.write(i, half, bytes + half, right.specs[i].bytes() - half);
            writer.write(i, 0, bytes, half);
        });
        writer.commit();
    }
    CHECK(is_model(folder / "m", right));
}

TEST_CASE("diffusers' names are written too, and of two models in a directory the new one is opened")
{
    const scratch folder;
    const auto out = folder / "m";
    const sample first(9, 1), second(9, 2);
    const auto write = [&](const sample& model, std::uint64_t size, std::string_view stem) {
        sharded_writer writer(out, model.specs, size, {}, durability::process, existing_directory::fill, {}, stem);
        model.fill(writer);
        writer.commit();
        CHECK(is_model(out, model));
    };
    const std::string single = "diffusion_pytorch_model.safetensors";
    write(first, 1000, model_stems[1]);
    CHECK(std::filesystem::exists(out / single));
    write(second, 40, model_stems[1]);
    CHECK_FALSE(std::filesystem::exists(out / single));
    CHECK(std::filesystem::exists(out / (single + ".index.json")));
    CHECK(std::filesystem::exists(out / "diffusion_pytorch_model-00001-of-00006.safetensors"));
    write(first, 40, model_stems[0]);
    CHECK_FALSE(std::filesystem::exists(out / (single + ".index.json")));
    write(second, 1000, model_stems[1]); // what would be opened before it goes
    CHECK_FALSE(std::filesystem::exists(out / index_file_name));
    write(first, 1000, model_stems[0]);
    write(second, 40, model_stems[1]);
    CHECK_FALSE(std::filesystem::exists(out / single_file_name));
}

TEST_CASE("finished shards outlive their writer, and a checkpoint takes them")
{
    const scratch folder;
    const sample model(9);
    constexpr std::uint64_t size = 40;
    std::filesystem::create_directory(folder / "work");
    sharded_writer plain(folder / "plain", model.specs, size);
    model.fill(plain);
    plain.commit();
    const auto write = [&](resumable_shards& to, std::size_t i) {
        to.write(i, 0, model.contents[i].data(), model.specs[i].bytes());
    };
    {
        resumable_shards first(folder / "work", model.specs, size);
        CHECK(first.found() == 0);
        for (const std::size_t i : {8, 7, 0, 1, 2}) { write(first, i); }
        CHECK_THROWS_AS((void)first.finish(), invalid_argument);
    }
    resumable_shards second(folder / "work", model.specs, size);
    CHECK(second.found() > 0);
    CHECK(second.found() < second.count());
    CHECK_FALSE(second.wants(8));
    CHECK_FALSE(second.rewritable());
    for (std::size_t i = 0; i < model.specs.size(); ++i) { write(second, i); } // what is not wanted is let go
    {
        sharded_writer out(
            folder / "m", model.specs, size, {}, durability::synchronised, existing_directory::fill, second.finish());
        out.commit();
    }
    CHECK(is_model(folder / "m", model));
    for (const auto& entry : std::filesystem::directory_iterator(folder / "plain")) {
        CHECK(slurp(entry.path()) == slurp(folder / "m" / entry.path().filename()));
    }
    const sample other(9, 1);
    auto specs = other.specs;
    specs[8].shape = {4};
    CHECK_THROWS_AS(resumable_shards(folder / "work", specs, size), format_error);
}

#if !defined(_WIN32)
TEST_CASE("a sharded writer that is killed leaves the old model or the new")
{
    const scratch folder;
    const auto out = folder / "m";
    const sample first(9, 1), second(9, 2);
    first.write(out, 20);
    for (int delay = 0; delay < 30; ++delay) {
        const pid_t child = ::fork();
        if (child == 0) {
            try {
                for (int i = 0;; ++i) { (i % 2 ? first : second).write(out, i % 3 ? 20 : 1000); }
            }
            catch (...) {
            }
            ::_exit(1);
        }
        ::usleep(static_cast<useconds_t>(200 * delay));
        ::kill(child, SIGKILL);
        int status = 0;
        ::waitpid(child, &status, 0);
        CHECK(WIFSIGNALED(status));
        const auto back = open_model(out);
        CHECK((first.equals(back.model()) || second.equals(back.model())));
    }
}
#endif

TEST_CASE("names of shards and indexes are told from what looks like them")
{
    const auto parts = parse_shard_name("a-b-00002-of-00003-2.safetensors");
    REQUIRE(parts);
    CHECK(parts->stem == "a-b");
    CHECK(parts->rest == "-2.safetensors");
    CHECK(parts->number == 2);
    CHECK(parts->count == 3);
    CHECK(parse_shard_name("-00001-of-00001.bin", ".bin")->stem.empty());
    for (const char* name : {"model.safetensors", "model-1-of-2.safetensors", "model-00000-of-00002.safetensors",
             "model-00003-of-00002.safetensors", "model-0000x-of-00002.safetensors", "model-00001-of-0000/.safetensors",
             "model-00001-of-00002.bin", "model-00001-or-00002.safetensors", "model-00001-of-0002.safetensors", ""}) {
        CAPTURE(name);
        CHECK_FALSE(parse_shard_name(name));
    }
    CHECK(is_index_name("m.safetensors.index.json"));
    CHECK(is_index_name("m.safetensors.index.fp16.json"));
    CHECK(is_pytorch_index_name("m.bin.index.json"));
    for (const char* name : {".safetensors.index.json", "m.safetensors.index.txt", "m.safetensors", "m.json"}) {
        CAPTURE(name);
        CHECK_FALSE(is_index_name(name));
    }
    for (const char* name : {".bin.index.json", "m.bin.index.txt", "m.bin", "m.json"}) {
        CAPTURE(name);
        CHECK_FALSE(is_pytorch_index_name(name));
    }
}

TEST_CASE("a directory in which several models may be meant says which, and opens none")
{
    const auto says = [](const std::vector<std::string>& names, const std::string& words,
                          const std::string& content = {}) {
        const scratch folder;
        for (const auto& name : names) {
            std::filesystem::create_directories((folder / name).parent_path());
            if (name.ends_with(".safetensors")) { write_one(folder / name, {name}); }
            else {
                spill(folder / name, content);
            }
        }
        CAPTURE(words);
        CHECK_THROWS_WITH_AS((void)open_model(folder.path()), doctest::Contains(words.c_str()), io_error);
    };
    says({"a.safetensors.index.json", "b.safetensors.index.json"},
        "several indexes ('a.safetensors.index.json', 'b.safetensors.index.json')", "{}");
    says({"a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "b.safetensors"}, "several files");
    says({"a-00001-of-00001.safetensors", "b-00001-of-00001.safetensors"}, "several files");
    says({"a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors", "e.safetensors", "f.safetensors"},
        "'d.safetensors' and 2 more): name the file");
    says({"a-00001-of-00001.bin", "b-00001-of-00001.bin"}, "several of PyTorch's");
    // What PyTorch's weights may be called, and what is none.
    says({"m.bin"}, "'m.bin': the weights lie in files of another format"); // of no byte
    says({"m.bin"}, "'m.bin': the weights lie in files of another format", "\xc1\x01\x02");
    says({"m.bin"}, "'m.bin': that is a text ('words')", "words");
    says({"part/m.safetensors.index.json", "other/readme"}, "but its folders do ('part')", "{}");

    const scratch folder; // one shard of one is a whole model, and nothing is said
    write_one(folder / "m-00001-of-00001.safetensors", {"a"});
    const auto only = open_model(folder / "m-00001-of-00001.safetensors");
    CHECK(only.notes().empty());
    CHECK(tensors(folder.path()) == 1);
}

TEST_CASE("a write beyond the tensors is refused, and what was noted is a model's shard or nothing")
{
    const scratch folder;
    const sample small(3);
    sharded_writer writer(folder / "out", small.specs, 1 << 20, {}, durability::process);
    CHECK_THROWS_WITH_AS(writer.write(3, 0, small.contents[0].data(), 4), "a write to tensor 3 of 3", invalid_argument);
    CHECK(writer.temporaries().size() >= 2); // the directory and the file; no index
    directory_lock lock(folder.path());
    lock.note("model-1.bin\nmodel-a/b.safetensors\nother-00001-of-00002.safetensors\nmodel-00001-of-00002.safetensors\n"
              "model-00002-of-00002.safetensors");
    CHECK(orphan_shards(folder.path(), lock) == std::vector<std::string>{"model-00001-of-00002.safetensors"});
}

TEST_CASE("shards without bytes are whole at once, and empty tensors may come last")
{
    const scratch folder;
    const std::vector<tensor_spec> nothing{{"a", dtype::f32, {0}}, {"b", dtype::f32, {3, 0}}};
    {
        const resumable_shards out(folder.path(), nothing, 1 << 20, {}, durability::process);
        CHECK(out.finish().size() == 1);
    }
    CHECK(resumable_shards(folder.path(), nothing, 1 << 20, {}, durability::process).found() == 1);
    const scratch other;
    const std::vector<tensor_spec> some{{"a", dtype::f32, {2}}, {"b", dtype::f32, {0}}};
    resumable_shards out(other.path(), some, 1 << 20, {}, durability::process);
    const float values[] = {1, 2};
    out.write(0, 0, values, 4);
    CHECK_THROWS_WITH_AS(
        (void)out.finish(), doctest::Contains("is incomplete: 4 bytes were not written"), invalid_argument);
    out.write(0, 4, values + 1, 4);
    out.write(1, 0, values, 0);
    const auto made = out.finish();
    REQUIRE(made.size() == 1);
    const auto back = open_model(made[0]);
    CHECK(back.model().size() == 2);
    CHECK(std::memcmp(back.model().find("a")->data, values, 8) == 0);
}

TEST_CASE("shards that are forced to disk replace those of before")
{
    const scratch folder;
    std::filesystem::create_directory(folder / "out");
    for (const int seed : {1, 2}) {
        const sample made(6, seed);
        made.write(folder / "out", 20, durability::synchronised);
        CHECK(is_model(folder / "out", made));
    }
}

TEST_CASE("an index is an allowlist")
{
    const scratch folder;
    const auto index = [&](const std::string& text) { spill(folder / "model.safetensors.index.json", text); };
    write_one(folder / "x.safetensors", {"a", "b"});
    write_one(folder / "y.safetensors", {"c"});
    index(
        R"({"metadata":{"total_size":12},"weight_map":{"a":"x.safetensors","b":"x.safetensors","c":"y.safetensors"}})");
    CHECK(tensors(folder.path()) == 3);
    index(R"({"weight_map":{"a":"x.safetensors","b":"x.safetensors"}})"); // y is not asked for
    CHECK(tensors(folder.path()) == 2);
    index(R"({"weight_map":{}})");
    CHECK(tensors(folder.path()) == 0);

    const auto refused = [&](const std::string& text) {
        index(text);
        CAPTURE(text);
        CHECK_THROWS_AS((void)open_model(folder.path()), format_error);
    };
    refused(R"({"weight_map":{"a":"x.safetensors"}})"); // x holds b, unlisted
    refused(R"({"weight_map":{"a":"x.safetensors","b":"x.safetensors","d":"x.safetensors"}})"); // x lacks d
    refused(R"({"weight_map":{"a":"x.safetensors","b":"y.safetensors","c":"y.safetensors"}})"); // b is elsewhere
    refused(R"({"weight_map":{"a":"x.safetensors","a":"x.safetensors","b":"x.safetensors"}})");
    refused(R"({"weight_map":{"a":1}})");
    refused(R"({"weight_map":["x.safetensors"]})");
    refused(R"({"metadata":{}})");
    refused(R"([])");
    refused(R"({"weight_map":{"a":"x.safetensors")");
    refused("");
    for (const char* name : {"../x.safetensors", "/x.safetensors", "./x.safetensors", "sub/x.safetensors", "..", ".",
             "", "a..b", "sub\\\\x.safetensors", "x\\u0000"}) {
        refused("{\"weight_map\":{\"a\":\"" + std::string(name) + "\"}}");
    }
    index(R"({"weight_map":{"a":"missing.safetensors"}})");
    CHECK_THROWS_AS((void)open_model(folder.path()), io_error);
    // The same tensor twice cannot pass, not even under two names of one file.
    std::filesystem::copy(folder / "x.safetensors", folder / "z.safetensors");
    refused(R"({"weight_map":{"a":"x.safetensors","b":"z.safetensors"}})");
}

TEST_CASE("an output directory whose index cannot be read is refused before anything is written")
{
    const scratch folder;
    std::filesystem::create_directory(folder / "m");
    spill(folder / "m/model.safetensors.index.json", "{");
    const sample model(3);
    CHECK_THROWS_AS(sharded_writer(folder / "m", model.specs, 8), format_error);
    CHECK(scratch::names_in(folder / "m").size() == 1);
}

TEST_CASE("an index of any stem is found, by its directory and by its path")
{
    for (const std::string stem : {"model", "diffusion_pytorch_model", "unet", "diffusion_pytorch_model.fp16"}) {
        const scratch folder;
        write_one(folder / (stem + "-00001-of-00002.safetensors"), {"a"});
        write_one(folder / (stem + "-00002-of-00002.safetensors"), {"b"});
        const auto index = folder / (stem + ".safetensors.index.json");
        spill(index,
            R"({"weight_map": {"a": ")" + stem + R"(-00001-of-00002.safetensors", "b": ")" + stem
                + R"(-00002-of-00002.safetensors"}})");
        CHECK(tensors(folder.path()) == 2);
        CHECK(tensors(index) == 2);
        std::filesystem::remove(index);
        {
            const auto without = open_model(folder.path());
            CHECK(without.model().size() == 2);
            REQUIRE(without.notes().size() == 1);
            CHECK(without.notes()[0].find("holds no index: all 2 shards are taken") != std::string::npos);
            const auto one = open_model(folder / (stem + "-00002-of-00002.safetensors"));
            CHECK(one.model().size() == 1);
            REQUIRE(one.notes().size() == 1);
            CHECK(one.notes()[0].find("is shard 2 of 2") != std::string::npos);
        }
        std::filesystem::remove(folder / (stem + "-00001-of-00002.safetensors"));
        CHECK_THROWS_WITH_AS((void)open_model(folder.path()), doctest::Contains("holds 1 of 2 shards"), io_error);
    }
}

#if !defined(_WIN32)
TEST_CASE("a directory that may not be read says so")
{
    const scratch folder;
    std::filesystem::create_directory(folder / "closed");
    std::filesystem::permissions(folder / "closed", std::filesystem::perms::none);
    std::filesystem::permissions(folder.path(), std::filesystem::perms::all);
    const bool root = ::geteuid() == 0; // who may read everything
    if (root) { REQUIRE(::seteuid(65534) == 0); }
    CHECK_THROWS_WITH_AS(
        (void)open_model(folder / "closed"), doctest::Contains("cannot be read as a directory"), io_error);
    if (root) { REQUIRE(::seteuid(0) == 0); }
    std::filesystem::permissions(folder / "closed", std::filesystem::perms::owner_all);
}
#endif

TEST_CASE("an index is strict, unless it is read leniently: then notes say what differs")
{
    const scratch folder;
    write_one(folder / "s1.safetensors", {"a", "extra", "b"});
    write_one(folder / "s2.safetensors", {"b"});
    spill(folder / "model.safetensors.index.json",
        R"({"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s2.safetensors", "d": "s3.safetensors"}})");
    CHECK_THROWS_AS((void)open_model(folder.path()), error);
    const auto model = open_model(folder.path(), index_check::lenient);
    CHECK(model.model().size() == 3);
    CHECK(model.model().find("extra") != nullptr);
    CHECK(model.model().find("b")->data == model.files()[1].tensor(model.files()[1].entries()[0]).data);
    CHECK(model.data_bytes() == 12);
    CHECK(model.notes().size() == 4); // extra, b's second place, c, and the shard of d
}

TEST_CASE("a shard of the set that its index does not list")
{
    const scratch folder;
    write_one(folder / "model-00001-of-00002.safetensors", {"a"});
    write_one(folder / "model-00002-of-00002.safetensors", {"b", "c"});
    spill(folder / "model.safetensors.index.json", R"({"weight_map": {"a": "model-00001-of-00002.safetensors"}})");
    CHECK_THROWS_WITH_AS((void)open_model(folder.path()),
        doctest::Contains("does not list the shard 'model-00002-of-00002.safetensors' of the same set"), format_error);
    const auto model = open_model(folder.path(), index_check::lenient);
    CHECK(model.model().size() == 3);
    REQUIRE(model.notes().size() == 1);
    CHECK(model.notes()[0].find("'model-00002-of-00002.safetensors'") != std::string::npos);
    // Shards of other sets: another count, another variant, another generation, another name.
    std::filesystem::rename(folder / "model-00002-of-00002.safetensors", folder / "model-00002-of-00003.safetensors");
    CHECK(tensors(folder.path()) == 1);
    for (const std::string other : {"model-00002-of-00002.fp16.safetensors", "model-00002-of-00002-2.safetensors",
             "other-00002-of-00002.safetensors"}) {
        write_one(folder / other, {"b"});
        CHECK(tensors(folder.path()) == 1);
    }
}

TEST_CASE("the only file of a directory is its model; deltas and adapters are none")
{
    const scratch folder;
    write_one(folder / "merged.safetensors", {"a"});
    write_one(folder / "math.delta.safetensors", {"b", "c"});
    write_one(folder / "adapter_model.safetensors", {"b", "c"});
    CHECK(tensors(folder.path()) == 1);
    write_one(folder / "diffusion_pytorch_model.safetensors", {"x", "y"});
    CHECK(tensors(folder.path()) == 2); // a usual name comes first
}

#if defined(_WIN32)
TEST_CASE("what is of POSIX alone")
{
    testing::skip("more shards than files may be open, killed writers, and directories that may not be read: Windows "
                  "has no setrlimit, fork or modes");
}
#endif
