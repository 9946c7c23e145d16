// Quantised layers: read as the numbers that their definitions give, written again by the same scheme, and refused by
// name where their tensors contradict each other.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/core/random.hpp>
#include <taskvec/formats/checkpoint.hpp>
#include <taskvec/formats/fingerprint.hpp>
#include <taskvec/formats/name_pattern.hpp>
#include <taskvec/formats/quantising_sink.hpp>
#include <taskvec/methods/average.hpp>
#include <taskvec/methods/merge.hpp>
#include <taskvec/methods/ties.hpp>

#include "scratch.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace quantised_test {

using namespace taskvec;

/// Tensors that own their bytes.
class owned_model {
public:
    void add(const std::string& name, dtype type, extents shape, std::string bytes)
    {
        REQUIRE(byte_count(type, element_count(shape)) == bytes.size());
        bytes_.push_back(std::move(bytes));
        model_.insert(name, const_tensor_ref{bytes_.back().data(), type, std::move(shape)});
    }
    void add(const std::string& name, extents shape, const std::vector<float>& values)
    {
        add(name, dtype::f32, std::move(shape),
            std::string(reinterpret_cast<const char*>(values.data()), 4 * values.size()));
    }
    [[nodiscard]] const const_model_ref& model() const { return model_; }

private:
    std::deque<std::string> bytes_;
    const_model_ref model_;
};

struct random_words {
    random_stream stream;
    std::uint64_t next = 0;
    explicit random_words(std::string_view name)
        : stream(20261129, 0, name)
    { }
    std::uint64_t below(std::uint64_t bound) { return stream.word(next++) % bound; }
    float between(float low, float high) { return low + (high - low) * static_cast<float>(below(1u << 20)) / 0x1p20f; }
};

std::string random_codes(random_words& random, std::size_t count, dtype type)
{
    std::string codes(count, '\0');
    for (auto& code : codes) {
        do {
            code = static_cast<char>(random.below(256));
        } while (type == dtype::f8_e4m3 ? (static_cast<unsigned>(code) & 0x7fu) == 0x7fu
                                        : (static_cast<unsigned>(code) & 0x7cu) == 0x7cu);
    }
    return codes;
}

/// What a code of 1 + exponent + mantissa bits means, by its definition.
double meaning(unsigned code, int exponent_bits, int mantissa_bits)
{
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int mantissa = static_cast<int>(code & ((1u << mantissa_bits) - 1));
    const int exponent = static_cast<int>(code >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const double size = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                      : std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
    return (code >> (exponent_bits + mantissa_bits)) & 1u ? -size : size;
}
double meaning_of(unsigned code, dtype type)
{
    return type == dtype::f8_e5m2 ? meaning(code, 5, 2) : meaning(code, 4, 3);
}

/// The nearest code, ties to the even one: by looking at all of them.
unsigned nearest_code(double value, dtype type)
{
    unsigned best = 0;
    const unsigned last = type == dtype::f8_e5m2 ? 0x7bu : 0x7eu;
    for (unsigned code = 0; code <= last; ++code) {
        const double now = std::abs(meaning_of(code, type) - std::abs(value));
        const double before = std::abs(meaning_of(best, type) - std::abs(value));
        if (now < before || (now == before && code % 2 == 0)) { best = code; }
    }
    return best | (std::signbit(value) ? 0x80u : 0u);
}

std::vector<float> all_of(const const_tensor_ref& tensor)
{
    std::vector<float> values(tensor.size());
    REQUIRE(tensor.source != nullptr);
    tensor.source->read(0, values.size(), values.data());
    return values;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b)
{
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), 4 * a.size()) == 0);
}

/// The whole, and runs that begin and end anywhere.
void check_runs(const const_tensor_ref& tensor, const std::vector<float>& expected, random_words& random)
{
    REQUIRE(same_bits(all_of(tensor), expected));
    for (int i = 0; i < 30; ++i) {
        const auto first = random.below(expected.size()), count = random.below(expected.size() - first + 1);
        std::vector<float> run(count);
        tensor.source->read(first, count, run.data());
        REQUIRE(same_bits(run,
            {expected.begin() + static_cast<std::ptrdiff_t>(first),
                expected.begin() + static_cast<std::ptrdiff_t>(first + count)}));
    }
}

/// A layer of FP8: shape of weight and scales, how many rows and columns share one.
struct fp8_case {
    extents shape, scales;
    std::int64_t rows, columns;
};
const std::vector<fp8_case> fp8_cases{{{5, 7}, {}, 5, 7}, {{5, 7}, {1}, 5, 7}, {{5, 7}, {1, 1}, 5, 7},
    {{5, 7}, {5}, 1, 7}, {{5, 7}, {5, 1}, 1, 7}, {{130, 300}, {2, 3}, 128, 128}, {{256, 128}, {2, 1}, 128, 128},
    {{4, 6}, {2, 3}, 2, 2}, {{4, 64}, {4, 2}, 1, 32}, {{9}, {}, 9, 9}, {{1, 300}, {1, 3}, 128, 128}};

struct fp8_layer {
    owned_model stored;
    std::vector<float> expected;
};
void make(fp8_layer& made, const fp8_case& how, dtype codes_type, dtype scale_type, random_words& random,
    const std::string& scale_name = "l.weight_scale")
{
    const std::size_t size = element_count(how.shape), groups = element_count(how.scales);
    const auto codes = random_codes(random, size, codes_type);
    std::string scales;
    std::vector<float> factors;
    for (std::size_t g = 0; g < groups; ++g) {
        const float wanted = random.between(0.001f, 3);
        if (scale_type == dtype::f32) {
            factors.push_back(wanted);
            scales.append(reinterpret_cast<const char*>(&factors.back()), 4);
        }
        else if (scale_type == dtype::bf16) {
            const auto word = f32_to_bf16(wanted);
            factors.push_back(bf16_to_f32(word));
            scales.append(reinterpret_cast<const char*>(&word), 2);
        }
        else {
            const auto exponent = 120 + random.below(10);
            factors.push_back(std::ldexp(1.0f, static_cast<int>(exponent) - 127));
            scales += static_cast<char>(exponent);
        }
    }
    const auto columns = how.shape.back();
    const auto across = (columns + how.columns - 1) / how.columns;
    for (std::size_t i = 0; i < size; ++i) {
        const auto row = static_cast<std::int64_t>(i) / columns, column = static_cast<std::int64_t>(i) % columns;
        const auto group = static_cast<std::size_t>(row / how.rows * across + column / how.columns);
        made.expected.push_back(
            static_cast<float>(meaning_of(static_cast<unsigned char>(codes[i]), codes_type)) * factors[group]);
    }
    made.stored.add("l.weight", codes_type, how.shape, codes);
    made.stored.add(scale_name, scale_type, how.scales, scales);
}

TEST_CASE("fp8 codes round to nearest even and saturate")
{
    random_words random("fp8 codes");
    for (const auto type : {dtype::f8_e4m3, dtype::f8_e5m2}) {
        const auto narrow = [&](float x) { return type == dtype::f8_e4m3 ? f32_to_e4m3(x) : f32_to_e5m2(x); };
        const unsigned last = type == dtype::f8_e4m3 ? 0x7eu : 0x7bu;
        for (unsigned code = 0; code <= last; ++code) {
            const auto x = static_cast<float>(meaning_of(code, type));
            const auto above = static_cast<float>(meaning_of(std::min(code + 1, last), type));
            for (const float value : {x, std::nextafter(x, 0.0f), std::nextafter(x, 1e9f), (x + above) / 2,
                     std::nextafter((x + above) / 2, 0.0f), std::nextafter((x + above) / 2, 1e9f)}) {
                REQUIRE(narrow(value) == nearest_code(value, type));
                REQUIRE(narrow(-value) == nearest_code(-value, type));
            }
        }
        for (int i = 0; i < 2000; ++i) {
            const float value = std::ldexp(random.between(-1, 1), static_cast<int>(random.below(40)) - 22);
            REQUIRE(narrow(value) == nearest_code(value, type));
        }
        CHECK(narrow(1e30f) == last);
        CHECK(narrow(-1e30f) == (last | 0x80u));
        CHECK((narrow(std::nanf("")) & 0x7fu) > last);
        CHECK(narrow(HUGE_VALF) == (type == dtype::f8_e4m3 ? 0x7f : 0x7c));
    }
}

TEST_CASE("scaled FP8: codes times scales, by tensor, channel and block, under each tool's names")
{
    random_words random("fp8");
    for (const auto& how : fp8_cases) {
        CAPTURE(to_string(how.scales));
        for (const auto codes : {dtype::f8_e4m3, dtype::f8_e5m2}) {
            for (const auto scales : {dtype::f32, dtype::bf16, dtype::f8_e8m0}) {
                for (const std::string name :
                    {"l.weight_scale", "l.weight_scale_inv", "l.scale_weight", "l.scale", "l.qscale_weight"}) {
                    fp8_layer made;
                    make(made, how, codes, scales, random, name);
                    const quantised_layers layers(made.stored.model());
                    REQUIRE(layers.unread().empty());
                    REQUIRE(layers.model().size() == 1);
                    REQUIRE(layers.model()[0].name == "l.weight");
                    REQUIRE(layers.model()[0].tensor.shape == how.shape);
                    check_runs(layers.model()[0].tensor, made.expected, random);
                }
            }
        }
    }
}

