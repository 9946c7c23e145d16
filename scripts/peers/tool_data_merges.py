"""The taskvec tool against the definitions of the merges that look at data or at angles, of sweeps and of joined statistics, from file to file."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import csv
import json
import pathlib
import tempfile

import numpy as np
import torch

import definition
from common import load, narrow, save, wide
from tool_merge import KINDS, Checks

# Linear weights out×in, one in×out; a scalar, an empty tensor, one of rank 4.
SHAPES = {"a.weight": (24, 37), "b.weight": (130, 300), "conv.weight": (33, 20), "a.bias": (24,), "empty": (0, 5), "scale": (), "tail": (3, 5, 7, 11)}
IN_OUT = "conv.weight"


def random_model(rng, dtypes, base=None):
    model = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        value = np.asarray(rng.normal(size=shape) * (0.3 if base else 1.0) + (wide(base[name]) if base else 0.0))
        dtype = dtypes[index % len(dtypes)]
        model[name] = torch.from_numpy(value) if dtype == torch.float64 else narrow(value.astype(np.float32), dtype)
    model["steps"] = torch.arange(5)
    return model


def unit(dtype):
    """A last place, relative."""
    return {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]


class DataChecks(Checks):
    def close(self, what, path, expected, places=1.0, cancelling=0.0):
        """Every element within so many last places of its own magnitude, or `cancelling` times the tensor's largest."""
        self.count += 1
        found, _ = load(path)
        for name in sorted(set(found) ^ set(expected)):
            self.failures.append(f"{what}: '{name}' is only {'written' if name in found else 'expected'}")
        for name in sorted(set(found) & set(expected)):
            a, b = found[name], expected[name]
            if a.dtype != b.dtype or a.shape != b.shape:
                self.failures.append(f"{what}: '{name}' differs in dtype or shape")
            elif b.is_floating_point() and b.numel():
                a, difference = a.double(), (a.double() - b.double()).abs()
                allowed = places * unit(b.dtype) * b.double().abs() + cancelling * b.double().abs().max()
                if not bool((difference <= allowed).all()):
                    self.failures.append(f"{what}: '{name}' is off by {float((difference / allowed.clamp_min(1e-300)).max()):.3g} times what it may be")
            elif not torch.equal(a, b):
                self.failures.append(f"{what}: '{name}' differs")

    def refuses(self, what, words, *arguments):
        import subprocess

        self.count += 1
        done = subprocess.run([self.tool, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 1 or done.stderr.count("\n") != 1 or not all(word in done.stderr for word in words):
            self.failures.append(f"{what}: exit code {done.returncode}: {done.stderr.strip()}; expected a line with {words}")


def fisher(tasks, fishers, weights, normalize=False, floor=1e-12):
    """definition.fisher() with its roundings: f32 (f64 for f64) products and sums in task order."""
    result = {}
    norms = [np.sqrt(sum(float((wide(value).astype(np.float64) ** 2).sum()) for value in diagonal.values())) for diagonal in fishers]
    for name, first in tasks[0].items():
        kind = wide(first).dtype.type
        factors = [kind(weight / norm if normalize else weight) for weight, norm in zip(weights, norms)]
        above, below = np.zeros(first.shape, kind), np.zeros(first.shape, kind)
        for task, diagonal, factor in zip(tasks, fishers, factors):
            importance = factor * wide(diagonal[name]).astype(kind)
            above = above + importance * wide(task[name])
            below = below + importance
        plain = wide(definition.average([{name: torch.from_numpy(np.asarray(wide(task[name])))} for task in tasks], weights)[name])
        unsure = below < kind(floor)
        result[name] = narrow(np.where(unsure, plain, above / np.where(unsure, kind(1), below)).astype(kind), first.dtype)
    return result


def regmean(tasks, grams, weights, alpha, ridge):
    merged = definition.average(tasks, weights)
    for name in grams[0]:
        w = [wide(task[name]).astype(np.float64) for task in tasks]
        w = w if name == IN_OUT else [value.T for value in w]
        scaled = [weight * (alpha * gram[name] + (1 - alpha) * np.diag(np.diag(gram[name]))) for weight, gram in zip(weights, grams)]
        mean = sum(weight * value for weight, value in zip(weights, w)) / sum(weights)
        system = sum(scaled)
        system = system + ridge * np.trace(system) / len(system) * np.eye(len(system))
        solved = mean + np.linalg.solve(system, sum(gram @ (value - mean) for gram, value in zip(scaled, w)))
        merged[name] = torch.from_numpy(np.ascontiguousarray(solved if name == IN_OUT else solved.T)).to(tasks[0][name].dtype)
    return merged


def statistics(kind, examples, **more):
    return {"schema": "taskvec.statistics.1", "kind": kind, "examples": str(examples), **more}


def write_sharded(folder, model):
    """The model over two shards, as transformers writes it."""
    folder.mkdir()
    names, weight_map = sorted(model), {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"model-{index + 1:05}-of-00002.safetensors"
        save(folder / file, {name: model[name] for name in part}, {})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


def check_merges(checks, label, dtypes, folder):
    rng = np.random.default_rng(len(label))
    base = random_model(rng, dtypes)
    tasks = [random_model(rng, dtypes, base) for _ in range(3)]
    floating = [name for name in SHAPES]
    only = [{name: task[name] for name in floating} for task in tasks]
    fbase, steps = {name: base[name] for name in floating}, {"steps": base["steps"]}
    save(folder / "base.safetensors", base, {})
    for index, task in enumerate(tasks[:2]):
        save(folder / f"task{index}.safetensors", task, {})
    write_sharded(folder / "task2", tasks[2])
    paths = [folder / "task0.safetensors", folder / "task1.safetensors", folder / "task2"]

    storage = [torch.float32, torch.float64, torch.bfloat16]
    fishers, grams, stored = [], [], []
    for index in range(3):
        diagonal = {name: np.square(rng.normal(size=SHAPES[name])) * 10.0**-index * (rng.random(SHAPES[name]) < 0.7) for name in floating}
        fishers.append({name: torch.from_numpy(np.asarray(value)).to(storage[index]) for name, value in diagonal.items()})
        save(folder / f"fisher{index}.safetensors", fishers[index], statistics("expected_fisher", 16))
        inputs = {name: rng.normal(size=(SHAPES[name][0 if name == IN_OUT else 1] + 50, SHAPES[name][0 if name == IN_OUT else 1])) for name in ("a.weight", "b.weight", IN_OUT)}
        grams.append({name: x.T @ x for name, x in inputs.items()})
        stored.append({name: torch.from_numpy(gram) for name, gram in grams[index].items()})
        save(folder / f"gram{index}.safetensors", stored[index], statistics("gram", 50, in_out=json.dumps([IN_OUT])))
        save(folder / f"plain{index}.safetensors", stored[index], {})

    out = folder / "out.safetensors"

    def arguments(method, weights, *options, with_base=False):
        count = len(weights)
        listed = [part for path, weight in zip(paths[:count], weights) for part in ("--task", f"{path}={weight}" if weight != 1 else path)]
        return ["merge", "--method", method, *(["--base", folder / "base.safetensors"] if with_base else []), *listed, *options, "--out", out]

    def each(option, name):
        return [part for index in range(3) for part in (option, folder / f"{name}{index}.safetensors")]

    for weights in ((1, 1, 1), (0.5, 2, 0.25)):
        for with_base in (False, True):
            if checks.run(*arguments("fisher", weights, *each("--fisher", "fisher"), with_base=with_base)):
                checks.equal(f"{label}: fisher {weights}", out, {**fisher(only, fishers, weights), **steps})
        if checks.run(*arguments("fisher", weights, *each("--fisher", "fisher"), "--normalize", "--floor", 1e-5, "--threads", 1)):
            # The norms are sums of another shape here: f64 factors differ in their last place, and the sum over tasks may cancel.
            checks.close(f"{label}: fisher normalized {weights}", out, {**fisher(only, fishers, weights, True, 1e-5), **steps}, 1, 1e-14)
        for alpha, ridge in ((0.9, 0), (1, 1e-3), (0, 0)):
            expected = {**regmean(only, grams, weights, alpha, ridge), **steps}
            for name, more in (("gram", ()), ("plain", ("--conv1d", "^conv"))):
                if checks.run(*arguments("regmean", weights, *each("--gram", name), "--alpha", alpha, "--ridge", ridge, *more)):
                    checks.close(f"{label}: regmean {name} {alpha:g} {ridge:g} {weights}", out, expected, 1, 1e-10)
    for t in (0, 0.3, 1, 1.5):
        if checks.run(*arguments("slerp", (1, 1), "--t", t)):
            checks.close(f"{label}: slerp {t}", out, {**definition.slerp(only[0], only[1], t), **steps}, 2, 2.0**-23)
        if checks.run(*arguments("slerp", (1,), "--t", t, with_base=True)):
            checks.close(f"{label}: slerp from the base {t}", out, {**definition.slerp(fbase, only[0], t), **steps}, 2, 2.0**-23)
    for clamp in (True, False):
        if checks.run(*arguments("model-stock", (1, 1, 1), *([] if clamp else ["--unclamped"]), with_base=True)):
            checks.close(f"{label}: model stock, clamped {clamp}", out, {**definition.model_stock(fbase, only, clamp), **steps}, 2, 2.0**-23)

    # A task that lacks a tensor, whose Fisher lacks it too, stands at the base there and counts as 0; an excluded one is the base's.
    save(folder / "lacks.safetensors", {name: value for name, value in tasks[0].items() if name != "tail"}, {})
    save(folder / "fisher_lacks.safetensors", {name: value for name, value in fishers[0].items() if name != "tail"}, {})
    paths[0] = folder / "lacks.safetensors"
    lacking = [{**only[0], "tail": fbase["tail"]}, *only[1:]]
    lacking_fishers = [{**fishers[0], "tail": torch.zeros(SHAPES["tail"])}, *fishers[1:]]
    options = ["--fisher", folder / "fisher_lacks.safetensors", "--fisher", folder / "fisher1.safetensors", "--fisher", folder / "fisher2.safetensors"]
    if checks.run(*arguments("fisher", (1, 1, 1), *options, "--missing", "base", with_base=True)):
        checks.equal(f"{label}: fisher, a tensor missing", out, {**fisher(lacking, lacking_fishers, (1, 1, 1)), **steps})
    checks.refuses(f"{label}: a tensor missing", ["'tail'", "lacks"], *arguments("fisher", (1, 1, 1), *options, with_base=True))
    if checks.run(*arguments("fisher", (1, 1, 1), *options, "--exclude", "^tail$", with_base=True)):
        checks.equal(f"{label}: fisher, excluded", out, {**fisher(only, fishers, (1, 1, 1)), "tail": base["tail"], **steps})


def check_statistics(checks, folder):
    """combine-statistics, and what is refused."""
    rng = np.random.default_rng(5)
    names = ["part0.safetensors", "part1.safetensors", "part2.safetensors"]
    examples = [3, 10, 7]
    parts = [part for name in names for part in ("--part", folder / name)]
    values = [np.square(rng.normal(size=(30, 40))) for _ in names]
    for name, value, count in zip(names, values, examples):
        save(folder / name, {"w": torch.from_numpy(value).float()}, statistics("empirical_fisher", count))
    joined = folder / "joined.safetensors"
    if checks.run("combine-statistics", *parts, "--out", joined):
        mean = sum(count * value.astype(np.float32).astype(np.float64) for count, value in zip(examples, values)) / sum(examples)
        checks.close("joined Fishers", joined, {"w": torch.from_numpy(mean).float()})
        checks.count += 1
        if load(joined)[1].get("examples") != "20":
            checks.failures.append(f"joined Fishers: {load(joined)[1]}")
    inputs = [rng.normal(size=(count, 20)) for count in examples]
    for name, x in zip(names, inputs):
        save(folder / name, {"w": torch.from_numpy(x.T @ x)}, statistics("gram", len(x)))
    if checks.run("combine-statistics", *parts, "--out", joined):
        x = np.concatenate(inputs)
        checks.close("joined Grams", joined, {"w": torch.from_numpy(x.T @ x)}, 4, 1e-14)

    rest = parts[2:]
    for what, tensors, metadata, words in (
        ("another kind", {"w": torch.eye(20, dtype=torch.float64)}, statistics("expected_fisher", 3), ["part1", "part0", "kinds"]),
        ("another shape", {"w": torch.eye(21, dtype=torch.float64)}, statistics("gram", 3), ["'w'", "[21, 21]"]),
        ("another tensor", {"v": torch.eye(20, dtype=torch.float64)}, statistics("gram", 3), ["different tensors"]),
        ("no schema", {"w": torch.eye(20, dtype=torch.float64)}, {}, ["part0", "taskvec.statistics.1"]),
        ("NaN", {"w": torch.full((20, 20), float("nan"), dtype=torch.float64)}, statistics("gram", 3), ["part0", "NaN"]),
        ("no square", {"w": torch.zeros(20, 19, dtype=torch.float64)}, statistics("gram", 3), ["part0", "square"]),
        ("asymmetrical", {"w": torch.triu(torch.ones(20, 20, dtype=torch.float64))}, statistics("gram", 3), ["part0", "symmetric"]),
    ):
        save(folder / names[0], tensors, metadata)
        checks.refuses(f"joining {what}", words, "combine-statistics", *parts[:2], *rest, "--out", folder / "never.safetensors")
        if (folder / "never.safetensors").exists():
            checks.failures.append(f"joining {what}: a file was left")
    whole = (folder / names[1]).read_bytes()
    (folder / names[0]).write_bytes(whole[: len(whole) // 2])
    checks.refuses("joining a truncated file", ["part0"], "combine-statistics", *parts, "--out", folder / "never.safetensors")


def check_sweep(checks, folder):
    """A sweep scored by Python, cut short once; its best is what the definition says."""
    rng = np.random.default_rng(6)
    base = {"w": torch.from_numpy(rng.normal(size=(40, 30))).float()}
    tasks = [{"w": (base["w"] + torch.from_numpy(rng.normal(size=(40, 30))).float() * 0.5)} for _ in range(3)]
    goal = definition.task_arithmetic(base, tasks, [1, 1, 1], 0.35)
    folder = folder / "with a space"
    folder.mkdir()
    for name, model in (("base", base), ("x", tasks[0]), ("y", tasks[1]), ("z", tasks[2]), ("goal", goal)):
        save(folder / f"{name}.safetensors", model, {})
    script = folder / "score.py"
    script.write_text("import sys\nfrom safetensors.torch import load_file\n"
                      "a, b = load_file(sys.argv[1]), load_file(sys.argv[2])\nprint('distance:', float((a['w'] - b['w']).double().norm()))\n")
    import sys

    score = f"'{sys.executable}' '{script}' {{}} '{folder / 'goal.safetensors'}'"
    sweep = ["sweep", "--base", folder / "base.safetensors", *[part for name in "xyz" for part in ("--task", folder / f"{name}.safetensors")],
             "--lambdas", "0.2:0.5:0.05", "--minimize", "--csv", folder / "scores.csv", "--out", folder / "best.safetensors", "--scratch", folder]
    checks.refuses("a sweep whose command gives out", ["lambda=0.3"], *sweep, "--score", f"test $TASKVEC_LAMBDA != 0.3 && {score}")
    with open(folder / "scores.csv", newline="") as file:
        begun = list(csv.reader(file))
    checks.count += 1
    if [row[0] for row in begun] != ["lambda", "0.2", "0.25"]:
        checks.failures.append(f"the table of a sweep cut short: {begun}")
    if checks.run(*sweep, "--score", score, "--jobs", 2):
        checks.equal("a sweep's best", folder / "best.safetensors", goal)
        with open(folder / "scores.csv", newline="") as file:
            rows = list(csv.reader(file))
        checks.count += 1
        expected = []
        for step in range(7):
            model = definition.task_arithmetic(base, tasks, [1, 1, 1], round(0.2 + 0.05 * step, 12))
            expected.append(float((model["w"] - goal["w"]).double().norm()))
        found = [float(row[1]) for row in rows[1:]]
        if rows[:3] != begun or [row[0] for row in rows[1:]] != ["0.2", "0.25", "0.3", "0.35", "0.4", "0.45", "0.5"] or not np.allclose(found, expected, rtol=1e-12):
            checks.failures.append(f"the table of a sweep: {rows}; expected {expected}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", required=True)
    parser.add_argument("--data", type=pathlib.Path)
    arguments = parser.parse_args()
    checks = DataChecks(arguments.tool)
    torch.set_num_threads(1)
    for label, kinds in {"f32": ["f32"], "bf16": ["bf16"], "mixed": ["bf16", "f32", "f64", "f16"]}.items():
        with tempfile.TemporaryDirectory() as scratch:
            check_merges(checks, label, [KINDS[kind] for kind in kinds], pathlib.Path(scratch))
    with tempfile.TemporaryDirectory() as scratch:
        check_statistics(checks, pathlib.Path(scratch))
        check_sweep(checks, pathlib.Path(scratch))
    if checks.failures:
        raise SystemExit("\n".join(checks.failures))
    print(f"{checks.count} results as the definitions have them")


if __name__ == "__main__":
    main()
