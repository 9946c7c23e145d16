"""Makes tests/data/merge: golden merges by mergekit and PEFT themselves, and by restatements of ties-merging and of the definitions."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import importlib.metadata
import pathlib

import numpy as np
import torch

import definition
from common import Goldens, by_name, equal_values, largest_difference, narrow, wide

SHAPES = {"decoder.weight": (7, 9), "encoder.0.bias": (11,), "encoder.1.weight": (2, 3, 4), "scale": ()}
UNIT = [1.0, 1.0, 1.0]
DYADIC = [0.5, 1.0, 0.25]
DECIMAL = [0.3, 0.7, 1.1]


def split(flat, dtype=np.float32):
    model, offset = {}, 0
    for name in by_name(SHAPES):
        size = int(np.prod(SHAPES[name]))
        model[name] = flat[offset : offset + size].reshape(SHAPES[name]).astype(dtype)
        offset += size
    return model


SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())


def grid(seed, tilt, tasks=3):
    """Base and task vectors on binary grids: differences are exact, magnitudes distinct within a task, and many sums over
    tasks are exactly zero. `tilt` > 0.5 makes positive entries the majority."""
    rng = np.random.default_rng(seed)
    base = rng.integers(-128, 129, SIZE) / 64
    zeros = rng.permutation(SIZE)[: SIZE // 5]
    rest = np.setdiff1d(np.arange(SIZE), zeros)
    vectors = []
    for task in range(tasks):
        magnitude = np.zeros(SIZE)
        # Large magnitudes go where the first two tasks cancel, so that trimming keeps them.
        large, small = rng.permutation(np.arange(SIZE - zeros.size + 1, SIZE + 1)), rng.permutation(np.arange(1, SIZE - zeros.size + 1))
        magnitude[rest] = small
        magnitude[zeros] = large
        sign = np.where(rng.random(SIZE) < tilt, 1.0, -1.0)
        if task == 1:
            magnitude[zeros], sign[zeros] = np.abs(vectors[0][zeros]) * 1024, -np.sign(vectors[0][zeros])
        if task >= 2:
            magnitude[zeros] = 0
        vectors.append(sign * magnitude / 1024)
    return base, vectors


def coarse(seed, tilt=0.5, tasks=3):
    """Nine distinct values: ties in magnitude everywhere, and zero sums."""
    rng = np.random.default_rng(seed)
    base = rng.integers(-16, 17, SIZE) / 8
    return base, [rng.choice(np.arange(-4, 5), SIZE, p=np.r_[np.full(4, (1 - tilt) / 4 * 0.9), 0.1, np.full(4, tilt / 4 * 0.9)]) / 8 for _ in range(tasks)]


def smooth(seed, tasks=3, step=0.05):
    """Ordinary floats: every operation rounds."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=SIZE), [rng.normal(size=SIZE) * step for _ in range(tasks)]


def models(source, dtypes):
    """Torch models from (base, vectors); dtypes: one for all or {name: dtype}."""
    base, vectors = source
    pick = (lambda name: dtypes[name]) if isinstance(dtypes, dict) else (lambda name: dtypes)

    def convert(flat):
        return {
            name: (torch.from_numpy(np.array(value)) if pick(name) == torch.float64 else narrow(value.astype(np.float32), pick(name)))
            for name, value in split(flat, np.float64).items()
        }

    return convert(base), [convert(base + vector) for vector in vectors]


def zero_base(source, dtype=torch.float32):
    _, vectors = source
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}, [
        {name: narrow(value, dtype) for name, value in split(vector).items()} for vector in vectors
    ]


def require_no_ties(base, tasks, densities, scope):
    for task in tasks:
        for density in densities:
            assert not definition.tied_at_threshold(definition.task_vector(base, task), density, scope), (density, scope)


def without_ties(make, densities, scope):
    """make(seed) for the first seed at which no threshold is tied."""
    for seed in range(1000):
        base, tasks = make(seed)
        if not any(definition.tied_at_threshold(definition.task_vector(base, task), density, scope) for task in tasks for density in densities):
            return base, tasks
    raise SystemExit("no seed without ties at the threshold")


def prefixed(model, prefix):
    return {f"{prefix}/{name}": value for name, value in model.items()}


