"""Methods that look at rows, against mergekit's own functions: DELLA's probabilities and rescaling, with the tool's draws in place of torch's; Arcee
Fusion's choice of entries."""
# SPDX-License-Identifier: Apache-2.0
import math
import os
import pathlib
import subprocess
import tempfile
import unittest.mock

import torch

from common import load, tool_arguments
from tool_mergekit import checkpoints


def run(tool, *arguments):
    subprocess.run([tool, "merge", *arguments, "--base", "base", "--task", "task0", "--out", "merged"],
                   check=True, capture_output=True)
    return load(pathlib.Path("merged/model.safetensors"))[0]


def check_della(tool, base, task):
    """Each tensor as mergekit makes it of the entries that the tool kept, and how far their number is from what mergekit's probabilities expect."""
    from mergekit.sparsify import RescaleNorm, della_magprune

    merged = run(tool, "--method", "della-linear", "--semantics", "mergekit", "--density", "0.6", "--epsilon", "0.25")
    apart, excess, by_rank, variance, variance_by_rank = 0.0, 0.0, 0.0, 0.0, 0.0
    for name in merged:
        kept = (merged[name] != base[name]).float()
        seen = []

        def bernoulli(probabilities):
            seen.append(probabilities)
            return kept.reshape(probabilities.shape)

        with unittest.mock.patch("torch.bernoulli", bernoulli):
            delta = della_magprune(task[name] - base[name], density=0.6, epsilon=0.25, rescale_norm=RescaleNorm.l1)
        apart = max(apart, float((base[name] + delta - merged[name]).abs().max()))
        p = seen[0].double()
        changed = (task[name] != base[name]).reshape(p.shape)
        off, spread = ((kept.reshape(p.shape) - p) * changed).double(), p * (1 - p) * changed
        excess += float(off.sum())
        variance += float(spread.sum())
        by_rank += float((off * (p - 0.6)).sum())
        variance_by_rank += float((spread * (p - 0.6) ** 2).sum())
    z, z_by_rank = excess / math.sqrt(variance), by_rank / math.sqrt(variance_by_rank)
    print(f"  della-linear: apart by {apart:.1e}; kept entries are off by {z:.2f} standard deviations, {z_by_rank:.2f} when weighed by their probability")
    if apart > 1e-6 or abs(z) > 5 or abs(z_by_rank) > 5:
        raise SystemExit("della-linear is not mergekit's")


def check_arcee_fusion(tool, base, task):
    """The entries that mergekit's own functions choose in f64. In f32 its softmax loses the digits that a divergence of near rows consists of."""
    from mergekit.merge_methods.arcee_fusion import DynamicThresholdFusion, _compute_importance

    merged = run(tool, "--method", "arcee-fusion")
    entries, differing = 0, [0, 0]
    for name in merged:
        entries += merged[name].numel()
        for which, kind in enumerate((torch.float64, torch.float32)):
            mask, _ = DynamicThresholdFusion().compute_fusion_mask(_compute_importance(task[name].to(kind), base[name].to(kind)))
            expected = base[name] + (task[name] - base[name]) * mask.float()
            differing[which] += int((merged[name] != expected).sum())
    print(f"  arcee-fusion: of {entries} entries {differing[0]} are not as mergekit's functions have them in f64, {differing[1]} in f32")
    if differing[0] > 1e-4 * entries or differing[1] > 0.05 * entries:
        raise SystemExit("arcee-fusion is not mergekit's")


def main():
    arguments = tool_arguments(__doc__)
    tool = pathlib.Path(arguments.tool).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        checkpoints(pathlib.Path("."), layers=4)
        base, task = load(pathlib.Path("base/model.safetensors"))[0], load(pathlib.Path("task0/model.safetensors"))[0]
        base, task = ({name: tensor.float() for name, tensor in model.items()} for model in (base, task))
        check_della(tool, base, task)
        check_arcee_fusion(tool, base, task)
        os.chdir("/")


if __name__ == "__main__":
    main()
