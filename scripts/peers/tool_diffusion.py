"""The taskvec tool's fuse of adapters with diffusers' names into single files of Stable Diffusion and the other way round, beside PEFT and diffusers' converters."""
# SPDX-License-Identifier: Apache-2.0
import logging
import pathlib
import subprocess
import tempfile

import torch

import diffusion_names
from common import largest_difference, load, save, tool_arguments

TOLERANCE = 1e-6  # of the largest weight, in f32
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
               "conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1", "add_embedding.linear_2"]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def text_encoder(projected):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = dict(vocab_size=61, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
    if projected:
        return CLIPTextModelWithProjection(CLIPTextConfig(**sizes, hidden_size=16, intermediate_size=24, projection_dim=16))
    return CLIPTextModel(CLIPTextConfig(**sizes, hidden_size=12, intermediate_size=20))


def adapt(model, layers):
    """(factors by module, their alpha, the tensors with them folded in), by PEFT."""
    from peft import LoraConfig, get_peft_model

    present = [layer for layer in layers if any(name == layer or name.endswith("." + layer) for name, _ in model.named_modules())]
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=present))
    factors = {}
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
                module, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
                factors.setdefault(module, {})[factor[0]] = parameter.detach().clone()
        merged = adapted.merge_and_unload().state_dict()
    return factors, 3.0, {name: tensor.detach().clone() for name, tensor in merged.items()}


def kohya(prefix, factors, alpha, names=lambda module: module):
    made = {}
    for module, pair in factors.items():
        stem = prefix + names(module).replace(".", "_")
        made |= {f"{stem}.lora_down.weight": pair["A"], f"{stem}.lora_up.weight": pair["B"], f"{stem}.alpha": torch.tensor(alpha)}
    return made


def main():
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    arguments = tool_arguments(__doc__)
    logging.disable(logging.WARNING)
    torch.manual_seed(4)
    failures = []

    def run(*words):
        done = subprocess.run([arguments.tool, *map(str, words)], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{words}: the tool answers {done.returncode}: {done.stderr.strip()}")
        return done.stderr

    def judge(what, found, expected, changed):
        if set(found) != set(expected):
            failures.append(f"{what}: tensors {sorted(set(found) ^ set(expected))[:4]}")
            return
        apart = max(largest_difference(found[name], expected[name]) for name in expected)
        print(f"  {what:60s} {changed:4d} modules, apart by {apart:.1e}")
        if not apart <= TOLERANCE:
            failures.append(f"{what}: off by {apart:.2e}, allowed {TOLERANCE:.0e}")

    def whole(model):
        return {name: tensor for name, tensor in diffusion_names.with_text_model(model).items() if not name.endswith("position_ids")}

    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for kind in ("sd1", "sd2", "sdxl"):
            unet = diffusion_names.unet("sdxl" if kind == "sdxl" else "sd1")
            names = diffusion_names.ldm_names(unet)
            base = diffusion_names.single_file(unet)
            prefixes = {"sd1": ["cond_stage_model.transformer."], "sd2": ["cond_stage_model.model."],
                        "sdxl": ["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."]}[kind]
            texts = [text_encoder(prefix == "conditioner.embedders.1.model.") for prefix in prefixes]
            for text, prefix in zip(texts, prefixes):
                own = whole(text.state_dict())
                base |= diffusion_names.open_clip(own, prefix) if prefix.endswith(".model.") else {prefix + name: tensor.detach().clone() for name, tensor in own.items()}
            base["first_stage_model.encoder.conv_in.weight"] = torch.randn(4, 3, 3, 3)  # there is a conv_in in the autoencoder too
            base["first_stage_model.decoder.conv_in.weight"] = torch.randn(4, 3, 3, 3)
            single, folder = scratch / f"{kind}.safetensors", scratch / kind / "unet"
            save(single, base, {})
            unet.save_pretrained(folder)

            factors, alpha, merged = adapt(unet, UNET_LAYERS)
            stems = ["lora_te_"] if len(texts) == 1 else ["lora_te1_", "lora_te2_"]
            components = ["text_encoder.", "text_encoder_2."]
            flat, dotted, expected_texts = {}, {}, []
            for stem, component, text in zip(stems, components, texts):
                text_factors, text_alpha, text_merged = adapt(text, TEXT_LAYERS)
                text_factors = {module if module.startswith("text_model.") else "text_model." + module: pair for module, pair in text_factors.items()}
                flat |= kohya(stem, text_factors, text_alpha)
                for module, pair in text_factors.items():
                    dotted |= {f"{component}{module}.lora_A.weight": pair["A"], f"{component}{module}.lora_B.weight": pair["B"] * (alpha / 2)}
                expected_texts.append(whole(text_merged))
            for module, pair in factors.items():
                dotted |= {f"unet.{module}.lora_A.weight": pair["A"], f"unet.{module}.lora_B.weight": pair["B"] * (alpha / 2)}

            def ldm(module):
                return names[module + ".weight"].removesuffix(".weight")

            files = {
                "kohya's file with diffusers' names": kohya("lora_unet_", factors, alpha) | flat,
                "kohya's file with names of single files": kohya("lora_unet_", factors, alpha, ldm) | flat,
                "diffusers' file": dotted,
            }
            for what, tensors in files.items():
                adapter, out = scratch / "adapter.safetensors", scratch / "out.safetensors"
                save(adapter, tensors, {})
                said = run("fuse", "--base", single, "--adapter", adapter, "--out", out)
                modules = sum(name.endswith((".lora_down.weight", ".lora_A.weight")) for name in tensors)
                if ("translated" in said) != ("single" not in what or kind != "sd1"):
                    failures.append(f"{kind}, {what}: the note is {said!r}")
                found, _ = load(out)
                judge(f"{kind}, {what} into a single file: the UNet", diffusion_names.convert(found, unet), merged, modules)
                for text, prefix, expected in zip(texts, prefixes, expected_texts):
                    mine = {name: tensor for name, tensor in found.items() if name.startswith(prefix)}
                    part = convert_open_clip_checkpoint(text, mine, prefix) if prefix.endswith(".model.") else convert_ldm_clip_checkpoint(mine)
                    judge(f"{kind}, {what}: the text encoder {prefix}", {name: tensor for name, tensor in part.items() if not name.endswith("position_ids")}, expected, modules)
                if what.startswith("diffusers"):
                    run("fuse", "--base", folder, "--adapter", adapter, "--out", scratch / "folder", "--exclude", "text_encoder.*")
                else:
                    run("fuse", "--base", folder, "--adapter", adapter, "--out", scratch / "folder", "--exclude", "lora_te.*")
                found, _ = load(next((scratch / "folder").glob("*.safetensors")))
                judge(f"{kind}, {what} into diffusers' folder", found, merged, modules)

                # As diffusers' file, from either kind of names: diffusers' names.
                run("convert", adapter, "--as", "diffusers", "--base", single, "--out", scratch / "as.safetensors")
                named, _ = load(scratch / "as.safetensors")
                wanted = {f"unet.{module}" for module in factors}
                if {name.partition(".lora")[0] for name in named if name.startswith("unet.")} != wanted:
                    failures.append(f"{kind}, {what}: convert makes other names of it")
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} failed:", *failures]))
    print("  Stable Diffusion's names agree")


if __name__ == "__main__":
    main()
