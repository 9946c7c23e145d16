// Deltas: round trips, the promises of the format, and files that break them.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/delta.hpp>
#include <taskvec/reuse/post_pruning.hpp>
#include <taskvec/reuse/sparse_addition.hpp>

#include "scratch.hpp"

#include <doctest/doctest.h>

#include <random>

using namespace taskvec;

namespace {

template <class A>
sparse_vector<A> random_sparse(std::mt19937& random, extents shape, double density)
{
    sparse_vector<A> result{std::move(shape), {}, {}};
    const auto size = element_count(result.shape);
    for (std::uint64_t i = 0; i < size; ++i) {
        if (std::uniform_real_distribution<double>()(random) < density) {
            result.indices.push_back(i);
            result.values.push_back(static_cast<A>(std::normal_distribution<double>()(random)));
        }
    }
    return result;
}

/// A delta file with these tensors, as a hostile or careless writer would make it.
struct raw {
    std::vector<std::int64_t> shape{2, 8};
    std::vector<float> values{1, 2};
    std::vector<std::int32_t> indices{3, 15};
    std::vector<std::uint8_t> mask{0x08, 0x80};
    bool with_indices = true, with_mask = false, with_shape = true, with_values = true;
    dtype values_type = dtype::f32, indices_type = dtype::i32, mask_type = dtype::u8, shape_type = dtype::i64;
    metadata_map metadata{
        {"schema", "taskvec.delta.1"}, {"additive", "true"}, {"fingerprint", "xxh64:0000000000000007"}};
    const_model_ref extra{};

    void write(const std::filesystem::path& path) const
    {
        const_model_ref model = extra;
        const auto count = [](const auto& v) { return extents{static_cast<std::int64_t>(v.size())}; };
        if (with_shape) { model.insert("w.shape", {shape.data(), shape_type, count(shape), {}}); }
        if (with_values) { model.insert("w.values", {values.data(), values_type, count(values), {}}); }
        if (with_indices) { model.insert("w.indices", {indices.data(), indices_type, count(indices), {}}); }
        if (with_mask) { model.insert("w.bitmask", {mask.data(), mask_type, count(mask), {}}); }
        write_safetensors(path, model, metadata, durability::process);
    }
};

} // namespace

TEST_CASE("deltas come back as they were, sparse ones as indices and dense ones as bits")
{
    const scratch folder;
    std::mt19937 random(5);
    for (const double density : {0.0, 0.01, 1.0 / 32, 0.1, 0.5, 1.0}) {
        delta content{.tensors = {}, .base_fingerprint = 0xfedcba9876543210, .metadata = {{"note", "x"}}};
        content.tensors["w"] = random_sparse<float>(random, {17, 31}, density);
        content.tensors["d"] = random_sparse<double>(random, {513}, density);
        content.tensors["scalar"] = random_sparse<float>(random, {}, density);
        content.tensors["empty"] = random_sparse<float>(random, {0, 3}, density);
        content.tensors["w.values"] = random_sparse<float>(random, {3, 3, 3}, density); // a name that ends like a role
        content.tensors["w.shape"] = random_sparse<float>(random, {9}, density);
        write_delta(folder / "f", content, durability::process);
        const auto back = read_delta(folder / "f");
        CHECK(back.tensors == content.tensors);
        CHECK(back.base_fingerprint == content.base_fingerprint);
        CHECK(back.metadata.at("note") == "x");
        CHECK(kept_entries(back.tensors) == kept_entries(content.tensors));
        const safetensors_file file(folder / "f");
        CHECK(file.metadata().at("schema") == "taskvec.delta.1");
        CHECK(file.metadata().at("additive") == "true");
        CHECK(file.metadata().at("fingerprint") == "xxh64:fedcba9876543210");
        const auto model = file.model();
        for (const auto& [name, tensor] : content.tensors) {
            const auto kept = std::visit([](const auto& s) { return s.kept(); }, tensor);
            const auto size = std::visit([](const auto& s) { return element_count(s.shape); }, tensor);
            CHECK((model.find(name + ".bitmask") != nullptr) == (32 * kept > size - size % 32));
            CHECK((model.find(name + ".indices") != nullptr) == (model.find(name + ".bitmask") == nullptr));
        }
    }
}

