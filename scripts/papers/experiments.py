# SPDX-License-Identifier: Apache-2.0
"""Both papers' experiments on the models that train.py made: merged, pruned and truncated by the taskvec tool, and scored here.

Every result goes to results.json as soon as it is known; what is there is not measured again. Several processes share the work out."""
import argparse
import contextlib
import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import time
import warnings

import common
import linearized
import maps
import subsets


def numbers(grid):
    """0:1:0.1 as a list."""
    first, last, step = (float(word) for word in grid.split(":"))
    return [round(first + step * place, 12) for place in range(int((last - first) / step + 1e-9) + 1)]


WHOLE = ("full", "linearized")  # the ways of which a model is stored; of the others an adapter
PHI = ("lora16", "llora16", "whole16")  # the adapters that are merged in the space of their own parameters
LINEAR = ("whole16", "linearized")  # a score of these follows from the network's derivatives along the task vectors
DARE = "0.5"  # the density that its entries are kept with


def size(*paths):
    """Bytes of models' files and adapters' folders."""
    return sum(one.stat().st_size for path in map(pathlib.Path, paths)
               for one in ([path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.json")]))


class Experiments:
    LINEAR = LINEAR

    def __init__(self, work, settings, tool, share):
        import torch
        self.torch, self.work, self.settings, self.tool, self.share = torch, work, settings, tool, share
        self.data = common.Tasks(work, common.read_json(work / "tasks.json"), settings)
        self.names = self.data.names
        self.merging = [way for way in ("full", "lora16", "llora16", "whole16", "linearized") if way in settings["paradigms"]]
        self.base = work / "base" / "model.safetensors"
        self.plain = self.model = common.upper_layers(common.load_encoder(settings["encoder"]), settings["layers"])
        self.expanded, self.derivatives = None, {}
        self.limits = {"validation": None, "test": None}  # of each task's texts
        self.results = common.Results(work)
        self.scratch = work / f"scratch-{share[0]}"
        self.scratch.mkdir(exist_ok=True)

    # What there is to do it with

    def once(self, key, measure):
        if key not in self.results:
            start = time.time()
            value = measure()
            self.results.add(key, value, time.time() - start)
            value = value.get("test", value) if isinstance(value, dict) else value
            mean = sum(value.values()) / len(value) if isinstance(value, dict) and all(isinstance(one, float) for one in value.values()) else value
            print(f"{key}: {mean if isinstance(mean, float) else str(mean)[:90]}", flush=True)
        return self.results[key]

    def run(self, *words):
        done = subprocess.run([self.tool, *map(str, words), "--threads", "1", "--quiet"], capture_output=True, text=True)
        if done.returncode != 0:
            common.fail(f"'taskvec {shlex.join(map(str, words))}' ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    numbers = staticmethod(numbers)

    @contextlib.contextmanager
    def narrowed(self, limits):
        """For measurements of which there are many: fewer texts."""
        before, self.limits = self.limits, limits
        try:
            yield
        finally:
            self.limits = before

    @contextlib.contextmanager
    def network(self, paradigm):
        """Which function of the parameters is scored: the network, or its linearization."""
        if paradigm in LINEAR:
            self.expanded = self.expanded or linearized.Linearized(self.settings)
            self.model = self.expanded
        try:
            yield
        finally:
            self.model = self.plain

    def combined(self, seed, paradigm):
        if (seed, paradigm) not in self.derivatives:
            self.derivatives[seed, paradigm] = subsets.Combined(self, seed, paradigm)
        return self.derivatives[seed, paradigm]

    def load(self, path):
        import safetensors.torch
        self.model.load_state_dict(safetensors.torch.load_file(path))

    def scores(self, path, names=None, split="test"):
        """{task: accuracy} of a file of the trained layers."""
        self.load(path)
        return {name: self.data.accuracy(self.model, name, split, self.limits[split]) for name in names or self.names}

    def seek(self, score, *words):
        """Runs a verb that scores candidates by `score`, of a candidate's file and its weights where the verb tells them."""
        place = min(self.scratch / "scores", pathlib.Path(os.path.relpath(self.scratch / "scores")), key=lambda path: len(str(path)))  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(place))
            server.listen()
            server.settimeout(0.2)
            command = shlex.join([sys.executable, str(pathlib.Path(__file__).with_name("score.py")), str(place)]) + " {}"
            process = subprocess.Popen([self.tool, *map(str, words), "--score", command, "--scratch", str(self.scratch), "--threads", "1", "--quiet"],
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            while process.poll() is None:
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    file, _, weights = connection.makefile().readline().rstrip("\n").partition("\t")
                    connection.sendall(f"{score(file, [float(one) for one in weights.split(',') if one])}\n".encode())
        place.unlink()
        if process.returncode != 0:
            common.fail(f"'taskvec {words[0]}' ended with {process.returncode}: {process.stderr.read().strip()}")

    # Models and adapters

    def tuned(self, seed, paradigm, name):
        folder = self.work / f"seed{seed}" / paradigm / name
        return folder / "model.safetensors" if paradigm in WHOLE else folder / "adapter"

    def init(self, seed, paradigm):
        return self.work / f"seed{seed}" / paradigm / self.names[0] / "init"

    def tasks(self, seed, paradigm, names):
        """The tasks as options of verbs that take --task."""
        words = []
        for name in names:
            words += ["--task", self.named(seed, paradigm, name)] if paradigm in WHOLE else ["--task-adapter", self.named_adapter(seed, paradigm, name)]
        return words

    def model_of(self, seed, paradigm, name):
        """A file of the trained layers."""
        tuned = self.tuned(seed, paradigm, name)
        return tuned if paradigm in WHOLE else self.fused(tuned)

    def named(self, seed, paradigm, name):
        """A file that is called as its task is."""
        link = self.work / f"seed{seed}" / paradigm / f"{name}.safetensors"
        if not link.exists():
            with contextlib.suppress(FileExistsError):  # made by the other process meanwhile
                link.symlink_to(pathlib.Path(name) / "model.safetensors")
        return link

    def named_adapter(self, seed, paradigm, name):
        folder = self.work / f"seed{seed}" / paradigm / "adapters" / name
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                folder.symlink_to(pathlib.Path("..") / name / "adapter")
        return folder

    def fused(self, adapter):
        out = self.scratch / "fused.safetensors"
        self.run("fuse", "--base", self.base, "--adapter", adapter, "--out", out)
        return out

    # Fine-tuned models by themselves

    def singles(self, seed, paradigm):
        found = {}
        for name in self.names:
            with self.network(paradigm):
                found.update(self.scores(self.model_of(seed, paradigm, name), [name]))
        files = [self.tuned(seed, paradigm, name) for name in self.names]
        return {"test": found, "bytes": size(*files, *([] if paradigm in WHOLE else [self.base]))}

    def cosines(self, seed, paradigm):
        out = self.scratch / "cosines.json"
        self.run("similarity", "--base", self.base, *self.tasks(seed, paradigm, self.names), "--report", out)
        return json.loads(out.read_text())["cosines"]

    def cosines_of_phi(self, seed, paradigm):
        """Of the adapters' own parameters, which the second paper compares: they are no models for the tool."""
        import safetensors.torch
        start = safetensors.torch.load_file(self.init(seed, paradigm) / "adapter_model.safetensors")
        vectors = []
        for name in self.names:
            tuned = safetensors.torch.load_file(self.tuned(seed, paradigm, name) / "adapter_model.safetensors")
            vectors.append(self.torch.cat([(tuned[key] - start[key]).double().flatten() for key in sorted(start)]))
        return [[float(a @ b / (a.norm() * b.norm())) for b in vectors] for a in vectors]

    # Merges

    def statistics(self, seed, paradigm, name):
        """A Fisher and a Gram file of a fine-tuned model, as docs/formats.md describes them."""
        import safetensors.torch
        torch, folder = self.torch, self.tuned(seed, paradigm, name).parent
        fisher_file, gram_file = folder / "fisher.safetensors", folder / "gram.safetensors"
        if fisher_file.exists() and gram_file.exists():
            return fisher_file, gram_file
        self.load(self.model_of(seed, paradigm, name))
        labels = self.data.splits[name, "train"][1]
        count = min(self.settings["statistics"], len(labels))
        fisher = {key: torch.zeros_like(one) for key, one in self.model.named_parameters()}
        grams, hooks = {}, []

        def collect(weight):
            def hook(layer, inputs, output):
                x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double()
                grams[weight] = grams.get(weight, 0) + x.T @ x
            return hook

        for key, layer in self.model.named_modules():
            if isinstance(layer, torch.nn.Linear):
                hooks.append(layer.register_forward_hook(collect(key + ".weight")))
        for place in range(count):
            self.model.zero_grad()
            logits = common.SCALE * self.data.embed(self.model, name, "train", [place]) @ self.data.heads[name].T
            torch.log_softmax(logits, -1)[0, labels[place]].backward()
            for key, one in self.model.named_parameters():
                fisher[key] += one.grad ** 2 / count
        for hook in hooks:
            hook.remove()
        self.model.zero_grad()
        facts = {"schema": "taskvec.statistics.1", "examples": str(count)}
        for values, file, kind in ((fisher, fisher_file, "empirical_fisher"), (grams, gram_file, "gram")):
            with common.written(file) as new:
                safetensors.torch.save_file(values, new, facts | {"kind": kind})
        return fisher_file, gram_file

    def grid(self, method):
        """The points that validation chooses from."""
        lambdas = numbers(self.settings["lambdas"])
        if method == "ties":
            return [{"density": density, "lambda": value} for density in numbers(self.settings["ties"]["densities"]) for value in numbers(self.settings["ties"]["lambdas"])]
        return [{"lambda": value} for value in lambdas] if method == "task-arithmetic" else [{}]

    def validated(self, path, names):
        found = self.scores(path, names, "validation")
        return sum(found.values()) / len(found)

    @staticmethod
    def best(points, score):
        """The first of the best."""
        if len(points) == 1:
            return points[0]
        scores = [score(point) for point in points]
        return points[scores.index(max(scores))]

    def at(self, seed, paradigm, method, names, point):
        """The merge that a point of the grid stands for, by the tool: a file."""
        options, out = [word for key, value in point.items() for word in (f"--{key}", value)], self.scratch / "merged.safetensors"
        if paradigm not in PHI:
            words = [word for name in names if method in ("fisher", "regmean")
                     for word in ((f"--{'fisher' if method == 'fisher' else 'gram'}"), self.statistics(seed, paradigm, name)[method == "regmean"])]
            self.run("merge", "--method", method, "--base", self.base, *self.tasks(seed, paradigm, names), *options, *words, "--out", out)
            return out
        # The adapters' own parameters around their common initialisation, as the second paper merges them.
        phi, plain = self.scratch / "phi", self.scratch / "plain"
        adapters = [word for name in names for word in ("--adapter", self.tuned(seed, paradigm, name))]
        how = "linear" if method == "task-arithmetic" else method
        self.run("merge-lora", "--space", "phi", "--method", how, "--init", self.init(seed, paradigm), *adapters, *options, "--out", phi)
        if paradigm == "llora16":
            self.run("fold-llora", "--init", self.init(seed, paradigm), "--adapter", phi, "--out", plain)
            shutil.rmtree(phi)
            phi = plain
        self.run("fuse", "--base", self.base, "--adapter", phi, "--out", out)
        shutil.rmtree(phi)
        return out

    def lorahub(self, seed, paradigm, names):
        """Weights by the tool, of cross-entropy, as in the paper; a file and what was chosen."""
        out, report, limit = self.scratch / "merged.safetensors", self.scratch / "lorahub.json", self.limits["validation"]

        def loss(file, weights):
            if paradigm in LINEAR:
                return self.combined(seed, paradigm).loss(dict(zip(names, weights, strict=True)), names, "validation", limit)
            self.load(file)
            found = [self.data.loss(self.model, name, "validation", limit) for name in names]
            return sum(found) / len(found)

        self.seek(loss, "lorahub", "--minimize", "--base", self.base, *self.tasks(seed, paradigm, names), "--out", out, "--report", report,
                  "--evaluations", self.settings["evaluations"])
        found = json.loads(report.read_text())
        return out, {"score": found["score"], **found["weights"]}

    def merged(self, seed, paradigm, method, names):
        """A merge with what validation chooses, as a file; and what was chosen."""
        if method == "lorahub":
            return self.lorahub(seed, paradigm, names)
        if paradigm not in PHI + LINEAR and method in ("task-arithmetic", "ties", "dare"):
            out, report = self.scratch / "merged.safetensors", self.scratch / "sweep.json"
            grids = {"task-arithmetic": ["--lambdas", self.settings["lambdas"]], "dare": ["--density", DARE, "--lambdas", self.settings["lambdas"]],
                     "ties": ["--densities", self.settings["ties"]["densities"], "--lambdas", self.settings["ties"]["lambdas"]]}[method]
            self.seek(lambda file, _: self.validated(file, names), "sweep", "--method", method, "--base", self.base, *self.tasks(seed, paradigm, names), *grids,
                      "--out", out, "--report", report)
            return out, {key: float(value) for key, value in json.loads(report.read_text())["best"].items()}
        if paradigm in LINEAR:
            point = self.of_derivatives(seed, paradigm, method, names)
        else:
            point = self.best(self.grid(method), lambda one: self.validated(self.at(seed, paradigm, method, names, one), names))
        return self.at(seed, paradigm, method, names, point), point

    def of_derivatives(self, seed, paradigm, method, names):
        """The best point of a way that is linear, without merging, but for TIES, which is linear in λ alone."""
        combined, limit, lines = self.combined(seed, paradigm), self.limits["validation"], {}

        def score(point):
            if method == "ties":
                if point["density"] not in lines:
                    lines[point["density"]] = combined.along(self.at(seed, paradigm, method, names, point | {"lambda": 1}), names, "validation", limit)
                found = lines[point["density"]](point["lambda"])
            else:
                found = combined.accuracies(dict.fromkeys(names, point["lambda"]), names, "validation", limit)
            return sum(found.values()) / len(found)

        return self.best(self.grid(method), score)

    def derived(self, seed, paradigm, method, names):
        """A merge of a way that is linear, with its scores from the derivatives."""
        combined, limit = self.combined(seed, paradigm), self.limits["test"]
        if method == "lorahub":
            _, point = self.lorahub(seed, paradigm, names)
            weights = {name: point[name] for name in names}
        else:
            point = self.of_derivatives(seed, paradigm, method, names)
            weights = dict.fromkeys(names, point.get("lambda", 1 / len(names)))
        if method == "ties":
            test = combined.along(self.at(seed, paradigm, method, names, point | {"lambda": 1}), self.names, "test", limit)(point["lambda"])
        else:
            test = combined.accuracies(weights, self.names, "test", limit)
        return {"chosen": point, "test": test}

    def merge(self, key, seed, paradigm, method, names=None):
        def measure():
            with self.network(paradigm):
                out, chosen = self.merged(seed, paradigm, method, names or self.names)
                return {"chosen": chosen, "test": self.scores(out), "bytes": size(out)}
        return self.once(key, measure)

    # The first paper

    def peru_fft(self, seed, method, densities):
        keys = {density: f"seed{seed}/full/peru-fft/{method}/{density}" for density in densities}
        if all(key in self.results for key in keys.values()):
            return
        merged, _ = self.merged(seed, "full", method, self.names)
        kept = self.scratch / "peru.safetensors"
        shutil.copy(merged, kept)
        for density, key in keys.items():
            self.once(key, lambda: self.pruned(seed, kept, density))
        kept.unlink()

    def pruned(self, seed, base, density):
        found, stored, delta, served = {}, size(base), self.scratch / "delta.safetensors", self.scratch / "served.safetensors"
        for name in self.names:
            self.run("prune", "--base", base, "--task", self.named(seed, "full", name), "--density", density, "--out", delta)
            self.run("apply", "--base", base, "--delta", delta, "--out", served)
            found.update(self.scores(served, [name]))
            stored += size(delta)
        return {"test": found, "bytes": stored}

    def peru_lora(self, seed, paradigm, rank):
        found, stored, cut = {}, size(self.base), self.scratch / "cut"
        for name in self.names:
            self.run("peru-lora", "--adapter", self.tuned(seed, paradigm, name), "--rank", rank, "--out", cut)
            found.update(self.scores(self.fused(cut), [name]))
            stored += size(cut)
            shutil.rmtree(cut)
        return {"test": found, "bytes": stored}

    # All of it

    def single(self, seed, paradigm):
        return self.once(f"seed{seed}/{paradigm}/single", lambda: self.singles(seed, paradigm))

    def first_paper(self, seed):
        self.single(seed, "full")
        for method in self.settings["methods"]:
            self.merge(f"seed{seed}/full/merge/{method}", seed, "full", method)
        for density in self.settings["densities"]:
            self.once(f"seed{seed}/full/post-pruning/{density}", lambda: self.pruned(seed, self.base, density))
        for method in self.settings["peru"]:
            self.peru_fft(seed, method, self.settings["densities"])
        self.single(seed, "lora128")
        for method in self.settings["lora_methods"]:
            self.merge(f"seed{seed}/lora128/merge/{method}", seed, "lora128", method)
        for rank in self.settings["ranks"]:
            self.once(f"seed{seed}/lora128/peru-lora/{rank}", lambda: self.peru_lora(seed, "lora128", rank))

    def second_paper(self, seed):
        for paradigm in self.merging:
            self.single(seed, paradigm)
            self.once(f"seed{seed}/{paradigm}/cosines", lambda: self.cosines(seed, paradigm))
            if paradigm not in WHOLE:
                self.once(f"seed{seed}/{paradigm}/cosines of phi", lambda: self.cosines_of_phi(seed, paradigm))
            for method in ("average", "task-arithmetic", "ties", "lorahub"):
                self.merge(f"seed{seed}/{paradigm}/merge/{method}", seed, paradigm, method)

    def all(self):
        place, step = self.share
        seeds = self.settings["seeds"]
        if place == 0:
            self.once("base", lambda: self.scores(self.base))
        for seed in seeds[place::step]:
            self.first_paper(seed)
            self.second_paper(seed)
            maps.truncation(self, seed)
            if seed == seeds[0]:
                subsets.check(self, seed)
        if len(seeds) % step == place:  # one of those with the fewest seeds
            maps.planes(self, seeds[0])
            maps.embeddings(self, seeds[0])
        subsets.measure(self, seeds[0], self.settings["subsets"], self.share)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--settings", type=pathlib.Path, required=True)
    parser.add_argument("--tool", required=True)
    parser.add_argument("--share", type=common.share, default=(0, 1), help="K/N: every Nth seed, and round of subsets, from the Kth on")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    experiments = Experiments(given.work, common.read_json(given.settings), given.tool, given.share)
    try:
        experiments.all()
    finally:
        shutil.rmtree(experiments.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
