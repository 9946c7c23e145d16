"""Makes tests/data/peft_merge: adapters of one rank and of another, and what PEFT's add_weighted_adapter makes of them."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import logging
import pathlib
import shutil
import warnings

import torch

from common import save
from tiny_model import load_adapter, tiny

# Combination type, adapters, weights, density, majority sign, rank. As adapters d has another rank than a, b and c.
CASES = {
    "linear": ("linear", "ab", [0.75, -0.5], None, "total", None),
    "linear_of_three": ("linear", "abc", [1.0, 0.25, -2.0], None, "total", None),
    "cat": ("cat", "abd", [0.75, -0.5, 1.5], None, "total", None),
    "svd": ("svd", "abd", [0.75, -0.5, 1.5], None, "total", None),
    "svd_rank": ("svd", "ab", [1.0, 1.0], None, "total", 2),
    "ties": ("ties", "abc", [1.0, 0.5, 0.75], 0.5, "total", None),
    "ties_negative": ("ties", "abc", [1.0, -0.5, 0.75], 0.7, "total", None),
    "ties_frequency": ("ties", "abc", [1.0, 0.5, 0.75], 0.6, "frequency", None),
    "ties_none_kept": ("ties", "ab", [1.0, 0.5], 0.01, "total", None),
    "ties_svd": ("ties_svd", "abd", [1.0, 0.5, 0.75], 0.5, "total", None),
    "ties_svd_frequency": ("ties_svd", "abc", [1.0, 0.5, -0.75], 0.5, "frequency", 2),
    "magnitude_prune": ("magnitude_prune", "abc", [1.0, -0.5, 0.75], 0.4, "total", None),
    "magnitude_prune_svd": ("magnitude_prune_svd", "abd", [1.0, -0.5, 0.75], 0.4, "total", 3),
    "one_alone": ("ties", "a", [0.5], 0.5, "total", None),
}
SETTINGS = {  # rank, alpha, modules
    "a": (3, 6, ["q_proj", "v_proj", "embed"]),
    "b": (3, 2, ["q_proj", "v_proj", "embed"]),
    "c": (3, 3, ["q_proj", "embed"]),
    "d": (2, 5, ["q_proj", "v_proj"]),
}


def write_adapters(out, seed=17, dtype=torch.float32):
    from peft import LoraConfig, get_peft_model

    for index, (name, (rank, alpha, modules)) in enumerate(SETTINGS.items()):
        torch.manual_seed(seed + index)
        adapted = get_peft_model(tiny(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.5 * torch.randn(parameter.shape))
                    parameter.data = parameter.data.to(dtype)
        adapted.save_pretrained(str(out / name), save_embedding_layers=False)
        (out / name / "README.md").unlink(missing_ok=True)


def factors(model, name):
    """{module.lora_A or .lora_B: factor} of an adapter in a PEFT model."""
    found = {}
    for module, layer in model.base_model.model.named_modules():
        for side in ("A", "B"):
            plain, embedding = getattr(layer, f"lora_{side}", {}), getattr(layer, f"lora_embedding_{side}", {})
            if name in plain:
                found[f"{module}.lora_{side}"] = plain[name].weight.detach().clone()
            elif name in embedding:
                found[f"{module}.lora_{side}"] = embedding[name].detach().clone()
    return found


def merged_by_peft(folder, case):
    how, names, weights, density, majority, rank = case
    model, _ = load_adapter(folder / names[0])
    loaded = ["default"]
    for name in names[1:]:
        model.load_adapter(str(folder / name), name)
        loaded.append(name)
    options = {} if density is None else {"density": density}
    model.add_weighted_adapter(loaded, weights, "merged", combination_type=how, majority_sign_method=majority, svd_rank=rank, **options)
    made = factors(model, "merged")
    if how == "cat":  # PEFT fills up with zeros where an adapter lacks the module
        for key, value in made.items():
            rank = sum(SETTINGS[name][0] for name in names if any(key.split(".lora_")[0].endswith(module) for module in SETTINGS[name][2]))
            filled = value[rank:] if key.endswith("A") else value[:, rank:]
            assert not filled.any()
            made[key] = (value[:rank] if key.endswith("A") else value[:, :rank]).contiguous()
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out / "peft_merge"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    write_adapters(out)
    for name, case in CASES.items():
        made = merged_by_peft(out, case)
        if case[0].endswith("svd"):  # singular vectors have no sign: the updates
            made = {key.removesuffix(".lora_A"): made[key.removesuffix("A") + "B"] @ made[key] for key in made if key.endswith(".lora_A")}
        save(out / f"{name}.safetensors", made, {})
        print(f"  {name:20s} {len(made)} tensors")
    keys = ("combination", "adapters", "weights", "density", "majority_sign", "rank")
    (out / "index.json").write_text(json.dumps({name: dict(zip(keys, case)) for name, case in CASES.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