TEST_CASE("pruning streams into a file what it collects in memory")
{
    const scratch folder;
    std::mt19937 random(3);
    std::vector<std::uint16_t> stored(50'000), tuned(50'000);
    std::vector<double> wide(1000), wide_tuned(1000);
    for (std::size_t i = 0; i < stored.size(); ++i) {
        stored[i] = f32_to_bf16(std::normal_distribution<float>()(random));
        tuned[i] = f32_to_bf16(bf16_to_f32(stored[i]) + std::normal_distribution<float>(0, 0.1f)(random));
    }
    for (std::size_t i = 0; i < wide.size(); ++i) {
        wide_tuned[i] =
            (wide[i] = std::normal_distribution<double>()(random)) + std::normal_distribution<double>(0, 0.1)(random);
    }
    const const_model_ref base{
        {"b", {stored.data(), dtype::bf16, {100, 500}, {}}}, {"w", {wide.data(), dtype::f64, {1000}, {}}}};
    const const_model_ref task{
        {"b", {tuned.data(), dtype::bf16, {100, 500}, {}}}, {"w", {wide_tuned.data(), dtype::f64, {1000}, {}}}};
    for (const double density : {0.001, 0.02, 0.03125, 0.1, 1.0}) {
        for (const auto over : {scope::model, scope::tensor}) {
            const auto expected = post_pruning(cpu{}, {density, over}, base, task);
            delta_writer writer(folder / "f", 9, {{"note", "x"}}, durability::process);
            model_options how;
            how.chunk = 640;
            post_pruning(cpu{.threads = 3}, {density, over}, aligned_models(&base, {&task, 1}, how), writer);
            writer.commit();
            const auto back = read_delta(folder / "f");
            CHECK(back.tensors == expected);
            // Added from the file it gives the bits that it gives from memory, whatever the blocks and threads.
            const delta_file file(folder / "f");
            std::vector<std::uint16_t> from_memory(stored.size()), from_file(stored.size());
            std::vector<double> wide_from_memory(wide.size()), wide_from_file(wide.size());
            const auto out = [](auto& b, auto& w) {
                return model_ref{
                    {"b", {b.data(), dtype::bf16, {100, 500}, {}}}, {"w", {w.data(), dtype::f64, {1000}, {}}}};
            };
            merge(cpu{}, sparse_addition_options{views(expected), -0.7}, base, {&base, 1},
                out(from_memory, wide_from_memory));
            merge(cpu{.threads = 3}, sparse_addition_options{file.parts(), -0.7}, base, {&base, 1},
                out(from_file, wide_from_file), how);
            CHECK(from_memory == from_file);
            CHECK(wide_from_memory == wide_from_file);
            CHECK(file.kept() == kept_entries(expected));
            CHECK(back.base_fingerprint == 9);
            CHECK(back.metadata.at("note") == "x");
        }
    }
}

TEST_CASE("a writer of deltas refuses what was not begun, or was begun otherwise")
{
    const scratch folder;
    delta_writer writer(folder / "f", 1, {}, durability::process);
    CHECK(writer.temporary().empty());
    CHECK(writer.file_size() == 0);
    CHECK_THROWS_WITH_AS(writer.commit(), doctest::Contains("no delta was begun"), invalid_argument);
    CHECK_THROWS_WITH_AS(
        writer.begin({{"w", {2, 3}, 7, false}}), "delta of tensor 'w' keeps 7 of 6 entries", invalid_argument);
    CHECK(folder.names().empty());
    delta_writer other(folder / "f", 1, {}, durability::process);
    other.begin({{"w", {64, 64}, 1, false}});
    CHECK(other.temporary().filename().string().starts_with(".taskvec-"));
    const std::uint64_t index = 3;
    const double wide = 1;
    const float narrow = 1;
    CHECK_THROWS_WITH_AS(other.write(0, 0, 0, 4096, &index, &wide, 1),
        "delta of tensor 'w' was begun with other values", invalid_argument);
    other.write(0, 0, 0, 4096, &index, &narrow, 1);
    other.commit();
    CHECK(read_delta(folder / "f").tensors == sparse_model{{"w", sparse_vector<float>{{64, 64}, {3}, {1}}}});
}