def agreement(case, expected, defined, exact_wanted=True, tolerance=0.0):
    """Checks what is claimed about peer and definition, and says how far they are apart."""
    same = all(equal_values(expected[name], defined[name]) for name in expected)
    apart = max(largest_difference(expected[name], defined[name]) for name in expected)
    print(f"  {case:58s} {'equal' if same else f'apart by {apart:.2e}'}")
    if exact_wanted and not same:
        raise SystemExit(f"{case}: the peer and the definition's preset disagree, by {apart:.3e}")
    if not exact_wanted and tolerance and apart > tolerance:
        raise SystemExit(f"{case}: the peer is {apart:.3e} from the definition; expected at most {tolerance:.1e}")


# ---------------------------------------------------------------- mergekit


def mergekit_goldens(path):
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    def run(method, base, tasks, shared=None, per_task=None, dtype=None, out_dtype=None, per_input=None):
        result = {}
        names = by_name(tasks[0])
        groups = []
        for name in names:
            tensors = ([base[name]] if base is not None else []) + [task[name] for task in tasks]
            groups.append(TensorGroup.from_tensors(tensors, base_index=0 if base is not None else None, name=name))
        parameters = dict(shared or {})
        first = 1 if base is not None else 0
        for key, values in (per_task or {}).items():
            parameters[key] = {first + index: value for index, value in enumerate(values)}
        outputs = registry.get(method)(groups, parameters=parameters, dtype=dtype, out_dtype=out_dtype)
        for name, output in zip(names, outputs):
            result[name] = output
        return result

    goldens = Goldens()
    groups = {
        "grid": models(grid(11, 0.6), torch.float32),
        "smooth": models(smooth(12), torch.float32),
        "smooth_bf16": without_ties(lambda seed: models(smooth(seed, step=0.5), torch.bfloat16), (0.5, 0.2), "tensor"),
    }
    for name, (base, tasks) in groups.items():
        goldens.group(name, base, tasks)

    weight_sets = {"unit": UNIT, "dyadic": DYADIC, "decimal": DECIMAL, "negative": [1.0, -0.5, 0.75]}
    for group in ("grid", "smooth"):
        base, tasks = groups[group]
        for density in (1.0, 0.5, 0.2, 0.01):
            require_no_ties(base, tasks, [density], "tensor")
            for label, weights in weight_sets.items():
                if density in (1.0, 0.01) and label not in ("unit", "negative"):
                    continue
                lam = 0.4 if label == "dyadic" else 1.0
                merged = run("ties", base, tasks, {"lambda": lam}, {"weight": weights, "density": [density] * 3})
                case = f"ties_{group}_{density:g}_{label}"
                agreement(case, merged, definition.ties(base, tasks, weights, density, lam, **definition.AS_IN_MERGEKIT))
                goldens.case(case, group, "ties", {"preset": "mergekit", "density": density, "weights": weights, "lambda": lam}, prefixed(merged, "expected"))
        merged = run("ties", base, tasks, {"normalize": False}, {"weight": DYADIC, "density": [0.5] * 3})
        agreement(f"ties_{group}_sum", merged, definition.ties(base, tasks, DYADIC, 0.5, 1.0, **definition.AS_IN_MERGEKIT, merge="sum"))
        goldens.case(f"ties_{group}_sum", group, "ties", {"preset": "mergekit", "density": 0.5, "weights": DYADIC, "lambda": 1.0, "merge": "sum"},
                     prefixed(merged, "expected"), note="normalize: false in mergekit")
        for label, weights in weight_sets.items():
            lam = 0.3 if label == "unit" else 1.0
            merged = run("task_arithmetic", base, tasks, {"lambda": lam}, {"weight": weights})
            agreement(f"task_arithmetic_{group}_{label}", merged, definition.task_arithmetic(base, tasks, weights, lam))
            goldens.case(f"task_arithmetic_{group}_{label}", group, "task_arithmetic", {"weights": weights, "lambda": lam}, prefixed(merged, "expected"))
        for label in ("unit", "dyadic", "decimal"):
            merged = run("linear", None, tasks, {}, {"weight": weight_sets[label]})
            agreement(f"average_{group}_{label}", merged, definition.average(tasks, weight_sets[label]), exact_wanted=False, tolerance=2e-7)
            goldens.case(f"average_{group}_{label}", group, "average", {"weights": weight_sets[label]}, prefixed(merged, "expected"), "tolerance", 2e-7,
                         "mergekit's linear; addcmul may fuse")

    # bf16: computed in f32 and rounded once (mergekit's dtype: float32, out_dtype: bfloat16) it agrees; in bf16 throughout it cannot.
    base, tasks = groups["smooth_bf16"]
    for density in (0.5, 0.2):
        require_no_ties(base, tasks, [density], "tensor")
        for label in ("unit", "decimal"):
            weights = weight_sets[label]
            options = {"preset": "mergekit", "density": density, "weights": weights, "lambda": 1.0}
            merged = run("ties", base, tasks, {}, {"weight": weights, "density": [density] * 3}, torch.float32, torch.bfloat16)
            case = f"ties_bf16_in_f32_{density:g}_{label}"
            agreement(case, merged, definition.ties(base, tasks, weights, density, 1.0, **definition.AS_IN_MERGEKIT))
            goldens.case(case, "smooth_bf16", "ties", options, prefixed(merged, "expected"), note="mergekit with dtype float32, out_dtype bfloat16")
    merged = run("task_arithmetic", base, tasks, {"lambda": 0.3}, {"weight": DECIMAL}, torch.float32, torch.bfloat16)
    agreement("task_arithmetic_bf16_in_f32", merged, definition.task_arithmetic(base, tasks, DECIMAL, 0.3))
    goldens.case("task_arithmetic_bf16_in_f32", "smooth_bf16", "task_arithmetic", {"weights": DECIMAL, "lambda": 0.3}, prefixed(merged, "expected"),
                 note="mergekit with dtype float32, out_dtype bfloat16")
    merged = run("task_arithmetic", base, tasks, {"lambda": 0.3}, {"weight": DECIMAL})
    agreement("task_arithmetic_bf16_throughout", merged, definition.task_arithmetic(base, tasks, DECIMAL, 0.3), exact_wanted=False, tolerance=2e-2)
    goldens.case("task_arithmetic_bf16_throughout", "smooth_bf16", "task_arithmetic", {"weights": DECIMAL, "lambda": 0.3}, prefixed(merged, "expected"),
                 "tolerance", 2e-2, "mergekit's default: every step rounds to bf16")

    # SLERP and Model Stock: f64 in the definition, so to a tolerance.
    base, tasks = groups["smooth"]
    opposed = {name: -value + 0.25 * tasks[2][name] for name, value in base.items()}
    close = {name: value * (1 + 2.0**-10) + 2.0**-12 for name, value in base.items()}
    far = {name: tasks[2][name].flatten().flip(0).reshape(SHAPES[name]) * 1.5 for name in base}
    zero = {name: torch.zeros_like(value) for name, value in base.items()}
    for label, other in {"near": tasks[1], "far": far, "opposed": opposed, "collinear": close}.items():
        goldens.group(f"slerp_{label}", base, [other])
        for t in (0.0, 0.25, 0.5, 1.0):
            if t in (0.0, 1.0) and label != "far":
                continue
            merged = run("slerp", base, [other], {"t": t})
            agreement(f"slerp_{label}_{t:g}", merged, definition.slerp(base, other, t), exact_wanted=False, tolerance=4e-6)
            goldens.case(f"slerp_{label}_{t:g}", f"slerp_{label}", "slerp", {"t": t}, prefixed(merged, "expected"), "tolerance", 4e-6)
    goldens.group("slerp_zero", base, [zero])
    merged, defined = run("slerp", base, [zero], {"t": 0.25}), definition.slerp(base, zero, 0.25)
    agreement("slerp_zero_0.25", merged, defined, exact_wanted=False)
    goldens.case("slerp_zero_0.25", "slerp_zero", "slerp", {"t": 0.25}, {**prefixed(defined, "expected"), **prefixed(merged, "peer")}, "tolerance", 1e-6,
                 "a zero norm: mergekit takes the angle as a right one, the definition interpolates linearly; expected is the definition's")

    aligned_source = smooth(17)
    common = np.random.default_rng(18).normal(size=SIZE) * 0.1
    aligned = models((aligned_source[0], [vector + common for vector in aligned_source[1]]), torch.float32)
    goldens.group("aligned", *aligned)
    for label, (base, tasks) in {"aligned": aligned, "smooth": groups["smooth"]}.items():
        merged = run("model_stock", base, tasks)
        defined = definition.model_stock(base, tasks, clamp=False)
        agreement(f"model_stock_{label}_unclamped", merged, defined, exact_wanted=False, tolerance=4e-6)
        goldens.case(f"model_stock_{label}_unclamped", label, "model_stock", {"clamp": False}, prefixed(merged, "expected"), "tolerance", 4e-6)
        clamped = definition.model_stock(base, tasks, clamp=True)
        agreement(f"model_stock_{label}_clamped", clamped, merged, exact_wanted=False)
        goldens.case(f"model_stock_{label}_clamped", label, "model_stock", {"clamp": True}, prefixed(clamped, "expected"), "tolerance", 4e-6,
                     "the definition's clamp of t to [0, 1], which mergekit has not")

    # Angles of rows and of columns: some rows are zeros, and none are nearly opposite, where an angle in f32 has no digits.
    start, vectors = smooth(19, tasks=2)
    vectors = [np.abs(vector) for vector in vectors]
    vectors[0][18:27] = 0
    acute = models((start, vectors), torch.float32)
    goldens.group("acute", *acute)
    flags = {"tensors": {}, "rows": {"nuslerp_flatten": False}, "columns": {"nuslerp_flatten": False, "nuslerp_row_wise": True}}
    for angles, shared in flags.items():
        for label, weights in {"unit": [1.0, 1.0], "decimal": [0.3, 0.9]}.items():
            merged = run("nuslerp", *acute, shared, {"weight": weights})
            agreement(f"nuslerp_{angles}_{label}", merged, definition.nuslerp(*acute, weights, angles), exact_wanted=False, tolerance=4e-6)
            goldens.case(f"nuslerp_{angles}_{label}", "acute", "nuslerp", {"angles": angles, "weights": weights}, prefixed(merged, "expected"), "tolerance", 4e-6)
    for label, (base, tasks) in {"acute": acute, "aligned": aligned}.items():
        merged = run("model_stock", base, tasks, {"filter_wise": True})
        agreement(f"model_stock_rows_{label}", merged, definition.model_stock_of_rows(base, tasks), exact_wanted=False, tolerance=1e-5)
        goldens.case(f"model_stock_rows_{label}", label, "model_stock_rows", {"clamp": False}, prefixed(merged, "expected"), "tolerance", 1e-5)
    goldens.write(path, f"mergekit {importlib.metadata.version('mergekit')}, torch {torch.__version__.split('+')[0]}")


