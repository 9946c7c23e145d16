// Adapters as people have them: PEFT's directories, files of kohya and A1111, diffusers, MLX and llama.cpp, told apart
// by what they hold, read into one form that folds into a base.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/formats/adapter_contents.hpp>
#include <taskvec/formats/adapter_gguf.hpp>
#include <taskvec/formats/adapter_reader.hpp>

#include <algorithm>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// The file of tensors that an adapter's path stands for: itself, or PEFT's, diffusers' or MLX's file in a directory.
/// Throws io_error where there is none.
[[nodiscard]] inline std::filesystem::path adapter_tensor_file(const std::filesystem::path& path)
{
    std::error_code ignored;
    if (!std::filesystem::is_directory(path, ignored)) { return path; }
    for (const std::string_view name : {peft_model_name, std::string_view("pytorch_lora_weights.safetensors"),
             std::string_view("adapters.safetensors"), peft_pickle_name}) {
        if (std::filesystem::exists(path / name, ignored)) { return path / name; }
    }
    std::vector<std::string> named; // as PEFT saves adapters that have names
    for (const auto& entry : std::filesystem::directory_iterator(path, ignored)) {
        if (std::filesystem::exists(entry.path() / peft_config_name, ignored)) {
            named.push_back(entry.path().filename().string());
        }
    }
    if (!named.empty()) {
        std::sort(named.begin(), named.end());
        raise<io_error>(error_code::model_not_found,
            message("holds no adapter, but ", detail::quoted_list(named),
                named.size() > 1 ? " in it do: name one of them" : " in it does: name that"),
            path.string());
    }
    raise<io_error>(error_code::model_not_found,
        message("holds no adapter: expected ", peft_model_name,
            " (PEFT), pytorch_lora_weights.safetensors (diffusers) or adapters.safetensors (MLX), or name the file "
            "(kohya's, or a GGUF file)"),
        path.string());
}

/// Reads an adapter of any dialect: a PEFT directory, a directory of diffusers or MLX, or a file (a GGUF file by
/// read_gguf_adapter()). Told apart by the names of its tensors; a file that mixes dialects, or holds several adapters,
/// is refused. Scalings are α/r (α/√r with use_rslora), with α and r from the configuration and its patterns, from
/// those that diffusers keeps in the header of its file (`lora_adapter_metadata`), or from `.alpha` tensors; MLX gives
/// its scale; where nothing gives one α is r, which `notes` says. LoHa, LoKr and Tucker's forms of them become updates
/// of higher rank, exactly but for the rounding of products of factors to T. Factors of convolutions are flattened,
/// with the kernel among the inputs. Throws io_error; format_error for halves without partners, a rank of 0, alphas
/// that contradict each other, factors of another kind than the configuration says (peft_type, use_dora), tensors with
/// no place in an adapter, configurations that no update can say; shape_mismatch; dtype_mismatch.
///
///     const auto adapter = read_adapter("style.safetensors");
template <arithmetic_element T = float>
[[nodiscard]] adapter_contents<T> read_adapter(const std::filesystem::path& path)
{
    const auto file = adapter_tensor_file(path);
    if (is_gguf_file(file)) { return read_gguf_adapter<T>(file); }
    return detail::adapter_reader<T>(path, file).read();
}

} // namespace taskvec::inline TASKVEC_ABI
