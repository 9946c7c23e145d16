// taskvec fold-llora.
// SPDX-License-Identifier: Apache-2.0
#include "run_tool.hpp"

#include <taskvec/core/random.hpp>
#include <taskvec/formats/peft.hpp>

#include <nlohmann/json.hpp>

using namespace tools_test;

namespace {

taskvec::matrix<float> random_factor(std::size_t rows, std::size_t cols, std::uint64_t seed, float scale = 1)
{
    taskvec::matrix<float> x(rows, cols, taskvec::matrix_order::row_major);
    const taskvec::random_stream stream(seed, 0);
    for (std::size_t i = 0; i < rows * cols; ++i) { x.data()[i] = scale * static_cast<float>(stream.normal(i)); }
    return x;
}

taskvec::peft_adapter<float> adapter(
    std::size_t rank, std::uint64_t seed, float b_of_q, float b_of_v, double scaling = 2)
{
    taskvec::peft_adapter<float> made;
    made.updates["layers.0.q"] = {random_factor(6, rank, seed, b_of_q), random_factor(rank, 5, seed + 1), scaling};
    made.updates["layers.0.v"] = {random_factor(4, rank, seed + 2, b_of_v), random_factor(rank, 5, seed + 3), scaling};
    return made;
}

/// scaling·(B0·A0 + B0·ΔA + ΔB·A0)
double linearized(
    const taskvec::lora_update<float>& from, const taskvec::lora_update<float>& to, std::size_t i, std::size_t j)
{
    double sum = 0;
    for (std::size_t k = 0; k < from.rank(); ++k) {
        const double b0 = from.b(i, k), a0 = from.a(k, j), db = to.b(i, k) - b0, da = to.a(k, j) - a0;
        sum += b0 * a0 + b0 * da + db * a0;
    }
    return from.scaling * sum;
}
double product(const taskvec::lora_update<float>& update, std::size_t i, std::size_t j)
{
    double sum = 0;
    for (std::size_t k = 0; k < update.rank(); ++k) { sum += static_cast<double>(update.b(i, k)) * update.a(k, j); }
    return update.scaling * sum;
}

const std::vector<std::string> fold{"fold-llora", "--init", "init", "--adapter", "task", "--out", "folded"};

std::vector<std::string> with(std::vector<std::string> arguments, const std::vector<std::string>& more)
{
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
}

} // namespace

TEST_CASE("fold-llora writes the plain adapter that computes the same; rank r where B0 is 0, otherwise 2r")
{
    const scratch folder;
    const auto initial = adapter(3, 1, 0, 0.5f), tuned = adapter(3, 10, 1, 1);
    taskvec::write_peft(folder / "init", initial);
    taskvec::write_peft(folder / "task", tuned);
    const auto result = run(folder, with(fold, {"--report", "r.json"}));
    CAPTURE(result.err);
    REQUIRE(result.code == 0);
    CHECK(result.out.find("the rank doubled in 1") != std::string::npos);
    const auto folded = taskvec::read_peft((folder / "folded").string());
    CHECK(folded.updates.at("layers.0.q").rank() == 3);
    CHECK(folded.updates.at("layers.0.v").rank() == 6);
    for (const auto& [name, update] : folded.updates) {
        for (std::size_t i = 0; i < update.out(); ++i) {
            for (std::size_t j = 0; j < update.in(); ++j) {
                CHECK(product(update, i, j)
                    == doctest::Approx(linearized(initial.updates.at(name), tuned.updates.at(name), i, j))
                        .epsilon(1e-5));
            }
        }
    }
    const auto report = nlohmann::json::parse(slurp(folder / "r.json"));
    CHECK(report["layers"].size() == 2);
    CHECK(report["layers"][1]["rank"] == 6);
}

TEST_CASE("fold-llora keeps the dtype of the adapter's factors unless told otherwise")
{
    const scratch folder;
    const auto initial = adapter(2, 1, 0, 0);
    taskvec::write_peft(folder / "init", initial, {.output = taskvec::dtype::bf16});
    taskvec::write_peft(folder / "task", adapter(2, 10, 1, 1), {.output = taskvec::dtype::bf16});
    REQUIRE(run(folder, fold).code == 0);
    const taskvec::safetensors_file folded(folder / "folded/adapter_model.safetensors");
    for (const auto& [name, tensor] : folded.model()) { CHECK(tensor.dtype == taskvec::dtype::bf16); }
    REQUIRE(run(folder, with(fold, {"--dtype", "F32"})).code == 0);
    const taskvec::safetensors_file wide(folder / "folded/adapter_model.safetensors");
    for (const auto& [name, tensor] : wide.model()) { CHECK(tensor.dtype == taskvec::dtype::f32); }
}

