"""The taskvec tool against the definitions, element for element: merges, pruning, applying, PERU-FFT, on random models from file to file."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import pathlib
import subprocess
import tempfile

import numpy as np
import torch

import definition
from common import by_name, equal_values, load, narrow, save, wide

SHAPES = {"blocks.0.attn.weight": (48, 37), "blocks.0.bias": (37,), "blocks.1.attn.weight": (61, 40), "embed": (97, 16), "scale": (), "tail.weight": (3, 5, 7, 11)}
KINDS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


def random_model(rng, dtypes, base=None, step=0.0, coarse=False):
    """A model, or a fine-tuned one of `base`. Coarse values lie on a grid of nine, so that magnitudes tie and sums cancel."""
    model = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        dtype = dtypes[index % len(dtypes)]
        draw = rng.integers(-4, 5, shape) / 8 if coarse else rng.normal(size=shape) * (step if base else 1.0)
        value = np.asarray(draw) + (wide(base[name]).astype(np.float64) if base else 0.0)
        model[name] = torch.from_numpy(np.array(value)) if dtype == torch.float64 else narrow(value.astype(np.float32), dtype)
    model["steps"] = torch.arange(5)
    return model


class Checks:
    def __init__(self, tool):
        self.tool, self.count, self.failures = tool, 0, []

    def run(self, *arguments):
        done = subprocess.run([self.tool, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            self.failures.append(f"{' '.join(map(str, arguments))}: exit code {done.returncode}: {done.stderr.strip()}")
        return done.returncode == 0

    def equal(self, what, path, expected):
        self.count += 1
        found, _ = load(path)
        for name in sorted(set(found) ^ set(expected)):
            self.failures.append(f"{what}: '{name}' is only {'written' if name in found else 'expected'}")
        for name in sorted(set(found) & set(expected)):
            if not equal_values(found[name], expected[name]):
                a, b = found[name], expected[name]
                where = "dtype or shape" if a.dtype != b.dtype or a.shape != b.shape else f"{int((a != b).sum())} of {a.numel()} elements"
                self.failures.append(f"{what}: '{name}' differs in {where}")


def delta_of(path):
    """{parameter: dense f32 (f64) array} from a delta file, read by its documented layout."""
    tensors, _ = load(path)
    dense = {}
    for key in tensors:
        if not key.endswith(".shape"):
            continue
        name = key[: -len(".shape")]
        shape, values = tuple(tensors[key].tolist()), tensors[f"{name}.values"].numpy()
        flat = np.zeros(int(np.prod(shape)), values.dtype)
        if f"{name}.bitmask" in tensors:
            flat[np.unpackbits(tensors[f"{name}.bitmask"].numpy(), bitorder="little")[: flat.size].astype(bool)] = values
        else:
            flat[tensors[f"{name}.indices"].numpy()] = values
        dense[name] = flat.reshape(shape)
    return dense


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", required=True)
    parser.add_argument("--data", type=pathlib.Path)
    arguments = parser.parse_args()
    checks = Checks(arguments.tool)
    torch.set_num_threads(1)

    mixtures = {"f32": ["f32"], "bf16": ["bf16"], "mixed": ["bf16", "f32", "f16", "f64"]}
    for seed, (label, kinds) in enumerate(mixtures.items()):
        for coarse in (False, True):
            rng = np.random.default_rng(1000 + seed)
            dtypes = [KINDS[kind] for kind in kinds]
            base = random_model(rng, dtypes, coarse=coarse)
            tasks = [random_model(rng, dtypes, base, 0.3, coarse) for _ in range(3)]
            floating = [name for name in by_name(base) if base[name].is_floating_point()]

            def only(model):
                return {name: model[name] for name in floating}

            fbase, ftasks = only(base), [only(task) for task in tasks]
            steps = {"steps": base["steps"]}
            with tempfile.TemporaryDirectory() as scratch:
                scratch = pathlib.Path(scratch)
                save(scratch / "base.safetensors", base, {})
                for index, task in enumerate(tasks):
                    save(scratch / f"task{index}.safetensors", task, {})
                out = scratch / "out.safetensors"

                def given(weights):
                    return [part for i, weight in enumerate(weights) for part in ("--task", f"{scratch / f'task{i}.safetensors'}" + (f"={weight}" if weight != 1 else ""))]

                def merge(what, expected, *options, weights=(1, 1, 1), with_base=True):
                    out.unlink(missing_ok=True)
                    base_option = ["--base", scratch / "base.safetensors"] if with_base else []
                    if checks.run("merge", *base_option, *given(weights), "--out", out, *options):
                        checks.equal(f"{label}{' coarse' if coarse else ''}: {what}", out, {**expected, **steps})

                for weights in ((1, 1, 1), (0.5, 1, 0.25)):
                    merge(f"average {weights}", definition.average(ftasks, weights), "--method", "average", weights=weights, with_base=False)
                for weights in ((1, 1, 1), (0.3, -0.7, 1.1)):
                    merge(f"task-arithmetic {weights}", definition.task_arithmetic(fbase, ftasks, weights, 0.3), "--method", "task-arithmetic", weights=weights)
                merge("task-arithmetic forgets", definition.task_arithmetic(fbase, ftasks[:1], [1], -0.5), "--method", "task-arithmetic", "--lambda", -0.5, weights=(1,))
                for scope in ("model", "tensor"):
                    for how in ("mean", "sum", "max"):
                        for density in (0.2, 1.0, 0.003):
                            merged = definition.ties(fbase, ftasks, [1, 1, 1], density, 0.7, scope=scope, merge=how)
                            merge(f"ties {scope} {how} {density}", merged, "--method", "ties", "--scope", scope, "--merge-weights", how, "--density", density,
                                  "--lambda", 0.7)
                    merged = definition.ties(fbase, ftasks, [0.3, 0.7, 1.1], 0.2, 1.0, scope=scope)
                    merge(f"ties {scope} weighted", merged, "--method", "ties", "--scope", scope, weights=(0.3, 0.7, 1.1))
                merge("ties-merging", definition.ties(fbase, ftasks, [1, 1, 1], 0.2, 1.0, **definition.AS_IN_TIES_MERGING), "--method", "ties", "--semantics", "ties-merging")
                for semantics, preset in (("mergekit", definition.AS_IN_MERGEKIT), ("peft", definition.AS_IN_PEFT)):
                    merge(semantics, definition.ties(fbase, ftasks, [0.3, -0.7, 1.1], 0.2, 1.0, **preset), "--method", "ties", "--semantics", semantics,
                          weights=(0.3, -0.7, 1.1))

                for density in (0.01, 0.1, 0.6):
                    delta = definition.pruned_delta(fbase, ftasks[0], density)
                    written = scratch / "delta.safetensors"
                    if checks.run("prune", "--base", scratch / "base.safetensors", "--task", scratch / "task0.safetensors", "--density", density, "--out", written):
                        found = delta_of(written)
                        checks.count += 1
                        for name in floating:
                            stored = found.get(name, np.zeros_like(delta[name]))
                            if stored.dtype != delta[name].dtype or not np.array_equal(stored, delta[name]):
                                checks.failures.append(f"{label}: prune {density}: '{name}' differs")
                        if checks.run("apply", "--base", scratch / "base.safetensors", "--delta", written, "--out", out):
                            checks.equal(f"{label}: apply {density}", out, {**definition.add(fbase, delta, 1.0), **steps})

                folder = scratch / "peru"
                if checks.run("peru-fft", "--method", "ties", "--base", scratch / "base.safetensors", *given((1, 1, 1)), "--density", 0.05, "--merge-density", 0.2, "--out", folder):
                    merged = definition.ties(fbase, ftasks, [1, 1, 1], 0.2, 1.0)
                    checks.equal(f"{label}: peru-fft merged", folder / "merged.safetensors", {**merged, **steps})
                    for index, task in enumerate(ftasks):
                        delta = definition.pruned_delta(merged, task, 0.05)
                        if checks.run("apply", "--base", folder / "merged.safetensors", "--delta", folder / f"task{index}.delta.safetensors", "--out", out):
                            checks.equal(f"{label}: peru-fft task {index}", out, {**definition.add(merged, delta, 1.0), **steps})

    if checks.failures:
        raise SystemExit("\n".join(checks.failures))
    print(f"{checks.count} files, every element as the definitions have it")


if __name__ == "__main__":
    main()
