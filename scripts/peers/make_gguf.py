"""Makes tests/data/gguf: adapters that PEFT wrote for tiny language models, and the same as llama.cpp loads them, written by PyPI's gguf."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import logging
import os
import pathlib
import shutil
import warnings

import gguf
import torch
from safetensors.torch import load_file

DTYPES = {"f32": (torch.float32, gguf.GGMLQuantizationType.F32, 0), "f16": (torch.float16, gguf.GGMLQuantizationType.F16, 1), "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, 32)}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def families():
    """Name: transformers' classes of configuration and model, llama.cpp's architecture, modules, dtype, options of PEFT."""
    return {
        "llama": ("LlamaConfig", "LlamaForCausalLM", gguf.MODEL_ARCH.LLAMA, [*LLAMA, "lm_head"], "f32", {"lora_alpha": 6}),
        "mistral": ("MistralConfig", "MistralForCausalLM", gguf.MODEL_ARCH.LLAMA, ["q_proj", "k_proj", "embed_tokens"], "f16", {"lora_alpha": 4}),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", gguf.MODEL_ARCH.QWEN2, LLAMA, "bf16", {"lora_alpha": 4}),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", gguf.MODEL_ARCH.QWEN3, ["q_proj", "v_proj"], "f32", {"lora_alpha": 5, "use_rslora": True}),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", gguf.MODEL_ARCH.GEMMA2, LLAMA, "f32", {"lora_alpha": 2}),
        "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", gguf.MODEL_ARCH.GEMMA3, ["q_proj", "down_proj"], "f16", {"lora_alpha": 2}),
        "phi2": ("PhiConfig", "PhiForCausalLM", gguf.MODEL_ARCH.PHI2, ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"], "f32", {"lora_alpha": 2}),
        "phi3": ("Phi3Config", "Phi3ForCausalLM", gguf.MODEL_ARCH.PHI3, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"], "f32", {"lora_alpha": 2}),
    }


def write_peft(folder, name, row, seed=11):
    import transformers
    from peft import LoraConfig, get_peft_model

    config_class, model_class, _, modules, dtype, options = row
    torch.manual_seed(seed)
    sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0)
    if name == "phi2":
        sizes["num_key_value_heads"] = 2
    if name != "phi2" and name != "phi3":
        sizes["head_dim"] = 4
    config = getattr(transformers, config_class)(**sizes, tie_word_embeddings="gemma" in name)
    config.architectures = [model_class]
    model = getattr(transformers, model_class)(config)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=modules, **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.5 * torch.randn(parameter.shape))
                parameter.data = parameter.data.to(DTYPES[dtype][0])
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    heads = {key: getattr(config, key) for key in ("num_attention_heads", "num_key_value_heads")}
    (folder / "config.json").write_text(json.dumps({"architectures": [model_class], **heads, "tie_word_embeddings": "gemma" in name}, indent=1) + "\n")


def paired(b, heads):
    """What llama.cpp's converter does to the rows of q and k of Llama and Mistral: halves of a head become pairs."""
    return b.reshape(heads, 2, b.shape[0] // heads // 2, b.shape[1]).transpose(1, 2).reshape(b.shape)


def pairs_of(folder, architecture):
    """{llama.cpp's tensor: (lora_a, lora_b)} of a PEFT directory, and its alpha, by gguf's own table of names."""
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    names = gguf.get_tensor_name_map(architecture, 4)
    pairs = {}
    for key, a in tensors.items():
        for mark, other in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if not key.endswith(mark):
                continue
            b = tensors[key[: -len(mark)] + other]
            module = key[: -len(mark)].removeprefix("base_model.model.")
            name = names.get_name(module) + ".weight"
            if architecture == gguf.MODEL_ARCH.LLAMA and module.endswith(("q_proj", "k_proj")):
                b = paired(b, config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"])
            pairs[name] = (a.T if "embedding" in mark else a, b)
    rank = settings["r"]
    alpha = settings["lora_alpha"] * (rank**0.5 if settings.get("use_rslora") else 1)
    return pairs, alpha


def write_gguf(path, pairs, alpha, architecture, dtype, more=()):
    kind, number, file_type = DTYPES[dtype]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(file_type)
    for key, value in more:
        writer.add_uint32(key, value)
    for name in sorted(pairs):
        for half, tensor in zip(("lora_a", "lora_b"), pairs[name]):
            tensor = tensor.to(kind).contiguous()
            if dtype == "bf16":
                writer.add_tensor(f"{name}.{half}", tensor.view(torch.uint8).numpy(), raw_dtype=number)
            else:
                writer.add_tensor(f"{name}.{half}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out / "gguf"
    shutil.rmtree(out, ignore_errors=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    for name, row in families().items():
        folder = out / name
        os.makedirs(folder)
        write_peft(folder, name, row)
        pairs, alpha = pairs_of(folder, row[2])
        write_gguf(folder / "expected.gguf", pairs, alpha, row[2], row[4])
        print(f"  {name:10s} {len(pairs)} weights, {sum(f.stat().st_size for f in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
