// Readers under mutation: whatever a file has become, a reader takes it as valid or says what is wrong with it.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/random.hpp>
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/delta.hpp>
#include <taskvec/formats/peft.hpp>
#include <taskvec/formats/pytorch.hpp>
#include <taskvec/formats/statistics.hpp>

#include "scratch.hpp"

#include <doctest/doctest.h>

#include <array>
#include <span>
#include <string>
#include <string_view>
#include <vector>

using namespace taskvec;

namespace {

/// Mutations of valid files, the same in every run.
class mutator {
public:
    explicit mutator(std::string_view name)
        : stream_(20261126, 0, name)
    { }

    std::string operator()(const std::vector<std::string>& seeds)
    {
        std::string bytes = seeds[below(seeds.size())];
        for (std::size_t rounds = 1 + below(3); rounds > 0 && !bytes.empty(); --rounds) { change(bytes); }
        return bytes;
    }
    std::size_t below(std::size_t bound) { return stream_.word(next_++) % bound; }

private:
    /// What hurts readers: the ends of ranges, other types, repeated and nested keys, bytes that are not text.
    static constexpr std::array<std::string_view, 27> words{"0", "1", "-1", "-0", "1.0", "1e400", "4294967296",
        "9223372036854775808", "18446744073709551615", "18446744073709551616", "null", "true", "[]", "{}", "[[]]",
        "\"\"", "\"F64\"", "\"F4\"", "\"U8\"", ",", "\xff", "\xc3\x28", "\\ud800", "\\u0000", "..", "(",
        "{\"__metadata__\":{\"a\":\"b\"}"};

    void change(std::string& bytes)
    {
        const std::size_t at = below(bytes.size()), length = 1 + below(std::min<std::size_t>(bytes.size() - at, 12));
        switch (below(8)) {
        case 0: bytes[at] = static_cast<char>(static_cast<unsigned char>(bytes[at]) ^ (1u << below(8))); break;
        case 1: bytes[at] = static_cast<char>(below(256)); break;
        case 2: bytes.erase(at, length); break;
        case 3: bytes.insert(below(bytes.size()), bytes.substr(at, length)); break;
        case 4: bytes.resize(at); break;
        case 5: bytes.insert(at, words[below(words.size())]); break;
        case 6: replace_number(bytes, at); break;
        default: bytes.replace(at, length, words[below(words.size())]); break;
        }
        // A header that still has the length it claims lets the mutation reach what lies behind the first check.
        const auto brace = bytes.rfind('}');
        if (bytes.size() > 9 && bytes[8] == '{' && brace != bytes.npos && below(4) != 0) {
            const std::uint64_t header = brace + 1 - 8;
            std::memcpy(bytes.data(), &header, 8);
        }
    }
    void replace_number(std::string& bytes, std::size_t at)
    {
        const auto first = bytes.find_first_of("0123456789", at);
        if (first == bytes.npos) { return; }
        const auto last = std::min(bytes.find_first_not_of("0123456789", first), bytes.size());
        bytes.replace(first, last - first, words[below(10)]);
    }