TEST_CASE("block sizes come from the configuration, where it says them")
{
    random_words random("hints");
    fp8_layer made;
    make(made, {{96, 96}, {3, 3}, 32, 32}, dtype::f8_e4m3, dtype::f32, random);
    const auto hint = [](extents block) { return [block] { return quantisation_hints{block, false, "config.json"}; }; };
    CHECK(quantised_layers(made.stored.model(), hint({32, 32})).unread().empty());
    const quantised_layers wrong(made.stored.model(), hint({64, 64}));
    REQUIRE(wrong.unread().size() == 1);
    CHECK(
        wrong.unread()[0].what.find("expected [] for all of it, [96] for each channel or [2, 2] for blocks of 64 × 64 "
                                    "(config.json)")
        != std::string::npos);

    const scratch folder;
    spill(folder / "config.json", R"({"quantization_config": {"weight_block_size": [64, 32], "scale_fmt": "ue8m0"}})");
    CHECK(read_quantisation_hints(folder / "config.json").block == extents{64, 32});
    CHECK(read_quantisation_hints(folder / "config.json").powers_of_two);
    spill(folder / "config.json",
        R"({"quantization_config": {"config_groups": {"group_0": {"weights": {"block_structure": [16, 8]}}}}})");
    CHECK(read_quantisation_hints(folder / "config.json").block == extents{16, 8});
    for (const std::string wrong : {"[0, 32]", "[]", "64", R"("64x")", R"("x64")", R"("64 by 64")", R"("0x64")",
             "[-1, 32]", "[1.5, 32]", "[4294967296, 32]", R"("4294967296x32")", R"(["64", 32])"}) {
        CAPTURE(wrong);
        spill(folder / "config.json", R"({"quantization_config": {"weight_block_size": )" + wrong + "}}");
        CHECK_THROWS_AS((void)read_quantisation_hints(folder / "config.json"), format_error);
    }
}

TEST_CASE("what a configuration says of quantisation is found in each spelling, at any depth")
{
    const scratch folder;
    const auto hints = [&](const std::string& config) {
        spill(folder / "config.json", config);
        return read_quantisation_hints(folder / "config.json");
    };
    const auto group = [](const std::string& weights) {
        return R"({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {)" + weights
            + "}}}}";
    };
    const std::string floating = R"("num_bits": 8, "type": "float", )";
    struct spelling {
        std::string config;
        extents block;
        bool scaled;
        std::string key;
    };
    const std::string in_group = "quantization_config.config_groups.group_0.weights.";
    for (const auto& said :
        std::vector<spelling>{{R"({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}})",
                                  {64, 32}, true, "quantization_config.weight_block_size"},
            {R"({"quantization_config": {"quant_method": "fp8", "weight_block_size": null}})", {}, true, ""},
            {R"({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}})", {}, true, ""},
            {R"({"quantization_config": {"quant_method": "gptq", "bits": 4}})", {}, false, ""},
            {R"({"text_config": {"quantization_config": {"weight_block_size": [64, 32]}}})", {64, 32}, false,
                "text_config.quantization_config.weight_block_size"},
            {R"({"a": {"b": {"compression_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}}}})", {8, 8},
                true, "a.b.compression_config.weight_block_size"},
            {R"({"quantization_config": )" + group(floating + R"("block_structure": [16, 8])") + "}", {16, 8}, true,
                in_group + "block_structure"},
            {R"({"quantization_config": )" + group(floating + R"("block_structure": "16x8")") + "}", {16, 8}, true,
                in_group + "block_structure"},
            {R"({"quantization_config": )" + group(floating + R"("strategy": "group", "group_size": 64)") + "}",
                {1, 64}, true, in_group + "group_size"},
            {R"({"quantization_config": )" + group(floating + R"("strategy": "channel", "group_size": null)") + "}", {},
                true, ""},
            {R"({"quantization_config": )" + group(R"("num_bits": 4, "type": "float", "group_size": 16)") + "}", {},
                false, ""},
            {R"({"compression_config": )" + group(floating + R"("block_structure": [16, 8])") + "}", {16, 8}, true,
                "compression_config.config_groups.group_0.weights.block_structure"},
            {R"({"quantization_config": )" + group(floating + R"("block_structure": "16X8")") + "}", {16, 8}, true,
                in_group + "block_structure"},
            {R"({"quantization_config": )" + group(floating + R"("group_size": 0)") + "}", {}, true, ""},
            {R"({"quantization_config": )" + group(floating + R"("group_size": -1)") + "}", {}, true, ""},
            {R"({"quantization_config": )" + group(floating + R"("group_size": 4294967296)") + "}", {}, true, ""},
            {R"({"quantization_config": )" + group(R"("num_bits": "8", "type": "float", "group_size": 64)") + "}", {},
                false, ""},
            {R"({"quantization_config": {"config_groups": [{}]}})", {}, false, ""},
            {R"({"quantization_config": {"config_groups": {"a": 5, "b": {}, "c": {"weights": []}}}})", {}, false, ""},
            {R"({"quantization_config": 5, "compression_config": {"quant_method": "fp8"}})", {}, true, ""},
            {R"([{"quantization_config": {"quant_method": "fp8"}}])", {}, false, ""},
            {R"({"model_type": "x", "text_config": {}})", {}, false, ""}}) {
        CAPTURE(said.config);
        const auto found = hints(said.config);
        CHECK(found.block == said.block);
        CHECK(found.scaled_fp8 == said.scaled);
        CHECK(found.key == said.key);
    }
    const auto several = hints(
        R"({"quantization_config": {"weight_block_size": [128, 128], "config_groups": {"a": {"weights": {"block_structure": "64x64"}}}}})");
    CHECK(several.block == extents{128, 128});
    CHECK(several.more_blocks == std::vector<extents>{{64, 64}});
    const auto twice =
        hints(R"({"quantization_config": {"weight_block_size": [8, 8], "scale_fmt": "ue8m0"}, "text_config": )"
              R"({"quantization_config": {"weight_block_size": [8, 8]}}})");
    CHECK(twice.block == extents{8, 8});
    CHECK(twice.more_blocks.empty());
    CHECK(twice.powers_of_two);
    // ComfyUI's, in the metadata of a file.
    CHECK(detail::comfy_formats(R"({"layers": {"l": {"format": "nvfp4"}, "k": 5, "j": {}}})")
        == std::map<std::string, std::string, std::less<>>{{"j", ""}, {"l", "nvfp4"}});
    for (const char* nothing : {"", "{", "5", "{}", R"({"layers": []})", R"({"layers": {}})"}) {
        CHECK(detail::comfy_formats(nothing).empty());
    }
}

TEST_CASE("blocks cut at the edges: as the configuration says, or the only power of two, or none")
{
    random_words random("cut blocks");
    const auto check = [&](const fp8_case& how, quantisation_hints hints) {
        CAPTURE(to_string(how.shape));
        CAPTURE(to_string(how.scales));
        fp8_layer made;
        make(made, how, dtype::f8_e4m3, dtype::f32, random);
        hints.file = "config.json";
        const quantised_layers layers(made.stored.model(), [&] { return hints; });
        REQUIRE(layers.unread().empty());
        check_runs(layers.model()[0].tensor, made.expected, random);
    };
    const auto wrong = [&](const extents& shape, const extents& scales, quantisation_hints hints) {
        owned_model stored;
        stored.add("l.weight", dtype::f8_e4m3, shape, std::string(element_count(shape), '\x38'));
        stored.add("l.weight_scale", scales, std::vector<float>(element_count(scales), 1));
        const quantised_layers layers(stored.model(), [&] { return hints; });
        REQUIRE(layers.unread().size() == 1);
        CHECK(layers.unread()[0].name == "l.weight");
        return layers.unread()[0].what + ": " + layers.unread()[0].mend;
    };
    // Said: none of these shapes is a multiple of the block, and most would split evenly into as many.
    for (const auto& how : std::vector<fp8_case>{{{96, 96}, {2, 2}, 64, 64}, {{100, 100}, {2, 2}, 64, 64},
             {{192, 192}, {2, 3}, 128, 64}, {{200, 150}, {4, 5}, 64, 32}, {{1000, 1000}, {4, 4}, 256, 256},
             {{200, 150}, {200, 3}, 1, 64}, {{100, 90}, {3, 2}, 48, 48}}) {
        check(how, {.block = {how.rows, how.columns}});
        check(how, {.block = {512, 512}, .more_blocks = {{how.rows, how.columns}}});
        check(how, {.block = {how.rows, how.columns}, .more_blocks = {{how.rows, how.columns}}});
    }
    check({{200, 150}, {200, 1}, 1, 150}, {.block = {64, 32}}); // channels beside a block of other layers
    check({{3, 4, 8}, {3, 4, 1}, 1, 8}, {.block = {64, 32}}); // of experts
    // Not said.
    for (const auto& how : std::vector<fp8_case>{{{101, 99}, {2, 2}, 64, 64}, {{130, 151}, {3, 5}, 64, 32},
             {{1001, 1001}, {4, 4}, 256, 256}, {{192, 128}, {3, 2}, 64, 64}, {{300, 200}, {3, 2}, 128, 128},
             {{3, 4, 8}, {3, 4, 1}, 1, 8}, {{3, 4, 8}, {3, 1, 1}, 4, 8}, {{3, 4, 8}, {3}, 4, 8}}) {
        check(how, {});
    }
    const auto is_in = [](const std::string& text, const std::string& part) {
        return text.find(part) != std::string::npos;
    };
    auto text = wrong({96, 96}, {2, 2}, {});
    CHECK(is_in(text, "shape [2, 2] for a weight of shape [96, 96], which is one of blocks of 64 × 64 as of 48 × 48"));
    CHECK(is_in(text, "weight_block_size"));
    CHECK(is_in(wrong({1000, 1000}, {4, 4}, {}), "256 × 256 as of 250 × 250"));
    CHECK(is_in(wrong({100, 100}, {6, 6}, {}), "[1, 1] for blocks of 128 × 128"));
    CHECK(is_in(wrong({3, 100, 99}, {2, 2, 2}, {}), "[3, 1, 1] for blocks of 128 × 128"));
    // Said otherwise, and by two sizes that both fit.
    CHECK(is_in(wrong({96, 96}, {2, 2}, {.block = {32, 32}, .file = "config.json", .key = "quantization_config.x"}),
        "[3, 3] for blocks of 32 × 32 (quantization_config.x of config.json)"));
    CHECK(is_in(wrong({96, 96}, {2, 2}, {.block = {64, 64}, .more_blocks = {{48, 48}}}), "64 × 64 as of 48 × 48"));
}

