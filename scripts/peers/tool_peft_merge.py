"""merge-lora --semantics peft beside PEFT's add_weighted_adapter: the same factors, and DARE's with the tool's masks handed to PEFT."""
# SPDX-License-Identifier: Apache-2.0
import pathlib
import subprocess
import tempfile

import torch
from safetensors.torch import load_file

from common import largest_difference, tool_arguments
from make_peft_merge import CASES, SETTINGS, merged_by_peft, write_adapters

DARE = {
    "dare_linear": ("dare_linear", "ab", [0.75, -0.5], 0.6, "total", None),
    "dare_ties": ("dare_ties", "abc", [1.0, 0.5, 0.75], 0.5, "total", None),
    "dare_ties_frequency": ("dare_ties", "abc", [1.0, 0.5, -0.75], 0.5, "frequency", None),
}


def main():
    arguments = tool_arguments(__doc__)
    failures, count, worst = [], 0, {}

    def merge(folder, case, out, weights=None, seed=5):
        how, names, own, density, majority, rank = case
        words = ["merge-lora", "--semantics", "peft", "--method", how.replace("_", "-"), "--out", out, "--seed", seed, "--any-base"]
        for name, weight in zip(names, weights or own):
            words += ["--adapter", f"{folder / name}={weight}"]
        words += [] if density is None else ["--density", density]
        words += [] if rank is None else ["--rank", rank]
        words += [] if majority == "total" else ["--majority-sign", majority]
        done = subprocess.run([arguments.tool, *map(str, words)], capture_output=True, text=True)
        if done.returncode != 0:
            failures.append(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
            return None
        found = {}
        for key, value in load_file(pathlib.Path(out) / "adapter_model.safetensors").items():
            key = key.removeprefix("base_model.model.").replace("lora_embedding_", "lora_").removesuffix(".weight")
            found[key] = value
        return found

    def products(made):
        return {key.removesuffix(".lora_A"): made[key.removesuffix("A") + "B"] @ made[key] for key in made if key.endswith(".lora_A")}

    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        for seed in range(100, 106):
            folder = scratch / str(seed)
            write_adapters(folder, seed)
            for name, case in CASES.items():
                count += 1
                found, expected = merge(folder, case, folder / f"out_{name}"), merged_by_peft(folder, case)
                if found is None:
                    continue
                if case[0].endswith("svd") and len(case[1]) > 1:
                    found, expected, allowed = products(found), products(expected), 5e-6
                else:
                    allowed = 0.0
                if set(found) != set(expected):
                    failures.append(f"{name}: tensors {sorted(set(found) ^ set(expected))}")
                    continue
                apart = max(largest_difference(found[key], expected[key]) for key in expected)
                worst[case[0]] = max(worst.get(case[0], 0.0), apart)
                if not apart <= allowed:
                    failures.append(f"{name}, seed {seed}: off by {apart:.2e}, allowed {allowed:.0e}")

            # DARE: an adapter alone among others of weight 0 shows what was kept of it; PEFT is given these masks.
            for name, case in DARE.items():
                count += 1
                how, names, weights, density, majority, rank = case
                masks, kept, size = {}, 0, 0
                for index, owner in enumerate(names):
                    alone = merge(folder, ("dare_linear", *case[1:4], "total", None), folder / f"mask_{name}_{owner}", [float(i == index) for i in range(len(names))])
                    # Modules whose other owners have weight 0 are this one's, times √scaling, over the density.
                    for key, value in (alone or {}).items():
                        masks[owner, key] = (value != 0).float()
                    modules = [key for key in alone or {} if not (owner == "c" and "v_proj" in key)]
                    kept += sum(int(masks[owner, key].sum()) for key in modules)
                    size += sum(masks[owner, key].numel() for key in modules)
                share, spread = kept / size, (density * (1 - density) / size) ** 0.5
                if abs(share - density) > 5 * spread:
                    failures.append(f"{name}: {share:.4f} of the entries are kept, expected {density} ± {spread:.4f}")
                found = merge(folder, case, folder / f"out_{name}")
                expected = with_masks(folder, case, masks)
                apart = max(largest_difference(found[key], expected[key]) for key in expected)
                worst[how] = max(worst.get(how, 0.0), apart)
                if set(found) != set(expected) or apart != 0:
                    failures.append(f"{name}, seed {seed}: off by {apart:.2e} with the same masks")
    for how, apart in worst.items():
        print(f"  {how:24s} apart by {apart:.1e}")
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} of {count} failed:", *failures[:20]]))
    print(f"  {count} merges are PEFT's")


def with_masks(folder, case, masks):
    """PEFT's merge with the masks in place of its draws, which it makes factor by factor: A of all adapters, then B."""
    from peft.tuners.lora import model as lora_model
    from peft.utils import merge_utils

    names, density = case[1], case[3]
    order = []

    def draw(tensor, density, rescale):
        owner, key = order.pop(0)
        assert masks[owner, key].shape == tensor.shape
        return tensor * masks[owner, key] / density

    original, layers = merge_utils.random_pruning, lora_model.LoraModel._generalized_task_arithmetic_weighted_adapter

    def merge_layer(self, combination_type, adapters, weights, target, *more):
        module = next(name for name, layer in self.model.named_modules() if layer is target)
        owners = [owner for owner, adapter in zip(names, adapters) if adapter in target.lora_A or adapter in target.lora_embedding_A]
        order[:] = [(owner, f"{module}.lora_{side}") for side in ("A", "B") for owner in owners]
        return layers(self, combination_type, adapters, weights, target, *more)

    merge_utils.random_pruning, lora_model.LoraModel._generalized_task_arithmetic_weighted_adapter = draw, merge_layer
    try:
        return merged_by_peft(folder, case)
    finally:
        merge_utils.random_pruning, lora_model.LoraModel._generalized_task_arithmetic_weighted_adapter = original, layers


if __name__ == "__main__":
    main()
