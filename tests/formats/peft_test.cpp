// SPDX-License-Identifier: Apache-2.0
#include <taskvec/formats/peft.hpp>

#include "formats/scratch.hpp"
#include "reference/adapters.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <optional>
#include <string>
#include <vector>

using namespace taskvec;
namespace fs = std::filesystem;

namespace {

const fs::path fixtures = fs::path(TASKVEC_TEST_DIR) / "data" / "peft";

nlohmann::json stored_index()
{
    return parse_json(read_text_file(fixtures / "index.json"), "index.json");
}

/// max |ΔW − expected| over the adapter; `transposed` says that the expected tensors are in×out.
template <class T>
double distance_from_expected(const peft_adapter<T>& adapter, const fs::path& expected_file, bool transposed)
{
    const safetensors_file expected(expected_file);
    REQUIRE(expected.entries().size() == adapter.updates.size());
    double worst = 0;
    for (const auto& entry : expected.entries()) {
        REQUIRE(adapter.updates.contains(entry.name));
        const auto delta = reference::dense(adapter.updates.at(entry.name));
        const bool turned = transposed || adapter.embeddings.contains(entry.name);
        const std::size_t rows = static_cast<std::size_t>(entry.shape[0]),
                          cols = static_cast<std::size_t>(entry.shape[1]);
        REQUIRE(delta.size() == (turned ? cols : rows));
        REQUIRE(delta[0].size() == (turned ? rows : cols));
        for (std::size_t i = 0; i < rows; ++i) {
            for (std::size_t j = 0; j < cols; ++j) {
                float value = 0;
                std::memcpy(&value,
                    static_cast<const std::byte*>(expected.tensor(entry).data) + (i * cols + j) * sizeof value,
                    sizeof value);
                worst = std::max(worst, std::abs(static_cast<double>(value) - (turned ? delta[j][i] : delta[i][j])));
            }
        }
    }
    return worst;
}

/// A copy of a fixture, changed.
fs::path changed(const ::scratch& scratch, const std::string& name, const std::function<void(nlohmann::json&)>& change)
{
    const fs::path folder = scratch.path() / "changed";
    fs::remove_all(folder);
    fs::create_directory(folder);
    fs::copy_file(fixtures / name / peft_model_name, folder / peft_model_name);
    auto config = nlohmann::json::parse(read_text_file(fixtures / name / peft_config_name));
    change(config);
    std::ofstream(folder / peft_config_name) << config.dump();
    return folder;
}

/// The fixture's factors as raw tensors, changed.
fs::path with_tensors(const ::scratch& scratch,
    const std::function<void(std::map<std::string, std::pair<extents, std::vector<float>>>&)>& change)
{
    const fs::path folder = changed(scratch, "plain", [](auto&) { });
    std::map<std::string, std::pair<extents, std::vector<float>>> tensors;
    {
        const safetensors_file file(fixtures / "plain" / peft_model_name);
        for (const auto& entry : file.entries()) {
            const auto tensor = file.tensor(entry);
            std::vector<float> values(tensor.size());
            std::memcpy(values.data(), tensor.data, tensor.bytes());
            tensors[entry.name] = {entry.shape, values};
        }
    }
    change(tensors);
    const_model_ref model;
    for (const auto& [name, tensor] : tensors) {
        model.insert(name, as_tensor(host_view<const float>(tensor.second.data(), tensor.second.size()), tensor.first));
    }
    write_safetensors(folder / peft_model_name, model, {}, durability::process);
    return folder;
}

std::string refusal(const fs::path& folder, const peft_read_options& options = {})
{
    try {
        (void)read_peft<float>(folder, options);
    }
    catch (const error& problem) {
        return problem.what();
    }
    return {};
}

bool says(const std::string& text, std::string_view part)
{
    INFO(text);
    CHECK(text.find(part) != text.npos);
    return text.find(part) != text.npos;
}

} // namespace

