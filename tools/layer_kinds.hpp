// What a configuration says of layers by their numbers, where those of a result are other models' in another order.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "models.hpp"

#include <taskvec/core/tensor_ref.hpp>

#include <nlohmann/json.hpp>

#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace tool {

/// The layers of a result that are put together, and what its configuration has to say of them: how many there are, and
/// of which kind each is, by lists over layers (`layer_types`), lists of their numbers (`mlp_only_layers`), or numbers
/// that they are compared with (`first_k_dense_replace`, `attn_layer_period`).
class layers_in_config {
public:
    using json = nlohmann::ordered_json;
    /// `layers`: of which models they are, and outlives this.
    layers_in_config(const model_view& layers, const run_options& run);

    /// Brings a part of the configuration up to date, and notes what it cannot say. `key`: of the part; empty: the
    /// whole. Returns whether it changed.
    bool update(json& part, const std::string& key);
    /// Notes where layers that the configuration takes for one kind hold different tensors. After update() of all
    /// parts. `specs`: the result's tensors.
    void check(const std::vector<taskvec::tensor_spec>& specs) const;

private:
    struct layer {
        std::string path; ///< of the model that it is of
        std::size_t number = 0; ///< in that one
        std::string kind{}; ///< all that was said of it, in words that are the same where that is
    };
    [[nodiscard]] const json& config_of(const layer& one) const;
    bool update_list(const std::string& name, json& value, std::size_t before);
    bool update_number_kinds(json& part);
    void load_configurations(const std::string& key, const json& part);

    const run_options& run_;
    std::vector<layer> layers_;
    std::map<std::string, json> others_; ///< the part of the configurations of the models, by path
    json own_; ///< the part before it is changed
    bool is_said_ = false; ///< whether the configuration says how many layers there are
    bool noted_ = false;
};

} // namespace tool
