// Adapters of every dialect: what is wrong with a file is said by the tensor's or module's name, products of factors
// are what their definitions give, and what a dialect cannot say is refused before anything is written.
// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/adapter_convert.hpp>
#include <taskvec/formats/adapter_names.hpp>

#include "reference/adapters.hpp"
#include "scratch.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace adapter_dialects_test {

using namespace taskvec;

using shapes = std::map<std::string, extents>;
constexpr double infinity = std::numeric_limits<double>::infinity();

/// Small numbers, others for every name.
std::vector<float> values_of(const std::string& name, const extents& shape)
{
    std::vector<float> values(element_count(shape));
    unsigned word = 7;
    for (const char c : name) { word = word * 31 + static_cast<unsigned char>(c); }
    for (auto& value : values) {
        word = word * 1664525u + 1013904223u;
        value = static_cast<float>(static_cast<int>(word >> 24)) / 64.0f - 2.0f;
    }
    return values;
}

/// A file of such tensors.
void write_file(const std::filesystem::path& path, const shapes& tensors, metadata_map metadata = {})
{
    std::map<std::string, std::vector<float>> values;
    const_model_ref model;
    for (const auto& [name, shape] : tensors) {
        values[name] = values_of(name, shape);
        model.insert(name, {values[name].data(), dtype::f32, shape, {}});
    }
    write_safetensors(path, model, std::move(metadata), durability::process);
}
std::filesystem::path file_of(const scratch& folder, const shapes& tensors, metadata_map metadata = {})
{
    write_file(folder / "a.safetensors", tensors, std::move(metadata));
    return folder / "a.safetensors";
}
/// A directory as PEFT or MLX write them.
std::filesystem::path directory_of(
    const scratch& folder, const shapes& tensors, const std::string& config, const std::string& name = "adapter_model")
{
    std::filesystem::create_directories(folder / "adapter");
    write_file(folder / ("adapter/" + name + ".safetensors"), tensors);
    spill(folder / "adapter/adapter_config.json", config);
    return folder / "adapter";
}

std::string refusal(const std::filesystem::path& path)
{
    try {
        (void)read_adapter<float>(path);
    }
    catch (const error& problem) {
        return problem.what();
    }
    return "nothing";
}
void says(const std::string& found, const std::string& words)
{
    CHECK_MESSAGE(found.find(words) != std::string::npos, found);
}

shapes with(shapes tensors, const shapes& more)
{
    for (const auto& [name, shape] : more) { tensors[name] = shape; }
    return tensors;
}
/// Factors of 4×3 of rank 2, as kohya and PEFT call them.
shapes kohya(const std::string& module = "lora_unet_m")
{
    return {{module + ".lora_up.weight", {4, 2}}, {module + ".lora_down.weight", {2, 3}}};
}
const shapes loha{{"lora_unet_m.hada_w1_a", {4, 2}}, {"lora_unet_m.hada_w1_b", {2, 3}},
    {"lora_unet_m.hada_w2_a", {4, 2}}, {"lora_unet_m.hada_w2_b", {2, 3}}};

TEST_CASE("a module of an adapter that contradicts itself is refused by name, whatever it is made of")
{
    const auto refused = [](const shapes& tensors, const std::string& words) {
        const scratch folder;
        CAPTURE(words);
        says(refusal(file_of(folder, tensors)), words);
    };
    const std::string m = "lora_unet_m";
    refused({{m + ".alpha", {}}}, "an alpha, a magnitude or a bias but no factors");
    refused(with(kohya(), loha), "factors of more than one kind");
    refused({{m + ".lora_up.weight", {4, 0}}, {m + ".lora_down.weight", {0, 3}}}, "has rank 0");
    refused(with(kohya(), {{m + ".lora_down.weight", {3, 3}}}), "their ranks differ");
    refused({{m + ".lora_up.weight", {4, 2}}}, "half of its update is missing");
    // Convolutions.
    for (const auto& mid : {extents{2, 2}, extents{3, 2, 1, 1}, extents{2, 3, 1, 1}}) {
        refused(
            with(kohya(), {{m + ".lora_mid.weight", mid}}), "which does not fit between its factors of ranks 2 and 2");
    }
    refused(with(kohya(), {{m + ".lora_mid.weight", {2, 2, 3, 3}}, {m + ".lora_down.weight", {2, 3, 3, 3}}}),
        "only that has a kernel");
    refused(with(kohya(), {{m + ".lora_up.weight", {4, 2, 3, 3}}}),
        "of a convolution's factors only the first has a kernel");
    // What belongs to the outputs.
    for (const auto& shape : {extents{1, 4}, extents{3, 1}, extents{5, 1}, extents{}}) {
        refused(with(kohya(), {{m + ".dora_scale", shape}}), "and module 'lora_unet_m' has 4 outputs");
    }
    for (const auto& shape : {extents{5}, extents{4, 1}}) {
        refused(with(kohya(), {{m + ".lora_up.bias", shape}}), "and module 'lora_unet_m' has 4 outputs");
    }
    refused(with(kohya(), {{m + ".alpha", {2}}}), "is no finite number");
    // LoHa and LoKr.
    refused(with(loha, {{m + ".hada_t2", {2, 2, 1, 1}}}), "has hada_t2 but no hada_t1");
    refused(with(loha,
                {{m + ".hada_t1", {2, 2, 1, 1}}, {m + ".hada_t2", {2, 2, 3, 3}}, {m + ".hada_w1_a", {2, 4}},
                    {m + ".hada_w2_a", {2, 4}}}),
        "of another kernel than the other core");
    refused(with(loha, {{m + ".hada_w2_a", {5, 2}}}), "the two products of LoHa are 4×3 and 5×3");
    refused(with(loha, {{m + ".hada_w2_b", {2, 5}}}), "the two products of LoHa are 4×3 and 4×5");
    refused(with(loha, {{m + ".dora_scale", {4, 1}}}), "stands beside the factors of LoHa");
    const shapes lokr{{m + ".lokr_w1", {2, 2}}, {m + ".lokr_w2", {2, 3}}};
    refused({{m + ".lokr_w1", {2, 2}}}, "has other LoKr factors but no lokr_w2 or lokr_w2_a");
    refused(with(lokr, {{m + ".lokr_t2", {2, 2, 3, 3}}}), "has lokr_w2 whole, and a core lokr_t2 of it");
    refused({{m + ".lokr_w1", {2, 2}}, {m + ".lokr_w2_a", {2, 2}}, {m + ".lokr_w2_b", {3, 3}}}, "their ranks differ");
}

