"""`taskvec run` against mergekit: whole configurations, both commands' results compared element for element; docs/migrate.md has what comes out."""
# SPDX-License-Identifier: Apache-2.0
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import yaml

from common import load, tool_arguments
from tool_mergekit import checkpoints

WEIGHTED = """
base_model: base
dtype: float32
models:
  - model: base
  - model: task0
    parameters:
      weight:
        - filter: self_attn
          value: [0.2, 0.9, 0.4]
        - value: 0.7
  - model: task1
    parameters: {weight: 0.5}
"""
# What differs by more than this is another merge: f32 rounds in another order where it is not 0. A third number is the share of entries that may
# differ by more: those that are chosen otherwise, as docs/migrate.md says.
CONFIGURATIONS = {
    "task_arithmetic": (WEIGHTED + "merge_method: task_arithmetic\nparameters: {lambda: 0.6}", 0.0),
    "task_arithmetic, written in float64": (WEIGHTED + "merge_method: task_arithmetic\nout_dtype: float64", 0.0),
    "ties": (WEIGHTED + "merge_method: ties\nparameters: {density: 0.3}", 0.0),
    "ties, summed": (WEIGHTED + "merge_method: ties\nparameters: {density: 0.3, normalize: false, rescale: true}", 1e-6),
    "breadcrumbs": (WEIGHTED + "merge_method: breadcrumbs\nparameters: {density: 0.7, gamma: 0.1}", 0.0),
    "breadcrumbs_ties": (WEIGHTED + "merge_method: breadcrumbs_ties\nparameters: {density: 0.7, gamma: 0.1}", 0.0),
    "dare_ties, nothing dropped": (WEIGHTED + "merge_method: dare_ties\nparameters: {density: 1}", 0.0),
    "dare_linear, nothing dropped": (WEIGHTED + "merge_method: dare_linear\nparameters: {density: 1, lambda: 0.7}", 0.0),
    "della, nothing dropped": (WEIGHTED + "merge_method: della\nparameters: {epsilon: 0.2}", 0.0),
    "della_linear, nothing dropped": (WEIGHTED + "merge_method: della_linear\nparameters: {density: 1, lambda: 0.7}", 0.0),
    "nuslerp": (WEIGHTED + "merge_method: nuslerp", 1e-6),
    "nuslerp of rows": (WEIGHTED + "merge_method: nuslerp\nparameters: {nuslerp_flatten: false}", 1e-6),
    "nuslerp of columns": (WEIGHTED + "merge_method: nuslerp\nparameters: {nuslerp_flatten: false, nuslerp_row_wise: true}", 1e-6),
    "nuslerp of columns, no base": ("models: [{model: task0}, {model: task1}]\nmerge_method: nuslerp\n"
                                    "parameters: {weight: [0.25, 1], nuslerp_flatten: false, nuslerp_row_wise: true}\ndtype: float32", 1e-6),
    "sce": (WEIGHTED + "merge_method: sce\nparameters: {select_topk: 0.5}", 1e-6),
    "model_stock": (WEIGHTED + "merge_method: model_stock", 1e-6),
    "model_stock of rows": (WEIGHTED + "merge_method: model_stock\nparameters: {filter_wise: true}", 1e-6),
    "linear": ("models: [{model: task0}, {model: task1}]\nbase_model: base\nmerge_method: linear\nparameters: {weight: [0.25, 1], normalize: false}\n"
               "dtype: float32", 1e-6),
    "multislerp": ("models: [{model: task0}, {model: task1}]\nbase_model: base\nmerge_method: multislerp\nparameters: {weight: [0.25, 1]}\ndtype: float32", 1e-6),
    "multislerp, no base": ("models: [{model: task0}, {model: task1}]\nmerge_method: multislerp\nparameters: {weight: 0.5}\ndtype: float32", 1e-6),
    "nearswap": ("models: [{model: task0}]\nbase_model: base\nmerge_method: nearswap\nparameters: {t: 0.001}\ndtype: float32", 0.0),
    "ram": ("models: [{model: task0}, {model: task1}, {model: task2}]\nbase_model: base\nmerge_method: ram\nparameters: {epsilon: 0.01}\ndtype: float32", 0.0),
    "ramplus_tl": ("models: [{model: task0}, {model: task1}]\nbase_model: base\nmerge_method: ramplus_tl\nparameters: {epsilon: 0.01, r: 0.2, alpha: 0.3}\n"
                   "dtype: float32", 0.0),
    "karcher": ("models: [{model: task0}, {model: task1}]\nmerge_method: karcher\ndtype: float32", 1e-6),
    "passthrough": ("models: [{model: task0, parameters: {scale: [{filter: down_proj, value: 0.5}, {value: 1}]}}]\nmerge_method: passthrough\n"
                    "dtype: float32", 0.0),
    "slerp": ("""
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: task0, layer_range: [0, 4]}
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float32
""", 1e-6),
    "a density of each": ("""
base_model: base
merge_method: ties
dtype: float32
models:
  - model: base
  - model: task0
    parameters: {weight: 1, density: [1, 0.7, 0.1]}
  - model: task1
    parameters:
      weight: [0, 0.3, 0.7, 1]
      density: 0.5
  - model: task2
    parameters:
      weight:
        - {filter: mlp, value: 0.5}
        - value: 0
      density: 0.33
parameters: {normalize: true}
""", 0.0),
    "a density and gamma of each": ("""
base_model: base
merge_method: breadcrumbs
dtype: float32
models:
  - {model: task0, parameters: {weight: 1, density: 0.6, gamma: [0, 0.2]}}
  - {model: task1, parameters: {weight: 0.4, density: [0.3, 0.8], gamma: 0.1}}
""", 0.0),
    "YAML 1.1, and models as mappings": ("""
base_model: {model: {path: base}}
merge_method: task_arithmetic
dtype: torch.float32
models:
  - model: {model: {path: task0}}
    parameters: &p
      weight: 010
  - model: task1
    parameters:
      <<: *p
      weight: 04
parameters: {normalize: 1.0, lambda: 0.5}
""", 0.0),
    "a density of 0": ("""
base_model: base
merge_method: ties
dtype: float32
models:
  - {model: task0, parameters: {weight: 1, density: [0, 0.7]}}
  - {model: task1, parameters: {weight: 0.4, density: 0.5}}
""", 0.0),
    "layers of two models": ("""
slices:
  - sources: [{model: task0, layer_range: [0, 3]}]
  - sources:
      - model: task1
        layer_range: [1, 4]
        parameters: {scale: [{filter: down_proj, value: [0.5, 2]}, {value: 1}]}
merge_method: passthrough
dtype: float32
""", 0.0),
    "layers of one model again": ("""
slices:
  - sources: [{model: task0, layer_range: [0, 3]}]
  - sources: [{model: task0, layer_range: [1, 2]}]
  - sources: [{model: task0, layer_range: [1, 4]}]
merge_method: passthrough
dtype: float32
""", 0.0),
    "slerp of slices": ("""
slices:
  - sources: [{model: base, layer_range: [0, 2]}, {model: task0, layer_range: [1, 3]}]
    parameters: {t: 0.3}
  - sources: [{model: task1, layer_range: [1, 4]}, {model: base, layer_range: [0, 3]}]
    parameters: {t: [{filter: mlp, value: [0.2, 0.9]}, {value: 0.6}]}
merge_method: slerp
base_model: base
dtype: float32
""", 1e-6),
    "linear over slices": ("""
slices:
  - sources:
      - {model: task0, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}
      - {model: task1, layer_range: [0, 2], parameters: {weight: 0.7}}
  - sources:
      - {model: task2, layer_range: [2, 4], parameters: {weight: 0.1}}
      - {model: task0, layer_range: [1, 3], parameters: {weight: 0.3}}
merge_method: linear
dtype: float32
""", 1e-6),
    "ties over slices": ("""
slices:
  - sources:
      - {model: base, layer_range: [0, 1]}
      - {model: task0, layer_range: [0, 1], parameters: {weight: 0.5, density: 0.4}}
      - {model: task1, layer_range: [0, 1], parameters: {weight: 0.3, density: 0.6}}
  - sources:
      - {model: base, layer_range: [1, 4]}
      - {model: task2, layer_range: [1, 4], parameters: {weight: [0.5, 1], density: 0.7}}
      - {model: task0, layer_range: [0, 3], parameters: {weight: 0.2, density: [0.9, 0.2]}}
merge_method: ties
base_model: base
dtype: float32
""", 0.0),
}
# What mergekit's own folder of examples does (bio-merge, linear, ties, orcamini-platy-44layer, gradient-slerp, arcee_fusion, mega), on these models, in f32.
EXAMPLES = {
    "example: two tasks by ties, summed": ("""
models:
  - {model: task0, parameters: {density: 0.5, weight: 0.5}}
  - {model: task1, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: base
parameters: {normalize: false, int8_mask: true}
dtype: float32
""", 0.0),
    "example: three models, linear": ("""
models:
  - {model: task0, parameters: {weight: 1.0}}
  - {model: task1, parameters: {weight: 0.3}}
  - {model: task2, parameters: {weight: 0.5}}
merge_method: linear
dtype: float32
""", 1e-6),
    "example: gradients of density and weight": ("""
models:
  - {model: task0, parameters: {density: [0.8, 0.3, 0.1], weight: [1.0, 0.8, 0.5]}}
  - {model: task1, parameters: {density: [0.1, 0.4, 0.1], weight: [0.2, 0.8, 0.1]}}
  - {model: task2, parameters: {density: [0.1, 0.2, 0.6], weight: [0.5, 0.8, 1.0]}}
merge_method: ties
base_model: base
parameters:
dtype: float32
""", 0.0),
    "example: layers of two models, overlapping": ("""
slices:
  - sources: [{model: task0, layer_range: [0, 3]}]
  - sources: [{model: task1, layer_range: [2, 4]}]
merge_method: passthrough
dtype: float32
""", 0.0),
    "example: arcee_fusion": ("models: [{model: base}, {model: task0}]\nmerge_method: arcee_fusion\nbase_model: base\ndtype: float32", 1e-7, 0.1),
    "example: slerp by gradients, then ties": ("""
name: gradient-slerp
slices:
  - sources:
      - {model: base, layer_range: [0, 4]}
      - {model: task0, layer_range: [0, 4]}
merge_method: slerp
base_model: base
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float32
---
models:
  - {model: gradient-slerp, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: task1, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
merge_method: ties
base_model: task2
parameters: {normalize: true, int8_mask: true}
dtype: float32
""", 1e-6, 1e-3),
}
# The document of the result first, as mergekit-multi takes it too.
EXAMPLES["documents in another order"] = ("---".join(reversed(EXAMPLES["example: slerp by gradients, then ties"][0].split("---"))), 1e-6, 1e-3)


