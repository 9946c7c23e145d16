# SPDX-License-Identifier: Apache-2.0
"""Both papers' experiments on the models that train.py made: merged, pruned and truncated by the taskvec tool, and scored here.

Every result goes to results.json as soon as it is known; what is there is not measured again."""
import argparse
import contextlib
import json
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
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


class Experiments:
    def __init__(self, work, settings, tool):
        import torch
        self.torch, self.work, self.settings, self.tool = torch, work, settings, tool
        self.data = common.Tasks(work, common.read_json(work / "tasks.json"), settings)
        self.names = self.data.names
        self.merging = [way for way in ("full", "lora16", "llora16", "linearized") if way in settings["paradigms"]]
        self.base = work / "base" / "model.safetensors"
        self.plain = self.model = common.upper_layers(common.load_encoder(settings["encoder"]), settings["layers"])
        self.expanded = None
        self.limits = {"validation": None, "test": None}  # of each task's texts
        self.ties = {"densities": "0.25:1:0.25", "lambdas": "0.25:1:0.25"}
        self.results = common.read_json(work / "results.json", {})
        self.scratch = pathlib.Path(tempfile.mkdtemp(prefix="reproduce-", dir=work))

    # What there is to do it with

    def once(self, key, measure):
        if key not in self.results:
            self.results[key] = measure()
            common.write_json(self.work / "results.json", self.results)
            value = self.results[key]
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
    def narrowed(self, settings, limits):
        """For measurements of which there are many: coarser grids, fewer texts."""
        before = self.settings, self.ties, self.limits
        self.settings, self.ties, self.limits = self.settings | settings, settings["ties"], limits
        try:
            yield
        finally:
            self.settings, self.ties, self.limits = before

    @contextlib.contextmanager
    def network(self, paradigm):
        """Which function of the parameters is scored: the network, or its linearization."""
        if paradigm == "linearized":
            self.expanded = self.expanded or linearized.Linearized(self.settings)
            self.model = self.expanded
        try:
            yield
        finally:
            self.model = self.plain

    def load(self, path):
        import safetensors.torch
        self.model.load_state_dict(safetensors.torch.load_file(path))

    def scores(self, path, names=None, split="test"):
        """{task: accuracy} of a file of the trained layers."""
        self.load(path)
        return {name: self.data.accuracy(self.model, name, split, self.limits[split]) for name in names or self.names}

    def seek(self, measure, *words):
        """Runs a verb that scores candidates: the mean over the validation splits of the tasks that are merged."""
        place = self.scratch / "scores"
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
                    self.load(connection.makefile().readline().strip())
                    found = [measure(self.model, name, "validation", self.limits["validation"]) for name in self.seeking]
                    connection.sendall(f"{sum(found) / len(found)}\n".encode())
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

    def named(self, seed, paradigm, name):
        """A file that is called as its task is."""
        link = self.work / f"seed{seed}" / paradigm / f"{name}.safetensors"
        if not link.exists():
            link.symlink_to(pathlib.Path(name) / "model.safetensors")
        return link

    def named_adapter(self, seed, paradigm, name):
        folder = self.work / f"seed{seed}" / paradigm / "adapters" / name
        if not folder.exists():
            folder.parent.mkdir(exist_ok=True)
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
            tuned = self.tuned(seed, paradigm, name)
            with self.network(paradigm):
                found.update(self.scores(tuned if paradigm in WHOLE else self.fused(tuned), [name]))
        return found

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

    def statistics(self, seed, name):
        """A Fisher and a Gram file of a fully fine-tuned model, as docs/formats.md describes them."""
        import safetensors.torch
        torch, folder = self.torch, self.tuned(seed, "full", name).parent
        fisher_file, gram_file = folder / "fisher.safetensors", folder / "gram.safetensors"
        if gram_file.exists():
            return fisher_file, gram_file
        self.load(folder / "model.safetensors")
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
        safetensors.torch.save_file(fisher, fisher_file, facts | {"kind": "empirical_fisher"})
        safetensors.torch.save_file(grams, gram_file, facts | {"kind": "gram"})
        return fisher_file, gram_file

    def merged(self, seed, paradigm, method, names):
        """A merge with what validation chooses, as a file; and what was chosen. The merges that are worked out from data are of full models."""
        out, chosen = self.scratch / "merged.safetensors", {}
        tasks = self.tasks(seed, paradigm, names)
        self.seeking = names
        if paradigm in ("lora16", "llora16") and method != "lorahub":
            return self.merged_in_phi_space(seed, paradigm, method, names)
        if method in ("task-arithmetic", "ties", "dare"):
            grids = {"task-arithmetic": ["--lambdas", self.settings["lambdas"]], "dare": ["--density", "0.5", "--lambdas", "0.1:0.5:0.1"],
                     "ties": ["--densities", self.ties["densities"], "--lambdas", self.ties["lambdas"]]}[method]
            report = self.scratch / "sweep.json"
            self.seek(self.data.accuracy, "sweep", "--method", method, "--base", self.base, *tasks, *grids, "--out", out, "--report", report)
            chosen = {key: float(value) for key, value in json.loads(report.read_text())["best"].items()}
        elif method == "lorahub":
            report = self.scratch / "lorahub.json"
            self.seek(self.data.loss, "lorahub", "--minimize", "--base", self.base, *tasks, "--out", out, "--report", report,
                      "--evaluations", self.settings["evaluations"])  # of cross-entropy, as in the paper
            found = json.loads(report.read_text())
            chosen = {"score": found["score"], **found["weights"]}
        else:
            words = []
            if method in ("fisher", "regmean"):
                for name in names:
                    fisher, gram = self.statistics(seed, name)
                    words += ["--fisher", fisher] if method == "fisher" else ["--gram", gram]
            self.run("merge", "--method", method, "--base", self.base, *tasks, *words, "--out", out)
        return out, chosen

    def merged_in_phi_space(self, seed, paradigm, method, names):
        """The adapters' own parameters around their common initialisation, as the second paper merges them."""
        adapters = [word for name in names for word in ("--adapter", self.tuned(seed, paradigm, name))]

        def at(point):
            phi, plain = self.scratch / "phi", self.scratch / "plain"
            words = [word for key, value in point.items() for word in (f"--{key}", value)]
            how = "average" if method == "average" else "linear" if method == "task-arithmetic" else method
            self.run("merge-lora", "--space", "phi", "--method", how, "--init", self.init(seed, paradigm), *adapters, *words, "--out", phi)
            if paradigm.startswith("llora"):
                self.run("fold-llora", "--init", self.init(seed, paradigm), "--adapter", phi, "--out", plain)
                shutil.rmtree(phi)
                phi = plain
            out = self.fused(phi)
            shutil.rmtree(phi)
            return out

        points = [{}]
        if method == "task-arithmetic":
            points = [{"lambda": value} for value in numbers(self.settings["lambdas"])]
        elif method == "ties":
            points = [{"density": density, "lambda": value} for density in numbers(self.ties["densities"]) for value in numbers(self.ties["lambdas"])]
        best, score = points[0], -1.0
        for point in points if len(points) > 1 else []:
            found = self.scores(at(point), names, "validation")
            if sum(found.values()) / len(found) > score:
                best, score = point, sum(found.values()) / len(found)
        return at(best), best

    def merge(self, key, seed, paradigm, method, names=None):
        def measure():
            with self.network(paradigm):
                out, chosen = self.merged(seed, paradigm, method, names or self.names)
                return {"chosen": chosen, "test": self.scores(out)}
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
        found, delta, served = {}, self.scratch / "delta.safetensors", self.scratch / "served.safetensors"
        for name in self.names:
            self.run("prune", "--base", base, "--task", self.named(seed, "full", name), "--density", density, "--out", delta)
            self.run("apply", "--base", base, "--delta", delta, "--out", served)
            found.update(self.scores(served, [name]))
        return found

    def peru_lora(self, seed, paradigm, rank):
        found, cut = {}, self.scratch / "cut"
        for name in self.names:
            self.run("peru-lora", "--adapter", self.tuned(seed, paradigm, name), "--rank", rank, "--out", cut)
            found.update(self.scores(self.fused(cut), [name]))
            shutil.rmtree(cut)
        return found

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
        for method in ("average", "task-arithmetic", "ties"):
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
        self.once("base", lambda: self.scores(self.base))
        for seed in self.settings["seeds"]:
            self.first_paper(seed)
            self.second_paper(seed)
        first = self.settings["seeds"][0]
        for seed in self.settings["seeds"]:
            maps.truncation(self, seed)
        maps.planes(self, first)
        maps.embeddings(self, first)
        if "linearized" in self.merging:
            subsets.check(self, first)
        subsets.measure(self, first, self.settings["subsets"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--settings", type=pathlib.Path, required=True)
    parser.add_argument("--tool", required=True)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    experiments = Experiments(given.work, common.read_json(given.settings), given.tool)
    try:
        experiments.all()
    finally:
        shutil.rmtree(experiments.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