TEST_CASE("parts of a delta of another rank than theirs are refused by name")
{
    const scratch folder;
    const std::int64_t shape[2] = {2, 2};
    const std::int32_t index[2] = {0, 1};
    const float value[2] = {1, 2};
    const std::uint8_t bits[2] = {3, 0};
    const auto refused = [&](const char* part, extents sides, bool bitmask, const char* words) {
        const_model_ref model;
        const auto add = [&](const char* name, const void* data, dtype type, extents usual) {
            model.insert(std::string("w.") + name, {data, type, part == std::string(name) ? sides : usual, {}});
        };
        add("values", value, dtype::f32, {2});
        add("shape", shape, dtype::i64, {2});
        if (bitmask) { add("bitmask", bits, dtype::u8, {1}); }
        else {
            add("indices", index, dtype::i32, {2});
        }
        write_safetensors(folder / "f", model,
            {{"schema", "taskvec.delta.1"}, {"additive", "true"}, {"fingerprint", "xxh64:0000000000000001"}},
            durability::process);
        CHECK_THROWS_WITH_AS(delta_file(folder / "f"), doctest::Contains(words), format_error);
    };
    refused("values", {2, 1}, false, "delta of tensor 'w' has values of rank 2; expected 1");
    refused("shape", {2, 1}, false, "has a shape of dtype I64 and rank 2; expected I64 of rank 1");
    refused("indices", {1, 2}, false, "has indices of dtype I32 and rank 2; expected I32 or I64 of rank 1");
    refused("bitmask", {1, 1}, true, "has a bitmask of dtype U8 and rank 2; expected U8 of rank 1");
}

TEST_CASE("a delta in a file that does not fit the base is refused")
{
    const scratch folder;
    const std::vector<float> values(6);
    std::vector<float> out(6);
    const auto refused = [&](const sparse_model& content) {
        write_delta(folder / "f", {.tensors = content});
        const delta_file file(folder / "f");
        const const_model_ref base{{"w", as_tensor(as_view(values), {2, 3})}};
        CHECK_THROWS_AS(merge(cpu{}, sparse_addition_options{file.parts()}, base, {&base, 1},
                            model_ref{{"w", as_tensor(as_view(out), {2, 3})}}),
            error);
    };
    refused({{"w", sparse_vector<float>{{3, 2}, {1}, {1}}}});
    refused({{"v", sparse_vector<float>{{2, 3}, {1}, {1}}}});
    refused({{"w", sparse_vector<double>{{2, 3}, {1}, {1}}}});
}

