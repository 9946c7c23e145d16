// What the architectures of common models say of names: heads that are an embedding, embeddings under several names,
// weights that are read past their modules, and modules that a library calls otherwise than the files it writes.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/core/tensor_ref.hpp>

#include <nlohmann/json_fwd.hpp>

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace tool {

/// Whether a model's linear layers are transformers' Conv1D, whose weights lie in×out, by its configuration.
[[nodiscard]] bool has_conv1d_layers(const nlohmann::json& config);
/// The same of the config.json beside a model.
[[nodiscard]] bool has_conv1d_layers(const std::filesystem::path& model);

/// Whether a module of this name is the head of a language model: lm_head, embed_out, cls.predictions.decoder, …
[[nodiscard]] bool is_head_module(std::string_view module);
/// Whether a tensor of this name is the weight of such a head, or is called as one: output.weight, …
[[nodiscard]] bool is_head(std::string_view name);
/// Whether a tensor of this name is an embedding of tokens, or is called as one.
[[nodiscard]] bool is_embedding(std::string_view name);
/// The rows of the input embedding among some tensors; nothing where none is called so.
[[nodiscard]] std::optional<std::int64_t> vocabulary_rows(const std::vector<taskvec::tensor_spec>& specs);

/// Whether PEFT (0.21) makes of factors of single experts those of the parameter in which transformers 5 keeps all, as
/// it loads an adapter, for models of this configuration.
[[nodiscard]] bool peft_joins_experts(const nlohmann::json& config);

/// A language model's input embedding, and what is the same matrix in the model that is loaded.
struct tied_matrix {
    std::string embedding{}; ///< its module; empty: the model has none that is known
    /// Modules that are it once the model is loaded, and that no file holds: of T5 and BART, which store `shared`.
    std::vector<std::string> copies{};
    std::string head{}; ///< the module of the head; empty: the architecture has none
    bool head_stored = false; ///< whether the head is in the file
    bool tied = false; ///< whether the head is the embedding
};
/// By the tensors of a model, and the configuration beside it: what that says of tie_word_embeddings, or what
/// transformers takes it for where it says nothing and no file has the head.
[[nodiscard]] tied_matrix tied_matrix_of(const nlohmann::json& config, const taskvec::const_model_ref& model);

/// Whether common models, or one of this configuration, read the weight of a module of this name without calling the
/// module, call it with other than its indices, or look at more of it than PEFT shows: PEFT cannot adapt it.
[[nodiscard]] bool is_read_past_its_module(const nlohmann::json& config, std::string_view module);

/// Whether a module is the router of a mixture of experts, by its name and the experts beside it: transformers 5 keeps
/// its weight as a bare parameter, and PEFT cannot adapt it there.
[[nodiscard]] bool is_router(
    const nlohmann::json& config, const taskvec::const_model_ref& model, std::string_view module);

/// The major version of transformers that wrote a configuration; nothing where it does not say.
[[nodiscard]] std::optional<int> transformers_version(const nlohmann::json& config);
/// What transformers 5 calls a module of a model of this configuration that is called so in files; the name itself
/// where they are the same.
[[nodiscard]] std::string name_in_transformers_5(const nlohmann::json& config, const std::string& module);

} // namespace tool
