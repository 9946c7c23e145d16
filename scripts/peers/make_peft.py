"""Makes tests/data/peft: adapters that PEFT itself wrote for a tiny model, and the updates that it computes from them."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import logging
import pathlib
import shutil
import warnings

import torch

from common import save
from tiny_model import deltas, load_adapter, tiny

Q, V, FC = "q_proj", "v_proj", "c_fc"


def configurations():
    from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig

    accepted = {
        "plain": LoraConfig(r=3, lora_alpha=6, target_modules=[Q, V]),
        "rslora": LoraConfig(r=4, lora_alpha=5, target_modules=[Q, V], use_rslora=True),
        "patterns": LoraConfig(r=3, lora_alpha=6, target_modules=[Q, V], rank_pattern={"layers.0.attn.q_proj": 2, r"layers\.\d\.attn\.v_proj": 4},
                               alpha_pattern={"layers.1.attn.q_proj": 9, V: 2}),
        "patterns_rslora": LoraConfig(r=3, lora_alpha=6, target_modules=[Q, V], use_rslora=True, rank_pattern={Q: 4}, alpha_pattern={"^layers.0.attn.q_proj": 5}),
        "fan_in_fan_out": LoraConfig(r=2, lora_alpha=3, target_modules=[FC], fan_in_fan_out=True),
        "embedding": LoraConfig(r=2, lora_alpha=4, target_modules=["embed", Q]),
        "embedding_saved": LoraConfig(r=2, lora_alpha=4, target_modules=["embed", Q]),
        "regex_target": LoraConfig(r=2, lora_alpha=2, target_modules=r"layers\.1\.attn\.(q|v)_proj"),
        "bias_all": LoraConfig(r=2, lora_alpha=2, target_modules=[V], bias="all"),
        "bias_lora_only": LoraConfig(r=2, lora_alpha=2, target_modules=[V], bias="lora_only"),
        "bf16": LoraConfig(r=3, lora_alpha=6, target_modules=[Q, V]),
        "merge_a": LoraConfig(r=2, lora_alpha=4, target_modules=[Q, V]),
        "merge_b": LoraConfig(r=3, lora_alpha=2, target_modules=[Q, "head"], use_rslora=True),
    }
    asked = {"modules_to_save": LoraConfig(r=2, lora_alpha=2, target_modules=[Q], modules_to_save=["head"])}
    refused = {
        "adalora": ("peft_type", AdaLoraConfig(init_r=3, target_r=2, lora_alpha=6, target_modules=[Q, V], total_step=10)),
        "dora": ("use_dora", LoraConfig(r=2, lora_alpha=2, target_modules=[Q], use_dora=True)),
        "pissa": ("init_lora_weights", LoraConfig(r=2, lora_alpha=2, target_modules=[Q], init_lora_weights="pissa")),
        "olora": ("init_lora_weights", LoraConfig(r=2, lora_alpha=2, target_modules=[Q], init_lora_weights="olora")),
        "alora": ("alora_invocation_tokens", LoraConfig(r=2, lora_alpha=2, target_modules=[Q], alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM")),
        "lora_bias": ("lora_bias", LoraConfig(r=2, lora_alpha=2, target_modules=[V], lora_bias=True)),
        "trainable_tokens": ("trainable_token_indices", LoraConfig(r=2, lora_alpha=2, target_modules=[Q], trainable_token_indices={"embed": [1, 3]})),
        "conv2d": ("a convolution's factors", LoraConfig(r=2, lora_alpha=2, target_modules=["conv"])),
        "loha": ("peft_type LOHA", LoHaConfig(r=2, alpha=2, target_modules=[Q])),
        "ia3": ("peft_type IA3", IA3Config(target_modules=[Q, V], feedforward_modules=[V])),
    }
    return accepted, asked, refused


def write_adapter(folder, config, dtype=torch.float32):
    from peft import get_peft_model

    model = tiny()
    peft_model = get_peft_model(model, config)
    torch.manual_seed(sum(folder.name.encode()))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad or name.endswith(".bias") and config.to_dict().get("bias", "none") != "none":
                parameter.copy_(torch.randn(parameter.shape) * 0.5)
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    # What PEFT does by itself for embeddings called embed_tokens: a copy of the base weight goes beside the factors.
    peft_model.save_pretrained(str(folder), save_embedding_layers="auto" if folder.name != "embedding_saved" else True)
    (folder / "README.md").unlink(missing_ok=True)
    return peft_model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out / "peft"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

    save(out / "base.safetensors", tiny().state_dict(), {})
    accepted, asked, refused = configurations()
    index = {}
    for name, config in {**accepted, **asked}.items():
        peft_model = write_adapter(out / name, config, torch.bfloat16 if name == "bf16" else torch.float32)
        expected = deltas(peft_model)
        again, _ = load_adapter(out / name)
        for module, value in deltas(again).items():
            assert torch.equal(value, expected[module]), (name, module)
        assert expected
        save(out / name / "expected.safetensors", expected, {"scaling": json.dumps(
            {module: peft_model.base_model.model.get_submodule(module).scaling["default"] for module in sorted(expected)})})
        index[name] = {"read": "yes"} if name in accepted else {"read": "asked", "because": "modules_to_save"}
    for name, (because, config) in refused.items():
        write_adapter(out / name, config)
        index[name] = {"read": "no", "because": because}

    # PEFT's own exact merge of adapters of different rank and targets, one weight negative.
    model, _ = load_adapter(out / "merge_a")
    model.load_adapter(str(out / "merge_b"), "b")
    single = [deltas(model, "default"), deltas(model, "b")]
    model.add_weighted_adapter(["default", "b"], [0.75, -0.5], "merged", combination_type="cat")
    merged = deltas(model, "merged")
    for module, value in merged.items():
        total = sum(weight * single[i][module] for i, weight in enumerate((0.75, -0.5)) if module in single[i])
        assert float((total - value).abs().max()) < 1e-5, module
    save(out / "merged_a_b.safetensors", merged, {"weights": "[0.75, -0.5]", "adapters": '["merge_a", "merge_b"]'})
    (out / "index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for folder, row in sorted(index.items()):
        print(f"  {folder:18s} {row['read']:6s} {sum(f.stat().st_size for f in (out / folder).iterdir())} bytes")


if __name__ == "__main__":
    main()