# ---------------------------------------------------------------- PEFT


def peft_goldens(path):
    from peft.utils import merge_utils

    goldens = Goldens()
    groups = {"grid": zero_base(grid(21, 0.6)), "smooth": zero_base(smooth(22))}
    for name, (base, tasks) in groups.items():
        goldens.group(name, base, tasks)

    weight_sets = {"unit": UNIT, "dyadic": DYADIC, "decimal": DECIMAL, "negative": [1.0, -0.5, 0.75]}
    for group, (base, tasks) in groups.items():

        def each(function):
            return {name: function([task[name] for task in tasks]) for name in by_name(base)}

        for label, weights in weight_sets.items():
            tensor_weights = torch.tensor(weights)
            merged = each(lambda vectors: merge_utils.task_arithmetic(vectors, tensor_weights))
            agreement(f"task_arithmetic_{group}_{label}", merged, definition.task_arithmetic(base, tasks, weights, 1.0))
            goldens.case(f"task_arithmetic_{group}_{label}", group, "task_arithmetic", {"weights": weights, "lambda": 1.0}, prefixed(merged, "expected"))
            # PEFT keeps int(density n) entries, none at all below one: here every density keeps at least one entry of
            # each tensor but the one-element ones, which are left out.
            for density in (1.0, 0.5, 0.2):
                if density == 1.0 and label in ("dyadic", "decimal"):
                    continue
                names = [name for name in base if density * base[name].numel() >= 1]
                some = ({n: base[n] for n in names}, [{n: task[n] for n in names} for task in tasks])
                require_no_ties(*some, [density], "tensor")
                for election in ("total", "frequency") if density == 0.5 else ("total",):
                    merged = {n: merge_utils.ties([t[n] for t in tasks], tensor_weights, density, election) for n in names}
                    case = f"ties_{election}_{group}_{density:g}_{label}"
                    options = {**definition.AS_IN_PEFT, "election": "unweighted" if election == "total" else "frequency"}
                    agreement(case, merged, definition.ties(*some, weights, density, 1.0, **options))
                    goldens.case(case, group, "ties", {"preset": "peft", "election": election, "density": density, "weights": weights, "lambda": 1.0},
                                 prefixed(merged, "expected"))
                if density == 0.5 and label in ("decimal", "negative"):
                    merged = {n: merge_utils.magnitude_prune([t[n] for t in tasks], tensor_weights, density) for n in names}
                    case = f"magnitude_prune_{group}_{density:g}_{label}"
                    pruned = [definition.trim({n: wide(t[n]) for n in names}, density, "tensor") for t in tasks]
                    total = {n: definition.ordered_sum([p[n] * np.float32(w) for p, w in zip(pruned, weights)]) for n in names}
                    agreement(case, merged, definition.add(some[0], total, 1.0))
                    goldens.case(case, group, "magnitude_prune", {"density": density, "weights": weights}, prefixed(merged, "expected"))
    goldens.write(path, f"peft {importlib.metadata.version('peft')}, torch {torch.__version__.split('+')[0]}")


