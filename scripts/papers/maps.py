# SPDX-License-Identifier: Apache-2.0
"""What the papers draw: loss planes and disentanglement of pairs of tasks, embeddings in the plane, and the error that truncation leaves."""
import json
import math
import shutil
import sys


def point_of(x, seed, way, weights):
    """The model at the base plus weighted task vectors, in the space of what the way trains, written by the tool: a file."""
    out, phi, plain = x.scratch / "point.safetensors", x.scratch / "point", x.scratch / "folded"
    some = {name: weight for name, weight in weights.items() if weight != 0}
    if not some:
        return x.base  # as B0 = 0, adapters as they were initialised change nothing
    if way == "full":
        words = [word for name, weight in some.items() for word in ("--task", f"{x.named(seed, way, name)}={weight}")]
        x.run("merge", "--method", "task-arithmetic", "--lambda", 1, "--base", x.base, *words, "--out", out)
        return out
    init = x.init(seed, way)
    words = [word for name, weight in some.items() for word in ("--adapter", f"{x.tuned(seed, way, name)}={weight}")]
    x.run("merge-lora", "--space", "phi", "--method", "linear", "--init", init, *words, "--out", phi)
    if way == "llora16":
        x.run("fold-llora", "--init", init, "--adapter", phi, "--out", plain)
        shutil.rmtree(phi)
        phi = plain
    out = x.fused(phi)
    shutil.rmtree(phi)
    return out


def plane(x, seed, way, pair):
    """Over the plane of two task vectors: both tasks' mean cross-entropy, and the share of predictions that the other task's vector changes."""
    torch, count, grid = x.torch, x.settings["plane_texts"], x.numbers(x.settings["plane_grid"])
    found = {}
    for a in grid:
        for b in grid:
            weights = {pair[0]: a, pair[1]: b}
            if way in x.LINEAR:
                found[a, b] = [x.combined(seed, way).logits(weights, name, "validation", count) for name in pair]
            else:
                x.load(point_of(x, seed, way, weights))
                found[a, b] = [x.data.logits(x.model, name, "validation", count) for name in pair]
    labels = [torch.tensor(x.data.splits[name, "validation"][1][:count]) for name in pair]

    def loss(logits):
        return sum(float(torch.nn.functional.cross_entropy(one, label)) for one, label in zip(logits, labels)) / 2

    def changed(a, b):
        alone = found[a, 0.0][0], found[0.0, b][1]
        return sum(float((one.argmax(1) != other.argmax(1)).double().mean()) for one, other in zip(found[a, b], alone))

    return {"grid": grid, "loss": [[round(loss(found[a, b]), 5) for a in grid] for b in grid], "xi": [[round(changed(a, b), 5) for a in grid] for b in grid]}


def planes(x, seed):
    for pair in x.settings["planes"]:
        for way in x.merging:
            x.once(f"seed{seed}/{way}/plane/{'+'.join(pair)}", lambda: plane(x, seed, way, pair))


def embeddings(x, seed):
    """The embeddings of a task's test texts in the plane, by the base, a merged model, PERU-FFT on it, and the task's own: t-SNE of scikit-learn."""
    name, key = x.settings["embedded"], f"seed{seed}/full/embeddings"
    if key in x.results:
        return
    try:
        import numpy
        from sklearn.manifold import TSNE
    except ImportError:
        print(f"{key}: left out, as scikit-learn is not installed", file=sys.stderr)
        return

    def measure():
        delta, served = x.scratch / "delta.safetensors", x.scratch / "served.safetensors"
        merged, _ = x.merged(seed, "full", "task-arithmetic", x.names)
        x.run("prune", "--base", merged, "--task", x.named(seed, "full", name), "--density", 0.1, "--out", delta)
        x.run("apply", "--base", merged, "--delta", delta, "--out", served)
        result = {}
        for words, file in (("Pre-Trained", x.base), ("Task Arithmetic", merged), ("PERU-FFT, m = 10%", served), ("Single-Task", x.named(seed, "full", name))):
            x.load(file)
            rows = [None] * len(x.data.splits[name, "test"][1])
            with x.torch.no_grad():
                for places in x.data.batches(name, "test", 64):
                    for place, row in zip(places, x.data.embed(x.model, name, "test", places)):
                        rows[place] = row.numpy()
            drawn = TSNE(n_components=2, init="pca", perplexity=min(20, (len(rows) - 1) / 3), random_state=seed).fit_transform(numpy.stack(rows))
            result[words] = [[round(float(one), 3) for one in row] for row in drawn]
        return {"task": name, "labels": x.data.splits[name, "test"][1], "points": result}

    x.once(key, measure)


def truncation(x, seed):
    """What is lost of the updates of rank 128 when they are cut to rank q: mean relative error over layers and tasks, and what falls off exponentially."""
    def measure():
        errors, cut, report = {}, x.scratch / "cut", x.scratch / "cut.json"
        for rank in x.settings["error_ranks"]:
            found = []
            for name in x.names:
                x.run("peru-lora", "--adapter", x.tuned(seed, "lora128", name), "--rank", rank, "--out", cut, "--report", report)
                found += [layer["relative_error"] for layer in json.loads(report.read_text())["layers"]]
                shutil.rmtree(cut)
            errors[str(rank)] = sum(found) / len(found)
        return {"errors": errors, **fit([(float(rank), math.log(error)) for rank, error in errors.items() if error > 0])}
    if "lora128" in x.settings["paradigms"]:
        x.once(f"seed{seed}/lora128/truncation", measure)


def fit(points):
    """log error = intercept - decay · q by least squares, and the share of the variance that it explains."""
    n = len(points)
    mean_x, mean_y = sum(one for one, _ in points) / n, sum(one for _, one in points) / n
    slope = sum((a - mean_x) * (b - mean_y) for a, b in points) / sum((a - mean_x) ** 2 for a, _ in points)
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in points)
    return {"decay": -slope, "intercept": mean_y - slope * mean_x, "explained": 1 - rest / sum((b - mean_y) ** 2 for _, b in points)}