TEST_CASE("fold-llora refuses another initialisation, names what differs, and leaves no output")
{
    const scratch folder;
    taskvec::write_peft(folder / "task", adapter(3, 10, 1, 1));
    const auto refused = [&](const taskvec::peft_adapter<float>& initial, const char* because) {
        std::filesystem::remove_all(folder / "init");
        taskvec::write_peft(folder / "init", initial);
        const auto result = run(folder, fold);
        CAPTURE(result.err);
        CHECK(result.code == 1);
        CHECK(is_error_line(result.err));
        CHECK(result.err.find(because) != std::string::npos);
        CHECK(!std::filesystem::exists(folder / "folded"));
    };
    refused(adapter(2, 1, 0, 0), "module 'layers.0.q' is");
    refused(adapter(3, 1, 0, 0, 1), "scaling");
    auto fewer = adapter(3, 1, 0, 0);
    fewer.updates.erase("layers.0.v");
    refused(fewer, "module 'layers.0.v' of 'task' is not in 'init'");
    std::filesystem::remove_all(folder / "init");
    CHECK(run(folder, fold).code == 1);
    CHECK(run(folder, {"fold-llora", "--adapter", "task", "--out", "folded"}).code == 2);
    CHECK(run(folder, {"fold-llora", "--help"}).out.find("Example:") != std::string::npos);
}

TEST_CASE("fold-llora says so where an A moved that linearized training cannot have moved")
{
    const scratch folder;
    const auto initial = adapter(3, 1, 0, 0.5f);
    taskvec::write_peft(folder / "init", initial);
    auto tuned = adapter(3, 10, 1, 1);
    taskvec::write_peft(folder / "task", tuned);
    const auto other = run(folder, fold); // q: its B0 is 0; v's is not, so that its A may move
    CHECK(other.code == 0);
    CHECK(other.err.find("lora_A differs from the initialisation's in 1 layer whose") != std::string::npos);
    CHECK(run(folder, with(fold, {"--quiet"})).err.empty());
    tuned.updates.at("layers.0.q").a = initial.updates.at("layers.0.q").a;
    std::filesystem::remove_all(folder / "task");
    taskvec::write_peft(folder / "task", tuned);
    CHECK(run(folder, fold).err.empty());
}

TEST_CASE("fold-llora and merge-lora --space phi take one scaling for one, however it is written: α/√r, or α'/r")
{
    const scratch folder;
    taskvec::write_peft(folder / "init", adapter(5, 1, 0, 0.5f));
    auto config = nlohmann::json::parse(slurp(folder / "init/adapter_config.json"));
    config["use_rslora"] = true;
    for (const double alpha : {0.5, 11.0, 0.3}) { // of these, some α/√5·5/5 is α/√5 in the last bit and some is not
        config["lora_alpha"] = alpha;
        spill(folder / "init/adapter_config.json", config.dump());
        const auto phi = run(folder,
            {"merge-lora", "--space", "phi", "--init", "init", "--adapter", "init", "--adapter", "init", "--out",
                "task"});
        CAPTURE(phi.err);
        REQUIRE(phi.code == 0);
        const auto again = run(folder,
            {"merge-lora", "--space", "phi", "--init", "init", "--adapter", "init", "--adapter", "task", "--out",
                "again"});
        CAPTURE(again.err);
        CHECK(again.code == 0);
        const auto factors = run(folder,
            {"merge-lora", "--method", "average-factors", "--adapter", "init", "--adapter", "task", "--out", "again"});
        CAPTURE(factors.err);
        CHECK(factors.code == 0);
        const auto folded = run(folder, fold);
        CAPTURE(folded.err);
        CHECK(folded.code == 0);
    }
}

TEST_CASE("fold-llora --dry-run writes nothing")
{
    const scratch folder;
    taskvec::write_peft(folder / "init", adapter(3, 1, 0, 0));
    taskvec::write_peft(folder / "task", adapter(3, 10, 1, 1));
    const auto result = run(folder, with(fold, {"--dry-run"}));
    CHECK(result.code == 0);
    CHECK(result.out.find("ranks unchanged because B0 is 0") != std::string::npos);
    CHECK(!std::filesystem::exists(folder / "folded"));
}
