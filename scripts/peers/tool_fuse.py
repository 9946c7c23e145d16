"""The taskvec tool's fuse beside PEFT's merge_and_unload: the weights of every kind of adapter, and the outputs of language models."""
# SPDX-License-Identifier: Apache-2.0
import json
import logging
import pathlib
import subprocess
import tempfile

import torch

from common import largest_difference, load, save, tool_arguments
from tiny_model import load_adapter, tiny

TOLERANCE = 1e-6  # of the largest weight, in f32
FOLDED = ["adalora", "dora", "lora_bias", "conv2d", "loha"]  # what fuse takes beside what the other verbs read


def language_models():
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt2 = GPT2Config(vocab_size=61, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    llama = dict(vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    return {
        "gpt2": lambda: GPT2LMHeadModel(gpt2),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=False)),
        "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**llama, tie_word_embeddings=True)),
    }


def adapters():
    from peft import LoraConfig

    return [
        ("gpt2", "all layers", LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
        ("gpt2", "DoRA", LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)),
        ("llama", "rsLoRA with patterns", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5})),
        ("llama", "DoRA", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "up_proj"], use_dora=True)),
        ("llama", "head saved whole", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], modules_to_save=["lm_head"])),
        ("llama", "head and embedding", LoraConfig(r=2, lora_alpha=2, target_modules=["embed_tokens", "lm_head"])),
        ("llama tied", "head alone", LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head", "k_proj"])),
        ("llama tied", "embedding alone", LoraConfig(r=2, lora_alpha=2, target_modules=["embed_tokens"])),
        ("llama tied", "tied adapters", LoraConfig(r=2, lora_alpha=2, target_modules=["embed_tokens"], ensure_weight_tying=True)),
    ]