OVERLAPPING = "example: layers of two models, overlapping"
# Of other shapes than Llama's: biases, fused and transposed weights, tied heads, further norms. And what mergekit fails at: it writes no configuration
# with lists over layers where their number changes.
ARCHITECTURES = {"Llama": [], "Mistral": [], "GPT-2": [], "Phi-3": [], "Qwen2": [OVERLAPPING], "Gemma 2": [OVERLAPPING]}


def compare(tool, configurations, what, failures):
    """Merges the models of the working directory by both; how many elements were compared."""
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    LoaderCache().loaders.clear()  # of models that other directories have under these names
    count = 0
    for number, (title, (text, tolerance, *share)) in enumerate(configurations.items()):
        name = f"{what}: {title}" if what else title
        theirs, ours = pathlib.Path(f"mergekit {number}"), pathlib.Path(f"taskvec {number}")
        pathlib.Path("config.yml").write_text(text)
        if "---" in text:
            subprocess.run([pathlib.Path(sys.executable).with_name("mergekit-multi"), "config.yml", "-I", f"stages{number}", "--out-path", theirs,
                            "--no-copy-tokenizer", "--no-write-model-card", "--quiet"], check=True, capture_output=True)
        else:
            run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(theirs),
                      MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True))
        expected = {}
        for path in theirs.glob("*.safetensors"):
            expected |= load(path)[0]
        done = subprocess.run([tool, "run", "config.yml", "--out", ours], capture_output=True, text=True)
        if done.returncode != 0:
            failures.append(f"{name}: exit code {done.returncode}: {done.stderr.strip()}")
            continue
        configs = [json.loads((folder / "config.json").read_text()) for folder in (theirs, ours)]
        layers = [config.get("num_hidden_layers", config.get("n_layer")) for config in configs]
        if layers[0] != layers[1]:
            failures.append(f"{name}: config.json has {layers[1]} layers, and mergekit's {layers[0]}")
        found, _ = load(ours / "model.safetensors")
        if set(found) != set(expected):
            failures.append(f"{name}: tensors differ: {sorted(set(found) ^ set(expected))}")
        both = [(found[tensor], expected[tensor]) for tensor in sorted(set(found) & set(expected))]
        apart = max(float((ours - theirs).abs().max()) for ours, theirs in both)
        entries = sum(ours.numel() for ours, _ in both)
        equal = sum(int((ours == theirs).sum()) for ours, theirs in both) / entries
        beyond = sum(int(((ours - theirs).abs() > tolerance).sum()) for ours, theirs in both) / entries
        count += entries
        if beyond > sum(share):
            failures.append(f"{name}: {beyond:.2%} of the entries are off by more than {tolerance:.0e}, the most by {apart:.2e}")
        print(f"  {name}: {len(found)} tensors, {equal:.2%} equal, apart by {apart:.1e}" + (f", {beyond:.2%} by more than {tolerance:.0e}" if share else ""), flush=True)
    return count


def main():
    arguments = tool_arguments(__doc__)
    tool = pathlib.Path(arguments.tool).resolve()

    failures, count = [], 0
    for kind, fails in ARCHITECTURES.items():
        with tempfile.TemporaryDirectory() as scratch:
            os.chdir(scratch)
            checkpoints(pathlib.Path("."), layers=4, kind=kind)
            configurations = (CONFIGURATIONS if kind == "Llama" else {}) | {name: one for name, one in EXAMPLES.items() if name not in fails}
            count += compare(tool, configurations, "" if kind == "Llama" else kind, failures)
            os.chdir("/")
    if failures:
        raise SystemExit("\n".join(failures))
    print(f"{count} elements as mergekit's own runs have them")


if __name__ == "__main__":
    main()