TEST_CASE("FP8 whose scale was lost is no numbers where anything says that it had one")
{
    const auto bare = [](owned_model& m) {
        m.add("l.weight", dtype::f8_e4m3, {2, 2}, "\x38\x38\x38\x38");
        m.add("norm", {2}, {1, 2});
    };
    owned_model stored;
    bare(stored);
    const auto what = [&](const quantisation_hints& hints) {
        const quantised_layers layers(stored.model(), [&] { return hints; });
        if (layers.unread().empty()) { return std::string(); }
        CHECK(layers.unread()[0].name == "l.weight");
        return layers.unread()[0].what;
    };
    CHECK(what({}).empty());
    CHECK(what({.block = {64, 64}, .file = "config.json"}).empty());
    CHECK(what({.absent = {"k.weight_scale", "l.bias", "l.weight.x", "l.weight.", "l.weight.a.scale", "l.a.scale",
                    "l.other_s", "l.weight"}})
            .empty());
    CHECK(what({.file = "config.json", .scaled_fp8 = true})
        == "is FP8 without a scale ('l.weight_scale'), which layers have by what 'config.json' says of quantisation");
    for (const std::string name : {"l.weight_scale", "l.weight_scale_inv", "l.scale", "l.qscale_weight"}) {
        CHECK(what({.absent = {"k.weight", name}})
            == "is FP8 without its scale ('" + name + "'), which the index lists and no file has");
    }
    CHECK(what({.formats = {{"l", "float8_e4m3fn"}}}).find("the file's header") != std::string::npos);

    owned_model whole, other;
    bare(whole);
    whole.add("l.weight_scale", {}, {0.5f});
    other.add("l.weight", {2, 2}, {1, 1, 1, 1});
    other.add("norm", {2}, {1, 2});
    const quantised_layers scaled(whole.model()), lost(stored.model()), numbers(other.model());
    const auto alike = [&](const quantised_layers& a, const quantised_layers& b,
                           const callback<bool(std::string_view)>& include = {}) -> std::string {
        try {
            refuse_unscaled(a.model(), b.model(), b, include, "a", "b");
        }
        catch (const format_error& failure) {
            return failure.what();
        }
        return "";
    };
    CHECK(alike(lost, scaled).find("a: layer 'l.weight' is FP8 without a scale, which it has in 'b' ('l.weight_scale')")
        == 0);
    CHECK(alike(lost, scaled).find(R"(--exclude '^l\.weight$')") != std::string::npos);
    CHECK(alike(lost, scaled, [](std::string_view name) { return name != "l.weight"; }).empty());
    CHECK(alike(scaled, lost).empty());
    CHECK(alike(numbers, scaled).empty());
    CHECK(alike(lost, numbers).empty());
    CHECK_FALSE(alike(lost, scaled, [](std::string_view) { return true; }).empty());
    owned_model others, plain_there;
    others.add("k.weight", dtype::f8_e4m3, {2, 2}, "\x38\x38\x38\x38");
    others.add("k.weight_scale", {}, {1});
    const quantised_layers elsewhere(others.model()); // which has no such layer
    CHECK(alike(lost, elsewhere).empty());
    others.add("l.weight", {2, 2}, {1, 1, 1, 1}); // or has it in numbers
    const quantised_layers in_numbers(others.model());
    CHECK(alike(lost, in_numbers).empty());
    CHECK(taskvec::pattern_of({}).empty());
    CHECK(taskvec::pattern_of({"a.b.c", "a.b.d.e"}) == R"(^a\.b\.(c|d\.e)$)");
    CHECK(taskvec::pattern_of({"a.b.c", "a.d"}) == R"(^a\.(b\.c|d)$)");
    CHECK(taskvec::pattern_of({"a.b", "c.d"}) == R"(^(a\.b|c\.d)$)");
}

TEST_CASE("ComfyUI's marks are parts of their layers, and what they name has to be what is read")
{
    random_words random("comfy");
    const auto with_mark = [&](dtype type, const std::string& format, const quantisation_hints& hints, bool beside) {
        fp8_layer made;
        make(made, {{4, 4}, {}, 4, 4}, type, dtype::f32, random);
        const std::string mark = R"({"format": ")" + format + R"("})";
        if (beside) { made.stored.add("l.comfy_quant", dtype::u8, {static_cast<std::int64_t>(mark.size())}, mark); }
        const quantised_layers layers(made.stored.model(), [&] { return hints; });
        if (!layers.unread().empty()) { return layers.unread()[0].name + " " + layers.unread()[0].what; }
        REQUIRE(layers.model().size() == 1);
        check_runs(layers.model()[0].tensor, made.expected, random);
        CHECK(layers.layers()[0].layer().parts.size() == (beside ? 3u : 2u));
        return std::string();
    };
    CHECK(with_mark(dtype::f8_e4m3, "float8_e4m3fn", {}, true).empty());
    CHECK(with_mark(dtype::f8_e5m2, "float8_e5m2", {}, true).empty());
    CHECK(with_mark(dtype::f8_e4m3, "mxfp8", {}, true) == "l.weight is quantised by ComfyUI as 'mxfp8'");
    CHECK(with_mark(dtype::f8_e4m3, "", {.formats = {{"l", "float8_e4m3fn"}}}, false).empty());
    CHECK(with_mark(dtype::f8_e4m3, "", {.formats = {{"k", "nvfp4"}}}, false).empty());
    CHECK(with_mark(dtype::f8_e4m3, "", {.formats = {{"l", "nvfp4"}}}, false)
        == "l.weight is quantised by ComfyUI as 'nvfp4'");
}

TEST_CASE("MXFP4 and NVFP4: nibbles, low first, times the scale of their group")
{
    constexpr double e2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    random_words random("fp4");
    const auto number = [&](const std::string& packed, std::size_t i) {
        const auto byte = static_cast<unsigned char>(packed[i / 2]);
        const unsigned code = i % 2 ? byte >> 4 : byte & 15u;
        return static_cast<float>(code & 8u ? -e2m1[code & 7u] : e2m1[code & 7u]);
    };
    const auto bytes = [&](std::size_t count, unsigned from, unsigned below) {
        std::string text;
        for (std::size_t i = 0; i < count; ++i) { text += static_cast<char>(from + random.below(below)); }
        return text;
    };
    { // gpt-oss: experts, out, in / 32, 16; read as experts, in, out
        const std::size_t experts = 2, out = 5, groups = 3, in = 32 * groups;
        owned_model stored;
        const auto packed = bytes(experts * out * groups * 16, 0, 256), scales = bytes(experts * out * groups, 110, 30);
        stored.add("m.experts.up_blocks", dtype::u8, {2, 5, 3, 16}, packed);
        stored.add("m.experts.up_scales", dtype::u8, {2, 5, 3}, scales);
        const quantised_layers layers(stored.model());
        REQUIRE(layers.model().size() == 1);
        CHECK(layers.model()[0].name == "m.experts.up");
        REQUIRE(layers.model()[0].tensor.shape == extents{2, 96, 5});
        std::vector<float> expected(experts * in * out);
        for (std::size_t e = 0; e < experts; ++e) {
            for (std::size_t o = 0; o < out; ++o) {
                for (std::size_t i = 0; i < in; ++i) {
                    const std::size_t row = e * out + o;
                    const int exponent = static_cast<unsigned char>(scales[row * groups + i / 32]) - 127;
                    expected[(e * in + i) * out + o] = std::ldexp(number(packed, row * in + i), exponent);
                }
            }
        }
        check_runs(layers.model()[0].tensor, expected, random);
    }
    { // without experts: out, in / 32, 16; not turned
        owned_model stored;
        const auto packed = bytes(5 * 3 * 16, 0, 256), scales = bytes(5 * 3, 110, 30);
        stored.add("m.up_blocks", dtype::u8, {5, 3, 16}, packed);
        stored.add("m.up_scales", dtype::u8, {5, 3}, scales);
        const quantised_layers layers(stored.model());
        REQUIRE(layers.model().size() == 1);
        REQUIRE(layers.model()[0].tensor.shape == extents{5, 96});
        std::vector<float> expected(5 * 96);
        for (std::size_t i = 0; i < expected.size(); ++i) {
            expected[i] = std::ldexp(number(packed, i), static_cast<unsigned char>(scales[i / 32]) - 127);
        }
        check_runs(layers.model()[0].tensor, expected, random);
    }
    for (const std::string way : {"mxfp4", "e8m0", "modelopt", "compressed-tensors"}) {
        const bool mx = way == "mxfp4" || way == "e8m0";
        const std::size_t out = 6, in = 96, group = mx ? 32 : 16;
        owned_model stored;
        const auto packed = bytes(out * in / 2, 0, 256);
        const auto scales = mx ? bytes(out * in / group, 110, 30) : bytes(out * in / group, 1, 126);
        const float global = 0.37f;
        stored.add(way == "modelopt" ? "l.weight" : "l.weight_packed", dtype::u8, {6, 48}, packed);
        stored.add("l.weight_scale",
            way == "mxfp4" ? dtype::u8
                : mx       ? dtype::f8_e8m0
                           : dtype::f8_e4m3,
            {6, static_cast<std::int64_t>(in / group)}, scales);
        if (way == "modelopt") { stored.add("l.weight_scale_2", {}, {global}); }
        if (way == "compressed-tensors") { stored.add("l.weight_global_scale", {1}, {global}); }
        const quantised_layers layers(stored.model());
        REQUIRE(layers.unread().empty());
        REQUIRE(layers.model().size() == 1);
        CHECK(layers.model()[0].name == "l.weight");
        std::vector<float> expected(out * in);
        for (std::size_t i = 0; i < expected.size(); ++i) {
            const auto code = static_cast<unsigned char>(scales[i / group]);
            const float scale = mx
                ? std::ldexp(1.0f, code - 127)
                : static_cast<float>(meaning_of(code, dtype::f8_e4m3)) * (way == "modelopt" ? global : 1.0f / global);
            expected[i] = number(packed, i) * scale;
        }
        check_runs(layers.model()[0].tensor, expected, random);
    }
}

