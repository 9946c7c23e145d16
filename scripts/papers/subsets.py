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
    """Scores of linearized models whose task vectors are combined linearly: no network runs."""

    def __init__(self, experiments, seed, way):
        self.x, x = experiments, experiments

        def files():
            for name in x.names:
                yield x.model_of(seed, way, name)

        self.model = linearized.Linearized(x.settings)
        self.found = linearized.directions(x.work / f"seed{seed}" / way / "directions.pt", x.data, self.model, files, x.settings["limits"])

    def head(self, name, embedding):
        return common.SCALE * embedding @ self.x.data.heads[name].T

    def logits(self, weights, name, split, limit=None):
        """`weights`: {task: weight of its task vector}."""
        rows = self.found[name, split]
        embedding = rows[0][:limit].clone()
        for task, weight in weights.items():
            embedding += weight * rows[1 + self.x.names.index(task)][:limit]
        return self.head(name, embedding)

    def labels(self, name, split, limit=None):
        return self.x.torch.tensor(self.x.data.splits[name, split][1][:limit])

    def accuracies(self, weights, names, split, limit=None):
        return {name: float((self.logits(weights, name, split, limit).argmax(1) == self.labels(name, split, limit)).double().mean()) for name in names}

    def loss(self, weights, names, split, limit=None):
        """Mean cross-entropy over the tasks."""
        cross = self.x.torch.nn.functional.cross_entropy
        return sum(float(cross(self.logits(weights, name, split, limit), self.labels(name, split, limit))) for name in names) / len(names)

    def along(self, file, names, split, limit=None):
        """{factor λ: {task: accuracy}} as a function, of the base plus λ times what the file is away from it: of merges that are not linear in the task
        vectors, but in λ."""
        import safetensors.torch
        self.model.load_state_dict(safetensors.torch.load_file(file))
        parts = {name: linearized.along(self.x.data, self.model, name, split, limit) for name in names}

        def at(factor):
            return {name: float((self.head(name, value + factor * tangent).argmax(1) == self.labels(name, split, limit)).double().mean())
                    for name, (value, tangent) in parts.items()}
        return at


def measure(x, seed, count, share):
    """The first `count` rounds, or all that there are: every Nth from the Kth on."""
    first, step = share
    with x.narrowed(x.settings["subset_limits"]):
        for way in x.merging:  # what the scores are divided by, of the same texts
            x.once(f"seed{seed}/{way}/subset single", lambda: x.singles(seed, way))
        for names in rounds(x.names, seed)[:count][first::step]:
            for subset in names:
                for way in x.merging:
                    for method in x.settings["subset_methods"]:
                        key = f"seed{seed}/{way}/subset/{method}/{'+'.join(subset)}"
                        if way in x.LINEAR:
                            x.once(key, lambda: x.derived(seed, way, method, list(subset)))
                        else:
                            x.merge(key, seed, way, method, list(subset))


def check(x, seed):
    """How far the combined scores are from those of merges that the tool wrote, of the ways that are linear."""
    for way in x.merging:
        if way in x.LINEAR:
            def measured():
                every = x.results[f"seed{seed}/{way}/merge/average"]["test"]
                found = x.combined(seed, way).accuracies(dict.fromkeys(x.names, 1 / len(x.names)), x.names, "test")
                return max(abs(found[name] - every[name]) for name in x.names)
            x.once(f"seed{seed}/{way}/combined against merged", measured)