TEST_CASE("a mapped delta is applied in place and undone as it lies, indices or bits")
{
    const scratch folder;
    std::mt19937 random(8);
    for (const double density : {0.01, 0.2}) {
        const delta content{.tensors = {{"w", random_sparse<float>(random, {300, 500}, density)},
                                {"x", random_sparse<double>(random, {70'001}, density)}}};
        write_delta(folder / "f", content, durability::process);
        const delta_file file(folder / "f");
        CHECK((file.parts()[0].bitmask != nullptr) == (density > 0.1));
        std::vector<float> base(150'000, 1.0f);
        std::vector<double> wide(70'001, -3.0);
        auto expected = base, live = base;
        auto wide_expected = wide, wide_live = wide;
        const auto model = [](auto& w, auto& x) {
            return model_ref{{"w", as_tensor(as_view(w), {300, 500})}, {"x", as_tensor(as_view(x), {70'001})}};
        };
        (void)apply(cpu{}, content.tensors, model(expected, wide_expected), 0.3);
        std::vector<std::uint64_t> memory(saved_bytes(file.parts(), model(live, wide_live)) / 8);
        const auto bytes = std::as_writable_bytes(std::span(memory));
        apply(cpu{.threads = 3}, file.parts(), model(live, wide_live), bytes, 0.3);
        CHECK(live == expected);
        CHECK(wide_live == wide_expected);
        CHECK(live != base);
        undo(cpu{.threads = 2}, file.parts(), bytes, model(live, wide_live));
        CHECK(live == base);
        CHECK(wide_live == wide);
        CHECK_THROWS_WITH_AS(apply(cpu{}, file.parts(), model(live, wide_live), bytes.first(bytes.size() - 8)),
            message("the saved words of this delta take ", bytes.size(), " bytes (see saved_bytes()), not ",
                bytes.size() - 8, ": they do not belong to it")
                .c_str(),
            invalid_argument);
        CHECK_THROWS_AS((void)apply(cpu{}, file.parts(), model(wide_live, live)), error);
        CHECK(live == base);
    }
}

TEST_CASE("a tensor of 2^31 elements has wide indices")
{
    const scratch folder;
    const delta content{.tensors = {{"w", sparse_vector<float>{{1 << 16, 1 << 16}, {0, 4'294'967'295}, {1, 2}}},
                            {"v", sparse_vector<float>{{(1ll << 31) - 1}, {2'147'483'646}, {3}}}}};
    if constexpr (sizeof(std::size_t) < 8) {
        CHECK_THROWS_AS(write_delta(folder / "f", content), shape_mismatch);
        return;
    }
    write_delta(folder / "f", content);
    const safetensors_file file(folder / "f");
    const auto model = file.model();
    CHECK(model.find("w.indices")->dtype == dtype::i64);
    CHECK(model.find("v.indices")->dtype == dtype::i32);
    CHECK(read_delta(folder / "f").tensors == content.tensors);
}

TEST_CASE("a sparse vector that breaks its promises is not written")
{
    const scratch folder;
    for (const auto& bad : {sparse_vector<float>{{4}, {0, 1}, {1}}, sparse_vector<float>{{4}, {4}, {1}},
             sparse_vector<float>{{4}, {1, 1}, {1, 2}}, sparse_vector<float>{{4}, {2, 1}, {1, 2}},
             sparse_vector<float>{{-4}, {}, {}}}) {
        CHECK_THROWS_AS(write_delta(folder / "f", {.tensors = {{"w", bad}}}), error);
        CHECK(folder.names().empty());
    }
}

TEST_CASE("files that break the format's promises are refused")
{
    const scratch folder;
    raw{}.write(folder / "f");
    CHECK(std::get<sparse_vector<float>>(read_delta(folder / "f").tensors.at("w"))
        == sparse_vector<float>{{2, 8}, {3, 15}, {1, 2}});
    raw{.with_indices = false, .with_mask = true}.write(folder / "f");
    CHECK(std::get<sparse_vector<float>>(read_delta(folder / "f").tensors.at("w"))
        == sparse_vector<float>{{2, 8}, {3, 15}, {1, 2}});

    const auto refused = [&](const raw& content, const char* part) {
        content.write(folder / "f");
        try {
            (void)read_delta(folder / "f");
            FAIL("accepted; expected an error with: ", part);
        }
        catch (const format_error& failure) {
            CAPTURE(failure.what());
            CHECK(std::string(failure.what()).find(part) != std::string::npos);
        }
    };
    refused({.indices = {15, 3}}, "must ascend");
    refused({.indices = {3, 3}}, "must ascend");
    refused({.indices = {3, 16}}, "the tensor has 16 elements");
    refused({.indices = {-1, 3}}, "index -1");
    refused({.indices = {3}}, "1 indices for 2 values");
    refused({.values = {1}}, "2 indices for 1 values");
    refused({.with_mask = true}, "both indices and a bitmask");
    refused({.with_indices = false}, "neither");
    refused({.with_values = false}, "no 'w.values'");
    refused({.with_shape = false}, "belongs to no delta tensor");
    refused({.values_type = dtype::i32}, "expected F32 or F64");
    refused({.indices_type = dtype::u32}, "expected I32 or I64");
    refused({.shape_type = dtype::u64}, "expected I64");
    refused({.shape = {2, -8}}, "negative extent");
    refused({.shape = {1ll << 62, 4}}, "has a shape of more than");
    refused({.shape = {0, 8}}, "the tensor has 0 elements");
    refused({.mask = {0x08}, .with_indices = false, .with_mask = true}, "bitmask of 1 bytes");
    refused({.mask = {0x08, 0x80, 0}, .with_indices = false, .with_mask = true}, "bitmask of 3 bytes");
    refused({.mask = {0x08, 0x81}, .with_indices = false, .with_mask = true}, "3 bits set for 2 values");
    refused({.shape = {15}, .with_indices = false, .with_mask = true}, "beyond its last element");
    refused({.with_indices = false, .with_mask = true, .mask_type = dtype::i8}, "expected U8");
    refused({.metadata = {}}, "is not a delta");
    refused(
        {.metadata = {{"schema", "taskvec.delta.9"}, {"additive", "true"}, {"fingerprint", "xxh64:0000000000000007"}}},
        "taskvec.delta.9");
    refused(
        {.metadata = {{"schema", "taskvec.delta.1"}, {"additive", "false"}, {"fingerprint", "xxh64:0000000000000007"}}},
        "additive");
    refused({.metadata = {{"schema", "taskvec.delta.1"}, {"additive", "true"}, {"fingerprint", "7"}}}, "fingerprint");
    const float stray = 0;
    refused({.extra = {{"stray", {&stray, dtype::f32, {1}, {}}}}}, "'stray'");
    refused({.extra = {{"v.indices", {&stray, dtype::i32, {1}, {}}}}}, "'v.indices'");
    CHECK_THROWS_AS((void)read_delta(folder / "missing"), io_error);
}

TEST_CASE("delta files damaged at random are read or refused, never more")
{
    const scratch folder;
    std::mt19937 random(17);
    delta content;
    content.tensors["a"] = random_sparse<float>(random, {100}, 0.02);
    content.tensors["b"] = random_sparse<double>(random, {3, 7}, 0.5);
    write_delta(folder / "f", content, durability::process);
    const auto good = slurp(folder / "f");
    int parsed = 0;
    for (int round = 0; round < 3000; ++round) {
        auto bytes = good;
        const std::size_t header =
            8 + static_cast<unsigned char>(bytes[0]) + 256u * static_cast<unsigned char>(bytes[1]);
        for (auto edits = 1 + random() % 3; edits > 0; --edits) {
            const auto at = random() % 2 ? header + random() % (bytes.size() - header) : random() % bytes.size();
            bytes[at] = static_cast<char>(random() % 2 ? random() : bytes[at] ^ (1 << random() % 8));
        }
        spill(folder / "f", bytes);
        try {
            const auto back = read_delta(folder / "f");
            for (const auto& [name, tensor] : back.tensors) {
                std::visit([&name = name](const auto& sparse) { CHECK_NOTHROW(check_sparse(sparse, name)); }, tensor);
            }
            ++parsed;
        }
        catch (const error&) {
        }
    }
    CHECK(parsed > 100);
    CHECK(parsed < 2900);
}

TEST_CASE("a delta knows its base")
{
    const std::vector<float> values{1, 2, 3}, others{1, 2, 4};
    const const_model_ref base{{"w", as_tensor(as_view(values))}}, other{{"w", as_tensor(as_view(others))}};
    const delta content{.tensors = {}, .base_fingerprint = fingerprint(cpu{}, base)};
    CHECK_NOTHROW(check_base(cpu{}, content.base_fingerprint, base));
    CHECK_THROWS_AS(check_base(cpu{}, content.base_fingerprint, other), invalid_argument);
}