TEST_CASE("quantising again: fresh scales from the largest magnitudes, codes to nearest even")
{
    random_words random("requantise");
    for (const auto& how : fp8_cases) {
        CAPTURE(to_string(how.scales));
        for (const auto codes_type : {dtype::f8_e4m3, dtype::f8_e5m2}) {
            for (const auto scale_type : {dtype::f32, dtype::bf16, dtype::f8_e8m0}) {
                fp8_layer made;
                make(made, how, codes_type, scale_type, random);
                const quantised_layers layers(made.stored.model());
                const auto& layer = layers.layers()[0].layer();
                std::vector<float> values;
                for (std::size_t i = 0; i < made.expected.size(); ++i) { values.push_back(random.between(-9, 9)); }
                std::vector<std::uint8_t> codes(values.size());
                std::vector<std::byte> scales(layer.scales.bytes());
                memory_sink sink({codes.data(), scales.data()});
                quantise_fp8(layer, values.data(), sink, 0, 1);

                const auto columns = how.shape.back(), across = (columns + how.columns - 1) / how.columns;
                std::vector<float> largest(element_count(how.scales));
                const auto group = [&](std::size_t i) {
                    const auto row = static_cast<std::int64_t>(i) / columns,
                               column = static_cast<std::int64_t>(i) % columns;
                    return static_cast<std::size_t>(row / how.rows * across + column / how.columns);
                };
                for (std::size_t i = 0; i < values.size(); ++i) {
                    largest[group(i)] = std::max(largest[group(i)], std::abs(values[i]));
                }
                const const_tensor_ref stored{scales.data(), scale_type, how.scales};
                for (std::size_t g = 0; g < largest.size(); ++g) {
                    const float exact = largest[g] / (codes_type == dtype::f8_e4m3 ? 448.0f : 57344.0f);
                    const float found = detail::scale_at(stored, g);
                    if (scale_type == dtype::f32) { REQUIRE(found == exact); }
                    else if (scale_type == dtype::bf16) {
                        REQUIRE(found == bf16_to_f32(f32_to_bf16(exact)));
                    }
                    else {
                        REQUIRE(std::log2(found) == std::ceil(std::log2(exact)));
                    }
                }
                for (std::size_t i = 0; i < values.size(); ++i) {
                    REQUIRE(codes[i] == nearest_code(values[i] / detail::scale_at(stored, group(i)), codes_type));
                }
            }
        }
    }
}

TEST_CASE("where the configuration says powers of two, fresh scales in F32 are such")
{
    random_words random("powers");
    fp8_layer made;
    make(made, {{4, 6}, {4, 1}, 1, 6}, dtype::f8_e4m3, dtype::f32, random);
    const quantised_layers layers(made.stored.model(), [] { return quantisation_hints{.powers_of_two = true}; });
    REQUIRE(layers.unread().empty());
    const auto& layer = layers.layers()[0].layer();
    CHECK(layer.powers_of_two);
    std::vector<float> values, scales(4);
    for (std::size_t i = 0; i < 24; ++i) { values.push_back(random.between(-9, 9)); }
    std::vector<std::uint8_t> codes(24);
    memory_sink sink({codes.data(), scales.data()});
    quantise_fp8(layer, values.data(), sink, 0, 1);
    for (std::size_t row = 0; row < 4; ++row) {
        float largest = 0;
        for (std::size_t i = 0; i < 6; ++i) { largest = std::max(largest, std::abs(values[6 * row + i])); }
        CHECK(std::log2(scales[row]) == std::ceil(std::log2(largest / 448.0f)));
    }
}

TEST_CASE("a layer of one number without a shape is read and quantised again")
{
    for (const auto scale_type : {dtype::f32, dtype::f64}) {
        owned_model stored;
        stored.add("l.weight", dtype::f8_e4m3, {}, "\x40"); // 2
        const double scale = 0.25;
        if (scale_type == dtype::f64) {
            stored.add("l.weight_scale", dtype::f64, {}, std::string(reinterpret_cast<const char*>(&scale), 8));
        }
        else {
            stored.add("l.weight_scale", {}, {0.25f});
        }
        const quantised_layers layers(stored.model());
        REQUIRE(layers.model().size() == 1);
        REQUIRE(layers.layers().size() == 1);
        CHECK(all_of(layers.model()[0].tensor) == std::vector<float>{0.5f});
        const float value = -896;
        std::uint8_t code = 0;
        std::uint64_t fresh = 0;
        memory_sink sink({&code, &fresh});
        quantise_fp8(layers.layers()[0].layer(), &value, sink, 0, 1);
        CHECK(code == 0xfe); // -448
        const const_tensor_ref again{&fresh, scale_type, {}};
        CHECK(detail::scale_at(again, 0) == 2.0f);
    }
}

TEST_CASE("quantising zeros, NaN and infinity")
{
    owned_model stored;
    stored.add("l.weight", dtype::f8_e4m3, {2, 3}, std::string(6, '\x38'));
    stored.add("l.weight_scale", {2, 1}, {1, 1});
    const quantised_layers layers(stored.model());
    const std::vector<float> values{0, -0.0f, 0, NAN, HUGE_VALF, 2};
    std::vector<std::uint8_t> codes(6);
    std::vector<float> scales(2);
    memory_sink sink({codes.data(), scales.data()});
    quantise_fp8(layers.layers()[0].layer(), values.data(), sink, 0, 1);
    CHECK(scales == std::vector<float>{1, 2 / 448.0f});
    CHECK(codes == std::vector<std::uint8_t>{0, 0x80, 0, 0x7f, 0x7f, 0x7e});

    owned_model small; // a scale that F16 cannot hold
    const auto one = f32_to_f16(1);
    small.add("l.weight", dtype::f8_e4m3, {1}, "\x38");
    small.add("l.weight_scale", dtype::f16, {}, std::string(reinterpret_cast<const char*>(&one), 2));
    const quantised_layers other(small.model());
    const float large = 1e30f;
    CHECK_THROWS_AS(quantise_fp8(other.layers()[0].layer(), &large, sink, 0, 1), nonfinite_error);
}

