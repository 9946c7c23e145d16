"""`tokenizer` of a configuration, with `tokens` and `pad_to_multiple_of`: what `taskvec run` makes against mergekit, row by row, by the tokens' texts."""
# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import subprocess
import tempfile

import torch
import yaml

from common import load, tool_arguments

WORDS = [f"w{i}" for i in range(20)]
# Tokens in the order of their ids; rows behind them are padding.
VOCABULARIES = {"base": (WORDS + ["<s>"], 3), "task0": (WORDS[::-1] + ["<s>", "<x>", "<both>"], 0), "task1": (["<both>", "<y>", "<s>"] + WORDS[1:], 5)}
TWO = """
merge_method: task_arithmetic
base_model: base
dtype: float32
models:
  - {model: task0, parameters: {weight: 0.75}}
  - {model: task1, parameters: {weight: -0.5}}
tokenizer:
"""
AVERAGE = """
merge_method: linear
dtype: float32
models:
  - {model: base, parameters: {weight: 0.5}}
  - {model: task0, parameters: {weight: 0.25}}
  - {model: task1, parameters: {weight: 1}}
tokenizer:
"""
CASES = {
    "a multiple": "{source: base, pad_to_multiple_of: 16}",
    "a multiple that fits": "{source: union, pad_to_multiple_of: 8}",
    "a multiple, union": "{pad_to_multiple_of: 64}",
    # Not with source: base, where mergekit 0.1.5 takes rows that pad the base for tokens that it adds, or ends in a KeyError.
    "another model's token": '{source: union, tokens: {"<x>": {source: task0}, "<both>": {source: task1}}, pad_to_multiple_of: 10}',
    "a token that all have, forced": "{source: union, tokens: {w3: {source: task1, force: true}, w4: {source: task0}, w5: {force: false}}}",
    "zeros": '{source: union, tokens: {"<x>": {source: {kind: zero}}, w7: {source: {kind: zero}, force: true}, "<new>": {source: {kind: zero}}}}',
    "tokens of models": '{source: union, tokens: {"<new>": {source: {kind: model_token, model: task0, token: w2}}, '
                        '"<y>": {source: {kind: model_token, model: base, token_id: 22}}}, pad_to_multiple_of: 32}',
    "forced tokens of models": '{source: base, tokens: {"<s>": {source: {kind: model_token, model: {model: {path: task1}}, token: "<y>"}, force: true}}}',
    "the base by its name": '{source: base, tokens: {w0: {source: base, force: true}}, pad_to_multiple_of: 7}',
}


def directories():
    """A Llama for each vocabulary, with its tokenizer."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(11)
    for name, (tokens, padding) in VOCABULARIES.items():
        config = LlamaConfig(vocab_size=len(tokens) + padding, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=2, tie_word_embeddings=False)
        LlamaForCausalLM(config).float().save_pretrained(name)
        tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="w1"))
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens if token.startswith("<")])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(name)


def ids_of_the_tokenizers_library(tool):
    """A token of a task's vocabulary behind the base's added tokens: the library gives those that are not in the vocabulary ids of its own choice."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import BPE, WordLevel, WordPiece

    from safetensors.torch import save_file

    models = {"BPE": lambda vocabulary: BPE(vocabulary, [("a", "b")] if "ab" in vocabulary else []),
              "WordPiece": lambda vocabulary: WordPiece(vocabulary, unk_token="a"), "WordLevel": lambda vocabulary: WordLevel(vocabulary, unk_token="a")}
    base, failures, tokens = ["a", "b", "c", "d"], [], 0
    for kind, model in models.items():
        own = ["##ab"] if kind == "WordPiece" else ["ab"]
        for number, (vocabulary, added) in enumerate([(base + own, ["<s>", "</s>"]), (base + own, ["<x>", "</s>", "<s>"]), (own + base[::-1], ["</s>"]), (base, ["<y>", "<s>"])]):
            folders = {}
            for name, words, more, shift in (("base", base, ["<s>", "</s>"], 0.0), ("task", vocabulary, added, 100.0)):
                tokenizer = Tokenizer(model({token: index for index, token in enumerate(words)}))
                tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in more])
                folder = folders[name] = pathlib.Path(f"{kind}{number}{name}")
                folder.mkdir()
                tokenizer.save(str(folder / "tokenizer.json"))
                rows = {token: shift + float(index) for index, token in enumerate(base + ["<s>", "</s>", "##ab", "ab", "<x>", "<y>"])}
                table = torch.zeros(len(words) + len(more), 1)
                for token, index in tokenizer.get_vocab().items():
                    table[index, 0] = rows[token]
                save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
                (folder / "config.json").write_text(json.dumps({"vocab_size": len(table)}))
            out = pathlib.Path(f"{kind}{number}out")
            done = subprocess.run([tool, "merge", "--method", "average", "--task", folders["base"], "--task", folders["task"], "--vocabulary", "union", "--out", out],
                                  capture_output=True, text=True)
            if done.returncode != 0:
                failures.append(f"{kind} {number}: exit code {done.returncode}: {done.stderr.strip()}")
                continue
            read, table = Tokenizer.from_file(str(out / "tokenizer.json")), load(out / "model.safetensors")[0]["model.embed_tokens.weight"]
            theirs, mine = (Tokenizer.from_file(str(folders[name] / "tokenizer.json")).get_vocab() for name in ("base", "task"))
            for token in sorted(set(theirs) | set(mine)):
                value = rows[token] - 100
                expected = (value if token in theirs else value + 100) / 2 + (value + 100 if token in mine else value) / 2
                index = read.token_to_id(token)
                found = float(table[index, 0]) if index is not None and index < len(table) else None
                tokens += 1
                if found != expected:
                    failures.append(f"{kind} {number}: the row of {token!r}, read as id {index}, is {found}, and not {expected}")
    print(f"  {tokens} tokens have the rows of the ids that tokenizers reads", flush=True)
    return failures