def main():
    arguments = tool_arguments(__doc__, needs_data=True)
    data, failures, count = arguments.data / "peft", [], 0

    def fuse(*words):
        done = subprocess.run([arguments.tool, "fuse", *map(str, words)], capture_output=True, text=True)
        return done.returncode, done.stderr.strip()

    def judge(what, apart, allowed=TOLERANCE):
        print(f"  {what:44s} apart by {apart:.1e}")
        if not apart <= allowed:
            failures.append(f"{what}: off by {apart:.2e}, allowed {allowed:.0e}")

    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        base = tiny().state_dict()
        save(scratch / "base.safetensors", base, {})
        for name, row in json.loads((data / "index.json").read_text()).items():
            count += 1
            out = scratch / f"{name}.safetensors"
            code, words = fuse("--base", scratch / "base.safetensors", "--adapter", data / name, "--out", out)
            if row["read"] == "no" and name not in FOLDED:
                print(f"  {name:44s} exit code {code}: {words.splitlines()[0] if words else ''}")
                if code != 1 or out.exists():
                    failures.append(f"{name}: should be refused, and got {code}")
                continue
            if code != 0:
                failures.append(f"{name}: the tool answers {code}: {words}")
                continue
            model, _ = load_adapter(data / name)
            expected = model.float().merge_and_unload().state_dict()
            found, _ = load(out)
            if set(found) != set(expected):
                failures.append(f"{name}: tensors {sorted(set(found) ^ set(expected))}")
                continue
            # PEFT multiplies 16-bit factors in f32 here, since the model was widened first.
            judge(name, max(largest_difference(found[tensor], expected[tensor]) for tensor in expected))

        import transformers
        from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model

        transformers.utils.logging.disable_progress_bar()

        ids = torch.arange(20)[None] % 61
        for model_name, what, config in adapters():
            count += 1
            what = f"{model_name}, {what}"
            torch.manual_seed(5)
            make = language_models()[model_name]
            model = make().eval()
            place = scratch / what.replace(" ", "_").replace(",", "")
            model.save_pretrained(place / "base")
            adapted = get_peft_model(type(model).from_pretrained(place / "base"), config)
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.3 * torch.randn(parameter.shape))
            adapted.save_pretrained(str(place / "adapter"))
            fresh = type(model).from_pretrained(place / "base").eval()
            expected = PeftModel.from_pretrained(fresh, str(place / "adapter")).eval()(ids).logits.detach()
            code, words = fuse("--base", place / "base", "--adapter", place / "adapter", "--out", place / "fused")
            if code != 0:
                failures.append(f"{what}: the tool answers {code}: {words}")
                continue
            found, report = type(model).from_pretrained(place / "fused", output_loading_info=True)
            if report["missing_keys"] or report["unexpected_keys"]:
                failures.append(f"{what}: transformers misses {report['missing_keys']}, and does not expect {report['unexpected_keys']}")
            judge(f"{what}: logits", largest_difference(found.eval()(ids).logits.detach(), expected), 1e-5)

        # Initialisations that change the base: saved converted they are plain adapters, and otherwise refused.
        for init in ("pissa", "olora", "pissa_niter_4"):
            count += 1
            torch.manual_seed(8)
            model = language_models()["llama"]().eval()
            place = scratch / f"init_{init}"
            model.save_pretrained(place / "base")
            adapted = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init))
            adapted.peft_config["default"].init_lora_weights = True  # as PEFT asks for the adapter before the training
            adapted.save_pretrained(str(place / "initial"))
            adapted.peft_config["default"].init_lora_weights = init
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape))
            expected = adapted.eval()(ids).logits.detach()
            adapted.save_pretrained(str(place / "as_it_is"))
            adapted.save_pretrained(str(place / "converted"), path_initial_model_for_weight_conversion=str(place / "initial"))
            code, words = fuse("--base", place / "base", "--adapter", place / "as_it_is", "--out", place / "no")
            if code != 1 or "path_initial_model_for_weight_conversion" not in words or (place / "no").exists():
                failures.append(f"{init}, not converted: the tool answers {code}: {words}")
            code, words = fuse("--base", place / "base", "--adapter", place / "converted", "--out", place / "fused")
            if code != 0:
                failures.append(f"{init}: the tool answers {code}: {words}")
                continue
            found = type(model).from_pretrained(place / "fused").eval()
            judge(f"{init}, saved converted: logits", largest_difference(found(ids).logits.detach(), expected), 1e-5)

        # AdaLoRA with ranks that it has cut, one of them to 0.
        count += 1
        torch.manual_seed(9)
        model = language_models()["llama"]().eval()
        place = scratch / "adalora"
        model.save_pretrained(place / "base")
        adapted = get_peft_model(model, AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], total_step=10))
        pattern = {}
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape))
                if ".lora_E." in name:
                    kept = torch.tensor([True, "0" in name, False, True]) if "q_proj" in name else torch.tensor([False, True, True, True])
                    if "layers.1" in name and "q_proj" in name:
                        kept = torch.zeros(4, dtype=torch.bool)
                    parameter[~kept] = 0
                    pattern[name.removeprefix("base_model.model.")] = kept.tolist()
        adapted.peft_config["default"].rank_pattern = pattern
        expected = adapted.eval()(ids).logits.detach()
        adapted.save_pretrained(str(place / "adapter"))
        code, words = fuse("--base", place / "base", "--adapter", place / "adapter", "--out", place / "fused")
        if code != 0:
            failures.append(f"AdaLoRA: the tool answers {code}: {words}")
        else:
            found = type(model).from_pretrained(place / "fused").eval()
            judge("llama, AdaLoRA with cut ranks: logits", largest_difference(found(ids).logits.detach(), expected), 1e-5)

        # The other way round: what low-rank changes of tied embeddings and Conv1D layers become in PEFT's hands.
        for model_name, changed in (("gpt2", ["wte", "c_attn", "c_proj"]), ("llama tied", ["embed_tokens", "q_proj"]), ("llama", ["lm_head", "down_proj"])):
            count += 1
            torch.manual_seed(6)
            model = language_models()[model_name]().eval()
            place = scratch / ("extract_" + model_name.replace(" ", "_"))
            model.save_pretrained(place / "base")
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if any(name.endswith(f"{module}.weight") for module in changed):
                        parameter.add_(0.1 * torch.randn(parameter.shape[0], 2) @ torch.randn(2, parameter.shape[1]))
            model.save_pretrained(place / "tuned")
            done = subprocess.run([arguments.tool, "extract-lora", "--base", place / "base", "--task", place / "tuned", "--rank", "2", "--out", place / "adapter"], capture_output=True, text=True)
            if done.returncode != 0:
                failures.append(f"extract-lora of {model_name}: {done.stderr.strip()}")
                continue
            found = PeftModel.from_pretrained(type(model).from_pretrained(place / "base"), str(place / "adapter")).eval()
            judge(f"extract-lora of {model_name}: logits", largest_difference(found(ids).logits.detach(), model(ids).logits.detach()), 1e-5)

    if failures:
        raise SystemExit("\n".join([f"{len(failures)} of {count} failed:", *failures]))
    print(f"  {count} adapters agree")


if __name__ == "__main__":
    main()