TEST_CASE("layers that contradict themselves, or that nothing reads, are named")
{
    const std::string codes(16, '\x38');
    struct fault {
        const char* what;
        std::function<void(owned_model&)> make;
        std::string layer, words;
    };
    const auto f32_scale = [](extents shape, std::vector<float> values) {
        return [shape, values, codes = std::string(16, '\x38')](owned_model& m) {
            m.add("l.weight", dtype::f8_e4m3, {4, 4}, codes);
            m.add("l.weight_scale", shape, values);
        };
    };
    const auto i32 = [](owned_model& m, const std::string& name, extents shape) {
        m.add(name, dtype::i32, shape, std::string(4 * element_count(shape), '\1'));
    };
    const std::vector<fault> faults{
        {"three scales", f32_scale({3}, {1, 1, 1}), "l.weight", "shape [3] for a weight of shape [4, 4]"},
        {"as many as codes", f32_scale({4, 4}, std::vector<float>(16, 1)), "l.weight", "expected [] for all of it"},
        {"columns", f32_scale({1, 4}, {1, 1, 1, 1}), "l.weight", "[4] for each channel"},
        {"none", f32_scale({0}, {}), "l.weight", "shape [0]"},
        {"NaN", f32_scale({4}, {1, 1, NAN, 1}), "l.weight", "the scale nan (at 2 of 4)"},
        {"infinite", f32_scale({}, {HUGE_VALF}), "l.weight", "the scale inf"},
        {"negative", f32_scale({}, {-1}), "l.weight", "the scale -1"},
        {"integers",
            [&](owned_model& m) {
                m.add("l.weight", dtype::f8_e4m3, {4, 4}, codes);
                i32(m, "l.weight_scale", {});
            },
            "l.weight", "dtype I32"},
        {"two scales",
            [&](owned_model& m) {
                f32_scale({}, {1})(m);
                m.add("l.scale_weight", {}, {1});
            },
            "l.weight", "two scales"},
        {"scale alone", [&](owned_model& m) { m.add("l.weight_scale_inv", {}, {1}); }, "l.weight", "no codes"},
        {"codes alone",
            [&](owned_model& m) {
                f32_scale({}, {1})(m);
                m.add("k.weight", dtype::f8_e4m3, {4, 4}, codes);
            },
            "k.weight", "without a scale"},
        {"a scale of numbers",
            [&](owned_model& m) {
                f32_scale({}, {1})(m);
                m.add("k.weight", {1}, {1});
                m.add("k.weight_scale", {}, {1});
            },
            "k.weight", "is F32 and has a scale"},
        {"GPTQ",
            [&](owned_model& m) {
                i32(m, "q.qweight", {1, 8});
                i32(m, "q.qzeros", {1, 1});
                i32(m, "q.g_idx", {8});
                m.add("q.scales", {1, 8}, std::vector<float>(8, 1));
            },
            "q", "by GPTQ"},
        {"AWQ",
            [&](owned_model& m) {
                i32(m, "q.qweight", {8, 1});
                i32(m, "q.qzeros", {1, 1});
                m.add("q.scales", {1, 8}, std::vector<float>(8, 1));
            },
            "q", "by AWQ"},
        {"NF4",
            [&](owned_model& m) {
                m.add("q.weight", dtype::u8, {8, 1}, std::string(8, '\1'));
                m.add("q.weight.absmax", dtype::u8, {1}, "\1");
                m.add("q.weight.quant_map", {16}, std::vector<float>(16, 1));
                m.add("q.weight.quant_state.bitsandbytes__nf4", dtype::u8, {2}, "{}");
            },
            "q.weight", "NF4 by bitsandbytes"},
        {"INT8",
            [&](owned_model& m) {
                m.add("q.weight", dtype::i8, {4, 4}, codes);
                m.add("q.SCB", {4}, {1, 1, 1, 1});
            },
            "q.weight", "8 bits by bitsandbytes"},
        {"compressed-tensors",
            [&](owned_model& m) {
                i32(m, "q.weight_packed", {4, 1});
                m.add("q.weight_scale", {4, 1}, {1, 1, 1, 1});
                m.add("q.weight_shape", dtype::i64, {2}, std::string(16, '\0'));
            },
            "q", "integers (compressed-tensors)"},
        {"integers with scales",
            [&](owned_model& m) {
                m.add("q.weight", dtype::i8, {4, 4}, codes);
                m.add("q.weight_scale", {4, 1}, {1, 1, 1, 1});
            },
            "q.weight", "to integers"},
        {"NVFP4 without its factor",
            [&](owned_model& m) {
                m.add("q.weight_packed", dtype::u8, {2, 8}, codes);
                m.add("q.weight_scale", dtype::f8_e4m3, {2, 1}, "\x38\x38");
            },
            "q.weight", "without 'weight_scale_2'"},
        {"NVFP4 of another width",
            [&](owned_model& m) {
                m.add("q.weight_packed", dtype::u8, {2, 8}, codes);
                m.add("q.weight_scale", dtype::f8_e4m3, {2, 2}, "\x38\x38\x38\x38");
                m.add("q.weight_global_scale", {1}, {1});
            },
            "q.weight", "expected [2, 1]"},
        {"a scale and another",
            [&](owned_model& m) {
                f32_scale({}, {1})(m);
                m.add("l.weight_scale_2", {}, {1});
            },
            "l.weight", "two scales, 'l.weight_scale' and 'l.weight_scale_2'"},
        {"a lost scale, by that of the inputs",
            [&](owned_model& m) {
                m.add("l.weight", dtype::f8_e4m3, {4, 4}, codes);
                m.add("l.input_scale", {}, {1});
            },
            "l.weight", "without a scale ('l.weight_scale'), although 'l.input_scale' is there"},
        {"Marlin 2:4",
            [&](owned_model& m) {
                i32(m, "q.weight_packed", {8, 2});
                m.add("q.scale_packed", {1, 8}, std::vector<float>(8, 1));
                m.add("q.meta", dtype::i16, {8, 2}, std::string(32, '\1'));
            },
            "q", "Marlin 2:4"},
        {"Marlin",
            [&](owned_model& m) {
                i32(m, "q.B", {8, 2});
                m.add("q.s", {1, 8}, std::vector<float>(8, 1));
            },
            "q", "(Marlin)"},
        {"EXL2",
            [&](owned_model& m) {
                i32(m, "q.q_weight", {8, 16});
                i32(m, "q.q_scale", {1, 2});
                m.add("q.q_scale_max", {1}, {1});
                m.add("q.q_groups", dtype::i16, {2}, std::string(4, '\1'));
            },
            "q", "ExLlamaV2"},
        {"AQLM",
            [&](owned_model& m) {
                m.add("q.codes", dtype::i8, {8, 2, 1}, codes);
                m.add("q.codebooks", {1, 4, 1, 8}, std::vector<float>(32, 1));
                m.add("q.scales", {8, 1, 1, 1}, std::vector<float>(8, 1));
            },
            "q", "AQLM"},
        {"QuIP#",
            [&](owned_model& m) {
                m.add("q.Qidxs", dtype::i16, {4, 2}, codes);
                m.add("q.SU", {16}, std::vector<float>(16, 1));
                m.add("q.SV", {8}, std::vector<float>(8, 1));
            },
            "q", "QuIP#"},
        {"NVFP4 experts",
            [&](owned_model& m) {
                m.add("e.up", dtype::u8, {2, 1, 8}, codes);
                m.add("e.up_weight_scale", dtype::f8_e4m3, {2, 1, 1}, "\x38\x38");
                m.add("e.up_weight_scale_2", {2}, {1, 2});
                m.add("e.up_input_scale", {2}, {1, 2});
            },
            "e.up", "to U8 with scales ('e.up_weight_scale')"},
        {"integers with scales of another name",
            [&](owned_model& m) {
                m.add("q.weight", dtype::i8, {4, 4}, codes);
                m.add("q.scales", {4, 1}, {1, 1, 1, 1});
                m.add("q.zero_points", dtype::i8, {4}, "\1\1\1\1");
            },
            "q.weight", "to I8 with scales ('q.scales')"},
        {"NVFP4 in ComfyUI's order",
            [&](owned_model& m) {
                const std::string mark = R"({"format": "nvfp4"})";
                m.add("q.weight", dtype::u8, {2, 8}, codes);
                m.add("q.weight_scale", dtype::f8_e4m3, {2, 1}, "\x38\x38");
                m.add("q.weight_scale_2", {}, {1});
                m.add("q.comfy_quant", dtype::u8, {static_cast<std::int64_t>(mark.size())}, mark);
            },
            "q.weight", "by ComfyUI as 'nvfp4'"},
        {"ComfyUI's mark of numbers",
            [&](owned_model& m) {
                const std::string mark = R"({"format": "float8_e4m3fn"})";
                m.add("q.weight", {1}, {1});
                m.add("q.comfy_quant", dtype::u8, {static_cast<std::int64_t>(mark.size())}, mark);
            },
            "q.weight", "by ComfyUI as 'float8_e4m3fn' ('q.comfy_quant'), and its tensor is F32"},
        {"MXFP4 with a NaN",
            [&](owned_model& m) {
                m.add("q.up_blocks", dtype::u8, {1, 1, 1, 16}, codes);
                m.add("q.up_scales", dtype::u8, {1, 1, 1}, "\xff");
            },
            "q.up", "the scale nan"},
        {"MXFP4 without scales", [&](owned_model& m) { m.add("q.up_blocks", dtype::u8, {1, 1, 1, 16}, codes); }, "q.up",
            "without scales"},
        {"MXFP4 with scales of another dtype",
            [&](owned_model& m) {
                m.add("q.up_blocks", dtype::u8, {1, 1, 1, 16}, codes);
                m.add("q.up_scales", {1, 1, 1}, {1});
            },
            "q.up", "without scales ('q.up_scales', U8)"},
        {"MXFP4 beside its numbers",
            [&](owned_model& m) {
                m.add("q.up_blocks", dtype::u8, {1, 1, 1, 16}, codes);
                m.add("q.up_scales", dtype::u8, {1, 1, 1}, "\x7f");
                m.add("q.up", {1}, {1});
            },
            "q.up", "is there twice, as it is and quantised ('q.up_blocks')"},
        {"FNUZ",
            [&](owned_model& m) {
                m.add("l.weight", dtype::f8_e4m3fnuz, {4, 4}, codes);
                m.add("l.weight_scale", {}, {1});
            },
            "l.weight", "is quantised to F8_E4M3FNUZ"},
        {"the other FNUZ",
            [&](owned_model& m) {
                m.add("l.weight", dtype::f8_e5m2fnuz, {4, 4}, codes);
                m.add("l.weight_scale", {}, {1});
            },
            "l.weight", "is quantised to F8_E5M2FNUZ"},
        {"Marlin, sparse",
            [&](owned_model& m) {
                i32(m, "q.B_24", {8, 2});
                m.add("q.B_meta", dtype::i16, {8, 2}, std::string(32, '\1'));
                m.add("q.s", {1, 8}, std::vector<float>(8, 1));
            },
            "q", "(Marlin)"},
        {"EXL3",
            [&](owned_model& m) {
                m.add("q.trellis", dtype::i16, {2, 4}, codes);
                m.add("q.suh", {2}, {1, 1});
                m.add("q.bias", {2}, {1, 1}); // which is no part of it
            },
            "q", "ExLlamaV3"},
        {"QTIP",
            [&](owned_model& m) {
                m.add("q.trellis", dtype::i16, {2, 4}, codes);
                m.add("q.tlut", {2}, {1, 1});
                m.add("q.SU", {2}, {1, 1});
            },
            "q", "QTIP"},
        {"VPTQ",
            [&](owned_model& m) {
                i32(m, "q.indices", {1, 2, 2});
                m.add("q.centroids.weight", {1, 4}, {1, 1, 1, 1});
                m.add("q.weight_scale", {2}, {1, 1});
            },
            "q", "VPTQ"},
        {"HQQ",
            [&](owned_model& m) {
                m.add("q.W_q", dtype::u8, {4, 4}, codes);
                m.add("q.scale", {4, 1}, {1, 1, 1, 1});
                m.add("q.zero", {4, 1}, {1, 1, 1, 1});
            },
            "q", "HQQ"},
        {"Quanto",
            [&](owned_model& m) {
                m.add("q.weight._data", dtype::i8, {4, 4}, codes);
                m.add("q.weight._scale", {4, 1}, {1, 1, 1, 1});
            },
            "q.weight", "Quanto"},
        {"FP4",
            [&](owned_model& m) {
                m.add("q.weight", dtype::u8, {8, 1}, std::string(8, '\1'));
                m.add("q.weight.absmax", {1}, {1});
                m.add("q.weight.quant_state.bitsandbytes__fp4", dtype::u8, {2}, "{}");
            },
            "q.weight", "FP4 by bitsandbytes"},
        {"four bits of no kind",
            [&](owned_model& m) {
                m.add("q.weight", dtype::u8, {8, 1}, std::string(8, '\1'));
                m.add("q.weight.absmax", dtype::u8, {1}, "\1");
                m.add("q.weight.nested_absmax", {1}, {1});
            },
            "q.weight", "to 4 bits by bitsandbytes"},
        {"words of integers",
            [&](owned_model& m) {
                i32(m, "q.weight", {4, 1});
                m.add("q.weight_scales", {4, 1}, {1, 1, 1, 1});
            },
            "q.weight", "to integers"},
        {"packed codes alone", [&](owned_model& m) { m.add("q.weight_packed", dtype::u8, {2, 8}, codes); }, "q.weight",
            "packed codes without 'weight_scale'"},
        {"packed with scales of F32",
            [&](owned_model& m) {
                m.add("q.weight", dtype::u8, {2, 8}, codes);
                m.add("q.weight_scale", {2, 1}, {1, 1});
            },
            "q.weight", "with scales of F32: neither MXFP4 nor NVFP4"},
        {"one row of packed codes",
            [&](owned_model& m) {
                m.add("q.weight", dtype::u8, {16}, codes);
                m.add("q.weight_scale", dtype::u8, {1}, "\x7f");
            },
            "q.weight", "packed codes of shape [16]; expected [out, in / 2]"},
        {"rows that are no whole groups",
            [&](owned_model& m) {
                m.add("q.weight", dtype::u8, {4, 4}, codes);
                m.add("q.weight_scale", dtype::u8, {4, 1}, "\x7f\x7f\x7f\x7f");
            },
            "q.weight", "numbers of shape [4, 8], whose rows are no multiple of 32"},
        {"QuIP# without a module's name",
            [&](owned_model& m) {
                m.add("Qidxs", dtype::i16, {4, 2}, codes);
                m.add("SU", {16}, std::vector<float>(16, 1));
            },
            "Qidxs", "QuIP#"},
        {"packed bytes of Marlin",
            [&](owned_model& m) {
                m.add("q.weight_packed", dtype::u8, {2, 8}, codes);
                m.add("q.scale_packed", {1, 8}, std::vector<float>(8, 1));
            },
            "q", "Marlin 2:4"},
        {"GPTQ without scales", [&](owned_model& m) { i32(m, "q.qweight", {1, 8}); }, "q", "by GPTQ"},
        {"GPTQ with scales in a row",
            [&](owned_model& m) {
                i32(m, "q.qweight", {1, 8});
                m.add("q.scales", {8}, std::vector<float>(8, 1));
            },
            "q", "by GPTQ"},
        {"GPTQ in a row",
            [&](owned_model& m) {
                i32(m, "q.qweight", {8});
                m.add("q.scales", {1, 8}, std::vector<float>(8, 1));
            },
            "q", "by GPTQ"},
        {"GPTQ of one word a column",
            [&](owned_model& m) {
                i32(m, "q.qweight", {1, 8});
                m.add("q.scales", {1, 8}, std::vector<float>(8, 1));
            },
            "q", "by GPTQ"},
        {"integers whose zero points are floating",
            [&](owned_model& m) {
                m.add("q.weight", dtype::i8, {4, 4}, codes);
                m.add("q.a_zero_point", {}, {1});
                m.add("q.scales", {4, 1}, {1, 1, 1, 1});
                m.add("q.comfy_quant", dtype::u8, {2}, "{}");
            },
            "q.weight", "to I8 with scales ('q.scales')"},
        {"ComfyUI's mark of numbers with a scale",
            [&](owned_model& m) {
                m.add("q.weight", {1}, {1});
                m.add("q.weight_scale_x", {}, {1});
                m.add("q.comfy_quant", dtype::u8, {2}, "{}");
            },
            "q.weight", "by ComfyUI as '?' ('q.comfy_quant'), and its tensor is F32"},
        {"ComfyUI's mark of another dtype",
            [&](owned_model& m) {
                f32_scale({}, {1})(m);
                m.add("l.comfy_quant", {1}, {1});
            },
            "l.weight", "by ComfyUI as '?'"},
        {"no scale of one number",
            [&](owned_model& m) {
                m.add("l.weight", dtype::f8_e4m3, {}, "\x38");
                m.add("l.weight_scale", {0}, {});
            },
            "l.weight", "of shape [0] for a weight of shape []; expected [] for all of it"},
        {"scales of nothing",
            [&](owned_model& m) {
                m.add("l.weight", dtype::f8_e4m3, {0, 4}, "");
                m.add("l.weight_scale", {2}, {1, 1});
            },
            "l.weight", "of shape [2] for a weight of shape [0, 4]"},
        {"scales of a row",
            [&](owned_model& m) {
                m.add("l.weight", dtype::f8_e4m3, {16}, codes);
                m.add("l.weight_scale", {3}, {1, 1, 1});
            },
            "l.weight", "of shape [3] for a weight of shape [16]"},
        {"more scales than rows", f32_scale({8, 1}, std::vector<float>(8, 1)), "l.weight", "shape [8, 1]"},
        {"FP8 without a scale beside a mark",
            [&](owned_model& m) {
                m.add("l.weight", dtype::f8_e4m3, {4, 4}, codes);
                m.add("scaled_fp8", dtype::f8_e4m3, {0}, "");
            },
            "l.weight", "which other layers of the model have"},
        {"a scale of Mistral's alone", [&](owned_model& m) { m.add("l.qscale_weight", {}, {1}); }, "l.weight",
            "a scale ('l.qscale_weight') and no codes"},
        {"a scale of ComfyUI's alone", [&](owned_model& m) { m.add("l.scale_weight", {}, {1}); }, "l.weight",
            "a scale ('l.scale_weight') and no codes"},
        {"a scale of words that are no codes",
            [&](owned_model& m) {
                m.add("l.weight", dtype::u16, {2, 4}, codes);
                m.add("l.weight_scale", {}, {1});
            },
            "l.weight", "a scale ('l.weight_scale') and no codes"},
        {"a scale behind its word",
            [&](owned_model& m) {
                m.add("e.gate", dtype::f8_e4m3, {4, 4}, codes);
                m.add("e.scale_gate", {}, {1});
                m.add("e.scale_other", {}, {1});
            },
            "e.gate", "says too little ('e.scale_gate')"},
        {"ComfyUI's mark alone", [&](owned_model& m) { m.add("q.comfy_quant", dtype::u8, {2}, "{}"); }, "q.weight",
            "by ComfyUI as '?' ('q.comfy_quant'), and has no codes"}};
    auto all = faults;
    for (const std::string name :
        {"l.scales", "l.scale_inv", "l.weight.scale", "l.weight_s", "l.weight_scale_2", "l.weight_global_scale", "l.s",
            "l.weight_zero_point", "l.weight_amax", "l.weight_absmax_1", "l.weights_scale"}) {
        all.push_back({"a scale of another name",
            [&codes, name](owned_model& m) {
                m.add("l.weight", dtype::f8_e4m3, {4, 4}, codes);
                m.add(name, {1}, {1});
            },
            "l.weight", "a scale of a name that says too little ('" + name + "')"});
    }
    for (const auto& one : std::vector<std::pair<extents, extents>>{{{16}, {}}, {{1, 16}, {1}},
             {{1, 1, 1, 1, 16}, {1, 1, 1, 1}}, {{1, 2, 8}, {1, 2}}, {{1, 1, 16}, {1, 2}}, {{}, {}}}) {
        all.push_back({"MXFP4 of other shapes",
            [&codes, shape = one.first, scales = one.second](owned_model& m) {
                m.add("q.up_blocks", dtype::u8, shape, codes.substr(0, element_count(shape)));
                m.add("q.up_scales", dtype::u8, scales, std::string(element_count(scales), '\x7f'));
            },
            "q.up",
            "has MXFP4 codes of shape " + to_string(one.first) + " and scales of shape " + to_string(one.second)});
    }
    for (const auto& one : std::vector<std::tuple<dtype, std::vector<float>, std::string>>{
             {dtype::f32, {1, 1}, "a global scale of F32 [2]; expected one F32"},
             {dtype::u32, {1}, "a global scale of U32 [1]; expected one F32"},
             {dtype::f32, {0}, "the global scale 0; expected a positive number"},
             {dtype::f32, {-1}, "the global scale -1; expected a positive number"},
             {dtype::f32, {HUGE_VALF}, "the global scale inf; expected a positive number"},
             {dtype::f32, {NAN}, "the global scale nan; expected a positive number"},
             {dtype::f32, {1e-40f}, ", by which nothing can be divided"}}) {
        all.push_back({"NVFP4 with a global scale that is none",
            [&codes, type = std::get<0>(one), values = std::get<1>(one)](owned_model& m) {
                m.add("q.weight_packed", dtype::u8, {2, 8}, codes);
                m.add("q.weight_scale", dtype::f8_e4m3, {2, 1}, "\x38\x38");
                m.add("q.weight_global_scale", type, {static_cast<std::int64_t>(values.size())},
                    std::string(reinterpret_cast<const char*>(values.data()), 4 * values.size()));
            },
            "q.weight", std::get<2>(one)});
    }
    for (const auto& mark : {std::string("no JSON"), std::string("[1]"), std::string(R"({"format": ""})"),
             R"({"format": ")" + std::string(41, 'x') + "\"}"}) {
        all.push_back({"a mark of ComfyUI that says nothing",
            [&codes, mark](owned_model& m) {
                m.add("l.weight", dtype::f8_e4m3, {4, 4}, codes);
                m.add("l.weight_scale", {}, {1});
                m.add("l.comfy_quant", dtype::u8, {static_cast<std::int64_t>(mark.size())}, mark);
            },
            "l.weight", "by ComfyUI as '?'"});
    }
    for (const auto& fault : all) {
        CAPTURE(fault.words);
        owned_model stored;
        fault.make(stored);
        stored.add("z.norm", {2}, {1, 2});
        stored.add("l.bias", {2}, {1, 2});
        const quantised_layers layers(stored.model());
        REQUIRE(layers.unread().size() == 1);
        const auto& found = layers.unread()[0];
        CHECK(found.name == fault.layer);
        CHECK_MESSAGE(found.what.find(fault.words) != std::string::npos, found.what);
        for (const auto& part : found.parts) {
            CHECK(layers.model().find(part) != nullptr); // nothing is hidden
        }
        const auto refused = [&](const callback<bool(std::string_view)>& include) -> std::string {
            try {
                refuse_unread(layers, include, "m.safetensors");
            }
            catch (const error& failure) {
                return failure.what();
            }
            return "";
        };
        CHECK(refused({}).find("m.safetensors: layer '" + fault.layer + "' ") == 0);
        const auto& parts = found.parts;
        { // what the message gives as the way to exclude the layer is that, and leaves all else
            const auto text = refused({});
            const std::string option = "(the tool: --exclude '";
            const auto first = text.find(option) + option.size(), last = text.find("')", first);
            REQUIRE(first > option.size());
            const name_pattern pattern(text.substr(first, last - first));
            CHECK(refused([&](std::string_view name) { return !pattern.occurs_in(name); }).empty());
            for (const auto& [name, value] : stored.model()) {
                CHECK(pattern.occurs_in(name)
                    == (std::find(parts.begin(), parts.end(), name) != parts.end() || name == found.name));
            }
        }
        const auto listed = [&](std::string_view name) {
            return std::find(parts.begin(), parts.end(), name) != parts.end();
        };
        CHECK(refused([&](std::string_view name) { return !listed(name); }).empty());
        if (parts.size() > 1) {
            CHECK(refused([&](std::string_view name) { return name != parts[0]; }).find("exclude the whole layer")
                != std::string::npos);
        }
    }
}