def main():
    arguments = tool_arguments(__doc__)
    tool = pathlib.Path(arguments.tool).resolve()
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoTokenizer

    failures, rows = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        failures += ids_of_the_tokenizers_library(tool)
        directories()
        cases = {f"{what}{name}": head + "  " + text + "\n" for what, head in (("", TWO), ("no base: ", AVERAGE)) for name, text in CASES.items()
                 if "source: base" not in text or head is TWO}
        for number, (name, text) in enumerate(cases.items()):
            pathlib.Path("config.yml").write_text(text)
            theirs, ours = f"mergekit{number}", f"taskvec{number}"
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), theirs, MergeOptions(write_model_card=False, quiet=True))
            done = subprocess.run([tool, "run", "config.yml", "--out", ours], capture_output=True, text=True)
            if done.returncode != 0:
                failures.append(f"{name}: exit code {done.returncode}: {done.stderr.strip()}")
                continue
            expected = {}
            for path in pathlib.Path(theirs).glob("*.safetensors"):
                expected |= load(path)[0]
            found, _ = load(pathlib.Path(ours) / "model.safetensors")
            tokens, own = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (theirs, ours))
            if set(tokens) != set(own):
                failures.append(f"{name}: tokens differ: {sorted(set(tokens) ^ set(own))}")
                continue
            sizes = [json.loads((pathlib.Path(folder) / "config.json").read_text())["vocab_size"] for folder in (theirs, ours)]
            if sizes[0] != sizes[1]:
                failures.append(f"{name}: vocab_size is {sizes[1]}, and mergekit's {sizes[0]}")
            apart, filled = 0.0, 0.0
            for tensor in ("model.embed_tokens.weight", "lm_head.weight"):
                if found[tensor].shape != expected[tensor].shape or found[tensor].shape[0] != sizes[0]:
                    failures.append(f"{name}: {tensor} is {tuple(found[tensor].shape)}, and mergekit's {tuple(expected[tensor].shape)}")
                    continue
                apart = max(apart, max(float((found[tensor][own[token]] - expected[tensor][tokens[token]]).abs().max()) for token in tokens))
                if len(tokens) < sizes[0]:
                    filled = max(filled, float((found[tensor][len(tokens):] - expected[tensor][len(tokens):]).abs().max()))
                rows += sizes[0]
            print(f"  {name}: {len(tokens)} tokens in {sizes[1]} rows, apart by {apart:.1e}, rows behind the tokens by {filled:.1e}", flush=True)
            if apart > (1e-8 if "no base" not in name else 1e-7) or filled > 1e-7:
                failures.append(f"{name}: rows are off by {apart:.2e}, those behind the tokens by {filled:.2e}")
        os.chdir("/")
    if failures:
        raise SystemExit("\n".join(failures))
    print(f"{rows} rows as mergekit has them")


if __name__ == "__main__":
    main()
