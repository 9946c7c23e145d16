# SPDX-License-Identifier: Apache-2.0
"""reproduce_results.py FOLDER DRAWS [SHIFT [SHARE]]: made-up results of scripts/reproduce, as its parts that read results find them. Accuracies are drawn anew
for each DRAWS, with a deviation of a percent point over seeds; SHIFT is added to those of RegMean; of all results a SHARE is kept."""
import itertools
import json
import pathlib
import random
import struct
import sys

root = pathlib.Path(__file__).resolve().parents[2]
folder, draw = pathlib.Path(sys.argv[1]), random.Random(sys.argv[2])
shift, share = (float(one) for one in (sys.argv[3:] + ["0", "1"][len(sys.argv[3:]):]))
settings = json.loads((root / "scripts/papers/full.json").read_text()) | {"encoder": "nowhere", "model": "0", "parameters": 22565888}
names = ["section", "use", "works-with", "role", "implemented-in", "interface", "field", "admin"]
tasks = {name: {"labels": [f"{name} {k}" for k in range(4)], "train": [["a text", 0]] * 600, "test": [["a text", k % 4] for k in range(150)]} for name in names}
results, steady = {}, random.Random("the same in every run")
seeds = settings["seeds"]


def add(key, value):
    if key == "base" or draw.random() < share:
        results[key] = value


def scores(mean):
    """Of every seed: the same by task, but for the seed's own deviation."""
    by_task = {name: mean + steady.uniform(-0.1, 0.1) for name in names}
    return [{name: value + off for name, value in by_task.items()} for off in (draw.gauss(0, 0.01) for _ in seeds)]


def every(key, mean, **more):
    for seed, found in zip(seeds, scores(mean)):
        add(f"seed{seed}/{key}", {"test": found, **more})


add("base", {name: 0.55 for name in names})
ways = ["full", "lora16", "llora16", "whole16", "linearized"]
for way in (*ways, "lora128"):
    every(f"{way}/single", 0.75, bytes=21.3e6)
    for method in {"full": settings["methods"], "lora128": settings["lora_methods"]}.get(way, settings["subset_methods"]):
        every(f"{way}/merge/{method}", steady.uniform(0.57, 0.67) + (shift if method == "regmean" else 0), chosen={}, bytes=21.3e6)
for density in settings["densities"]:
    every(f"full/post-pruning/{density}", 0.56 + 0.4 * density, bytes=30e6)
    for method in settings["peru"]:
        every(f"full/peru-fft/{method}/{density}", 0.66 + 0.2 * density, bytes=30e6)
for rank in settings["ranks"]:
    every(f"lora128/peru-lora/{rank}", 0.68 + 0.0004 * rank, bytes=25e6)
for way in ways:
    for seed in seeds:
        rows = [[1.0 if a == b else 0.0 for b in names] for a in names]
        for a, b in itertools.combinations(range(len(names)), 2):
            rows[a][b] = rows[b][a] = steady.uniform(-0.1, 0.25) + draw.gauss(0, 0.01)
        add(f"seed{seed}/{way}/cosines", rows)
        add(f"seed{seed}/{way}/cosines of phi", rows)
    for pair in settings["planes"]:
        grid = [k / 4 - 1 for k in range(9)]
        add(f"seed0/{way}/plane/{'+'.join(pair)}", {"grid": grid, "loss": [[1 + (a - 0.5) ** 2 + (b - 0.5) ** 2 for a in grid] for b in grid], "xi": [[abs(a * b) for a in grid] for b in grid]})
    add(f"seed0/{way}/subset single", {"test": scores(0.75)[0], "bytes": 1})
    for method in settings["subset_methods"]:
        for size in range(2, 9):
            for names_of in (names[:size], names[-size:]):
                add(f"seed0/{way}/subset/{method}/{'+'.join(names_of)}", {"chosen": {}, "test": scores(0.55 + 0.01 * size)[0]})
for seed in seeds:
    errors = {str(rank): 0.6 * 0.95 ** rank for rank in settings["error_ranks"]}
    add(f"seed{seed}/lora128/truncation", {"errors": errors, "decay": 0.051, "intercept": -0.5, "explained": 0.94})
labels = [k % 4 for k in range(150)]
add("seed0/full/embeddings", {"task": "role", "labels": labels,
                              "points": {words: [[draw.gauss(label, 0.5), draw.gauss(label % 2, 0.5)] for label in labels] for words in ("Pre-Trained", "Task Arithmetic", "PERU-FFT, m = 10%", "Single-Task")}})

folder.mkdir(parents=True, exist_ok=True)
for name, value in (("settings", settings), ("tasks", tasks), ("results", results), ("seconds", {"training/seed0/full/role": 3600, "base": 1800})):
    (folder / f"{name}.json").write_text(json.dumps(value))
base = folder / "base" / "model.safetensors"
base.parent.mkdir(exist_ok=True)
header, end = {}, 0
for layer in range(3):
    for name, shape in (("attention.self.query", [384, 384]), ("attention.self.value", [384, 384]), ("output.dense", [384, 1536])):
        header[f"layer.{layer}.{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 4 * shape[0] * shape[1]]}
        end += 4 * shape[0] * shape[1]
text = json.dumps(header).encode()
with open(base, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + end)
