"""Makes tests/data/statistics: Fisher merging and RegMean, by their definitions in NumPy f64 and by fusion_bench."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import pathlib
import warnings

import numpy as np
import torch

import definition
from common import Goldens, wide

SHAPES = {"fc0.bias": (5,), "fc0.weight": (5, 6), "fc1.weight": (3, 5)}


def model(rng, dtype, scale=1.0):
    return {name: torch.from_numpy(rng.normal(size=shape) * scale).to(dtype) for name, shape in SHAPES.items()}


def prefixed(values, prefix):
    return {f"{prefix}/{name}": value for name, value in values.items()}


def from_fusion_bench(out):
    """What fusion_bench's functions make of models and statistics that they are handed. Every Fisher entry is positive: they have no plain average to fall back on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights
        from fusion_bench.method.regmean.regmean import merging_with_regmean_weights

    rng = np.random.default_rng(71)
    goldens = Goldens()
    for label, dtype, tolerance in (("f32", torch.float32, 2e-6), ("f64", torch.float64, 1e-12)):
        base, tasks = model(rng, dtype), [model(rng, dtype) for _ in range(3)]
        # The second task's gradients are ten times the first's, the third's a hundred times.
        fishers = [{name: (value.double().abs() + 0.1).square().mul(100.0**task).to(dtype) for name, value in model(rng, torch.float64).items()} for task in range(3)]
        inputs = [{"fc0": rng.normal(size=(9 + task, 6)), "fc1": np.maximum(rng.normal(size=(9 + task, 5)), 0)} for task in range(3)]
        grams = [{f"{layer}.weight": torch.from_numpy(x.T @ x).to(dtype) for layer, x in task.items()} for task in inputs]
        extra = {}
        for index in range(3):
            extra |= prefixed(fishers[index], f"fisher{index}") | prefixed(grams[index], f"gram{index}")
        goldens.group(label, base, tasks, extra)
        parameters = {name: [task[name] for task in tasks] for name in SHAPES}

        for case, weights, normalize, least in (("unit", [1, 1, 1], False, 0.0), ("weighted", [0.5, 1.0, 0.25], False, 0.0), ("normalized", [1, 1, 1], True, 0.0),
                                                ("normalized_weighted", [0.5, 1.0, 0.25], True, 0.0), ("smallest", [1, 1, 1], False, 0.05)):
            peer = merging_with_fisher_weights(parameters, fishers, torch.tensor(weights, dtype=dtype), normalize, least)
            outputs, note, options = prefixed(peer, "expected"), "", {"weights": weights, "normalize": normalize, "floor": 1e-12}
            if least:  # added to every Fisher entry there; the definition adds nothing
                outputs = prefixed(definition.fisher(tasks, fishers, weights, normalize), "expected") | prefixed(peer, "peer")
                options["peer_adds"] = least
                note = "the peer adds minimal_fisher_weight to every entry (1e-6 by default; here more, to show); the definition adds nothing"
            goldens.case(f"fisher_{label}_{case}", label, "fisher", options, outputs, "tolerance", tolerance, note)
        by_module = [{name.removesuffix(".weight"): gram for name, gram in task.items()} for task in grams]
        for alpha in (1.0, 0.5, 0.0) if dtype == torch.float64 else (1.0, 0.9, 0.1):  # the peer rounds alpha to f32
            peer = merging_with_regmean_weights(parameters, by_module, alpha)
            goldens.case(f"regmean_{label}_{alpha:g}", label, "regmean", {"alpha": alpha}, prefixed({name: value.contiguous() for name, value in peer.items()}, "expected"),
                         "tolerance", 100 * tolerance)
    goldens.write(out / "fusion_bench.safetensors", "fusion_bench's merging_with_fisher_weights and merging_with_regmean_weights")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out / "statistics"
    out.mkdir(parents=True, exist_ok=True)
    from_fusion_bench(out)
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
    print(f"  statistics: {sum(path.stat().st_size for path in out.iterdir())} bytes")


if __name__ == "__main__":
    main()
