# SPDX-License-Identifier: Apache-2.0
"""The second paper's question of how many tasks a merge takes: subsets of the tasks, merged in every way and scored on all tasks."""
import itertools
import random

import common
import linearized


def rounds(names, seed):
    """Every subset of two tasks and more, once: each round has one of each size as long as there are any, so that a run that is cut off has measured
    all sizes alike. The same for all ways and methods."""
    draws, of_size = random.Random(seed), {}
    for size in range(2, len(names) + 1):
        of_size[size] = list(itertools.combinations(names, size))
        draws.shuffle(of_size[size])
    longest = max(map(len, of_size.values()))
    return [[of_size[size][place] for size in of_size if place < len(of_size[size])] for place in range(longest)]


class Combined:
    """Scores of fully linearized models whose task vectors are combined linearly: no network runs."""

    def __init__(self, experiments, seed):
        self.x = experiments
        work = experiments.work / f"seed{seed}" / "linearized"
        files = [work / name / "model.safetensors" for name in experiments.names]
        limits = experiments.settings["limits"]
        self.found = linearized.directions(work, experiments.data, linearized.Linearized(experiments.settings), files, limits)

    def logits(self, weights, name, split, limit=None):
        """`weights`: {task: weight of its task vector}."""
        rows = self.found[name, split]
        embedding = rows[0][:limit].clone()
        for task, weight in weights.items():
            embedding += weight * rows[1 + self.x.names.index(task)][:limit]
        return common.SCALE * embedding @ self.x.data.heads[name].T

    def accuracies(self, weights, names, split, limit=None):
        result = {}
        for name in names:
            found, labels = self.logits(weights, name, split, limit).argmax(1), self.x.data.splits[name, split][1][:limit]
            result[name] = float((found == self.x.torch.tensor(labels)[:len(found)]).double().mean())
        return result

    def merged(self, method, names, lambdas, limits):
        points = [1 / len(names)] if method == "average" else lambdas
        best, score = points[0], -1.0
        for value in points if len(points) > 1 else []:
            found = self.accuracies(dict.fromkeys(names, value), names, "validation", limits["validation"])
            if sum(found.values()) > score:
                best, score = value, sum(found.values())
        return {"chosen": {"lambda": best} if method != "average" else {},
                "test": self.accuracies(dict.fromkeys(names, best), self.x.names, "test", limits["test"])}


def measure(x, seed, count):
    """The first `count` rounds, or all that there are."""
    limits, ways = x.settings["subset_limits"], x.merging
    combined = None

    def narrowed():
        return x.narrowed({"lambdas": x.settings["subset_lambdas"], "ties": x.settings["subset_ties"]}, limits)

    for names in rounds(x.names, seed)[:count]:
        for subset in names:
            for way in ways:
                for method in x.settings["subset_methods"]:
                    key = f"seed{seed}/{way}/subset/{method}/{'+'.join(subset)}"
                    if key in x.results or (way == "linearized" and method not in ("average", "task-arithmetic")):
                        continue
                    if way == "linearized":
                        combined = combined or Combined(x, seed)
                        lambdas = x.numbers(x.settings["lambdas"])
                        x.once(key, lambda: combined.merged(method, subset, lambdas, limits))
                    else:
                        with narrowed():
                            x.merge(key, seed, way, method, list(subset))
    for way in ways:  # what the scores are divided by, of the same texts
        with narrowed():
            x.once(f"seed{seed}/{way}/subset single", lambda: x.singles(seed, way))


def check(x, seed):
    """How far the combined scores are from those of merges that the tool wrote."""
    def measured():
        combined, every = Combined(x, seed), x.results[f"seed{seed}/linearized/merge/average"]["test"]
        found = combined.accuracies(dict.fromkeys(x.names, 1 / len(x.names)), x.names, "test")
        return max(abs(found[name] - every[name]) for name in x.names)
    return x.once(f"seed{seed}/linearized/combined against merged", measured)
