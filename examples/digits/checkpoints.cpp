// SPDX-License-Identifier: Apache-2.0
#include "checkpoints.hpp"

#include <taskvec/formats/delta.hpp>
#include <taskvec/formats/fingerprint.hpp>
#include <taskvec/formats/safetensors.hpp>

#include <cstring>

namespace digits {
namespace {

/// Copies a file's tensors into a model of the same names, shapes and dtypes.
void load(const std::filesystem::path& path, const taskvec::model_ref& into)
{
    const taskvec::safetensors_file file(path);
    const taskvec::const_model_ref from = file.model();
    for (const auto& [name, tensor] : into) {
        const auto* found = from.find(name);
        if (!found) {
            taskvec::raise<taskvec::format_error>(taskvec::error_code::file_tensors,
                taskvec::message("has no tensor '", name, "': it is no model of the digits example"), path.string());
        }
        if (found->shape != tensor.shape || found->dtype != tensor.dtype) {
            taskvec::raise<taskvec::format_error>(taskvec::error_code::file_tensors,
                taskvec::message("tensor '", name, "' is ", taskvec::to_string(found->dtype), ' ',
                    taskvec::to_string(found->shape), "; expected ", taskvec::to_string(tensor.dtype), ' ',
                    taskvec::to_string(tensor.shape)),
                path.string());
        }
        std::memcpy(tensor.data, found->data, tensor.bytes());
    }
}

taskvec::model_ref head_model(matrix& head)
{
    return {{"head.weight", taskvec::tensor_ref{head.data(), taskvec::dtype::f32, {classes, features}}}};
}

} // namespace

void save(const encoder& model, const std::filesystem::path& file)
{
    taskvec::write_safetensors(file, model.model());
}

encoder load_encoder(const std::filesystem::path& file)
{
    encoder model;
    load(file, model.model());
    return model;
}

void save_head(const matrix& head, const std::filesystem::path& file)
{
    matrix copy = head;
    taskvec::write_safetensors(file, head_model(copy));
}

matrix load_head(const std::filesystem::path& file)
{
    matrix head(classes, features);
    load(file, head_model(head));
    return head;
}

void save_base(const network& base, const std::filesystem::path& folder)
{
    save(base.body, folder / "base.safetensors");
    save_head(base.head, folder / "head.safetensors");
}

void save(const reused& compressed, const std::filesystem::path& folder)
{
    std::filesystem::create_directories(folder);
    save(compressed.shared, folder / "merged.safetensors");
    const std::uint64_t stamp = taskvec::fingerprint(taskvec::cpu{.threads = 1}, compressed.shared.model());
    for (std::size_t task = 0; task < tasks; ++task) {
        taskvec::write_delta(folder / taskvec::message(task_names[task], ".delta.safetensors"),
            {.tensors = compressed.deltas[task], .base_fingerprint = stamp});
    }
}

} // namespace digits