TEST_CASE("a file that is no adapter, or more than one, is refused by the tensor that shows it")
{
    const auto refused = [](const shapes& tensors, const std::string& words) {
        const scratch folder;
        CAPTURE(words);
        says(refusal(file_of(folder, tensors)), words);
    };
    const shapes peft{{"m.lora_A.weight", {2, 3}}, {"m.lora_B.weight", {4, 2}}};
    refused(with(peft, kohya()), "mixes dialects: ");
    refused(with(peft, {{"unet.n.lora.down.weight", {2, 3}}, {"unet.n.lora.up.weight", {4, 2}}}), "mixes dialects: ");
    refused({{"unet.m.lora_A.weight", {2, 3}}, {"unet.m.lora_B.weight", {4, 2}}, {"n.lora.down.weight", {2, 3}},
                {"n.lora.up.weight", {4, 2}}},
        "mixes dialects: ");
    refused({{"m.lora_A.one.weight", {2, 3}}, {"m.lora_B.two.weight", {4, 2}}}, "holds the adapters 'one' and 'two'");
    refused(with(peft, {{"m.lora_other", {2}}}), "tensor 'm.lora_other' is no part of a LoRA");
    refused(with(peft, {{"m.lora_A.default.other", {2}}}), "'m.lora_A.default.other' is no part of a LoRA");
    refused(with(peft, {{"m.oft_r", {0}}}), "'m.oft_r'");
    refused(with(peft, {{"n.lora_A.weight", {0}}}), "tensor 'n.lora_A.weight' ");
    refused({{"base_model.model.m.lora_A.weight", {2, 3}}, {"base_model.model.m.lora_B.weight", {4, 2}},
                {"lora_unet_m.alpha", {}}},
        "'lora_unet_m.alpha' does not begin with 'base_model.model.' as others of it do, which are PEFT's: this one is "
        "kohya's");
    refused({{"base_model.model.m.lora_A.weight", {2, 3}}, {"m.lora_B.weight", {4, 2}}},
        "'m.lora_B.weight' does not begin with 'base_model.model.'");
    // Twice the same is one; other bytes, or another shape, are another factor.
    refused(with(peft, {{"m.lora_A.default.weight", {2, 3}}}), "is the second such factor of its module");
    refused(with(peft, {{"m.lora_A.default.weight", {3, 2}}}), "is the second such factor of its module");
    refused({{"m.weight", {2, 2}}}, "holds no factors of an adapter");
    const scratch folder;
    for (const char* name : {"one", "two"}) {
        std::filesystem::create_directories(folder / name);
        spill(folder.path() / name / "adapter_config.json", "{}");
        says(refusal(folder.path()),
            name == std::string("one") ? "but 'one' in it does: name that"
                                       : "but 'one', 'two' in it do: name one of them");
    }
}

TEST_CASE("tensors beside factors are what their names say")
{
    const scratch folder;
    const auto adapter = read_adapter<float>(file_of(folder,
        {{"m.lora_A.default.weight", {2, 3}}, {"m.lora_B.default.weight", {4, 2}},
            {"head.modules_to_save.default.weight", {2, 2}}, {"other.modules_to_save.weight", {2, 2}},
            {"head.original_module.weight", {2, 2}}, {"m.lora_velora_embed", {2}}}));
    CHECK(adapter.dialect == adapter_dialect::peft);
    CHECK(adapter.modules.size() == 1);
    CHECK(adapter.wholes.size() == 2);
    CHECK(adapter.wholes.contains("head.weight"));
    CHECK(adapter.wholes.contains("other.weight"));
    const auto named = read_adapter<float>(
        file_of(folder, {{"m.lora_embedding_A.default", {2, 3}}, {"m.lora_embedding_B.default", {4, 2}}}));
    CHECK(named.modules.at("m").embedding);
    // The longest ending decides: this alpha is of the module, and of no layer within it.
    const auto encoder = read_adapter<float>(file_of(folder,
        {{"text_encoder.m.lora_linear_layer.down.weight", {2, 3}},
            {"text_encoder.m.lora_linear_layer.up.weight", {4, 2}}, {"text_encoder.m.lora_linear_layer.alpha", {}}}));
    CHECK(encoder.modules.at("text_encoder.m").update.scaling
        == static_cast<double>(values_of("text_encoder.m.lora_linear_layer.alpha", {})[0]) / 2);
    CHECK_FALSE(names_component("unet")); // a component alone is no module of it
    CHECK(names_component("unet.m"));
    // Embeddings that PEFT saves whole bring their magnitudes once more.
    std::vector<float> a(6, 1), b(8, 2), m(4, 3);
    const const_model_ref twice{{"m.lora_A.weight", {a.data(), dtype::f32, {2, 3}}},
        {"m.lora_B.weight", {b.data(), dtype::f32, {4, 2}}}, {"m.lora_magnitude_vector", {m.data(), dtype::f32, {4}}},
        {"m.lora_magnitude_vector.weight", {m.data(), dtype::f32, {4}}}};
    write_safetensors(folder / "twice.safetensors", twice, {}, durability::process);
    CHECK(read_adapter<float>(folder / "twice.safetensors").modules.at("m").magnitude == std::vector<double>(4, 3.0));
    // An alpha of any storage type or whole.
    const std::int64_t whole = 6;
    const float nan = std::nanf("");
    const_model_ref alphas{{"lora_unet_m.lora_down.weight", {a.data(), dtype::f32, {2, 3}}},
        {"lora_unet_m.lora_up.weight", {b.data(), dtype::f32, {4, 2}}}};
    auto other = alphas;
    alphas.insert("lora_unet_m.alpha", {&whole, dtype::i64, {1, 1}, {}});
    write_safetensors(folder / "alpha.safetensors", alphas, {}, durability::process);
    CHECK(read_adapter<float>(folder / "alpha.safetensors").modules.at("lora_unet_m").update.scaling == 3.0);
    other.insert("lora_unet_m.alpha", {&nan, dtype::f32, {}, {}});
    write_safetensors(folder / "alpha.safetensors", other, {}, durability::process);
    says(refusal(folder / "alpha.safetensors"), "'lora_unet_m.alpha' of shape [] is no finite number");
}

