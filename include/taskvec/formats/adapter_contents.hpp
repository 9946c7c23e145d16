// An adapter of any dialect in one form, and what readers of dialects share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <taskvec/adapters/lora.hpp>
#include <taskvec/formats/gguf.hpp>
#include <taskvec/formats/peft.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace taskvec::inline TASKVEC_ABI {

/// Who wrote an adapter, by the names of its tensors.
enum class adapter_dialect : std::uint8_t {
    peft, ///< `MODULE.lora_A.weight`, at times with an adapter's name in it, and PEFT's prefix before it
    kohya, ///< kohya's scripts, A1111, LyCORIS: `lora_unet_MODULE.lora_down.weight`, `.alpha`; dots are underscores
    diffusers, ///< `unet.MODULE.lora.down.weight`, `MODULE_lora.down.weight`, `MODULE.lora_linear_layer.down.weight`
    mlx, ///< `MODULE.lora_a` (in×r) and `MODULE.lora_b` (r×out)
    gguf ///< llama.cpp's: a GGUF file with `blk.N.attn_q.weight.lora_a`, `.lora_b`
};

/// "PEFT", "kohya", "diffusers", "MLX", "GGUF".
[[nodiscard]] constexpr std::string_view to_string(adapter_dialect dialect) noexcept
{
    switch (dialect) {
    case adapter_dialect::peft: return "PEFT";
    case adapter_dialect::kohya: return "kohya";
    case adapter_dialect::diffusers: return "diffusers";
    case adapter_dialect::mlx: return "MLX";
    default: return "GGUF";
    }
}

/// What an adapter does to one module.
template <arithmetic_element T>
struct adapted_module {
    lora_update<T>
        update{}; ///< out×in; a convolution's `in` counts its kernel (in·kh·kw), an embedding's is its entries
    extents kernel{}; ///< of a convolution: its sides, {1, 1} included; empty otherwise
    bool paired_rows = false; ///< rows lie as llama.cpp keeps those of q and k: unpair_rows() puts them back
    bool embedding = false; ///< factored as PEFT does it: the weight is entries×dimensions
    std::vector<double> magnitude{}; ///< DoRA's, one for each output; empty: none
    lora_update<T> bias{}; ///< what lora_bias adds to the module's bias, as an update of 1×out; of rank 0: nothing
    dtype stored = dtype_of<T>; ///< of the factors in the file
    std::string kind = "LoRA"; ///< "LoRA", "DoRA", "AdaLoRA", "LoHa" or "LoKr": what the update was made of
};

/// An adapter read from any dialect. Module names are the file's, without prefixes that say nothing of the module;
/// kohya's have underscores for dots: match_modules() finds the weights of a base that they mean.
template <arithmetic_element T>
struct adapter_contents {
    std::map<std::string, adapted_module<T>> modules{}; ///< by module
    std::map<std::string, peft_tensor> wholes{}; ///< tensors that were trained whole (modules_to_save, biases), by name
    std::map<std::string, peft_tensor> copies{}; ///< copies of base weights that an adapter carries, by name
    adapter_dialect dialect = adapter_dialect::peft; ///< that it was read from
    bool fan_in_fan_out = false; ///< square weights lie in×out, as its configuration says
    bool tied = false; ///< what it does to the embedding it does to the head tied to it (PEFT's ensure_weight_tying)
    nlohmann::json config = nlohmann::json::object(); ///< adapter_config.json, where there is one
    gguf_target target{}; ///< of a GGUF adapter: the model that it says it is for
    std::vector<std::string> notes{}; ///< what was taken for granted, a sentence each
    std::string label{}; ///< names the adapter in messages: its path
    std::filesystem::path file{}; ///< the tensors
};

namespace detail {

/// All entries of a stored factor in T, as rows of its first extent.
template <class T>
[[nodiscard]] matrix<T> read_flat_factor(const safetensors_file& file, const safetensors_entry& entry)
{
    safetensors_entry flat = entry;
    std::int64_t rest = 1;
    for (std::size_t i = 1; i < entry.shape.size(); ++i) { rest *= entry.shape[i]; }
    flat.shape = entry.shape.empty() ? extents{1, 1}
        : entry.shape.size() == 1    ? extents{1, entry.shape[0]}
                                     : extents{entry.shape[0], rest};
    return read_factor<T>(file, flat);
}

template <class T>
[[nodiscard]] matrix<T> turned_over(const matrix<T>& x)
{
    matrix<T> y(x.cols(), x.rows(), matrix_order::row_major);
    for (std::size_t i = 0; i < x.rows(); ++i) {
        for (std::size_t j = 0; j < x.cols(); ++j) { y(j, i) = x(i, j); }
    }
    return y;
}

} // namespace detail

} // namespace taskvec::inline TASKVEC_ABI