# ---------------------------------------------------------------- ties-merging


def ties_merging(base, tasks, density, merge, lam):
    """The behaviour of the TIES paper's published code, restated with torch: flat vectors over the whole model."""
    names = by_name(base)
    flat = torch.stack([torch.cat([(task[n].float() - base[n].float()).reshape(-1) for n in names]) for task in tasks])
    size = flat.shape[1]
    below = size - int(density * size)
    if below > 0:
        threshold = torch.stack([row.abs().kthvalue(below).values for row in flat])[:, None]
        flat = flat * (flat.abs() >= threshold)
    elected = torch.sign(flat.sum(0))
    elected[elected == 0] = torch.sign(elected.sum())
    selected = torch.where(torch.where(elected[None] > 0, flat > 0, flat < 0), flat, 0)
    if merge == "mean":
        merged = selected.sum(0) / (selected != 0).sum(0).float().clamp(min=1)
    elif merge == "sum":
        merged = selected.sum(0)
    else:
        merged = selected.abs().max(0).values * elected
    result, offset = {}, 0
    for n in names:
        part = merged[offset : offset + base[n].numel()].reshape(base[n].shape)
        result[n] = (base[n].float() + lam * part).to(base[n].dtype)
        offset += base[n].numel()
    return result


def balanced():
    """Hand-made: exact zero sums, and as many positive as negative elected signs, so that the majority itself is zero."""
    base = np.zeros(SIZE)
    first, second, third = np.zeros(SIZE), np.zeros(SIZE), np.zeros(SIZE)
    first[0:4] = 1, -1, 2, 3
    second[0:4] = 1, -1, -2, -3
    third[4:6] = 4, -4
    return base, [first, second, third]