TEST_CASE("what is not quantised stays as it is")
{
    owned_model stored;
    stored.add("f8", dtype::f8_e4m3, {2}, "\x38\x38"); // FP8 without scales anywhere: numbers
    stored.add("l.weight", {2}, {1, 2});
    stored.add("l.weight_scale", {}, {3}); // a parameter that happens to be called so
    stored.add("input_scale", {}, {3});
    stored.add("k.weight", dtype::f8_e4m3, {2, 2}, "\x38\x38\x38\x38"); // and beside what is no scale of it
    stored.add("k.bias", {2}, {1, 2});
    stored.add("k.k_scale", {}, {3});
    stored.add("k.norm.scale", {}, {3});
    stored.add("logit_scale", {}, {3});
    stored.add("ids", dtype::i64, {1, 2}, std::string(16, '\1'));
    stored.add("q.zero_point", dtype::i32, {2, 1}, std::string(8, '\1')); // of a fake quantiser
    stored.add("q.scale", {}, {3});
    // One tensor of a scheme without what would make it one.
    stored.add("m.B", dtype::i32, {2, 2}, std::string(16, '\1'));
    stored.add("m.indices", dtype::i64, {2, 1}, std::string(16, '\1'));
    stored.add("m.codes", dtype::u8, {2, 2}, std::string(4, '\1'));
    stored.add("m.weight._data", dtype::i8, {2, 2}, std::string(4, '\1'));
    stored.add("m.SCB", {1}, {1});
    stored.add("m.up_blocks", dtype::u8, {2, 2}, std::string(4, '\1'));
    stored.add("m.down_blocks", dtype::u8, {1, 2, 8}, std::string(16, '\1'));
    stored.add("n.weight", dtype::u8, {2, 2}, std::string(4, '\1'));
    stored.add("o.weight", dtype::f8_e4m3fnuz, {2, 2}, std::string(4, '\1'));
    const quantised_layers layers(stored.model());
    CHECK(!layers.any());
    CHECK(layers.model().size() == 21);
}

