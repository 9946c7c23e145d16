"""Makes tests/data/statistics: Fisher merging and RegMean from their definitions, in NumPy f64. (None of the peers has them.)"""
# SPDX-License-Identifier: Apache-2.0
import argparse
import pathlib

import numpy as np
import torch

import definition
from common import Goldens, wide

SHAPES = {"fc0.bias": (5,), "fc0.weight": (5, 6), "fc1.weight": (3, 5)}


def model(rng, dtype, scale=1.0):
    return {name: torch.from_numpy(rng.normal(size=shape) * scale).to(dtype) for name, shape in SHAPES.items()}


def prefixed(values, prefix):
    return {f"{prefix}/{name}": value for name, value in values.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out / "statistics"
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(61)
    goldens = Goldens()
    for label, dtype, tolerance in (("f32", torch.float32, 2e-6), ("f64", torch.float64, 1e-12)):
        base, tasks = model(rng, dtype), [model(rng, dtype) for _ in range(3)]
        # The diagonal Fisher of each task: mean of squared per-example gradients. Some entries are zero in every task.
        gradients = [[model(rng, dtype, 10.0 ** -task) for _ in range(4)] for task in range(3)]
        dead = {name: rng.random(shape) < 0.2 for name, shape in SHAPES.items()}
        for task in gradients:
            for example in task:
                for name in example:
                    example[name][torch.from_numpy(dead[name])] = 0
        fishers = [{name: torch.from_numpy(np.mean([wide(example[name]).astype(np.float64) ** 2 for example in task], axis=0)).to(dtype) for name in SHAPES}
                   for task in gradients]
        inputs = [{"fc0": torch.from_numpy(rng.normal(size=(9, 6))).to(dtype), "fc1": torch.from_numpy(np.maximum(rng.normal(size=(9, 5)), 0)).to(dtype)} for _ in range(3)]
        grams = [{f"{layer}.weight": torch.from_numpy(wide(x).astype(np.float64).T @ wide(x).astype(np.float64)).to(dtype) for layer, x in task.items()} for task in inputs]
        extra = {}
        for index in range(3):
            extra |= prefixed(fishers[index], f"fisher{index}") | prefixed(grams[index], f"gram{index}")
            extra |= {f"batch{index}/{name}": value for name, value in inputs[index].items()}
        for example, values in enumerate(gradients[0]):
            extra |= prefixed(values, f"gradient0_{example}")
        goldens.group(label, base, tasks, extra)

        for case, weights, normalize in (("unit", [1, 1, 1], False), ("weighted", [0.5, 1.0, 0.25], False), ("normalized", [1, 1, 1], True),
                                         ("normalized_weighted", [0.5, 1.0, 0.25], True)):
            merged = definition.fisher(tasks, fishers, weights, normalize)
            goldens.case(f"fisher_{label}_{case}", label, "fisher", {"weights": weights, "normalize": normalize, "floor": 1e-12}, prefixed(merged, "expected"),
                         "tolerance", tolerance)
        for alpha in (0.9, 1.0, 0.1, 0.0):
            merged = definition.average(tasks, [1.0, 1.0, 1.0])
            for name in ("fc0.weight", "fc1.weight"):
                solved = definition.regmean([wide(task[name]).astype(np.float64).T for task in tasks], [wide(gram[name]).astype(np.float64) for gram in grams], alpha)
                merged[name] = torch.from_numpy(np.ascontiguousarray(solved.T)).to(dtype)
            goldens.case(f"regmean_{label}_{alpha:g}", label, "regmean", {"alpha": alpha}, prefixed(merged, "expected"), "tolerance", 100 * tolerance)
    goldens.write(out / "statistics.safetensors", "a NumPy f64 restatement of the documented definitions (scripts/peers/definition.py)")
    print(f"  statistics: {(out / 'statistics.safetensors').stat().st_size} bytes")


if __name__ == "__main__":
    main()