TEST_CASE("adapters that PEFT wrote give the updates that PEFT computes; the others are refused by name")
{
    std::size_t read = 0, refused = 0;
    const auto index = stored_index();
    for (auto place = index.begin(); place != index.end(); ++place) {
        const std::string name = place.key();
        const auto& row = place.value();
        INFO(name);
        const fs::path folder = fixtures / name;
        const std::string kind = row["read"];
        if (kind != "yes") {
            const std::string said = refusal(folder);
            CHECK_FALSE(said.empty());
            says(said, row["because"].get<std::string>());
            ++refused;
            if (kind == "no") { continue; }
        }
        const auto adapter = read_peft<float>(folder, {.whole_modules = kind == "asked"});
        CHECK(distance_from_expected(adapter, folder / "expected.safetensors", name == "fan_in_fan_out") <= 1e-5);
        const auto wide = read_peft<double>(folder, {.whole_modules = kind == "asked"});
        CHECK(distance_from_expected(wide, folder / "expected.safetensors", name == "fan_in_fan_out") <= 1e-5);
        // The scale of each module, as PEFT says it.
        const safetensors_file expected(folder / "expected.safetensors");
        const auto scaling = nlohmann::json::parse(expected.metadata().at("scaling"));
        for (const auto& [module, update] : adapter.updates) { CHECK(update.scaling == scaling[module].get<double>()); }
        ++read;
    }
    CHECK(read >= 12);
    CHECK(refused >= 9);
}

TEST_CASE("what is written reads back as the same updates, ranks, scalings and other tensors")
{
    const ::scratch scratch;
    const auto index = stored_index();
    for (auto place = index.begin(); place != index.end(); ++place) {
        const std::string name = place.key();
        const auto& row = place.value();
        if (row["read"] == "no") { continue; }
        INFO(name);
        const auto adapter = read_peft<float>(fixtures / name, {.whole_modules = true});
        const fs::path out = scratch.path() / "deep" / name;
        write_peft(out, adapter);
        const auto again = read_peft<float>(out, {.whole_modules = true});
        CHECK(again.updates.size() == adapter.updates.size());
        for (const auto& [module, update] : adapter.updates) {
            const auto& other = again.updates.at(module);
            CHECK(other.scaling == doctest::Approx(update.scaling).epsilon(1e-15));
            CHECK(std::equal(update.a.data(), update.a.data() + update.a.size(), other.a.data()));
            CHECK(std::equal(update.b.data(), update.b.data() + update.b.size(), other.b.data()));
        }
        CHECK(again.others == adapter.others);
        CHECK(again.embeddings == adapter.embeddings);
        CHECK(again.stored == adapter.stored);
        CHECK(again.config["target_modules"] == adapter.config["target_modules"]);
        for (const auto& entry : fs::directory_iterator(scratch.path() / "deep")) {
            CHECK(entry.path().filename().string().find(".tmp") == std::string::npos);
        }
    }
}

TEST_CASE("different ranks and scalings go into patterns that match one module each")
{
    const ::scratch scratch;
    peft_adapter<float> adapter;
    std::uint64_t seed = 0;
    for (const auto& [name, rank, scaling] : std::vector<std::tuple<std::string, std::size_t, double>>{{"head", 2, 1.0},
             {"encoder.head", 4, 0.5}, {"layers.1.q", 4, 0.5}, {"layers.11.q", 3, 2.0}, {"odd+name", 1, 0.3},
             {"a.b", 3, 1.0}, {"a_b", 4, 0.5}, {"x.aab", 4, 0.5}}) {
        adapter.updates.emplace(name, reference::normal_update<float>(6, 5, rank, ++seed, scaling));
    }
    write_peft(scratch.path() / "a", adapter);
    const auto again = read_peft<float>(scratch.path() / "a");
    for (const auto& [module, update] : adapter.updates) {
        CHECK(again.updates.at(module).rank() == update.rank());
        CHECK(again.updates.at(module).scaling == doctest::Approx(update.scaling).epsilon(1e-15));
    }
    CHECK(again.config["r"] == 4);
    CHECK(again.config["lora_alpha"] == 2);
    CHECK(again.config["rank_pattern"].contains("^head"));
    CHECK(again.config["rank_pattern"].contains("layers.11.q"));
    CHECK(again.config["rank_pattern"].contains("^a\\.b")); // a dot in an expression matches any character
    CHECK(again.config["target_modules"].size() == 8);

    write_peft(scratch.path() / "a", adapter, {.output = dtype::bf16}); // over an existing one
    CHECK(read_peft<float>(scratch.path() / "a").stored.at("head") == dtype::bf16);
}