TEST_CASE("scales are told apart by the longest name that they continue")
{
    owned_model stored;
    const std::string codes(4, '\x38');
    for (const std::string name : {"e.gate", "e.gate_up_proj", "l.bias", "l.weight"}) {
        stored.add(name, dtype::f8_e4m3, {2, 2}, codes);
        stored.add(name + "_scale", {}, {0.5f});
    }
    stored.add("l.weight_zero_point", dtype::i8, {}, std::string(1, '\0'));
    const quantised_layers layers(stored.model());
    CHECK(layers.unread().empty());
    REQUIRE(layers.model().size() == 4);
    for (const auto& [name, tensor] : layers.model()) { CHECK(all_of(tensor) == std::vector<float>(4, 0.5f)); }
}

TEST_CASE("markers and scales of inputs go with their layers, and are no tensors to merge")
{
    random_words random("markers");
    fp8_layer made;
    make(made, {{4, 4}, {}, 4, 4}, dtype::f8_e4m3, dtype::f32, random, "l.scale_weight");
    made.stored.add("l.scale_input", {}, {0.5f});
    made.stored.add("scaled_fp8", dtype::f8_e4m3, {0}, "");
    made.stored.add("attn.k_scale", {}, {0.25f});
    made.stored.add("attn.output_scale", {}, {0.25f});
    made.stored.add("l.output_scale", {}, {0.25f});
    const std::string codes(4, '\x38');
    made.stored.add("e.gate", dtype::f8_e4m3, {2, 2}, codes); // of experts: no weight's name
    made.stored.add("e.gate_scale", {}, {0.5f});
    made.stored.add("e.gate_input_scale", {}, {0.5f});
    made.stored.add("norm", {2}, {1, 2});
    const quantised_layers layers(made.stored.model());
    REQUIRE(layers.unread().empty());
    CHECK(layers.model().size() == 3);
    for (const auto& layer : layers.layers()) { CHECK(layer.layer().parts.size() == 3); }
    CHECK(layers.beside().size() == 4);
    // Without a module's name before theirs.
    owned_model bare;
    bare.add("weight", dtype::f8_e4m3, {2, 2}, codes);
    bare.add("weight_scale", {}, {0.5f});
    const quantised_layers of_bare(bare.model());
    REQUIRE(of_bare.layers().size() == 1);
    CHECK(all_of(of_bare.model()[0].tensor) == std::vector<float>(4, 0.5f));
}

TEST_CASE("merges through a quantising sink: the numbers of the merge in f32, quantised")
{
    random_words random("sink");
    const scratch folder;
    // One layer in memory, one in a file without a name; a task in F32 among quantised ones.
    const std::vector<fp8_case> shapes{{{130, 300}, {2, 3}, 128, 128}, {{600, 700}, {600, 1}, 1, 700}};
    std::deque<owned_model> stored(3), plain(3);
    std::deque<quantised_layers> layers;
    for (std::size_t m = 0; m < 3; ++m) {
        for (std::size_t l = 0; l < shapes.size(); ++l) {
            fp8_layer made;
            make(made, shapes[l], dtype::f8_e4m3, dtype::f32, random);
            const std::string name = "layer" + std::to_string(l);
            for (const auto& [part, tensor] : made.stored.model()) {
                stored[m].add(name + part.substr(1), tensor.dtype, tensor.shape,
                    {static_cast<const char*>(tensor.data), tensor.bytes()});
            }
            plain[m].add(name + ".weight", shapes[l].shape, made.expected);
        }
        const std::vector<float> norm{random.between(-1, 1), random.between(-1, 1)};
        stored[m].add("norm", {2}, norm);
        plain[m].add("norm", {2}, norm);
        layers.emplace_back(stored[m].model());
    }
    cpu policy;
    policy.threads = 3;
    CHECK(fingerprint(policy, layers[0].model()) == fingerprint(policy, plain[0].model()));
    CHECK(fingerprint_sketch(layers[0].model()) == fingerprint_sketch(plain[0].model()));

    const auto run = [&](const auto& options) {
        const std::vector<const_model_ref> quantised{layers[1].model(), plain[2].model()};
        const std::vector<const_model_ref> numbers{plain[1].model(), plain[2].model()};
        const aligned_models models(&layers[0].model(), quantised), reference(&plain[0].model(), numbers);
        std::deque<std::vector<float>> expected;
        std::vector<void*> places;
        for (const auto& spec : reference.outputs()) {
            expected.emplace_back(spec.size());
            places.push_back(expected.back().data());
        }
        memory_sink in_memory(places);
        merge(policy, options, reference, in_memory);

        for (const bool keep : {false, true}) {
            const auto plan = plan_outputs(models, layers[0].model(), &layers[0], keep);
            CHECK(plan.plain() == !keep);
            std::deque<std::vector<std::byte>> files;
            std::vector<void*> file_places;
            std::map<std::string, std::size_t> place;
            for (const auto& spec : plan.specs) {
                place[spec.name] = files.size();
                files.emplace_back(spec.bytes());
                file_places.push_back(files.back().data());
            }
            memory_sink file(file_places);
            quantising_sink out(plan, file, folder.path());
            merge(policy, options, models, out);
            out.finish();
            for (std::size_t i = 0; i < expected.size(); ++i) {
                const auto& name = reference.outputs()[i].name;
                CAPTURE(name);
                const auto& written = files[place.at(name)];
                if (!keep || name == "norm") {
                    REQUIRE(std::memcmp(written.data(), expected[i].data(), 4 * expected[i].size()) == 0);
                    continue;
                }
                const auto& layer = layers[0].layers()[i].layer();
                REQUIRE(layer.name == name);
                std::vector<std::uint8_t> codes(expected[i].size());
                std::vector<std::byte> scales(layer.scales.bytes());
                memory_sink direct({codes.data(), scales.data()});
                quantise_fp8(layer, expected[i].data(), direct, 0, 1);
                CHECK(std::memcmp(written.data(), codes.data(), codes.size()) == 0);
                CHECK(files[place.at(name + "_scale")] == scales);
            }
        }
        CHECK(folder.names().empty());
    };
    run(average_options{});
    run(ties_options{.density = 0.3});
}