TEST_CASE("products of LoKr's and LoHa's factors are what their definitions give")
{
    const std::string m = "lora_unet_m.";
    const auto matrix_of = [&](const std::string& name, std::size_t rows, std::size_t cols) {
        auto made = reference::zeros(rows, cols);
        const auto values = values_of(m + name, {static_cast<std::int64_t>(rows), static_cast<std::int64_t>(cols)});
        for (std::size_t i = 0; i < rows * cols; ++i) { made[i / cols][i % cols] = static_cast<double>(values[i]); }
        return made;
    };
    const auto product = [](const reference::plain_matrix& x, const reference::plain_matrix& y) {
        auto made = reference::zeros(x.size(), y[0].size());
        for (std::size_t i = 0; i < x.size(); ++i) {
            for (std::size_t j = 0; j < y[0].size(); ++j) {
                for (std::size_t k = 0; k < y.size(); ++k) { made[i][j] += x[i][k] * y[k][j]; }
            }
        }
        return made;
    };
    const auto same = [](const reference::plain_matrix& found, const reference::plain_matrix& expected) {
        REQUIRE(found.size() == expected.size());
        REQUIRE(found[0].size() == expected[0].size());
        for (std::size_t i = 0; i < found.size(); ++i) {
            for (std::size_t j = 0; j < found[i].size(); ++j) {
                CHECK(found[i][j] == doctest::Approx(expected[i][j]).epsilon(1e-5));
            }
        }
    };
    // w1 from two factors of a small rank or a large one, or whole; w2 likewise.
    for (const std::int64_t rank : {0, 1, 3, 9}) {
        for (const std::int64_t inner : {0, 2}) {
            CAPTURE(rank);
            CAPTURE(inner);
            shapes tensors;
            auto w1 = matrix_of("lokr_w1", 3, 4), w2 = matrix_of("lokr_w2", 2, 5);
            if (rank == 0) { tensors[m + "lokr_w1"] = {3, 4}; }
            else {
                tensors[m + "lokr_w1_a"] = {3, rank};
                tensors[m + "lokr_w1_b"] = {rank, 4};
                const auto k = static_cast<std::size_t>(rank);
                w1 = product(matrix_of("lokr_w1_a", 3, k), matrix_of("lokr_w1_b", k, 4));
            }
            if (inner == 0) { tensors[m + "lokr_w2"] = {2, 5}; }
            else {
                tensors[m + "lokr_w2_a"] = {2, inner};
                tensors[m + "lokr_w2_b"] = {inner, 5};
                const auto k = static_cast<std::size_t>(inner);
                w2 = product(matrix_of("lokr_w2_a", 2, k), matrix_of("lokr_w2_b", k, 5));
            }
            auto expected = reference::zeros(6, 20);
            for (std::size_t i = 0; i < 6; ++i) {
                for (std::size_t j = 0; j < 20; ++j) { expected[i][j] = w1[i / 2][j / 5] * w2[i % 2][j % 5]; }
            }
            const scratch folder;
            const auto adapter = read_adapter<double>(file_of(folder, tensors));
            CHECK(adapter.dialect == adapter_dialect::kohya);
            const auto& made = adapter.modules.at("lora_unet_m");
            CHECK(made.kind == "LoKr");
            auto update = made.update;
            update.scaling = 1;
            same(reference::dense(update), expected);
        }
    }
    const scratch folder;
    const auto adapter = read_adapter<double>(file_of(folder, loha));
    auto update = adapter.modules.at("lora_unet_m").update;
    update.scaling = 1;
    auto expected = product(matrix_of("hada_w1_a", 4, 2), matrix_of("hada_w1_b", 2, 3));
    const auto second = product(matrix_of("hada_w2_a", 4, 2), matrix_of("hada_w2_b", 2, 3));
    for (std::size_t i = 0; i < 4; ++i) {
        for (std::size_t j = 0; j < 3; ++j) { expected[i][j] *= second[i][j]; }
    }
    same(reference::dense(update), expected);
    // Convolutions whose second side is whole.
    const auto whole = read_adapter<double>(file_of(folder, {{m + "lokr_w1", {2, 2}}, {m + "lokr_w2", {3, 2, 3, 1}}}));
    CHECK(whole.modules.at("lora_unet_m").kernel == extents{3, 1});
    says(refusal(directory_of(folder, {{"m.lokr_w1", {2, 2}}, {"m.lokr_w2", {3, 2, 3}}},
             R"({"peft_type": "LOKR", "r": 2, "alpha": 2})")),
        "of a convolution over one side PEFT lays LoKr's product out in another order");
    CHECK(refusal(directory_of(
              folder, {{"m.lokr_w1", {2, 2}}, {"m.lokr_w2", {3, 2}}}, R"({"peft_type": "LOKR", "r": 2, "alpha": 2})"))
        == "nothing");
}

