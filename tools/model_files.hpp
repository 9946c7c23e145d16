// What lies beside weights in a model's directory: configuration, tokenizer, templates, and the card that says how it
// was made.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "models.hpp"
#include "outputs.hpp"

#include <nlohmann/json_fwd.hpp>

#include <map>
#include <string>
#include <vector>

namespace tool {

/// Adds --copy-from, --no-copy, --copy-code and --no-card.
void add_copy_options(command& verb, copy_request& copies);

/// Whether --out names a directory: one that is there or ends in a slash, one of shards, or any name without
/// `.safetensors` where the models are directories.
[[nodiscard]] bool out_is_directory(const fs::path& out, const fs::path& first_model, bool sharded);

/// claim_output() of --out for a model, which goes to a directory or a file. A directory in which peru-fft has left a
/// merged model and deltas for it is refused: a second model there would be opened in place of that one.
void claim_model(const run_options& run, const fs::path& out, bool directory);

/// How a model was made, for its card.
struct recipe {
    struct model {
        std::string role, name;
        fs::path path;
        double weight = 1;
        const taskvec::checkpoint* opened = nullptr;
        const taskvec::const_model_ref* unstored = nullptr; ///< the tensors, where `opened` is only their outline
        bool is_result = false; ///< of another document, which nobody else has
    };
    std::string done; ///< "Merged by ties", say
    std::string method;
    std::vector<model> models; ///< the base first, where there is one
    std::string options; ///< JSON of those in force
    model_view layers{}; ///< of which its layers are, where they are not those of the first model
    bool untied = false; ///< the head is no longer the embedding
    const lined_up_vocabulary* vocabulary = nullptr; ///< what became of rows of tokens
    std::map<std::string, std::string> called{}; ///< model_request's
    std::vector<ingredient> made_of{}; ///< what models that are results were made of

    /// What a model is called in what is said.
    [[nodiscard]] std::string label_of(const fs::path& path) const
    {
        const auto place = called.find(path.string());
        return "'" + (place == called.end() ? path.string() : place->second) + "'";
    }
};
/// What results of other documents among the models of a merge were made of.
[[nodiscard]] std::vector<ingredient> recipe_ingredients(
    const model_request& request, const std::vector<recipe::model>& models);
/// The models of a merge.
[[nodiscard]] std::vector<recipe::model> recipe_models(const model_request& request, const merge_inputs& inputs);

/// Puts what loads the result beside its weights, where these go to a directory: files of the first model's directory
/// (or --copy-from), brought up to date, and the card, which is made while the output finishes: what `how` refers to
/// stays until then. `weights`: the file that holds the tensors, where it is not
/// called as a model's is, so that an index leads to it.
void add_model_files(model_folder& out, const copy_request& copies, const run_options& run, const recipe& how,
    const std::vector<taskvec::tensor_spec>& specs, const std::string& weights = "");

/// Throws io_error where a dry run's output would not fit on the disk.
void check_space(const fs::path& out, std::uint64_t bytes);

} // namespace tool
