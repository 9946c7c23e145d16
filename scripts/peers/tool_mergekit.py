"""The taskvec tool against whole mergekit runs: tiny Llama checkpoints on disk, merged by both, compared element for element."""
# SPDX-License-Identifier: Apache-2.0
import pathlib
import subprocess
import tempfile

import torch

import definition
from common import equal_values, load, tool_arguments


def tiny(kind, layers):
    """A tiny model of an architecture, with `layers` layers."""
    import transformers as t

    common = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2)
    grouped = dict(common, num_key_value_heads=2, tie_word_embeddings=False)
    if kind == "GPT-2":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=48, n_embd=16, n_layer=layers, n_head=2, n_positions=40))
    if kind == "GPT-NeoX":
        return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**common, max_position_embeddings=40))
    model, config = {"Llama": (t.LlamaForCausalLM, t.LlamaConfig), "Mistral": (t.MistralForCausalLM, t.MistralConfig), "Qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config),
                     "Gemma 2": (t.Gemma2ForCausalLM, t.Gemma2Config), "Phi-3": (t.Phi3ForCausalLM, t.Phi3Config)}[kind]
    more = {"Gemma 2": dict(head_dim=8, tie_word_embeddings=True), "Phi-3": dict(pad_token_id=0)}.get(kind, {})
    return model(config(**{**grouped, **more}))


def checkpoints(folder, count=3, layers=2, kind="Llama"):
    """A tiny model of `layers` layers and `count` fine-tuned ones, in f32, without ties at the thresholds that are used below."""
    torch.manual_seed(5)
    base = tiny(kind, layers).float()
    if kind != "Llama":  # no biases of zeros, to which slerp takes another way
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    base.save_pretrained(folder / "base")
    for index in range(count):
        with torch.no_grad():
            task = tiny(kind, layers).float()
            for name, parameter in task.named_parameters():
                parameter.copy_(base.get_parameter(name) + torch.randn(parameter.shape) * 0.02)
        task.save_pretrained(folder / f"task{index}")


def main():
    arguments = tool_arguments(__doc__)
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    weights, failures, count = [1.0, 0.3, -0.7], [], 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        checkpoints(scratch)
        base, _ = load(scratch / "base/model.safetensors")
        for index in range(3):
            task, _ = load(scratch / f"task{index}/model.safetensors")
            assert not definition.tied_at_threshold(definition.task_vector(base, task), 0.3, "tensor")
        tasks = [part for index, weight in enumerate(weights) for part in ("--task", f"{scratch / f'task{index}'}={weight}")]
        cases = {
            "ties": ({"merge_method": "ties", "parameters": {"normalize": True, "density": 0.3}},
                     ["--method", "ties", "--semantics", "mergekit", "--density", "0.3"], 0.0),
            "task_arithmetic": ({"merge_method": "task_arithmetic", "parameters": {"lambda": 0.4}}, ["--method", "task-arithmetic", "--lambda", "0.4"], 0.0),
            "linear": ({"merge_method": "linear", "parameters": {"normalize": True}}, ["--method", "average"], 1e-6),
        }
        for name, (config, options, tolerance) in cases.items():
            models = [{"model": str(scratch / f"task{index}"), "parameters": {"weight": weight}} for index, weight in enumerate(weights)]
            config = {**config, "models": models, "dtype": "float32"}
            if name != "linear":
                config["base_model"] = str(scratch / "base")
            run_merge(MergeConfiguration.model_validate(config), str(scratch / f"mergekit_{name}"), MergeOptions(copy_tokenizer=False, quiet=True))
            expected = {}
            for path in (scratch / f"mergekit_{name}").glob("*.safetensors"):
                expected |= load(path)[0]
            out = scratch / f"{name}.safetensors"
            done = subprocess.run([arguments.tool, "merge", *options, *([] if name == "linear" else ["--base", scratch / "base"]), *tasks, "--out", out],
                                  capture_output=True, text=True)
            if done.returncode != 0:
                failures.append(f"{name}: exit code {done.returncode}: {done.stderr.strip()}")
                continue
            found, _ = load(out)
            if set(found) != set(expected):
                failures.append(f"{name}: tensors differ: {sorted(set(found) ^ set(expected))}")
            apart = 0.0
            for tensor in set(found) & set(expected):
                count += found[tensor].numel()
                if tolerance == 0.0 and not equal_values(found[tensor], expected[tensor]):
                    failures.append(f"{name}: '{tensor}' differs")
                apart = max(apart, float((found[tensor] - expected[tensor]).abs().max()))
            if apart > tolerance:
                failures.append(f"{name}: off by {apart:.2e}")
            print(f"  {name}: {len(found)} tensors, apart by {apart:.1e}")
    if failures:
        raise SystemExit("\n".join(failures))
    print(f"{count} elements as mergekit's own runs have them")


if __name__ == "__main__":
    main()