TEST_CASE("what lies beside layers stays beside them, or is left out where none is left")
{
    random_words random("beside");
    fp8_layer made;
    make(made, {{4, 4}, {}, 4, 4}, dtype::f8_e4m3, dtype::f32, random);
    made.stored.add("attn.k_scale", {}, {0.25f});
    made.stored.add("scaled_fp8", dtype::f8_e4m3, {0}, "");
    made.stored.add("empty.weight", dtype::f8_e4m3, {0, 4}, "");
    made.stored.add("empty.weight_scale", {}, {1});
    const quantised_layers layers(made.stored.model());
    REQUIRE(layers.unread().empty());
    owned_model task;
    task.add("l.weight", {4, 4}, made.expected);
    task.add("empty.weight", {0, 4}, {});
    const std::vector<const_model_ref> tasks{task.model()};
    const aligned_models models(&layers.model(), tasks);
    for (const bool keep : {true, false}) {
        const auto plan = plan_outputs(models, layers.model(), &layers, keep);
        CHECK(plan.plain() == !keep);
        CHECK(plan.left_out
            == (keep ? std::vector<std::string>{} : std::vector<std::string>{"attn.k_scale", "scaled_fp8"}));
        std::map<std::string, std::vector<std::byte>> files;
        std::vector<void*> places;
        for (const auto& spec : plan.specs) {
            files[spec.name].resize(spec.bytes() + 1);
            places.push_back(files.at(spec.name).data());
        }
        memory_sink file(places);
        quantising_sink out(plan, file, {});
        CHECK(out.rewritable() == (!keep && file.rewritable()));
        CHECK(out.wants(0));
        merge(cpu{}, average_options{}, models, out);
        out.finish();
        CHECK(files.contains("attn.k_scale") == keep);
        if (keep) {
            float scale = 0;
            std::memcpy(&scale, files.at("attn.k_scale").data(), sizeof scale);
            CHECK(scale == 0.25f);
        }
    }
}

TEST_CASE("a sink of layers says what was not written")
{
    random_words random("incomplete");
    fp8_layer made;
    make(made, {{4, 4}, {}, 4, 4}, dtype::f8_e4m3, dtype::f32, random);
    const quantised_layers layers(made.stored.model());
    const aligned_models models(&layers.model(), {&layers.model(), 1});
    const auto plan = plan_outputs(models, layers.model(), &layers, true);
    std::vector<std::byte> codes(16), scale(4);
    memory_sink file({codes.data(), scale.data()});
    quantising_sink out(plan, file, {});
    const std::vector<float> some(16, 1);
    CHECK(out.direct(0) == nullptr);
    CHECK_THROWS_AS(out.write(0, 60, some.data(), 8), invalid_argument);
    out.write(0, 0, some.data(), 32);
    CHECK_THROWS_AS(out.finish(), invalid_argument);
    out.write(0, 32, some.data(), 32);
    CHECK_THROWS_AS(out.write(0, 0, some.data(), 4), invalid_argument);
    out.finish();
    CHECK(static_cast<unsigned>(codes[3]) == 0x7eu);
}

TEST_CASE("layers that take no part stay as they are stored, and are numbers where one dtype is asked for")
{
    random_words random("excluded");
    fp8_layer made;
    make(made, {{4, 4}, {4}, 1, 4}, dtype::f8_e4m3, dtype::f32, random);
    made.stored.add("norm", {2}, {1, 2});
    const quantised_layers layers(made.stored.model());
    model_options options;
    options.include = [](std::string_view name) { return name == "norm"; };
    {
        const aligned_models models(&layers.model(), {&layers.model(), 1}, options);
        const auto plan = plan_outputs(models, layers.model(), &layers, false);
        REQUIRE(plan.specs.size() == 3);
        std::vector<std::byte> codes(16), scales(16), norm(8);
        memory_sink file({codes.data(), scales.data(), norm.data()});
        quantising_sink out(plan, file, {});
        merge(cpu{}, average_options{}, models, out);
        out.finish();
        CHECK(std::memcmp(codes.data(), made.stored.model().find("l.weight")->data, 16) == 0);
        CHECK(std::memcmp(scales.data(), made.stored.model().find("l.weight_scale")->data, 16) == 0);
    }
    options.output = dtype::bf16;
    const aligned_models models(&layers.model(), {&layers.model(), 1}, options);
    const auto plan = plan_outputs(models, layers.model(), &layers, true);
    REQUIRE(plan.specs.size() == 2);
    CHECK(plan.specs[0].dtype == dtype::bf16);
    std::vector<std::uint16_t> weight(16), norm(2);
    memory_sink file({weight.data(), norm.data()});
    quantising_sink out(plan, file, {});
    merge(cpu{}, average_options{}, models, out);
    out.finish();
    for (std::size_t i = 0; i < 16; ++i) { CHECK(weight[i] == f32_to_bf16(made.expected[i])); }
}

TEST_CASE("fp8 without scales is rounded to it again, each number by itself")
{
    // Sums of two: exact in f32; what E4M3 has around them by its definition, ties to even.
    const std::vector<float> twice{1, 17, 19, 21, -0.001953125f, 0.0009765625f, 448, 464},
        result{1, 16, 20, 20, -0.001953125f, 0, 448, 448};
    for (const auto type : {dtype::f8_e4m3, dtype::f8_e5m2}) {
        CAPTURE(to_string(type));
        owned_model base, task;
        const std::string codes(8, '\0'); // zeros
        base.add("w", type, {8}, codes);
        base.add("b", {8}, std::vector<float>(8, 1.0f));
        task.add("w", {8}, twice);
        task.add("b", {8}, std::vector<float>(8, 3.0f));
        const auto write = [&](float largest, overflow how, std::uint64_t& saturated) {
            auto values = twice;
            values[0] = largest;
            owned_model given;
            given.add("w", {8}, values);
            given.add("b", {8}, std::vector<float>(8, 3.0f));
            model_options options;
            options.on_overflow = how;
            const std::vector<const_model_ref> tasks{given.model()};
            const aligned_models models(&base.model(), tasks, options);
            const auto plan = plan_outputs(models, base.model(), nullptr, true);
            REQUIRE(plan.specs.size() == 2);
            CHECK(plan.specs[0].dtype == dtype::f32);
            CHECK(plan.specs[1].dtype == type);
            CHECK_FALSE(plan.plain());
            std::vector<std::uint8_t> written(8);
            std::vector<float> others(8);
            memory_sink file({others.data(), written.data()});
            quantising_sink out(plan, file, {});
            CHECK_FALSE(out.rewritable()); // what is rounded is gone
            merge(cpu{}, average_options{}, models, out);
            out.finish();
            saturated = out.saturated();
            CHECK(others == std::vector<float>(8, 3.0f));
            return written;
        };
        const auto meaning_of = [&](std::uint8_t code) {
            return type == dtype::f8_e4m3 ? meaning(code, 4, 3) : meaning(code, 5, 2);
        };
        std::uint64_t saturated = 9;
        const auto written = write(1, overflow::error, saturated);
        CHECK(saturated == 0);
        for (std::size_t i = 0; i < 8 && type == dtype::f8_e4m3; ++i) { CHECK(meaning_of(written[i]) == result[i]); }
        const bool wide = type == dtype::f8_e5m2;
        const float largest = wide ? 57344.0f : 448.0f, beyond = wide ? 61440.0f : std::nextafter(464.0f, 500.0f);
        CHECK(meaning_of(write(std::nextafter(beyond, 0.0f), overflow::error, saturated)[0]) == largest);
        CHECK_THROWS_WITH_AS(
            (void)write(beyond, overflow::error, saturated), doctest::Contains("'w' would hold"), nonfinite_error);
        CHECK(meaning_of(write(-beyond, overflow::saturate, saturated)[0]) == -largest);
        CHECK(saturated == 1);
        CHECK(int{write(-beyond, overflow::propagate, saturated)[0]} == (wide ? 0xfc : 0xff));
    }
    { // NaN and infinity were no overflow
        owned_model zeros;
        zeros.add("w", dtype::f8_e5m2, {3}, std::string(3, '\0'));
        owned_model given;
        given.add("w", {3}, {NAN, HUGE_VALF, 1});
        model_options options;
        options.on_nonfinite = nonfinite::propagate;
        const std::vector<const_model_ref> tasks{given.model()};
        const aligned_models models(&zeros.model(), tasks, options);
        const auto plan = plan_outputs(models, zeros.model(), nullptr, true);
        std::vector<std::uint8_t> written(3);
        memory_sink file({written.data()});
        quantising_sink out(plan, file, {});
        merge(cpu{}, average_options{}, models, out);
        out.finish();
        CHECK(out.saturated() == 0);
        CHECK((written[0] & 0x7fu) > 0x7cu);
        CHECK(int{written[1]} == 0x7c);
        CHECK(int{written[2]} == 0x3c);
    }
    // Without being asked to keep it, it becomes numbers.
    owned_model base;
    base.add("w", dtype::f8_e4m3, {8}, std::string(8, '\0'));
    const aligned_models models(&base.model(), {&base.model(), 1});
    CHECK(plan_outputs(models, base.model(), nullptr, false).specs[0].dtype == dtype::f32);
}

TEST_CASE("what takes tensors as memory refuses layers that are decoded")
{
    random_words random("memory");
    const scratch folder;
    fp8_layer made;
    make(made, {{4, 4}, {}, 4, 4}, dtype::f8_e4m3, dtype::f32, random);
    const quantised_layers layers(made.stored.model());
    CHECK_THROWS_AS((void)flat_view<float>(layers.model()[0].tensor, "l.weight"), invalid_argument);
    CHECK_THROWS_AS(write_safetensors(folder / "m.safetensors", layers.model()), invalid_argument);
    write_safetensors(folder / "m.safetensors", made.stored.model());
    const auto opened = open_model(folder / "m.safetensors");
    REQUIRE(opened.layers() != nullptr);
    CHECK(opened.model().size() == 1);
    CHECK(opened.stored().size() == 2);
    CHECK(same_bits(all_of(opened.model()[0].tensor), made.expected));
}

} // namespace quantised_test
