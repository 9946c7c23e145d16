"""AutoPeftModelForCausalLM loads what merge-lora and extract-lora of the taskvec tool write, with the updates that they say."""
# SPDX-License-Identifier: Apache-2.0
import pathlib
import subprocess
import tempfile

import torch

from common import largest_difference, tool_arguments

TOLERANCE = 1e-5  # of the largest logit
WORDS = [f"w{i}" for i in range(60)]


def tokenizer_of(words):
    """A tokenizer with an id for each word, in their order."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0")), unk_token="w0")


def main():
    arguments, failures, count = tool_arguments(__doc__), [], 0
    import transformers
    from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    transformers.utils.logging.disable_progress_bar()

    def tool(*words):
        done = subprocess.run([arguments.tool, *map(str, words)], capture_output=True, text=True)
        if done.returncode != 0:
            failures.append(f"{words[0]}: the tool answers {done.returncode}: {done.stderr.strip()}")
        return done.returncode == 0

    def judge(what, folder, ids, expected):
        nonlocal count
        count += 1
        try:
            apart = largest_difference(AutoPeftModelForCausalLM.from_pretrained(str(folder)).eval()(ids).logits.detach(), expected)
        except Exception as problem:  # whatever PEFT says
            failures.append(f"{what}: {type(problem).__name__}: {problem}")
            return
        print(f"  {what:60s} apart by {apart:.1e}")
        if not apart <= TOLERANCE:
            failures.append(f"{what}: off by {apart:.2e}, allowed {TOLERANCE:.0e}")

    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        torch.manual_seed(4)
        base = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False)).eval()
        base.save_pretrained(scratch / "base")
        ids = torch.arange(30)[None]

        def load_base():
            return LlamaForCausalLM.from_pretrained(scratch / "base").eval()

        def adapter(name, seed, words=None, **how):
            """An adapter of the base, whose embedding has a row for each of `words`."""
            torch.manual_seed(seed)
            model = load_base()
            if words:
                model.resize_token_embeddings(len(words), mean_resizing=False)
            adapted = get_peft_model(model, LoraConfig(r=2 + seed % 2, lora_alpha=4, task_type="CAUSAL_LM", **how))
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape))
            adapted.save_pretrained(str(scratch / name), save_embedding_layers=False)
            if words:
                tokenizer_of(words).save_pretrained(str(scratch / name))

        def sum_of(weighted, model):
            """The model with the updates of adapters that fit it, as PEFT merges them."""
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            total = {name: tensor.clone() for name, tensor in before.items()}
            for name, weight in weighted:
                fresh = load_base()
                fresh.resize_token_embeddings(model.config.vocab_size, mean_resizing=False)
                fresh.load_state_dict(before)
                after = PeftModel.from_pretrained(fresh, str(scratch / name)).merge_and_unload().state_dict()
                for tensor in total:
                    total[tensor] += weight * (after[tensor] - before[tensor])
            model.load_state_dict(total)
            return model

        adapter("one", 1, target_modules=["q_proj", "down_proj"])
        adapter("two", 2, target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"])
        expected = sum_of([("one", 0.75), ("two", -0.5)], load_base())(ids).logits.detach()
        if tool("merge-lora", "--adapter", f"{scratch}/one=0.75", "--adapter", f"{scratch}/two=-0.5", "--out", scratch / "merged"):
            judge("merge-lora", scratch / "merged", ids, expected)
        adapter("three", 3, target_modules=["q_proj"], modules_to_save=["lm_head"])
        if tool("merge-lora", "--adapter", scratch / "three", "--adapter", scratch / "one", "--modules-to-save", "first", "--out", scratch / "whole"):
            judge("merge-lora with a head that is saved whole", scratch / "whole", ids, sum_of([("three", 1), ("one", 1)], load_base())(ids).logits.detach())

        # Vocabularies that differ: AutoPeftModel resizes the base to the tokenizer that lies beside the adapter.
        more = [*WORDS, "more"]
        turned = [*WORDS[::-1], "other"]
        adapter("more", 5, more, target_modules=["v_proj", "embed_tokens", "lm_head"])
        adapter("turned", 6, turned, target_modules=["k_proj", "embed_tokens", "lm_head"])
        if tool("merge-lora", "--adapter", f"{scratch}/more=0.5", "--adapter", f"{scratch}/turned=2", "--vocabulary", "union", "--out", scratch / "union"):
            joined = [*more, "other"]
            found = AutoPeftModelForCausalLM.from_pretrained(str(scratch / "union"))
            tokens = transformers.AutoTokenizer.from_pretrained(str(scratch / "union"))
            count += 1
            if tokens.convert_ids_to_tokens(list(range(len(tokens)))) != joined:
                failures.append("union: the tokenizer beside the adapter has other tokens")
            pieces = {}
            for name, weight, words in (("more", 0.5, more), ("turned", 2, turned)):
                model = load_base()
                model.resize_token_embeddings(len(words), mean_resizing=False)
                before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
                after = PeftModel.from_pretrained(model, str(scratch / name)).merge_and_unload().state_dict()
                for key in before:
                    change = weight * (after[key] - before[key])
                    if len(change) == len(words) and change.ndim == 2 and ("embed" in key or "lm_head" in key):
                        change = torch.stack([change[words.index(token)] if token in words else torch.zeros_like(change[0]) for token in joined])
                    pieces[key] = pieces.get(key, 0) + change
            plain = {key: tensor.clone() for key, tensor in found.get_base_model().state_dict().items() if ".lora_" not in key}
            after = found.merge_and_unload().state_dict()
            apart = max(largest_difference(after[key], plain[key.replace(".weight", ".base_layer.weight") if key not in plain else key] + change) for key, change in pieces.items())
            print(f"  {'merge-lora --vocabulary union: weights':60s} apart by {apart:.1e}")
            if not apart <= 1e-6:
                failures.append(f"union: weights are off by {apart:.2e}")

        with torch.no_grad():
            tuned = load_base()
            for name, parameter in tuned.named_parameters():
                if any(part in name for part in ("q_proj", "lm_head", "embed_tokens", "up_proj")):
                    parameter.add_(0.1 * torch.randn(parameter.shape[0], 2) @ torch.randn(2, parameter.shape[1]))
        tuned.save_pretrained(scratch / "tuned")
        if tool("extract-lora", "--base", scratch / "base", "--task", scratch / "tuned", "--rank", "2", "--task-type", "CAUSAL_LM", "--out", scratch / "extracted"):
            judge("extract-lora", scratch / "extracted", ids, tuned(ids).logits.detach())
        if tool("merge-lora", "--adapter", scratch / "extracted", "--adapter", scratch / "one", "--out", scratch / "further"):
            judge("merge-lora of that and another", scratch / "further", ids, sum_of([("extracted", 1), ("one", 1)], load_base())(ids).logits.detach())

    if failures:
        raise SystemExit("\n".join([f"{len(failures)} of {count} failed:", *failures]))
    print(f"  AutoPeftModel loads all {count}")


if __name__ == "__main__":
    main()