TEST_CASE("MLX's configurations: what they leave out or say of another type is refused")
{
    const shapes tensors{{"model.layers.3.q.lora_a", {3, 2}}, {"model.layers.3.q.lora_b", {2, 4}}};
    const auto read = [&](const std::string& config, const shapes& more = {}) {
        const scratch folder;
        return refusal(directory_of(folder, with(tensors, more), config, "adapters"));
    };
    const std::string strong = R"("lora_parameters": {"scale": 2.0, "rank": 2})";
    CHECK(read("{" + strong + "}") == "nothing");
    CHECK(read(R"({"num_layers": 1, "fine_tune_type": "lora", )" + strong + "}") == "nothing");
    CHECK(read(R"({"lora_layers": -1, )" + strong + "}") == "nothing");
    says(read(R"({"num_layers": "4", )" + strong + "}"), "num_layers is \"4\"; expected a whole number");
    says(read(R"({"lora_layers": 1.5, )" + strong + "}"), "lora_layers is 1.5; expected a whole number");
    says(read("{}"), "has no lora_parameters.scale");
    says(read(R"({"lora_parameters": 5})"), "has no lora_parameters.scale");
    says(read(R"({"lora_parameters": {"keys": null}})"), "has no lora_parameters.scale");
    says(read(R"({"lora_parameters": {"scale": "2"}})"), "lora_parameters.scale is \"2\"; expected a number");
    says(read(R"({"lora_parameters": {"scale": 2, "keys": "q"}})"), "expected a list of names");
    says(read(R"({"lora_parameters": {"scale": 2, "keys": ["v"]}})"), "does not name 'q'");
    CHECK(read(R"({"lora_parameters": {"scale": 2, "keys": ["q", "idle"]}})") == "nothing");
    CHECK(read(R"({"lora_parameters": {"scale": 2, "keys": ["model.layers.3.q"]}})") == "nothing");
    says(read(R"({"num_layers": 1, )" + strong + "}",
             {{"model.layers.1.q.lora_a", {3, 2}}, {"model.layers.1.q.lora_b", {2, 4}}}),
        "num_layers is 1, and the adapter has modules of layers 1 to 3");
    CHECK(read(R"({"num_layers": 0, )" + strong + "}").find("num_layers is 0") != std::string::npos);
    says(read(R"({"fine_tune_type": "dora", )" + strong + "}"), "has no magnitudes ('model.layers.3.q.m')");
    says(read(R"({"fine_tune_type": "full", )" + strong + "}"), "has factors, but adapter_config.json says");
    says(read(R"({"fine_tune_type": "lora", )" + strong + "}", {{"model.layers.3.q.m", {4}}}), "has magnitudes");
    says(read("{" + strong + "}", {{"model.layers.3.q.lora_a", {2, 3, 2}}}), "updates of experts");
    // Of modules outside of layers, in lists that are none, and magnitudes of nothing that is adapted.
    CHECK(read(R"({"num_layers": 1, )" + strong + "}",
              {{"lm_head.lora_a", {3, 2}}, {"lm_head.lora_b", {2, 4}}, {"layers.x.q.lora_a", {3, 2}},
                  {"layers.x.q.lora_b", {2, 4}}, {"a.layers.-1.q.lora_a", {3, 2}}, {"a.layers.-1.q.lora_b", {2, 4}},
                  {"layers.7.lora_a", {3, 2}}, {"layers.7.lora_b", {2, 4}}, {"layers.1x.q.lora_a", {3, 2}},
                  {"layers.1x.q.lora_b", {2, 4}}, {"norm.m", {4}}, {"norm.weight", {4}}})
        == "nothing");
    const scratch folder;
    const auto full = [&](const std::string& config) {
        return refusal(directory_of(folder, {{"w", {2, 2}}}, config, "adapters"));
    };
    says(full(R"({"fine_tune_type": "full"})"), "holds no factors of an adapter, as adapter_config.json says");
    CHECK(full(R"({"fine_tune_type": "lora"})").find("as adapter_config.json says") == std::string::npos);
    CHECK(full(R"({})").find("as adapter_config.json says") == std::string::npos);
    // Without its configuration an adapter has the scale 1, and a note says so; an embedding lies the other way round.
    const auto alone =
        read_adapter<float>(file_of(folder, with(tensors, {{"wte.lora_a", {5, 2}}, {"wte.lora_b", {2, 4}}})));
    CHECK(alone.modules.at("model.layers.3.q").update.scaling == 1);
    REQUIRE(alone.notes.size() == 1);
    says(alone.notes[0], "the scale is taken to be 1");
    CHECK(alone.modules.at("wte").embedding);
    CHECK(alone.modules.at("wte").update.in() == 5);
    const auto rescaled =
        read_adapter<float>(file_of(folder, {{"wte.lora_a", {5, 2}}, {"wte.lora_b", {2, 4}}, {"wte.m", {5}}}));
    CHECK_FALSE(rescaled.modules.at("wte").embedding);
    CHECK(rescaled.modules.at("wte").update.out() == 5);
}