def ties_merging_goldens(path):
    goldens = Goldens()
    groups = {
        "grid_positive": models(grid(31, 0.65), torch.float32),
        "grid_negative": models(grid(32, 0.35), torch.float32),
        "coarse_positive": models(coarse(33, 0.6), torch.float32),
        "coarse_negative": models(coarse(34, 0.4), torch.float32),
        "balanced": models(balanced(), torch.float32),
        "smooth": models(smooth(35), torch.float32),
        "coarse_bf16": models(coarse(36, 0.55), torch.bfloat16),
    }
    for group, (base, tasks) in groups.items():
        goldens.group(group, base, tasks)
        for density in (1.0, 0.5, 0.2, 0.001):
            for merge in ("mean", "sum", "max") if density == 0.5 or group == "balanced" else ("mean",):
                if group == "balanced" and density != 1.0:
                    continue
                lam = 0.7 if density == 0.5 else 1.0
                merged = ties_merging(base, tasks, density, merge, lam)
                case = f"{merge}_{group}_{density:g}"
                agreement(case, merged, definition.ties(base, tasks, UNIT, density, lam, merge=merge, **definition.AS_IN_TIES_MERGING))
                goldens.case(case, group, "ties", {"preset": "ties-merging", "density": density, "weights": UNIT, "lambda": lam, "merge": merge},
                             prefixed(merged, "expected"))
    goldens.write(path, "a restatement of ties-merging's documented behaviour")


# ---------------------------------------------------------------- the definitions themselves