    random_stream stream_;
    std::uint64_t next_ = 0;
};

/// How many mutations a reader took and how many it refused with an error of ours; any other exception fails the test.
struct verdicts {
    int taken = 0, refused = 0;
};
template <class Read>
verdicts read_mutations(std::string_view name, const std::vector<std::string>& seeds, int count, Read&& read)
{
    mutator mutate(name);
    verdicts result;
    for (int i = 0; i < count; ++i) {
        const std::string bytes =
            i < static_cast<int>(seeds.size()) ? seeds[static_cast<std::size_t>(i)] : mutate(seeds);
        CAPTURE(i);
        CAPTURE(bytes);
        try {
            read(bytes);
            ++result.taken;
        }
        catch (const error& refusal) {
            CHECK(std::string_view(refusal.what()).size() > 10);
            ++result.refused;
        }
    }
    // Both happen, and the seeds themselves are valid: otherwise this would test nothing.
    CHECK(result.taken >= static_cast<int>(seeds.size()));
    CHECK(result.refused > count / 4);
    return result;
}

std::string file_bytes(const const_model_ref& model, const metadata_map& metadata = {})
{
    std::vector<tensor_spec> specs;
    for (const auto& [name, tensor] : model) { specs.push_back({name, tensor.dtype, tensor.shape}); }
    const auto layout = layout_safetensors(specs, metadata);
    std::string bytes = layout.head;
    bytes.resize(layout.size);
    for (std::size_t i = 0; i < specs.size(); ++i) {
        if (specs[i].bytes()) { std::memcpy(bytes.data() + layout.offsets[i], model[i].tensor.data, specs[i].bytes()); }
    }
    return bytes;
}

/// Values that live as long as the test.
template <class T>
const_tensor_ref tensor_of(const std::vector<T>& values, dtype type, extents shape)
{
    return {values.data(), type, std::move(shape), {}, memory_space::host, 0};
}

const std::vector<float> floats{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
const std::vector<double> doubles{1, 0, 0, 1};
const std::vector<std::int64_t> shapes{10, 10, 0};
const std::vector<std::int32_t> places{3, 70};
const std::vector<std::uint8_t> mask{5, 0};

} // namespace

TEST_CASE("a mutated PyTorch file is refused, or has tensors that lie inside it")
{
    const std::filesystem::path data = std::filesystem::path(TASKVEC_TEST_DIR) / "formats" / "data" / "pytorch";
    const std::vector<std::string> seeds{slurp(data / "pytorch_model.bin"), slurp(data / "training.pt")};
    const auto check = [](const std::string& bytes) {
        const auto contents = parse_pytorch(std::as_bytes(std::span(bytes)), "mutated");
        for (const auto& entry : contents.header.entries) {
            CHECK(entry.offset <= bytes.size());
            CHECK(entry.bytes <= bytes.size() - entry.offset);
            CHECK(entry.bytes == byte_count(entry.dtype, element_count(entry.shape)));
        }
    };
    (void)read_mutations("pytorch", seeds, 4000, check);
    // Most of a file is padding: the pickle by itself, its length kept, so that the archive around it stays sound.
    mutator mutate("pickle");
    int taken = 0, refused = 0;
    for (int i = 0; i < 6000; ++i) {
        auto bytes = seeds[mutate.below(2)];
        const auto begin = bytes.find("\x80\x02"), end = bytes.find("PK", begin);
        for (std::size_t rounds = 1 + mutate.below(3); rounds > 0; --rounds) {
            const auto at = begin + mutate.below(end - begin);
            bytes[at] = static_cast<char>(mutate.below(256));
        }
        CAPTURE(i);
        try {
            check(bytes);
            ++taken;
        }
        catch (const format_error&) {
            ++refused;
        }
    }
    CHECK(taken > 100);
    CHECK(refused > 1000);
}

TEST_CASE("a mutated safetensors file is refused, or is one whose tensors tile its bytes and that can be written again")
{
    const std::vector<std::string> seeds{
        file_bytes({{"a", tensor_of(floats, dtype::f32, {2, 3})}, {"b", tensor_of(floats, dtype::bf16, {})},
            {"c", tensor_of(floats, dtype::u8, {5})}}),
        file_bytes({{"only", tensor_of(doubles, dtype::f64, {4})}}, {{"k\n", "v"}}),
        file_bytes({{"e", tensor_of(floats, dtype::f16, {0, 7})}, {"f", tensor_of(floats, dtype::f4, {4})}}),
        file_bytes({}),
    };
    (void)read_mutations("safetensors", seeds, 6000, [](const std::string& bytes) {
        const auto header = parse_safetensors(std::as_bytes(std::span(bytes)), "mutated");
        std::uint64_t end = header.data_offset;
        std::vector<tensor_spec> specs;
        for (const auto& entry : header.entries) {
            CHECK(entry.offset == end);
            CHECK(entry.bytes == byte_count(entry.dtype, element_count(entry.shape)));
            end += entry.bytes;
            specs.push_back({entry.name, entry.dtype, entry.shape});
        }
        CHECK(end == bytes.size());
        const auto layout = layout_safetensors(specs, header.metadata);
        std::string again = layout.head;
        again.resize(layout.size);
        CHECK(parse_safetensors(std::as_bytes(std::span(again)), "again").entries.size() == specs.size());
    });
}

TEST_CASE("a mutated index is refused, or names files beside it")
{
    const scratch folder;
    const std::vector<std::string> seeds{
        R"({"metadata":{"total_size":8},"weight_map":{"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"}})",
        R"({"weight_map":{}})"};
    (void)read_mutations("index", seeds, 3000, [&](const std::string& bytes) {
        spill(folder / "index.json", bytes);
        for (const auto& [name, shard] : read_index(folder / "index.json")) {
            CHECK(is_utf8(name));
            CHECK(std::filesystem::path(shard).filename() == shard);
            CHECK(shard.find("..") == shard.npos);
        }
    });
}

TEST_CASE("a mutated delta is refused, or keeps the promises of a sparse vector")
{
    const scratch folder;
    const metadata_map metadata{
        {"schema", "taskvec.delta.1"}, {"additive", "true"}, {"fingerprint", "xxh64:0123456789abcdef"}};
    const std::vector<std::string> seeds{
        file_bytes({{"p.values", tensor_of(floats, dtype::f32, {2})}, {"p.shape", tensor_of(shapes, dtype::i64, {2})},
                       {"p.indices", tensor_of(places, dtype::i32, {2})}},
            metadata),
        file_bytes({{"p.values", tensor_of(doubles, dtype::f64, {2})}, {"p.shape", tensor_of(shapes, dtype::i64, {1})},
                       {"p.bitmask", tensor_of(mask, dtype::u8, {2})}},
            metadata),
    };
    (void)read_mutations("delta", seeds, 3000, [&](const std::string& bytes) {
        spill(folder / "delta.safetensors", bytes);
        for (const auto& [name, tensor] : read_delta(folder / "delta.safetensors").tensors) {
            std::visit([&](const auto& sparse) { CHECK_NOTHROW(check_sparse(sparse)); }, tensor);
        }
    });
}

TEST_CASE("mutated statistics are refused, or hold what their kind says")
{
    const scratch folder;
    const std::vector<std::string> seeds{
        file_bytes({{"w", tensor_of(doubles, dtype::f64, {2, 2})}},
            {{"schema", "taskvec.statistics.1"}, {"kind", "gram"}, {"examples", "7"}, {"in_out", R"(["w"])"},
                {"fingerprint", "xxh64:0123456789abcdef"}}),
        file_bytes({{"w", tensor_of(floats, dtype::f32, {3})}},
            {{"schema", "taskvec.statistics.1"}, {"kind", "empirical_fisher"}, {"examples", "7"}}),
    };
    (void)read_mutations("statistics", seeds, 3000, [&](const std::string& bytes) {
        spill(folder / "statistics.safetensors", bytes);
        const statistics_file file(folder / "statistics.safetensors");
        for (const auto& [name, tensor] : file.model()) {
            CHECK(is_storage(tensor.dtype));
            if (file.described() && file.info().kind == statistics_kind::gram) { CHECK(tensor.shape.size() == 2); }
        }
    });
}

TEST_CASE("a mutated adapter is refused, or holds whole updates")
{
    const scratch folder;
    std::filesystem::create_directories(folder / "adapter");
    const std::string model = file_bytes({{"base_model.model.l.q.lora_A.weight", tensor_of(floats, dtype::f32, {2, 4})},
        {"base_model.model.l.q.lora_B.weight", tensor_of(floats, dtype::f32, {3, 2})},
        {"base_model.model.l.up.lora_A.weight", tensor_of(floats, dtype::f32, {3, 4})},
        {"base_model.model.l.up.lora_B.weight", tensor_of(floats, dtype::f32, {3, 3})}});
    const std::string config =
        R"({"peft_type":"LORA","r":2,"lora_alpha":4,"bias":"none","rank_pattern":{"up":3},"alpha_pattern":{"^l.q$|z":8},)"
        R"("use_rslora":true,"target_modules":["q","up"],"init_lora_weights":true,"fan_in_fan_out":false,"use_dora":false})";
    const auto read = [&] {
        for (const auto& [module, update] : read_peft(folder / "adapter").updates) {
            CHECK(update.rank() > 0);
            CHECK(std::isfinite(update.scaling));
        }
    };
    spill(folder / "adapter/adapter_model.safetensors", model);
    (void)read_mutations("adapter_config", {config}, 2000, [&](const std::string& bytes) {
        spill(folder / "adapter/adapter_config.json", bytes);
        read();
    });
    spill(folder / "adapter/adapter_config.json", config);
    (void)read_mutations("adapter_model", {model}, 2000, [&](const std::string& bytes) {
        spill(folder / "adapter/adapter_model.safetensors", bytes);
        read();
    });
}