TEST_CASE("PEFT's bare parameters: whose factors are whose is known, or said not to be")
{
    const std::string e = "base_model.model.l.0.mlp.experts", a = ".lora_A.weight", b = ".lora_B.weight";
    const auto config = [](const std::string& targets, const std::string& more = {}) {
        return R"({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": )" + targets + more + "}";
    };
    const auto read = [&](const shapes& tensors, const std::string& text) {
        const scratch folder;
        return refusal(directory_of(folder, tensors, text));
    };
    const shapes one{{e + a, {6, 3}}, {e + b, {4, 6}}}; // three matrices
    const shapes two = with(one, {{e + ".base_layer" + a, {6, 4}}, {e + ".base_layer" + b, {8, 6}}});
    const scratch folder;
    for (const char* target :
        {"mlp.experts.down_proj", "down_proj", "experts.down_proj", "l.0.mlp.experts.down_proj"}) {
        CAPTURE(target);
        const auto adapter =
            read_adapter<float>(directory_of(folder, one, config("[\"" + std::string(target) + "\"]")));
        REQUIRE(adapter.modules.size() == 3);
        const auto& made = adapter.modules.at("l.0.mlp.experts.1.down_proj");
        CHECK(made.slice.parameter == "l.0.mlp.experts.down_proj");
        CHECK(made.slice.index == 1);
        CHECK(made.slice.count == 3);
        CHECK(made.update.rank() == 2);
        CHECK(made.update.scaling == 2);
    }
    const auto both = read_adapter<float>(
        directory_of(folder, two, config(R"(["experts.down_proj", "mlp.experts.down_proj", "experts.gate_up_proj"])")));
    CHECK(both.modules.size() == 6);
    CHECK(both.modules.at("l.0.mlp.experts.0.down_proj").update.out() == 4); // the last one's are the outermost
    CHECK(both.modules.at("l.0.mlp.experts.0.gate_up_proj").update.out() == 8);
    const auto single = read_adapter<float>(
        directory_of(folder, {{e + a, {2, 3}}, {e + b, {4, 2}}}, config(R"(["experts.down_proj"])")));
    CHECK(single.modules.contains("l.0.mlp.experts.0.down_proj"));
    const auto weight = read_adapter<float>(
        directory_of(folder, {{e + a, {2, 3}}, {e + b, {4, 2}}}, config(R"(["mlp.experts.weight"])")));
    CHECK(weight.modules.contains("l.0.mlp.experts"));

    says(read(one, config("5")), "target_parameters is 5; expected names of parameters");
    says(read(one, config(R"(["experts.down_proj", "other.down_proj"])")),
        "names 'other.down_proj', and the adapter has");
    says(read(two, config(R"(["experts.down_proj", "experts.up_proj"])")), "which factors are whose is not known here");
    says(read(two, config(R"(["experts.down_proj", "experts.gate_up_proj", "experts.router"])")),
        "names 'down_proj' and 'gate_up_proj' of module 'l.0.mlp.experts'");
    says(read(one, config(R"(["experts.down_proj", "experts.gate_up_proj"])")),
        "has no factors 'l.0.mlp.experts.base_layer");
    says(read(two, config(R"(["experts.down_proj"])")),
        "the adapter has factors of 'l.0.mlp.experts.base_layer', and target_parameters names 1");
    // Factors of another kind than a parameter's, and ranks that are no multiples.
    const auto target = config(R"(["experts.down_proj"])", R"(, "lora_bias": true)");
    for (const auto& more :
        {with(one, {{e + ".lora_B.bias", {4}}}), shapes{{e + a, {6, 3, 3, 3}}, {e + b, {4, 6, 1, 1}}},
            shapes{{e + ".lora_embedding_A", {6, 3}}, {e + ".lora_embedding_B", {4, 6}}}}) {
        says(read(more, target), "has factors of another kind than those of plain LoRA");
    }
    says(read({{e + a, {5, 3}}, {e + b, {4, 5}}}, config(R"(["experts.down_proj"])")), "have rank 5 in all");
    says(read({{e + a, {1, 3}}, {e + b, {4, 1}}}, config(R"(["experts.down_proj"])")), "have rank 1 in all");
    says(read(one, config(R"(["experts.down_proj"])", R"(, "rank_pattern": {"experts.down_proj": 0})")),
        "says 0 of each matrix");
}

