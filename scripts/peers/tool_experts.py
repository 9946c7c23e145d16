"""The taskvec tool's fuse beside PEFT's merge_and_unload, of experts that PEFT adapts as one parameter (target_parameters)."""
# SPDX-License-Identifier: Apache-2.0
import pathlib
import subprocess
import tempfile

import torch

from common import largest_difference, load, save, tool_arguments

TOLERANCE = 1e-6  # of the largest weight, in f32
SIZES = dict(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, num_experts_per_tok=2)
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def models():
    from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    qwen = dict(SIZES, intermediate_size=24, num_experts=3, head_dim=8)
    return {
        "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=3)),
        "Qwen3 MoE": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**qwen, moe_intermediate_size=12)),
        "Qwen3 MoE, square": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**qwen, moe_intermediate_size=16)),
        "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, intermediate_size=24, num_local_experts=3, head_dim=8)),
        "gpt-oss, square": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, intermediate_size=16, num_local_experts=3, head_dim=8)),
    }


def adapters():
    return {
        "both": dict(target_modules=["q_proj"], target_parameters=BOTH),
        "both, the other way round": dict(target_modules=["q_proj"], target_parameters=BOTH[::-1]),
        "one": dict(target_modules=[], target_parameters=BOTH[1:]),
        "patterns, rsLoRA": dict(target_modules=["k_proj"], target_parameters=BOTH, use_rslora=True, rank_pattern={"experts.down_proj": 4}, alpha_pattern={"experts.gate_up_proj": 5}),
    }


def main():
    arguments, failures, count = tool_arguments(__doc__), [], 0
    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    transformers.utils.logging.disable_progress_bar()

    def judge(what, apart, allowed=TOLERANCE):
        print(f"  {what:60s} apart by {apart:.1e}")
        if not apart <= allowed:
            failures.append(f"{what}: off by {apart:.2e}, allowed {allowed:.0e}")

    ids = torch.arange(20)[None] % 61
    with tempfile.TemporaryDirectory() as scratch:
        for model_name, make in models().items():
            for adapter_name, how in adapters().items():
                count += 1
                what = f"{model_name}, {adapter_name}"
                place = pathlib.Path(scratch) / what.replace(" ", "_").replace(",", "")
                torch.manual_seed(3)
                model = make().eval()
                model.save_pretrained(place / "base")
                kind = type(model)
                adapted = get_peft_model(kind.from_pretrained(place / "base"), LoraConfig(r=2, lora_alpha=6, **how))
                with torch.no_grad():
                    for parameter in adapted.parameters():
                        if parameter.requires_grad:
                            parameter.add_(0.1 * torch.randn(parameter.shape))
                adapted.save_pretrained(str(place / "adapter"))
                merged = PeftModel.from_pretrained(kind.from_pretrained(place / "base"), str(place / "adapter")).merge_and_unload().eval()

                def fuse(base, out):
                    done = subprocess.run([arguments.tool, "fuse", "--base", base, "--adapter", place / "adapter", "--out", out], capture_output=True, text=True)
                    if done.returncode != 0:
                        failures.append(f"{what}: the tool answers {done.returncode}: {done.stderr.strip()}")
                    return done.returncode == 0

                # The model's directory, in which most architectures have a weight for each expert.
                if fuse(place / "base", place / "fused"):
                    found, report = kind.from_pretrained(place / "fused", output_loading_info=True)
                    if report["missing_keys"] or report["unexpected_keys"]:
                        failures.append(f"{what}: transformers misses {report['missing_keys']}, and does not expect {report['unexpected_keys']}")
                    expected, state = merged.state_dict(), found.state_dict()
                    judge(f"{what}: weights", max(largest_difference(state[name], expected[name]) for name in expected))
                    judge(f"{what}: logits", largest_difference(found.eval()(ids).logits.detach(), merged(ids).logits.detach()), 1e-5)
                # The tensors as they are in memory.
                save(place / "memory.safetensors", model.state_dict(), {})
                if fuse(place / "memory.safetensors", place / "memory_fused.safetensors"):
                    found, _ = load(place / "memory_fused.safetensors")
                    judge(f"{what}: weights as in memory", max(largest_difference(found[name], tensor) for name, tensor in merged.state_dict().items() if name in found))

    if failures:
        raise SystemExit("\n".join([f"{len(failures)} of {count} failed:", *failures]))
    print(f"  {count} adapters of experts agree")


if __name__ == "__main__":
    main()