TEST_CASE("patterns follow PEFT: file order, whole names or dotted ends, regular expressions")
{
    const ::scratch scratch;
    const auto scaling = [&](const char* alphas, const std::string& module) {
        const auto folder = changed(scratch, "plain", [](auto&) { });
        auto text = read_text_file(folder / peft_config_name);
        const auto at = text.find("\"alpha_pattern\":{}");
        REQUIRE(at != text.npos);
        text.replace(at, 18, std::string("\"alpha_pattern\":") + alphas);
        std::ofstream(folder / peft_config_name) << text;
        return read_peft<float>(folder).updates.at(module).scaling * 3;
    };
    CHECK(scaling(R"({"q_proj":9})", "layers.0.attn.q_proj") == doctest::Approx(9));
    CHECK(scaling(R"({"q_proj":9})", "layers.0.attn.v_proj") == doctest::Approx(6));
    CHECK(scaling(R"({"layers.0.attn.q_proj":12,"q_proj":9})", "layers.0.attn.q_proj") == doctest::Approx(12));
    CHECK(scaling(R"({"q_proj":9,"layers.0.attn.q_proj":12})", "layers.0.attn.q_proj")
        == doctest::Approx(9)); // the first in the file, not in the alphabet
    CHECK(scaling(R"({"attn\\.(q|v)_proj":3})", "layers.1.attn.v_proj") == doctest::Approx(3));
    CHECK(scaling(R"({"^layers.0.attn.q_proj":3})", "layers.0.attn.q_proj") == doctest::Approx(3));
    CHECK(scaling(R"({"q_proj|v_proj":1.5})", "layers.0.attn.v_proj") == doctest::Approx(1.5));
    const auto refused = [&](const char* field, nlohmann::json value) {
        return refusal(changed(scratch, "plain", [&](auto& config) { config[field] = value; }));
    };
    says(refused("alpha_pattern", {{"proj", 3}}), "matches no module"); // neither a whole name nor a dotted end
    says(refused("rank_pattern", {{"k_proj", 3}}), "matches no module");
    says(refused("alpha_pattern", {{"(", 3}}), "no regular expression to Python: it has a '(' without a ')'");
    says(refused("alpha_pattern", {{"q_proj", "3"}}), "not a number");
    says(refused("rank_pattern", {{"q_proj", 2}}), "has rank 3 but adapter_config.json says 2");
    says(refused("rank_pattern", nlohmann::json::array({1})), "not an object");
    // Expressions that would make a backtracking matcher search for ever, or overflow the stack of whoever compiles
    // them.
    says(refused("alpha_pattern", {{"([a-z.0-9_]+[a-z.0-9_]+)+!", 3}}), "matches no module");
    says(refused("alpha_pattern", {{std::string(50000, '(') + "q" + std::string(50000, ')'), 3}}),
        "and at most 1000 are read");
    says(refused("alpha_pattern", {{"(q)\\1", 3}}),
        "alpha_pattern has the key '(q)\\1': it has a back-reference ('\\1'), not understood here; write a key for "
        "each of "
        "the modules that are meant, of their names alone");
    says(refused("alpha_pattern", {{"(?i)Q_PROJ", 3}}), "flags of the whole are not at its beginning");
}