TEST_CASE("what diffusers keeps in the header of a file says what of which component")
{
    const shapes tensors{{"unet.m.lora_A.weight", {2, 3}}, {"unet.m.lora_B.weight", {4, 2}},
        {"text_encoder.n.lora_A.weight", {2, 3}}, {"text_encoder.n.lora_B.weight", {4, 2}}};
    const scratch folder;
    const auto file = [&](const std::string& kept) {
        return file_of(folder, tensors, {{"lora_adapter_metadata", kept}});
    };
    const auto adapter = read_adapter<float>(
        file(R"({"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 2, "text_encoder.lora_alpha": 1})"));
    CHECK(adapter.dialect == adapter_dialect::diffusers);
    CHECK(adapter.modules.at("unet.m").update.scaling == 3);
    CHECK(adapter.modules.at("text_encoder.n").update.scaling == 0.5);
    // Of one component alone: the other has a scaling of its own; and without a component: of all.
    CHECK(
        read_adapter<float>(file(R"({"unet.r": 2, "unet.lora_alpha": 6})")).modules.at("text_encoder.n").update.scaling
        == 1);
    CHECK(read_adapter<float>(file(R"({"r": 2, "lora_alpha": 6})")).modules.at("text_encoder.n").update.scaling == 3);
    says(refusal(file("[]")), "is not a JSON object");
    says(refusal(file(R"({"unet.r": 4})")), "has rank 2 but lora_adapter_metadata says 4");
    // In kohya's files nobody reads it.
    CHECK(read_adapter<float>(file_of(folder, kohya(), {{"lora_adapter_metadata", "[]"}})).dialect
        == adapter_dialect::kohya);
}

/// An adapter of one plain module, for writers.
adapter_contents<float> plain(const std::string& module = "m", adapter_dialect dialect = adapter_dialect::peft)
{
    adapter_contents<float> adapter;
    adapter.label = "'plain'";
    adapter.dialect = dialect;
    adapter.modules[module].update = reference::normal_update<float>(4, 3, 2, 1, 0.5);
    return adapter;
}

TEST_CASE("what is not finite is named as the tensor that holds it, or as the module's part")
{
    using contents = adapter_contents<float>;
    const auto problem = [](adapter_dialect dialect, const std::function<void(adapted_module<float>&)>& change) {
        contents adapter = plain("m", dialect);
        change(adapter.modules.at("m"));
        try {
            (void)converted_adapter(adapter, adapter_dialect::peft);
        }
        catch (const nonfinite_error& found) {
            return std::string(found.what());
        }
        return std::string("nothing");
    };
    const auto peft = adapter_dialect::peft, other = adapter_dialect::kohya;
    const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
    says(problem(peft, [&](auto& m) { m.update.a(1, 0) = nan; }),
        "tensor 'base_model.model.m.lora_A.weight' of 'plain' holds NaN at index 3");
    says(problem(peft, [&](auto& m) { m.update.b(0, 1) = -inf; }),
        "tensor 'base_model.model.m.lora_B.weight' of 'plain' holds infinity at index 1");
    says(problem(other, [&](auto& m) { m.update.a(1, 0) = nan; }), "module 'm': its factor A of 'plain' holds NaN");
    for (const char* kind : {"LoHa", "LoKr"}) { // whose factors are products
        says(problem(peft,
                 [&](auto& m) {
                     m.update.b(0, 0) = inf;
                     m.kind = kind;
                 }),
            "module 'm': its factor B of 'plain' holds infinity");
    }
    says(problem(peft, [&](auto& m) { m.magnitude = {1, infinity, 1, 1}; }),
        "'base_model.model.m.lora_magnitude_vector'");
    says(problem(peft,
             [&](auto& m) {
                 m.bias.a = matrix<float>(1, 4, matrix_order::row_major);
                 m.bias.b = matrix<float>(1, 1, matrix_order::row_major);
                 for (std::size_t i = 0; i < 4; ++i) { m.bias.a(0, i) = nan; }
             }),
        "'base_model.model.m.lora_B.bias'");
    auto adapter = plain();
    adapter.modules.at("m").update.a(0, 0) = nan;
    CHECK(std::isnan([&] {
        const auto made = converted_adapter(adapter, peft, {.on_overflow = overflow::propagate});
        float first = 0;
        std::memcpy(&first, made.bytes[0].data(), sizeof first);
        return first;
    }()));
}

TEST_CASE("a factor that its dtype cannot hold is refused, saturates or propagates")
{
    auto adapter = plain();
    adapter.modules.at("m").update.a(0, 0) = 1e6f;
    adapter.modules.at("m").update.a(0, 1) = -1e6f;
    CHECK_THROWS_AS((void)converted_adapter(adapter, adapter_dialect::peft, {.output = dtype::f16}), nonfinite_error);
    const auto made =
        converted_adapter(adapter, adapter_dialect::peft, {.output = dtype::f16, .on_overflow = overflow::saturate});
    CHECK(made.saturated == 2);
    f16 first[2];
    std::memcpy(first, made.bytes[0].data(), sizeof first);
    CHECK(widen<float>(first[0]) == 65504.0f);
    CHECK(widen<float>(first[1]) == -65504.0f);
    // Of f64, which f32 cannot hold; what was infinite before stays so where it may.
    adapter_contents<double> wide;
    wide.label = "'wide'";
    wide.modules["m"].update = reference::normal_update<double>(4, 3, 2, 1, 1.0);
    wide.modules.at("m").update.b(0, 0) = 1e300;
    wide.modules.at("m").update.b(0, 1) = -1e300;
    const auto narrow_made =
        converted_adapter(wide, adapter_dialect::peft, {.output = dtype::f32, .on_overflow = overflow::saturate});
    CHECK(narrow_made.saturated == 2);
    float second[2];
    std::memcpy(second, narrow_made.bytes[1].data(), sizeof second);
    CHECK(second[0] == std::numeric_limits<float>::max());
    CHECK(second[1] == -std::numeric_limits<float>::max());
}

