"""Random models of Llama's shapes and adapters for them, as scripts/bench-peers needs them.

    python bench_models.py models FOLDER BYTES     base and task0 to task2: bf16 shards, the tasks near the base
    python bench_models.py adapters FOLDER BASE    adapter0 and adapter1: LoRA of rank 16 on every projection of BASE"""
# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import sys
import zlib

import torch
from safetensors import safe_open
from safetensors.torch import save_file

RANK = 16
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random(shape, name, scale):
    """Normal values that depend on the name alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) * scale


def shapes_of(size):
    """(configuration, {name: shape}) of a model of about `size` bytes in bf16."""
    hidden, inner, words = (512, 1536, 8192) if size < 6e8 else (1536, 4608, 32000) if size < 5e9 else (3072, 8192, 32000)
    narrow = hidden // 3 if hidden > 512 else 256
    layer = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
             "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
             "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    shapes = {"model.embed_tokens.weight": (words, hidden)}
    layers = max(1, round((size / 2 - 2 * words * hidden) / sum(torch.Size(shape).numel() for shape in layer.values())))
    for index in range(layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64, "num_key_value_heads": narrow // 64, "head_dim": 64, "vocab_size": words, "torch_dtype": "bfloat16",
            "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}, shapes


def make_models(folder, size):
    config, shapes = shapes_of(size)
    total = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    most, shards = min(2_000_000_000, total // 2), [[]]
    for name, shape in shapes.items():
        if shards[-1] and 2 * sum(torch.Size(shapes[each]).numel() for each in [*shards[-1], name]) > most:
            shards.append([])
        shards[-1].append(name)
    for model in ("base", "task0", "task1", "task2"):
        path, places = folder / model, {}
        path.mkdir(parents=True, exist_ok=True)
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors = {}
            for name in names:
                values = random(shapes[name], name, 0.02)
                if model != "base":
                    values += random(shapes[name], f"{model} {name}", 0.001)
                tensors[name] = values.bfloat16()
            save_file(tensors, path / file, metadata={"format": "pt"})
            places |= dict.fromkeys(names, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
        (path / "config.json").write_text(json.dumps(config))
        (path / "made").touch()


def make_adapters(folder, base):
    shapes = {}
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():
                module = name.removesuffix(".weight")
                if module != name and module.rsplit(".", 1)[-1] in PROJECTIONS:
                    shapes[module] = file.get_slice(name).get_shape()
    if not shapes:
        sys.exit(f"{base} has none of the layers that adapters are made for: {', '.join(PROJECTIONS)}")
    for adapter in ("adapter0", "adapter1"):
        path, tensors = folder / adapter, {}
        path.mkdir(parents=True, exist_ok=True)
        for module, (outputs, inputs) in shapes.items():
            for factor, shape in (("lora_A", (RANK, inputs)), ("lora_B", (outputs, RANK))):
                tensors[f"base_model.model.{module}.{factor}.weight"] = random(shape, f"{adapter} {module} {factor}", 0.02)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = sorted({module.rsplit(".", 1)[-1] for module in shapes})
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": targets,
                                                               "base_model_name_or_path": str(base), "bias": "none"}))
    (folder / "made").touch()


if __name__ == "__main__":
    what, folder, argument = sys.argv[1:]
    if what == "models":
        make_models(pathlib.Path(folder), int(argument))
    else:
        make_adapters(pathlib.Path(folder), pathlib.Path(argument))