def definition_goldens(path):
    goldens = Goldens()
    kinds = {"decoder.weight": torch.bfloat16, "encoder.0.bias": torch.float64, "encoder.1.weight": torch.float16, "scale": torch.float32}
    groups = {
        "grid": models(grid(41, 0.4), torch.float32),
        "coarse": models(coarse(42, 0.6), torch.float32),
        "balanced": models(balanced(), torch.float32),
        "smooth": models(smooth(43), torch.float32),
        "smooth_bf16": models(smooth(44, step=0.5), torch.bfloat16),
        "coarse_bf16": models(coarse(45, 0.45), torch.bfloat16),
        "smooth_f16": models(smooth(46), torch.float16),
        "smooth_f64": models(smooth(47), torch.float64),
        "mixed": models(coarse(48, 0.4), kinds),
    }
    for group, (base, tasks) in groups.items():
        goldens.group(group, base, tasks)

    def ties_case(group, scope, merge, zero_sign, density, weights, lam):
        base, tasks = groups[group]
        label = {1.0: "unit", 0.5: "dyadic", 0.3: "decimal"}[weights[0]]
        merged = definition.ties(base, tasks, weights, density, lam, scope=scope, merge=merge, zero_sign=zero_sign)
        goldens.case(f"ties_{group}_{scope}_{merge}_{zero_sign}_{density:g}_{label}", group, "ties",
                     {"preset": "paper", "scope": scope, "merge": merge, "zero_sign": zero_sign, "density": density, "weights": weights, "lambda": lam},
                     prefixed(merged, "expected"))

    for scope in ("model", "tensor"):
        for merge in ("mean", "sum", "max"):
            for zero_sign in ("majority", "positive", "none"):
                ties_case("grid" if scope == "tensor" else "coarse", scope, merge, zero_sign, 0.5, UNIT, 1.0)
                # Which product `max` takes under weights is not among the definitions, so its weights stay 1.
                if merge != "max" and zero_sign == "majority":
                    ties_case("coarse" if scope == "tensor" else "grid", scope, merge, zero_sign, 0.2, DYADIC, 0.6)
        for group in groups:
            if group != "grid":
                ties_case(group, scope, "mean", "majority", 0.3, DECIMAL, 1.0)
        ties_case("coarse", scope, "mean", "majority", 0.01, UNIT, 1.0)
        ties_case("balanced", scope, "mean", "majority", 1.0, UNIT, 1.0)
        ties_case("smooth", scope, "mean", "majority", 1.0, DECIMAL, 0.8)
        ties_case("mixed", scope, "sum", "positive", 1.0, UNIT, 1.0)

    for group, (base, tasks) in groups.items():
        for label, weights, lam in (("unit", UNIT, 0.3), ("forget", [1.1, 0.0, -0.3], -0.7)):
            if label == "forget" and not group.startswith(("smooth", "mixed")):
                continue
            goldens.case(f"task_arithmetic_{group}_{label}", group, "task_arithmetic", {"weights": weights, "lambda": lam},
                         prefixed(definition.task_arithmetic(base, tasks, weights, lam), "expected"))
        for label, weights in (("unit", UNIT), ("dyadic", DYADIC)) if group.startswith(("smooth", "mixed")) else ():
            goldens.case(f"average_{group}_{label}", group, "average", {"weights": weights}, prefixed(definition.average(tasks, weights), "expected"))
        for scope in ("model", "tensor"):
            for density in (0.1, 0.4) if group in ("coarse", "mixed") else (0.1,):
                delta = definition.pruned_delta(base, tasks[0], density, scope)
                goldens.case(f"post_pruning_{group}_{scope}_{density:g}", group, "post_pruning",
                             {"density": density, "scope": scope, "kept": sum(int((value != 0).sum()) for value in delta.values())},
                             {**prefixed({n: torch.from_numpy(np.array(v)) for n, v in delta.items()}, "delta"), **prefixed(definition.add(base, delta, 1.0), "expected")})
    for group in ("coarse", "smooth_bf16", "mixed"):
        base, tasks = groups[group]
        for method, merged in (
            ("task_arithmetic", definition.task_arithmetic(base, tasks, UNIT, 0.3)),
            ("ties", definition.ties(base, tasks, UNIT, 0.2, 1.0)),
        ):
            outputs, kept = prefixed(merged, "expected/merged"), []
            for index, task in enumerate(tasks):
                delta = definition.pruned_delta(merged, task, 0.1)
                kept.append(sum(int((value != 0).sum()) for value in delta.values()))
                outputs |= prefixed(definition.add(merged, delta, 1.0), f"expected/task{index}")
            options = {"merge": method, "weights": UNIT, "lambda": 0.3} if method == "task_arithmetic" else {
                "merge": method, "weights": UNIT, "lambda": 1.0, "merge_density": 0.2}
            goldens.case(f"peru_fft_{group}_{method}", group, "peru_fft", {**options, "density": 0.1, "scope": "model", "kept": kept}, outputs)
    goldens.write(path, "a NumPy restatement of the documented definitions (scripts/peers/definition.py)")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out / "merge"
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, make in {"mergekit": mergekit_goldens, "peft": peft_goldens, "ties_merging": ties_merging_goldens, "definition": definition_goldens}.items():
        print(name)
        make(out / f"{name}.safetensors")


if __name__ == "__main__":
    main()