TEST_CASE("what a dialect has no place for is said before anything is written")
{
    const auto why = [](const adapter_contents<float>& adapter, adapter_dialect dialect,
                         const adapter_write_options& options = {}) {
        std::string all;
        for (const auto& loss : not_held(adapter, dialect, options)) { all += loss.what + ": " + loss.why + "\n"; }
        return all.empty() ? std::string("nothing") : all;
    };
    using enum adapter_dialect;
    says(why(adapter_contents<float>(), peft), "an adapter without a module: there is nothing to write");
    CHECK(why(plain("lora_unet_m", kohya), kohya) == "nothing");
    says(why(plain("lora_unet_m", kohya), diffusers), "its dots are underscores");
    auto biased = plain();
    biased.modules.at("m").bias.a = matrix<float>(1, 4, matrix_order::row_major);
    biased.modules.at("m").bias.b = matrix<float>(1, 1, matrix_order::row_major);
    CHECK(why(biased, peft) == "nothing");
    says(why(biased, kohya), "the bias of module 'm': it has no place there");
    const adapter_write_options llama{.target = {"llama", 2, 2, false}}, qwen{.target = {"qwen2", 2, 2, false}};
    auto paired = plain("model.layers.0.self_attn.q_proj", gguf);
    paired.target.architecture = "llama";
    paired.modules.begin()->second.paired_rows = true;
    CHECK(why(paired, gguf, llama) == "nothing");
    says(why(paired, gguf, qwen), "its rows are in the order of llama.cpp");
    says(why(paired, peft), "its rows are in the order of llama.cpp");
    // Embeddings under DoRA: MLX has a magnitude for each entry, others for each dimension.
    auto by_entry = plain("model.embed_tokens", mlx);
    by_entry.modules.begin()->second.magnitude.assign(4, 1.0);
    says(why(by_entry, peft), "with a magnitude for each entry, which MLX alone has");
    CHECK(why(by_entry, mlx) == "nothing");
    says(why(by_entry, gguf, qwen), "it is DoRA's");
    auto by_dimension = by_entry;
    by_dimension.modules.begin()->second.embedding = true;
    says(why(by_dimension, mlx), "with a magnitude for each dimension, and MLX has one for each entry");
    by_dimension.dialect = peft;
    says(why(by_dimension, mlx), "with a magnitude for each dimension, and MLX has one for each entry");
    says(why(by_dimension, kohya), "it is an embedding");
    // Square weights that lie in×out.
    auto turned = plain();
    turned.fan_in_fan_out = true;
    CHECK(why(turned, kohya) == "nothing");
    turned.modules.at("m").update = reference::normal_update<float>(4, 4, 2, 1);
    says(why(turned, kohya), "it is square, and lies in×out in its base");
    CHECK(why(turned, peft) == "nothing");
    turned.modules.at("m").embedding = true;
    CHECK(why(turned, mlx) == "nothing");
    turned.modules["model.layers.0.mlp.up_proj"] = turned.modules.at("m");
    turned.modules.at("model.layers.0.mlp.up_proj").embedding = false;
    turned.modules.erase("m");
    CHECK(why(turned, gguf, qwen) == "nothing");
}

TEST_CASE("names in kohya's files are those of the components")
{
    const auto names = [](const std::vector<std::string>& modules) {
        adapter_contents<float> adapter = plain(modules[0]);
        for (const auto& module : modules) { adapter.modules[module] = plain().modules.at("m"); }
        std::set<std::string> found;
        for (const auto& spec : converted_adapter(adapter, adapter_dialect::kohya).specs) {
            if (spec.name.ends_with(".alpha")) { found.insert(spec.name.substr(0, spec.name.size() - 6)); }
        }
        return found;
    };
    using set = std::set<std::string>;
    CHECK(names({"unet.a.b", "text_encoder.c.d"}) == set{"lora_unet_a_b", "lora_te_c_d"});
    CHECK(names({"text_encoder.c.d", "text_encoder_2.c.d"}) == set{"lora_te1_c_d", "lora_te2_c_d"});
    CHECK(names({"text_encoder.c.d", "text_encoder_3.c.d"}) == set{"lora_te1_c_d", "lora_te3_c_d"});
    CHECK(names({"text_model.c.d", "transformer.e"}) == set{"lora_te_text_model_c_d", "lora_transformer_e"});
    CHECK(names({"lora_te2_c_d", "m.n"}) == set{"lora_te2_c_d", "lora_unet_m_n"});
}

TEST_CASE("scalings that one number cannot say go into the factors, a scaling of 0 too")
{
    const auto weight = [](const adapter_contents<float>& adapter, const std::string& module) {
        return reference::dense(adapter.modules.at(module).update);
    };
    const std::string first = "model.layers.0.mlp.up_proj", second = "model.layers.1.mlp.up_proj";
    for (const double scaling : {0.0, 0.5}) {
        adapter_contents<float> adapter = plain(first);
        adapter.modules[second] = adapter.modules.at(first);
        adapter.modules.at(first).update.scaling = scaling;
        adapter.modules.at(second).update.scaling = 3;
        for (const auto dialect : {adapter_dialect::mlx, adapter_dialect::gguf}) {
            CAPTURE(scaling);
            const scratch folder;
            const auto place = folder / (dialect == adapter_dialect::gguf ? "out.gguf" : "out");
            write_adapter(place,
                converted_adapter(adapter, dialect, {.mode = durability::process, .target = {"qwen2", 2, 2, false}}));
            const auto back = read_adapter<float>(place);
            for (const auto& module : {first, second}) {
                const auto expected = weight(adapter, module), found = weight(back, module);
                for (std::size_t i = 0; i < 4; ++i) {
                    for (std::size_t j = 0; j < 3; ++j) {
                        CHECK(found[i][j] == doctest::Approx(expected[i][j]).epsilon(1e-5));
                    }
                }
            }
        }
    }
}