TEST_CASE("configurations that are not plain LoRA are refused by name")
{
    const ::scratch scratch;
    const auto refused = [&](const char* field, nlohmann::json value) {
        return refusal(changed(scratch, "plain", [&](auto& config) { config[field] = value; }));
    };
    CHECK(refused("lora_dropout", 0.5).empty());
    for (const char* init : {"pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "something_new"}) {
        says(refused("init_lora_weights", init), init);
    }
    for (const char* init : {"gaussian", "eva"}) { CHECK(refused("init_lora_weights", init).empty()); }
    CHECK(refused("init_lora_weights", false).empty());
    says(refused("peft_type", "ADALORA"), "peft_type ADALORA");
    says(refused("peft_type", nullptr), "no peft_type");
    CHECK(refused("bias", nullptr).empty());
    says(refused("use_dora", true), "use_dora");
    says(refused("use_dora", "yes"), "use_dora");
    says(refused("target_parameters", {"mlp.experts"}), "target_parameters");
    says(refused("layer_replication", {{0, 2}, {1, 3}}), "layer_replication");
    says(refused("modules_to_save", {"head"}), "modules_to_save");
    says(refused("r", "3"), "r is \"3\"; expected a number");
    says(refused("r", 4), "says 4");
    for (const auto& rank : nlohmann::json::parse("[null, 0, -3, 2.5, true, [3], {}]")) {
        says(refused("r", rank), "r is " + rank.dump() + "; expected a ");
    }
    says(refused("r", 1e300), "says 1e+300");
    for (const auto& alpha : nlohmann::json::parse(R"([null, "6", [6]])")) {
        says(refused("lora_alpha", alpha), "lora_alpha is " + alpha.dump() + "; expected a number");
    }
    CHECK(refused("lora_alpha", -6).empty());
    says(refused("bias", true), "bias is true; expected \"none\"");
    says(refused("bias", "some"), "bias is \"some\"");
    says(refused("fan_in_fan_out", "no"), "fan_in_fan_out is \"no\"; expected true or false");
    says(refused("target_modules", 7), "target_modules is 7; expected names of modules");
    says(refused("target_modules", {"q_proj", 1}), "expected names of modules");
    says(refused("exclude_modules", {{"q_proj", 1}}), "exclude_modules is {\"q_proj\":1}");
    says(refused("exclude_modules", {{std::string(100, 'x'), 1}}),
        std::string(78, 'x') + "…; expected names"); // not all
    says(refused("peft_type", 5), "peft_type 5");
    says(refused("use_rslora", 1), "use_rslora is 1; expected true or false");
}

TEST_CASE("damaged adapters are named errors")
{
    const ::scratch scratch;
    using tensors = std::map<std::string, std::pair<extents, std::vector<float>>>;
    const std::string q = "base_model.model.layers.0.attn.q_proj.";
    says(refusal(with_tensors(scratch, [&](tensors& t) { t.erase(q + "lora_B.weight"); })),
        "module 'layers.0.attn.q_proj' has lora_A but no lora_B");
    says(refusal(with_tensors(scratch, [&](tensors& t) { t.erase(q + "lora_A.weight"); })), "lora_B but no lora_A");
    says(refusal(with_tensors(scratch, [&](tensors& t) { t[q + "lora_B.weight"] = {{9, 2}, std::vector<float>(18)}; })),
        "their ranks differ");
    says(refusal(with_tensors(scratch,
             [&](tensors& t) {
                 t["base_model.model.layers.0.attn.q_proj.lora_embedding_B"] = t[q + "lora_B.weight"];
                 t.erase(q + "lora_B.weight");
             })),
        "not both factors of an embedding");
    says(
        refusal(with_tensors(scratch,
            [&](tensors& t) { t["base_model.model.layers.0.attn.q_proj.lora_embedding_B"] = t[q + "lora_B.weight"]; })),
        "is the second such factor");
    says(refusal(
             with_tensors(scratch, [&](tensors& t) { t[q + "lora_magnitude_vector"] = {{6}, std::vector<float>(6)}; })),
        "lora_magnitude_vector");
    says(refusal(with_tensors(scratch, [&](tensors& t) { t[q + "bias"] = {{6}, std::vector<float>(6)}; })),
        "neither a factor nor a bias");
    says(refusal(with_tensors(scratch, [&](tensors& t) { t["layers.0.lora_A.weight"] = {{1, 1}, {1.0f}}; })),
        "does not begin with");
    // Names that are nearly those of factors.
    for (const char* name : {"lora_A.weight", "lora_other", ".lora_A.weight"}) {
        says(refusal(with_tensors(
                 scratch, [&](tensors& t) { t["base_model.model." + std::string(name)] = {{1, 1}, {1.0f}}; })),
            "is not a factor of a plain low-rank update");
    }
    for (const char* name : {"lora_A.default.weight", "lora_B.default.weight", "lora_C.default.weight"}) {
        const auto said = refusal(with_tensors(scratch, [&](tensors& t) { t[q + name] = {{1, 1}, {1.0f}}; }));
        says(said, "is not a factor of a plain low-rank update");
        CHECK((said.find("without a name of the adapter") != said.npos) == (name[5] != 'C'));
    }
    says(refusal(with_tensors(scratch, [&](tensors& t) { t[q + "lora_B.weight"] = {{18}, std::vector<float>(18)}; })),
        "expected a matrix");
    says(refusal(with_tensors(
             scratch, [&](tensors& t) { t[q + "lora_B.weight"] = {{6, 3, 1, 1}, std::vector<float>(18)}; })),
        "a convolution's factors are not merged with others");
    const auto unlike =
        with_tensors(scratch, [&](tensors& t) { t[q + "lora_B.weight"] = {{9, 2}, std::vector<float>(18)}; });
    says(refusal(unlike), (unlike / peft_model_name).string());
    says(refusal(with_tensors(scratch, [&](tensors& t) { t.clear(); })), "no LoRA factors");
    const std::vector<std::int32_t> whole(18);
    const_model_ref integers;
    for (const char* half : {"lora_A.weight", "lora_B.weight"}) {
        integers.insert(q + half, {whole.data(), dtype::i32, {half[5] == 'A' ? 3 : 6, half[5] == 'A' ? 6 : 3}});
    }
    write_safetensors(unlike / peft_model_name, integers, {}, durability::process);
    says(refusal(unlike), "has dtype I32; a factor is");
    says(refusal(scratch.path() / "nowhere"), "is not a directory");
    const auto folder = changed(scratch, "plain", [](auto&) { });
    fs::rename(folder / peft_model_name, folder / "adapter_model.bin");
    const auto renamed = read_peft<double>(folder); // what it holds decides
    CHECK_FALSE(renamed.updates.empty());
    CHECK_FALSE(peft_is_wide(folder));
    write_peft(folder, renamed, {.output = dtype::f64});
    fs::rename(folder / peft_model_name, folder / "adapter_model.bin");
    CHECK(peft_is_wide(folder));
    spill(folder / "adapter_model.bin", "neither");
    says(refusal(folder), "adapter_model.bin");
    fs::remove(folder / peft_config_name);
    says(refusal(folder), "adapter_config.json");
}

TEST_CASE(
    "copies of base weights beside the factors of their modules are carried along; other whole weights are refused")
{
    const ::scratch scratch;
    const auto adapter = read_peft<float>(fixtures / "embedding_saved");
    REQUIRE(adapter.others.size() == 1);
    CHECK(adapter.others.at("embed.base_layer.weight").shape == extents{9, 6});
    using tensors = std::map<std::string, std::pair<extents, std::vector<float>>>;
    const std::string q = "base_model.model.layers.0.attn.q_proj.", other = "base_model.model.layers.0.mlp.";
    CHECK(refusal(with_tensors(scratch, [&](tensors& t) {
        t[q + "base_layer.weight"] = {{6, 6}, std::vector<float>(36)};
    })).empty());
    says(refusal(
             with_tensors(scratch, [&](tensors& t) { t[q + "base_layer.weight"] = {{6, 5}, std::vector<float>(30)}; })),
        "has shape [6, 5]");
    says(refusal(with_tensors(
             scratch, [&](tensors& t) { t[other + "base_layer.weight"] = {{6, 6}, std::vector<float>(36)}; })),
        "peft_read_options::whole_modules");
    says(refusal(with_tensors(scratch, [&](tensors& t) { t[other + "weight"] = {{6, 6}, std::vector<float>(36)}; })),
        "neither a factor nor a bias");
}

TEST_CASE("whole weights are carried along where they are asked for and are modules' that were saved, or weights")
{
    const ::scratch scratch;
    const auto refused = [&](const nlohmann::json& saved, const char* name) {
        const auto folder = with_tensors(
            scratch, [&](auto& t) { t["base_model.model." + std::string(name)] = {{6}, std::vector<float>(6)}; });
        auto config = nlohmann::json::parse(read_text_file(folder / peft_config_name));
        config["modules_to_save"] = saved;
        std::ofstream(folder / peft_config_name) << config.dump();
        return refusal(folder, {.whole_modules = true});
    };
    CHECK(refused({"head"}, "head.running_mean").empty());
    CHECK(refused({"ead"}, "head.running_mean").empty()); // PEFT takes every module whose name ends so
    CHECK(refused({"other"}, "head.weight").empty());
    for (const auto& saved :
        {nlohmann::json{"other"}, nlohmann::json{"other", ""}, nlohmann::json("head"), nlohmann::json()}) {
        says(refused(saved, "head.running_mean"), "neither a factor nor a bias that the configuration announces");
    }
}

TEST_CASE("which modules a configuration leaves out is what PEFT makes of its fields")
{
    const auto layer = [](const char* pattern, const char* module) {
        const auto given = nlohmann::json::parse(pattern);
        return detail::layer_for_peft(given.is_null() ? nullptr : &given, module);
    };
    CHECK(layer("null", "model.layers.3.q") == 3); // behind whatever comes second
    CHECK(layer("null", "layers.3.q") == std::nullopt);
    CHECK(layer("null", "model.layers.3") == std::nullopt);
    CHECK(layer("null", "q") == std::nullopt);
    CHECK(layer("null", "model.layers.x.2.q") == 2);
    CHECK(layer("\"\"", "model.layers.3.q") == 3);
    CHECK(layer("5", "model.layers.3.q") == 3);
    CHECK(layer("\"layers\"", "layers.3.q") == 3);
    CHECK(layer("\"layers\"", "model.layers.3.q") == 3);
    CHECK(layer("\"layers\"", "model.players.3.q") == std::nullopt);
    CHECK(layer("[5, \"h\", \"layers\"]", "model.layers.3.q") == 3);
    CHECK(layer("[\"h\", \"layers\"]", "h.1.layers.3.q") == 1); // the first of the lists
    for (const char* module : {"layers.x.q", "layers..q", "layers.12345678901.q", "layers.1x.q"}) {
        CAPTURE(module);
        CHECK(layer("\"layers\"", module) == std::nullopt);
    }
    const std::vector<std::string> modules{"model.layers.0.q", "model.layers.0.v", "model.layers.1.q", "head"};
    const auto out = [&](const char* config) {
        return detail::modules_left_out(nlohmann::json::parse(config), "adapter_config.json", modules,
            [](const std::string& module) { return module == "parameter"; });
    };
    using names = std::vector<std::string>;
    CHECK(out("{}").empty());
    CHECK(out(R"({"target_modules": ["q", "head"]})") == names{"model.layers.0.v"});
    CHECK(out(R"({"target_modules": ["q", 5]})") == names{"model.layers.0.v", "head"});
    CHECK(out(R"({"target_modules": ["other"]})").empty()); // another model's names: PEFT loads nothing of it
    CHECK(out(R"({"target_modules": "all-linear"})").empty());
    CHECK(out(R"({"target_modules": "ALL-Linear"})").empty());
    CHECK(out(R"({"target_modules": "[a-z.0-9]*[qv]"})") == names{"head"});
    CHECK(out(R"({"target_modules": {"q": 1}})").empty()); // which says nothing that is understood
    CHECK(out(R"({"exclude_modules": ["v"]})") == names{"model.layers.0.v"});
    CHECK(out(R"({"layers_to_transform": 1})") == names{"model.layers.0.q", "model.layers.0.v", "head"});
    CHECK(out(R"({"layers_to_transform": [0, "1", 2.5]})") == names{"model.layers.1.q", "head"});
    CHECK(out(R"({"layers_to_transform": "1"})").empty());
    CHECK(out(R"({"layers_to_transform": [1], "target_modules": ["q", "head", "model.layers.0.v"]})")
        == names{"model.layers.0.q"}); // a whole name is in whatever layer it says, or in none
    CHECK(out(R"({"layers_to_transform": [1], "target_modules": ".*"})").empty()); // of lists alone
    CHECK(out(R"({"layers_to_transform": [1], "layers_pattern": ["h", 5]})")
        == names{"model.layers.0.q", "model.layers.0.v", "model.layers.1.q", "head"});
    CHECK_THROWS_WITH_AS((void)out(R"({"layers_to_transform": [1], "layers_pattern": "lay.rs|h"})"),
        doctest::Contains("of regular expressions there, names alone are understood here"), format_error);
    CHECK(out(R"({"layers_pattern": "lay.rs|h"})").empty()); // which nothing reads then

    const auto tied = [](const char* config, const char* module = "lm_head") {
        return detail::is_tied_head(nlohmann::json::parse(config), module);
    };
    CHECK(tied(R"({"ensure_weight_tying": true})"));
    CHECK(tied(R"({"ensure_weight_tying": true, "target_modules": "all-linear"})"));
    CHECK(tied(R"({"ensure_weight_tying": true, "target_modules": ["q", "model.embed_tokens"]})"));
    CHECK(tied(R"({"ensure_weight_tying": true, "target_modules": ["lm_head"]})"));
    CHECK_FALSE(tied(R"({"ensure_weight_tying": true, "target_modules": ["q", 5]})"));
    CHECK_FALSE(tied(R"({"ensure_weight_tying": true})", "head"));
    CHECK_FALSE(tied(R"({"ensure_weight_tying": false})"));
    CHECK_FALSE(tied("{}"));

    CHECK(detail::peft_type_of(nlohmann::json::parse("[]")) == "LORA");
    CHECK(detail::peft_type_of(nlohmann::json::parse(R"({"peft_type": 5})")) == "LORA");
    CHECK(detail::peft_type_of(nlohmann::json::parse(R"({"peft_type": "LOHA"})")) == "LOHA");
    const ::scratch scratch;
    spill(scratch / "config.json", "[]");
    CHECK_THROWS_WITH_AS(
        detail::peft_config_file(scratch / "config.json"), doctest::Contains("is not a JSON object"), format_error);
    // Fields that say nothing.
    const auto nothing =
        nlohmann::json::parse(R"({"a": null, "b": false, "c": "", "d": [], "e": {}, "f": 0, "g": "x"})");
    const std::string file = "f";
    const detail::peft_fields fields(nothing, file);
    for (const char* field : {"a", "b", "c", "d", "e", "missing"}) { CHECK_FALSE(fields.says_something(field)); }
    for (const char* field : {"f", "g"}) { CHECK(fields.says_something(field)); }
}

TEST_CASE("halves of different dtypes are kept in one that holds both")
{
    const ::scratch scratch;
    const auto folder = changed(scratch, "plain", [](auto&) { });
    std::vector<std::vector<bf16>> brief;
    const_model_ref model;
    const safetensors_file file(fixtures / "plain" / peft_model_name);
    for (const auto& entry : file.entries()) {
        if (entry.name.find("lora_B") != std::string::npos) {
            model.insert(entry.name, file.tensor(entry));
            continue;
        }
        auto& values = brief.emplace_back();
        for (std::size_t i = 0; i < file.tensor(entry).size(); ++i) {
            values.push_back(narrow<bf16>(0.1f * static_cast<float>(i)));
        }
        model.insert(entry.name, as_tensor(host_view<const bf16>(values.data(), values.size()), entry.shape));
    }
    write_safetensors(folder / peft_model_name, model, {}, durability::process);
    const auto adapter = read_peft<float>(folder);
    for (const auto& [module, type] : adapter.stored) { CHECK(type == dtype::f32); }
    CHECK(wider(dtype::bf16, dtype::f16) == dtype::f32);
    CHECK(wider(dtype::bf16, dtype::bf16) == dtype::bf16);
    CHECK(wider(dtype::f16, dtype::f64) == dtype::f64);
    CHECK(wider(dtype::f64, dtype::f16) == dtype::f64);
}

TEST_CASE("nothing is written where writing cannot succeed")
{
    const ::scratch scratch;
    peft_adapter<float> adapter;
    CHECK_THROWS_AS(write_peft(scratch.path() / "a", adapter), invalid_argument);
    adapter.updates["q"] = {matrix<float>(3, 0, matrix_order::row_major), matrix<float>(0, 3, matrix_order::row_major)};
    CHECK_THROWS_WITH_AS(
        write_peft(scratch.path() / "a", adapter), "module 'q' has rank 0; PEFT has no such adapter", invalid_argument);
    adapter.updates.clear();
    for (const auto& kernel : {extents{2, 1}, extents{0}, extents{-1}}) { // which 3 inputs have none of
        auto convolution = adapter;
        convolution.updates.emplace("q", reference::normal_update<float>(3, 3, 1, 1));
        convolution.kernels["q"] = kernel;
        CHECK_THROWS_WITH_AS(write_peft(scratch.path() / "a", convolution),
            doctest::Contains("has 3 inputs, which its"), shape_mismatch);
    }
    adapter.updates.emplace("q", reference::normal_update<float>(3, 3, 1, 1));
    adapter.updates.at("q").a(0, 1) = 1e6f;
    CHECK_THROWS_AS(write_peft(scratch.path() / "a", adapter, {.output = dtype::f16}), nonfinite_error);
    CHECK_FALSE(fs::exists(scratch.path() / "a"));
    std::ofstream(scratch.path() / "file") << "x";
    CHECK_THROWS_AS(write_peft(scratch.path() / "file", adapter), io_error);
    CHECK_THROWS_AS(write_peft(scratch.path() / "file" / "a", adapter), io_error);
    std::size_t left = 0;
    for ([[maybe_unused]] const auto& entry : fs::directory_iterator(scratch.path())) { ++left; }
    CHECK(left == 1);
}