TEST_CASE("FLUX's modules become diffusers' where their rows fit, and stay what they are otherwise")
{
    std::vector<float> zeros(64 * 64);
    const auto base_of = [&](const std::map<std::string, extents>& weights) {
        const_model_ref base;
        for (const auto& [name, shape] : weights) { base.insert(name, {zeros.data(), dtype::f32, shape, {}}); }
        return base;
    };
    const std::string block = "transformer_blocks.0.attn.";
    const std::map<std::string, extents> fitting{
        {block + "to_q.weight", {4, 3}}, {block + "to_k.weight", {4, 3}}, {block + "to_v.weight", {4, 3}}};
    const auto split = [&](const std::string& module, const std::map<std::string, extents>& weights, std::size_t out,
                           const std::function<void(adapted_module<float>&)>& change = {}) {
        adapter_contents<float> adapter = plain(module, adapter_dialect::kohya);
        adapter.modules.at(module).update = reference::normal_update<float>(out, 3, 2, 5);
        if (change) { change(adapter.modules.at(module)); }
        const auto before = adapter.modules.at(module);
        const auto base = base_of(weights);
        const auto count = split_flux(adapter, base);
        if (count == 0) {
            CHECK(adapter.modules.size() == 1);
            CHECK(adapter.modules.contains(module));
            return count;
        }
        // The parts' rows one below the other are the whole's.
        std::size_t row = 0;
        for (const std::string part : {"to_q", "to_k", "to_v"}) {
            const auto& made = adapter.modules.at(block + part);
            for (std::size_t i = 0; i < made.update.out(); ++i, ++row) {
                for (std::size_t k = 0; k < 2; ++k) { CHECK(made.update.b(i, k) == before.update.b(row, k)); }
                if (!before.magnitude.empty()) { CHECK(made.magnitude[i] == before.magnitude[row]); }
            }
        }
        CHECK(row == out);
        return count;
    };
    const std::string qkv = "lora_unet_double_blocks_0_img_attn_qkv";
    CHECK(split(qkv, fitting, 12) == 1);
    CHECK(split(qkv, fitting, 12, [](auto& m) {
        for (int i = 0; i < 12; ++i) { m.magnitude.push_back(i); }
    }) == 1);
    CHECK(split(qkv, fitting, 13) == 0); // rows that are no sum
    CHECK(split(qkv, fitting, 12, [](auto& m) { m.kernel = {1, 1}; }) == 0);
    CHECK(split(qkv, fitting, 12, [](auto& m) { m.embedding = true; }) == 0);
    CHECK(split(qkv, fitting, 12, [](auto& m) { m.slice.parameter = "x"; }) == 0);
    for (const auto& other : {extents{4, 5}, extents{4}, extents{4, 3, 1}}) {
        auto weights = fitting;
        weights[block + "to_k.weight"] = other;
        CHECK(split(qkv, weights, 12) == 0);
    }
    auto weights = fitting;
    weights.erase(block + "to_v.weight");
    CHECK(split(qkv, weights, 12) == 0);
    weights = fitting;
    weights[qkv + ".weight"] = {12, 3}; // the base has it as it is
    CHECK(split(qkv, weights, 12) == 0);
    weights = fitting;
    weights["second.transformer_blocks.0.attn.to_q.weight"] = {4, 3}; // two models
    CHECK(split(qkv, weights, 12) == 0);
    CHECK(split(qkv, {{"xtransformer_blocks.0.attn.to_q.weight", {4, 3}}}, 12) == 0);
    for (const char* module : {"lora_unet_double_blocks_x_img_attn_qkv", "lora_unet_double_blocks_0",
             "lora_unet_double_blocks_0ximg_attn_qkv", "lora_unet_double_blocks_0_other",
             "lora_unet_double_blocks_99999999999_img_attn_qkv", "other"}) {
        CAPTURE(module);
        CHECK(split(module, fitting, 12) == 0);
    }
    // The halves of the last modulation are swapped; an odd number of rows has none.
    const std::map<std::string, extents> end{
        {"transformer_blocks.0.x.weight", {1, 1}}, {"norm_out.linear.weight", {4, 3}}};
    for (const std::size_t rows : {4u, 5u}) {
        adapter_contents<float> adapter = plain("lora_unet_final_layer_adaLN_modulation_1", adapter_dialect::kohya);
        auto& made = adapter.modules.begin()->second;
        made.update = reference::normal_update<float>(rows, 3, 2, 5);
        const auto before = made;
        auto shapes_of_end = end;
        shapes_of_end["norm_out.linear.weight"] = {static_cast<std::int64_t>(rows), 3};
        const auto base = base_of(shapes_of_end);
        CHECK(split_flux(adapter, base) == (rows == 4 ? 1 : 0));
        if (rows == 4) {
            CHECK(adapter.modules.at("norm_out.linear").update.b(0, 0) == before.update.b(2, 0));
            CHECK(adapter.modules.at("norm_out.linear").update.b(2, 0) == before.update.b(0, 0));
        }
    }
    // One weight by two names.
    adapter_contents<float> adapter = plain(qkv, adapter_dialect::kohya);
    adapter.modules.at(qkv).update = reference::normal_update<float>(12, 3, 2, 5);
    adapter.modules["lora_transformer_double_blocks_0_img_attn_qkv"] = adapter.modules.at(qkv);
    const auto base = base_of(fitting);
    CHECK_THROWS_WITH_AS(
        split_flux(adapter, base), doctest::Contains("both mean 'transformer_blocks.0.attn.to_q'"), invalid_argument);
}

} // namespace adapter_dialects_test
