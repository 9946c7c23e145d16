# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of results.json: docs/reproduction.md between its markers, and the SVG files beside it. Needs gnuplot."""
import argparse
import itertools
import math
import pathlib
import re
import statistics
import subprocess

import common

WAYS = {"full": "full fine-tuning", "lora16": "LoRA, r = 16", "llora16": "L-LoRA, r = 16", "whole16": "L-LoRA of the whole network, r = 16", "linearized": "full linearization",
        "lora128": "LoRA, r = 128"}
MERGED = ("full", "lora16", "llora16", "whole16", "linearized")  # the second paper's
COLOURS = dict(zip(MERGED, ("#333333", "#1f77b4", "#d62728", "#ff7f0e", "#2ca02c")))
WHOLE = ("full", "linearized")
MERGES = {"average": "Average", "task-arithmetic": "Task Arithmetic", "fisher": "Fisher merging", "regmean": "RegMean", "ties": "TIES", "dare": "DARE",
          "breadcrumbs": "Model Breadcrumbs", "model-stock": "Model Stock", "sce": "SCE", "karcher": "Karcher mean", "lorahub": "LoraHub"}


class Report:
    def __init__(self, work, settings):
        self.settings, self.results = settings, common.read_json(work / "results.json", {})
        self.names = list(common.read_json(work / "tasks.json"))
        self.work = work

    # Numbers

    def seeds(self, key):
        """The results under a key, seed by seed: accuracies by task."""
        found = []
        for seed in self.settings["seeds"]:
            value = self.results.get(f"seed{seed}/{key}")
            if value is not None:
                found.append(common.accuracies(value))
        return found

    def means(self, key):
        return [sum(one.values()) / len(one) for one in self.seeds(key)]

    def parameters(self):
        """Of the trained layers, and of an adapter of rank 1."""
        shapes = common.tensors(self.work / "base" / "model.safetensors")
        adapted = [shape for key, shape in shapes.items() if re.search(r"\.(query|value)\.weight$", key)]
        return sum(math.prod(shape) for shape in shapes.values()), sum(sum(shape) for shape in adapted), len(adapted)

    def bytes(self, key):
        """Of the files that a row's models are served from, the mean over seeds; None where none was measured."""
        found = [value["bytes"] for seed in self.settings["seeds"] if "bytes" in (value := self.results.get(f"seed{seed}/{key}") or {})]
        return statistics.fmean(found) if found else None

    def tested(self):
        tasks = common.read_json(self.work / "tasks.json")
        return sum(min(self.settings["limits"]["test"], len(task["test"])) for task in tasks.values())

    # Text

    def of_seeds(self, count):
        """What a row says that not all seeds have."""
        return "" if count == len(self.settings["seeds"]) else f" ({count} seed{'' if count == 1 else 's'})"

    def percent(self, values):
        if not values:
            return "–"
        mean = f"{100 * statistics.fmean(values):.1f}"
        return mean + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "") + self.of_seeds(len(values))

    def row(self, words, key, parameters, stored=None):
        found, stored = self.seeds(key), stored or self.bytes(key)
        if not found:
            return []
        tasks = [f"{100 * statistics.fmean(one[name] for one in found):.1f}" for name in self.names]
        return ["| " + " | ".join([words, f"{parameters / 1e6:.2f}", f"{stored / 1e6:.1f}" if stored else "–", *tasks, self.percent(self.means(key))]) + " |"]

    def head(self, first):
        words = [first, "parameters (M)", "files (MB)", *self.names, "mean"]
        return ["| " + " | ".join(words) + " |", "|---" * len(words) + "|"]

    def hours(self):
        found = common.read_json(self.work / "seconds.json", {})
        trained = sum(value for key, value in found.items() if key.startswith("training/"))
        return [f"The run took {trained / 3600:.1f} hours of one core to train, and {(sum(found.values()) - trained) / 3600:.1f} to merge and to score."] if found else ["It is not known how long the run took."]

    @staticmethod
    def words_of(grid):
        """0:1:0.05 as 0, 0.05 … 1."""
        first, last, step = (float(word) for word in grid.split(":"))
        return f"{first:g}, {first + step:g} … {last:g}"

    def grids(self):
        s = self.settings
        ties = s["ties"]
        return (f"Chosen on the validation texts of the tasks that are merged, for all ways from the same points: λ of Task Arithmetic from {{{self.words_of(s['lambdas'])}}}, "
                f"TIES's density from {{{self.words_of(ties['densities'])}}} with λ from {{{self.words_of(ties['lambdas'])}}}, LoraHub's weights by at most {s['evaluations']} evaluations of cross-entropy "
                "and 0.05·Σ|w| within ±1.5, without the constraint that they sum to 1")

    def setting(self):
        s, tasks = self.settings, common.read_json(self.work / "tasks.json")
        total, _, _ = self.parameters()
        count = {name: min(s["limits"]["test"], len(task["test"])) for name, task in tasks.items()}
        lines = [f"Seeds: {', '.join(map(str, s['seeds']))} (a figure that not all of them have says how many); the upper {s['layers']} of 6 layers are trained ({total / 1e6:.2f} million parameters), what is below "
                 f"them stays; {s['steps']} steps of AdamW with batches of {s['batch']} and a linearly falling rate; of each task at most {s['limits']['train']} texts to train, "
                 f"{s['limits']['validation']} to choose by and {s['limits']['test']} to test (in all {sum(count.values())}; the standard error of a mean over tasks is about "
                 f"{100 * 0.45 / math.sqrt(sum(count.values())):.1f} percent points, more than the seeds' deviation says, as they share the texts).", "",
                 "| task | classes | train | test | base | " + " | ".join(WAYS[way] for way in s["paradigms"]) + " |", "|---" * (5 + len(s["paradigms"])) + "|"]
        for name in self.names:
            cells = [f"{100 * self.results['base'][name]:.1f}"]
            for way in s["paradigms"]:
                found = self.seeds(f"{way}/single")
                cells.append(f"{100 * statistics.fmean(one[name] for one in found):.1f}" if found else "–")
            task = tasks[name]
            lines.append(f"| {name} | {len(task['labels'])} | {min(s['limits']['train'], len(task['train']))} | {count[name]} | " + " | ".join(cells) + " |")
        cells = [f"{100 * statistics.fmean(self.results['base'].values()):.1f}"] + [self.percent(self.means(f"{way}/single")) for way in s["paradigms"]]
        lines.append("| mean | | | | " + " | ".join(cells) + " |")
        return lines

    def base_bytes(self):
        return (self.work / "base" / "model.safetensors").stat().st_size

    def first_paper(self):
        total, of_rank, layers = self.parameters()
        n = len(self.names)
        lines = self.head("full fine-tuning")
        base = self.results["base"]
        lines += ["| " + " | ".join(["Pre-Trained", f"{total / 1e6:.2f}", f"{self.base_bytes() / 1e6:.1f}", *(f"{100 * base[name]:.1f}" for name in self.names), f"{100 * statistics.fmean(base.values()):.1f}"]) + " |"]
        lines += self.row("Single-Task", "full/single", n * total)
        for method in self.settings["methods"]:
            lines += self.row(MERGES[method], f"full/merge/{method}", total)
        for density in self.settings["densities"]:
            lines += self.row(f"Post-Pruning, m = {100 * density:g}%", f"full/post-pruning/{density}", total * (1 + n * density))
        for method in self.settings["peru"]:
            for density in self.settings["densities"]:
                lines += self.row(f"PERU-FFT of {MERGES[method]}, m = {100 * density:g}%", f"full/peru-fft/{method}/{density}", total * (1 + n * density))
        lines += ["", *self.head("LoRA, r = 128")]
        lines += self.row("Single-Task", "lora128/single", total + n * 128 * of_rank)
        for method in self.settings["lora_methods"]:
            lines += self.row(MERGES[method], f"lora128/merge/{method}", total)
        for rank in self.settings["ranks"]:
            lines += self.row(f"PERU-LoRA, q = {rank}", f"lora128/peru-lora/{rank}", total + n * rank * (of_rank + layers))
        return [*lines, "", f"{self.grids()}; DARE keeps half of the entries, with λ from the same points as Task Arithmetic."]

    def sizes(self, ways):
        """The second paper's Table 3."""
        total, of_rank, _ = self.parameters()
        lines = ["| a task's own model | trained (M) | share of the whole model | file (MB) |", "|---|---|---|---|"]
        for way in ways:
            trained, stored = total if way in WHOLE else 16 * of_rank, self.bytes(f"{way}/single")
            each = (stored - (0 if way in WHOLE else self.base_bytes())) / len(self.names) if stored else None
            share = f"{100 * trained / self.settings['parameters']:.2f} %" if "parameters" in self.settings else "–"
            lines.append(f"| {WAYS[way]} | {trained / 1e6:.3f} | {share} | {f'{each / 1e6:.2f}' if each else '–'} |")
        return lines

    def ways(self):
        return [way for way in MERGED if self.seeds(f"{way}/single")]

    def second_paper(self):
        ways = self.ways()
        lines = ["| all eight tasks merged | " + " | ".join(f"{WAYS[way]}: absolute | normalized" for way in ways) + " |", "|---" * (1 + 2 * len(ways)) + "|"]

        def cells(key):
            result = []
            for way in ways:
                result += [self.percent(self.means(f"{way}/{key}")), self.percent(list(self.normalized(way, key).values()))]
            return result

        lines.append("| Single-Task | " + " | ".join(cells("single")) + " |")
        for method in ("average", "task-arithmetic", "ties", "lorahub"):
            lines.append(f"| {MERGES[method]} | " + " | ".join(cells(f"merge/{method}")) + " |")
        lines += ["", "| cosines of task vectors, mean over pairs | " + " | ".join(WAYS[way] for way in ways) + " |", "|---" * (1 + len(ways)) + "|"]
        for words, phi in (("here, of what is trained (L's)", True), ("here, of the weights' changes", False)):
            found = [self.cosine(way, phi) for way in ways]
            lines.append(f"| {words} | " + " | ".join(f"{value:.3f}" if value is not None else "–" for value in found) + " |")
        lines.append("| the paper's authors (CLIP) | " + " | ".join({"full": "0.202", "lora16": "0.233", "llora16": "0.102"}.get(way, "–") for way in ways) + " |")
        return [*lines, "", *self.of_each_task(ways), "", *self.sizes(ways), "", f"{self.grids()}."]

    def normalized(self, way, key):
        """{seed: mean over tasks of the accuracy by that of the way's own models}."""
        found = {}
        for seed in self.settings["seeds"]:
            one, own = (self.results.get(f"seed{seed}/{way}/{word}") for word in (key, "single"))
            if one and own:
                found[seed] = statistics.fmean(common.accuracies(one)[name] / common.accuracies(own)[name] for name in self.names)
        return found

    def of_each_task(self, ways):
        """The second paper's Table 5."""
        lines = ["| normalized, all eight tasks merged | " + " | ".join(self.names) + " |", "|---" * (1 + len(self.names)) + "|"]
        for way in ways:
            for method in ("average", "task-arithmetic", "ties", "lorahub"):
                both = [pair for pair in zip(self.seeds(f"{way}/merge/{method}"), self.seeds(f"{way}/single"))]
                if both:
                    cells = [f"{100 * statistics.fmean(one[name] / own[name] for one, own in both):.1f}" for name in self.names]
                    lines.append(f"| {WAYS[way]}, {MERGES[method]} | " + " | ".join(cells) + " |")
        return lines

    def cosines(self, way, phi=True):
        """{seed: those of the pairs of tasks}, of what is trained: for adapters their own parameters, or the updates that they make."""
        found = {}
        for seed in self.settings["seeds"]:
            rows = self.results.get(f"seed{seed}/{way}/cosines" + (" of phi" if phi and way not in WHOLE else ""))
            if rows:
                found[seed] = [rows[r][c] for r in range(len(rows)) for c in range(r)]
        return found

    def cosine(self, way, phi=True):
        found = [one for pairs in self.cosines(way, phi).values() for one in pairs]
        return statistics.fmean(found) if found else None

    def subset_results(self, way, method):
        """[(names, accuracies)] of the subsets that were measured, in rounds that are complete for every way."""
        seed, found = self.settings["seeds"][0], []
        head = f"seed{seed}/{way}/subset/{method}/"
        for key, value in self.results.items():
            if key.startswith(head):
                found.append((key[len(head):].split("+"), value["test"]))
        return found

    def subset_scores(self, way, method, normalized, over="all"):
        """{size: [mean over all tasks, those merged, or those held out]}."""
        single, found = common.accuracies(self.results.get(f"seed{self.settings['seeds'][0]}/{way}/subset single") or {}), {}
        for names, one in self.subset_results(way, method) if single else []:
            tasks = [name for name in self.names if over == "all" or (name in names) == (over == "merged")]
            if tasks:
                found.setdefault(len(names), []).append(statistics.fmean(one[name] / (single[name] if normalized else 1) for name in tasks))
        return dict(sorted(found.items()))

    def subsets(self):
        lines, sizes = [], range(2, len(self.names) + 1)
        for over, words in (("all", "over all eight tasks"), ("merged", "over the merged tasks"), ("held out", "over the tasks held out")):
            for normalized in (True, False):
                rows = []
                for way in MERGED:
                    for method in self.settings["subset_methods"]:
                        found = self.subset_scores(way, method, normalized, over)
                        if found:
                            cells = (f"{statistics.fmean(found[size]):.3f}" if size in found else "–" for size in sizes)
                            rows.append(f"| {WAYS[way]}, {MERGES[method]} | " + " | ".join(cells) + " |")
                if rows:
                    lines += [f"| {'normalized' if normalized else 'absolute'}, {words}; tasks merged: | " + " | ".join(map(str, sizes)) + " |",
                              "|---" * (1 + len(sizes)) + "|", *rows, ""]
        if lines:
            limits, counts = self.settings["subset_limits"], {}
            for way in MERGED:
                for method in self.settings["subset_methods"]:
                    found = self.subset_scores(way, method, True)
                    if found:
                        counts.setdefault(", ".join(f"{size}: {len(values)}" for size, values in found.items()), []).append(f"{WAYS[way]}, {MERGES[method]}")
            listed = "; ".join((f"{' and '.join(rows)}: " if len(counts) > 1 else "") + count for count, rows in counts.items())
            lines.append(f"Subsets measured of each size, drawn at random, in the same order for all rows: {listed}. Seed {self.settings['seeds'][0]} alone; of each task the first "
                         f"{limits['validation']} texts to choose by and the first {limits['test']} to test. {self.grids()}.")
            for way in MERGED:
                far = self.results.get(f"seed{self.settings['seeds'][0]}/{way}/combined against merged")
                if far is not None:
                    lines.append(f"Scores of the average of all eight models ({WAYS[way]}) that follow from derivatives, and those of the model that the tool merged, differ by at most "
                                 f"{100 * far:.1f} percent points on a task.")
        else:
            lines.append("No subsets were measured in this run.")
        return lines

    def truncation(self):
        """{rank: mean error over seeds}, and the fits."""
        found = [self.results[key] for key in (f"seed{seed}/lora128/truncation" for seed in self.settings["seeds"]) if key in self.results]
        return {int(rank): statistics.fmean(one["errors"][rank] for one in found) for rank in (found[0]["errors"] if found else {})}, found

    def errors(self):
        errors, found = self.truncation()
        if not found:
            return ["Not measured in this run."]
        ranks = sorted(errors)
        line = "By least squares on the logarithm the error falls by a factor e every {:.1f} ranks and {:.0f} % of its variance is explained (the mean over {} seed{}).".format(
            1 / statistics.fmean(one["decay"] for one in found), 100 * statistics.fmean(one["explained"] for one in found), len(found), "" if len(found) == 1 else "s")
        return ["| rank kept, q | " + " | ".join(map(str, ranks)) + " |", "|---" * (1 + len(ranks)) + "|",
                "| relative error of the update | " + " | ".join(f"{errors[rank]:.3f}" for rank in ranks) + " |", "", line]

    def disentanglement(self, way):
        """Mean ξ over the paper's box, its axes left out, of the pairs that were measured: {pair: ξ}."""
        found = {}
        for pair in self.settings["planes"]:
            one = self.results.get(f"seed{self.settings['seeds'][0]}/{way}/plane/{'+'.join(pair)}")
            if one:
                inside = [place for place, value in enumerate(one["grid"]) if value > 0]
                found["+".join(pair)] = statistics.fmean(one["xi"][row][column] for row in inside for column in inside)
        return found

    def maps(self):
        ways = [way for way in MERGED if self.disentanglement(way)]
        if not ways:
            return ["Not measured in this run."]
        pairs = self.disentanglement(ways[0])
        return ["| mean ξ over λ1, λ2 in (0, 1] | " + " | ".join(" and ".join(pair.split("+")) for pair in pairs) + " |", "|---" * (1 + len(pairs)) + "|",
                *(f"| {WAYS[way]} | " + " | ".join(f"{self.disentanglement(way)[pair]:.3f}" if pair in self.disentanglement(way) else "–" for pair in pairs) + " |" for way in ways)]

    # What the papers say

    @staticmethod
    def noise(texts):
        """The standard error of the difference of two accuracies on so many texts."""
        return 0.45 * math.sqrt(2 / texts)

    @staticmethod
    def verdict(differences, noise, least=0.0):
        """Whether their mean is at least `least`, and more than noise away from it: the deviation over seeds, or what one measurement may be off by."""
        mean = statistics.fmean(differences)
        noise = max(noise, statistics.stdev(differences) if len(differences) > 1 else 0)
        return ("holds" if mean >= least else "does not hold") + (", within noise" if abs(mean - least) <= noise else "")

    @staticmethod
    def spread(differences, factor=1, digits=1):
        return f" (difference {factor * statistics.fmean(differences):+.{digits}f} ± {factor * statistics.stdev(differences):.{digits}f})" if len(differences) > 1 else ""

    def judged(self, first, second, least=0.0):
        """Whether `first` - `second` is at least `least`, over the seeds that have both: a word, the numbers, and how many seeds."""
        a, b = [], []
        for seed in self.settings["seeds"]:
            both = [self.results.get(f"seed{seed}/{key}") for key in (first, second)]
            if all(both):
                for value, list_ in zip(both, (a, b)):
                    list_.append(statistics.fmean(common.accuracies(value).values()))
        if not a:
            return None
        differences = [x - y for x, y in zip(a, b)]
        numbers = f"{100 * statistics.fmean(a):.1f} against {100 * statistics.fmean(b):.1f}" + self.spread(differences, 100)
        return self.verdict(differences, self.noise(self.tested()), least), numbers, len(a)

    def best_of(self, way, methods):
        """The key of the best merge, of those that all seeds with any have; and a name."""
        found = {key: self.means(key) for method in methods if self.means(key := f"{way}/merge/{method}")}
        most = max(map(len, found.values()), default=0)
        found = {key: statistics.fmean(values) for key, values in found.items() if len(values) == most}
        best = max(found, key=found.get, default=None)
        return best, MERGES[best.split("/")[-1]] if best else ""

    def claims(self):
        best, name = self.best_of("full", self.settings["methods"])
        best_lora, name_lora = self.best_of("lora128", self.settings["lora_methods"])
        peru = f"full/peru-fft/{self.settings['peru'][0]}"
        tables = "P §4.1–2, Tables 1–4"
        rows = [
            (tables, f"no merge comes near the single-task models: 5 points or more below (best: {name})", "full/single", best, 0.05),
            (tables, f"Post-Pruning (10%) is far above every merge: 5 points or more (best: {name})", "full/post-pruning/0.1", best, 0.05),
            (tables, f"PERU-FFT (10%) is above every merge (best: {name})", f"{peru}/0.1", best, 0.0),
            (tables, "PERU-FFT (10%) is close to the single-task models: within 3 points", f"{peru}/0.1", "full/single", -0.03),
            ("P §4.1, Figure 5", "PERU-FFT is above Post-Pruning at m = 10%", f"{peru}/0.1", "full/post-pruning/0.1", 0.0),
            ("P §4.1", "PERU-FFT (5%) is as good as Post-Pruning (10%): not 0.5 points below it", f"{peru}/0.05", "full/post-pruning/0.1", -0.005),
            ("P Figure 5", "PERU-FFT is saturated at m = 20%: 40% gains less than 0.5 points", f"{peru}/0.2", f"{peru}/0.4", -0.005),
            (tables, f"PERU-LoRA (16) is far above every merge of LoRA adapters: 5 points or more (best: {name_lora})", "lora128/peru-lora/16", best_lora, 0.05),
            ("P §4.1–2", "PERU-LoRA (16) is above PERU-FFT (10%), with fewer parameters", "lora128/peru-lora/16", f"{peru}/0.1", 0.0),
            ("P §4.1–2", "LoRA (r = 128) is as good as full fine-tuning: within 1 point", "lora128/single", "full/single", -0.01),
            ("P Figure 6", "q = 40 of 128 is as good as the whole adapter: within 0.5 points", "lora128/peru-lora/40", "lora128/single", -0.005),
        ]
        found = [(where, claim, self.judged(first, second, least)) for where, claim, first, second, least in rows if second]
        found += [self.exponential(), *self.of_orthogonality(), *self.of_normalized(), *self.of_disentanglement(), *self.of_growth()]
        noted = [("observation", f"{WAYS[first]}'s own models are above those of {WAYS[second]}", self.judged(f"{first}/single", f"{second}/single"))
                 for first, second in (("full", "lora16"), ("lora16", "llora16"), ("lora16", "whole16"))]
        noted += self.of_orthogonality("observation", phi=False)
        return ["| where | claim | here | | seeds |", "|---|---|---|---|---|",
                *(f"| {where} | {claim} | {result[0]} | {result[1]} | {result[2]} |" for where, claim, result in found + noted if result)]

    def exponential(self):
        _, found = self.truncation()
        margins = [one["explained"] - 0.95 for one in found]
        result = (self.verdict(margins, 0), f"R² {statistics.fmean(margins) + 0.95:.3f}" + (f" ± {statistics.stdev(margins):.3f}" if len(margins) > 1 else ""), len(margins)) if margins else None
        return "P §1", "the truncation's error falls exponentially in q: R² of a line through its logarithm is 0.95 at least", result

    def of_normalized(self):
        rows = []
        for way in ("llora16", "whole16"):
            for method in ("average", "task-arithmetic", "ties", "lorahub"):
                a, b = self.normalized(way, f"merge/{method}"), self.normalized("lora16", f"merge/{method}")
                both = [seed for seed in a if seed in b]
                if both:
                    differences = [a[seed] - b[seed] for seed in both]
                    absolute = [100 * statistics.fmean(statistics.fmean(common.accuracies(self.results[f"seed{seed}/{one}/merge/{method}"]).values()) for seed in both) for one in (way, "lora16")]
                    noise = self.noise(self.tested()) / statistics.fmean(self.means("lora16/single"))
                    rows.append(("L Table 1, Figures 9–11", f"{WAYS[way]} merges better than LoRA by {MERGES[method]}, normalized, all tasks",
                                 (self.verdict(differences, noise), f"{statistics.fmean(a[seed] for seed in both):.3f} against {statistics.fmean(b[seed] for seed in both):.3f}"
                                  + self.spread(differences, 1, 3) + f"; absolute {absolute[0]:.1f} against {absolute[1]:.1f}", len(both))))
        return rows

    def of_orthogonality(self, where="L Figures 2, 8", phi=True):
        """Noise is the deviation over seeds, or the standard error over pairs of tasks where that is more."""
        rows, subject = [], "task vectors" if phi else "changes of weights"
        for way in ("llora16", "whole16"):
            for other in ("lora16", "full") if phi else ("lora16",):
                a, b = self.cosines(way, phi), self.cosines(other, phi)
                both = [seed for seed in a if seed in b]
                if both:
                    pairs = [[y - x for x, y in zip(a[seed], b[seed])] for seed in both]
                    differences = [statistics.fmean(one) for one in pairs]
                    noise = statistics.fmean(statistics.stdev(one) / math.sqrt(len(one)) if len(one) > 1 else 0 for one in pairs)
                    means = [statistics.fmean(statistics.fmean(one[seed]) for seed in both) for one in (a, b)]
                    rows.append((where, f"the {subject} of {WAYS[way]} are closer to orthogonal than those of {WAYS[other]}",
                                 (self.verdict(differences, noise), f"mean cosine {means[0]:.3f} against {means[1]:.3f}" + self.spread([-one for one in differences], 1, 3), len(both))))
        return rows

    def of_disentanglement(self):
        rows = []
        for way in ("llora16", "whole16"):
            a, b = self.disentanglement(way), self.disentanglement("lora16")
            both = [pair for pair in a if pair in b]
            if both:
                mean = [statistics.fmean(one[pair] for pair in both) for one in (a, b)]
                noise = 2 * self.noise(2 * len(both) * self.settings["plane_texts"])  # two shares are added
                rows.append(("L Figure 6", f"the tasks of {WAYS[way]} are more disentangled than LoRA's: ξ over the box, mean over {len(both)} pair{'' if len(both) == 1 else 's'}",
                             (self.verdict([mean[1] - mean[0]], noise), f"{mean[0]:.3f} against {mean[1]:.3f}", 1)))
        return rows

    def of_growth(self):
        rows = []
        for way in MERGED:
            found = self.subset_scores(way, "task-arithmetic", True)
            if found:
                sizes = sorted(found)
                low, high = statistics.fmean(found[sizes[0]]), statistics.fmean(found[sizes[-1]])
                spread = max(statistics.stdev(found[size]) if len(found[size]) > 1 else 0.0 for size in (sizes[0], sizes[-1]))  # over subsets
                error = self.noise(self.settings["subset_limits"]["test"] * len(self.names)) / statistics.fmean(self.means(f"{way}/single"))
                rows.append(("L Table 1", f"{WAYS[way]}: Task Arithmetic's average over all tasks rises with the number merged",
                             (self.verdict([high - low], max(error, spread)), f"{low:.3f} with {sizes[0]} ({len(found[sizes[0]])} subsets), {high:.3f} with {sizes[-1]}", 1)))
        return rows

    # Pictures

    def chart(self, path, title, x_label, y_label, curves, extra=""):
        """`curves`: [(label, [(x, y)], dashed)]."""
        blocks, plots, greys = [], [], itertools.cycle(("#333333", "#777777", "#aaaaaa", "#cccccc"))
        for place, (label, points, dashed) in enumerate(curves):
            blocks.append(f"$data{place} << EOD\n" + "".join(f"{x} {y}\n" for x, y in points) + "EOD\n")
            style = "lines dashtype 2 linewidth 1.5" if dashed else "linespoints linewidth 1.8 pointtype 7 pointsize 0.6"
            colour = f"rgb '{next(greys)}'" if dashed else str(place + 1)
            plots.append(f"$data{place} using 1:2 with {style} linecolor {colour} title '{label}'")
        many = len(curves) > 5
        key = "set key outside right center vertical\nset bmargin 4" if many else "set key outside bottom center horizontal\nset bmargin 7.5"
        self.gnuplot(path, 960 if many else 760, 460, f"set title '{title}'\nset xlabel '{x_label}'\nset ylabel '{y_label}'\nset grid linecolor '#dddddd'\n{key}\n"
                     f"set autoscale xfix\nset border 3\nset tics nomirror\n{extra}\n" + "".join(blocks) + "plot " + ", ".join(plots) + "\n", 13)

    def gnuplot(self, path, width, height, program, letters=12):
        with common.written(path) as new:
            text = f"set terminal svg size {width},{height} dynamic background 'white' font 'Helvetica,{letters}'\nset output '{new}'\n{program}"
            done = subprocess.run(["gnuplot"], input=text, text=True, capture_output=True)
            if done.returncode != 0:
                common.fail(f"gnuplot: {done.stderr.strip()}")

    def heats(self, path, panels, columns, settings, gap, drop):
        """`panels`: [(title, matrix, gnuplot's words for its axes)], `columns` of them in a row; `gap` is between them for the colours and what is on the
        left of the next, `drop` below each for what stands there and the next one's title."""
        rows, side, left, right, top = -(-len(panels) // columns), 200, gap - 65, 65, 40
        width, height = left + columns * side + (columns - 1) * gap + right, top + rows * (side + drop)
        program = (f"set multiplot layout {rows},{columns} margins {left / width},{(width - right) / width},{drop / height},{1 - top / height} spacing {gap / width},{drop / height}\n"
                   f"set palette defined (0 '#ffffff', 0.5 '#6baed6', 1 '#08306b')\nset palette maxcolors 40\nunset key\nset cbtics offset -0.7\n{settings}\n")
        for place, (title, matrix, words) in enumerate(panels):
            program += f"$m{place} << EOD\n" + "".join(" ".join(f"{value:.5g}" for value in row) + "\n" for row in matrix) + f"EOD\nset title '{title}'\n{words.format(f'$m{place}')}\n"
        self.gnuplot(path, width, height, program + "unset multiplot\n")

    def of_pairs(self, folder, made):
        """The second paper's Figure 4: Task Arithmetic on pairs, one task's normalized score against the other's."""
        blocks, plots, seed, ends = [], [], self.settings["seeds"][0], []
        for place, way in enumerate(MERGED):
            single = common.accuracies(self.results.get(f"seed{seed}/{way}/subset single") or {})
            pairs = [(names, one) for names, one in self.subset_results(way, "task-arithmetic") if len(names) == 2 and single]
            if pairs:
                points = [(one[a] / single[a], one[b] / single[b]) for (a, b), one in pairs]
                ends += [value for point in points for value in point]
                blocks.append(f"$data{place} << EOD\n" + "".join(f"{x} {y}\n" for x, y in points) + "EOD\n")
                # Open shapes, the first the largest: points of several ways that coincide are all seen.
                plots.append(f"$data{place} using 1:2 with points pointtype {(6, 4, 8, 10, 12)[place]} pointsize {1.9 - 0.3 * place:.1f} linewidth 1.5 linecolor rgb '{COLOURS[way]}' title '{WAYS[way]} ({len(pairs)} pairs)'")
        if plots:
            low, high = min(ends) - 0.03, max(ends) + 0.03
            words = "Task Arithmetic on pairs of tasks: the normalized accuracy of one against that of the other."
            self.gnuplot(folder / "pairs-of-tasks.svg", 800, 470, "set title 'Pairs of tasks merged by Task Arithmetic, normalized accuracy'\nset size square\nset grid linecolor '#dddddd'\nset key outside right center vertical\n"
                         f"set xrange [{low:.3f}:{high:.3f}]\nset yrange [{low:.3f}:{high:.3f}]\nset xlabel 'first task'\nset ylabel 'second task'\n" + "".join(blocks) + "plot " + ", ".join(plots) + "\n")
            made["pairs-of-tasks"] = words

    def of_cosines(self, folder, made):
        panels, tics = [], ", ".join(f"'{name}' {place}" for place, name in enumerate(self.names))
        edge = len(self.names) - 0.5
        for way in MERGED:
            rows = self.results.get(f"seed{self.settings['seeds'][0]}/{way}/cosines" + (" of phi" if way not in WHOLE else ""))
            if rows:
                panels.append((WAYS[way], rows, f"set xrange [-0.5:{edge}]\nset yrange [{edge}:-0.5]\nplot {{}} matrix with image pixels"))
        if panels:
            self.heats(folder / "cosines.svg", panels, min(3, len(panels)), "set palette defined (-1 '#b2182b', -0.5 '#f4a582', 0 '#ffffff', 0.5 '#6baed6', 1 '#08306b')\nset palette maxcolors 61\n"
                       f"set cbrange [-0.3:0.3]\nset xtics ({tics}) rotate by 90 right\nset ytics ({tics})", 190, 150)
            made["cosines"] = ("Cosines of task vectors, of what is trained: white is 0, red is negative, 0.3 and more in the darkest blue; the diagonal is 1. "
                               f"Seed {self.settings['seeds'][0]}.")

    def of_planes(self, folder, made):
        box = "set object 1 rectangle from 0,0 to 1,1 fillstyle empty border linecolor rgb '#cc0000' linewidth 2 front"
        for kind, name, words in (("xi", "disentanglement", "ξ(λ1, λ2): predictions on two tasks that change when the other task's vector is added, both tasks' shares added (2 at most; 1 and more in the darkest colour); the paper's box in red."),
                                  ("loss", "loss-planes", "Cross-entropy of two tasks over the plane of their task vectors, mean of both; the box from the base to both vectors in red.")):
            panels, values = [], []
            for pair in self.settings["planes"]:
                for way in MERGED:
                    one = self.results.get(f"seed{self.settings['seeds'][0]}/{way}/plane/{'+'.join(pair)}")
                    if one:
                        first, step = one["grid"][0], one["grid"][1] - one["grid"][0]
                        values += [value for row in one[kind] for value in row]
                        panels.append((f"{WAYS[way]}: {pair[0]}, {pair[1]}", one[kind], f"plot {{}} matrix using ({first} + {step} * $1):({first} + {step} * $2):3 with image pixels"))
            if panels:
                top = 1 if kind == "xi" else sorted(values)[int(0.95 * len(values))]
                self.heats(folder / f"{name}.svg", panels, len([way for way in MERGED if self.disentanglement(way)]),
                           f"set cbrange [{0 if kind == 'xi' else min(values):.3f}:{top:.3f}]\n{box}\nset xlabel 'λ1'\nset ylabel 'λ2'\nset autoscale fix", 150, 110)
                made[name] = words

    def of_embeddings(self, folder, made):
        found = self.results.get(f"seed{self.settings['seeds'][0]}/full/embeddings")
        if found:
            names = common.read_json(self.work / "tasks.json")[found["task"]]["labels"]
            colours = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#333333", "#17becf", "#7f7f7f", "#98df8a", "#c49c94"]
            styles = [f"pointtype {(7, 5, 9)[k % 3]} pointsize 0.5 linecolor rgb '{colours[k % len(colours)]}'" for k in range(len(names))]
            program = "set multiplot\nunset key\nunset tics\nset offsets graph 0.06, graph 0.06, graph 0.06, graph 0.06\nset tmargin at screen 0.88\nset bmargin at screen 0.04\n"
            for place, words in enumerate(("Pre-Trained", "Task Arithmetic", "PERU-FFT, m = 10%", "Single-Task")):
                program += f"$e{place} << EOD\n" + "".join(f"{a} {b} {label}\n" for (a, b), label in zip(found["points"][words], found["labels"])) + "EOD\n"
                program += f"set title '{words}'\nset lmargin at screen {0.01 + 0.18 * place:.3f}\nset rmargin at screen {0.18 * (place + 1):.3f}\n"
                program += "plot " + ", ".join(f"$e{place} using ($3 == {k} ? $1 : NaN):2 with points {style}" for k, style in enumerate(styles)) + "\n"
            program += ("unset title\nunset border\nset lmargin at screen 0.74\nset rmargin at screen 0.99\nset key at screen 0.995, screen 0.88 top right Right samplen 1 spacing 1.1\nset xrange [0:1]\nset yrange [0:1]\n"
                        "plot " + ", ".join(f"NaN with points {style} title \"{name}\"" for name, style in zip(names, styles)) + "\n")
            self.gnuplot(folder / "embeddings.svg", 1240, 300, program + "unset multiplot\n")
            made["embeddings"] = f"Embeddings of the {len(found['labels'])} test texts of '{found['task']}' in the plane (t-SNE by scikit-learn), a colour for each class."

    def of_sizes(self, folder, made):
        """The second paper's Figures 9–11: a panel for each method, a curve for each way."""
        for normalized in (True, False):
            panels, ends, word = [], [], "normalized" if normalized else "absolute"
            for method in self.settings["subset_methods"]:
                curves = [(way, found) for way in MERGED if len(found := self.subset_scores(way, method, normalized)) > 1]
                if curves:
                    panels.append((method, curves))
                    ends += [statistics.fmean(values) for _, found in curves for values in found.values()]
            if not panels:
                continue
            columns = 2 if len(panels) > 1 else 1
            rows = -(-len(panels) // columns)
            low, high = min(ends) - 0.02, max(ends) + 0.02
            program = (f"set multiplot layout {rows},{columns} margins 0.08,0.98,{0.26 if rows > 1 else 0.4},0.92 spacing 0.09,0.13\nset grid linecolor '#dddddd'\nset border 3\nset tics nomirror\n"
                       f"set yrange [{low:.3f}:{high:.3f}]\nset xtics 1\nset autoscale xfix\nset xlabel 'tasks merged' offset 0,0.5\nset ylabel '{word} accuracy'\n"
                       "set key at screen 0.53, screen 0.01 bottom center horizontal samplen 2 width 2 maxrows 2\n")
            for place, (method, curves) in enumerate(panels):
                plots = []
                for way, found in curves:
                    name = f"$d{place}_{way}"
                    program += f"{name} << EOD\n" + "".join(f"{size} {statistics.fmean(values)}\n" for size, values in found.items()) + "EOD\n"
                    plots.append(f"{name} using 1:2 with linespoints linewidth 1.8 pointtype 7 pointsize 0.6 linecolor rgb '{COLOURS[way]}' title '{WAYS[way]}'")
                program += f"set title '{MERGES[method]}'\nplot " + ", ".join(plots) + "\nunset key\n"
            self.gnuplot(folder / f"{word}-against-tasks.svg", 860, 170 + 240 * rows, program + "unset multiplot\n")
            made[f"{word}-against-tasks"] = f"{word.capitalize()} accuracy, the mean over all eight tasks, merged or not, against the number of tasks merged."

    def pictures(self, folder):
        folder.mkdir(exist_ok=True)
        densities, made = self.settings["densities"], {}
        points = {"Post-Pruning": "full/post-pruning", **{f"PERU-FFT of {MERGES[method]}": f"full/peru-fft/{method}" for method in self.settings["peru"]}}
        curves = []
        for label, key in points.items():
            start = "base" if key.endswith("pruning") else f"full/merge/{key.split('/')[-1]}"
            first = statistics.fmean(self.results["base"].values()) if start == "base" else statistics.fmean(self.means(start)) if self.means(start) else None
            line = ([(0, 100 * first)] if first is not None else []) + [(100 * m, 100 * statistics.fmean(self.means(f"{key}/{m}"))) for m in densities if self.means(f"{key}/{m}")]
            if len(line) > 1:
                curves.append((label, line, False))
        if curves and self.means("full/single"):
            single = 100 * statistics.fmean(self.means("full/single"))
            curves.append(("Single-Task", [(0, single), (100 * densities[-1], single)], True))
            self.chart(folder / "accuracy-against-m.svg", "Eight tasks, full fine-tuning", "entries kept of each task, m (%)", "mean accuracy (%)", curves)
            made["accuracy-against-m"] = "Accuracy against the share of entries that is kept; at m = 0 stand the base and the merged models."
        line = [(q, 100 * statistics.fmean(self.means(f"lora128/peru-lora/{q}"))) for q in self.settings["ranks"] if self.means(f"lora128/peru-lora/{q}")]
        if line:
            ends, curves = (line[0][0], line[-1][0]), [("PERU-LoRA", line, False)]
            best, name = self.best_of("lora128", self.settings["lora_methods"])
            for label, key in (("the adapters as they are, r = 128", "lora128/single"), (f"their best merge, {name}", best)):
                if key and self.means(key):
                    value = 100 * statistics.fmean(self.means(key))
                    curves.append((label, [(ends[0], value), (ends[1], value)], True))
            values = [y for _, points, _ in curves for _, y in points]
            self.chart(folder / "accuracy-against-q.svg", "Eight tasks, LoRA of rank 128 cut to rank q", "rank kept, q", "mean accuracy (%)", curves,
                       f"set logscale x 2\nset xtics ({', '.join(str(q) for q, _ in line)})\nset yrange [{math.floor(min(values)) - 1}:{math.ceil(max(values)) + 1}]")
            made["accuracy-against-q"] = "Accuracy against the rank that PERU-LoRA keeps, beside that of the uncut adapters and of the best of their merges."
        errors, _ = self.truncation()
        if errors:
            self.chart(folder / "error-against-q.svg", "LoRA of rank 128 cut to rank q", "rank kept, q", "relative error of the update",
                       [("mean over layers, tasks and seeds", sorted(errors.items()), False)], "set logscale y")
            made["error-against-q"] = "What the cut to rank q loses of the updates, on a logarithmic scale: an exponential is a line."
        self.of_sizes(folder, made)
        self.of_pairs(folder, made)
        self.of_cosines(folder, made)
        self.of_planes(folder, made)
        self.of_embeddings(folder, made)
        return made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--settings", type=pathlib.Path, required=True)
    parser.add_argument("--page", type=pathlib.Path, required=True, help="its blocks between markers are replaced, pictures go to the folder of its name")
    given = parser.parse_args()
    settings = common.read_json(given.settings)
    if not settings or "base" not in common.read_json(given.work / "results.json", {}):
        common.fail(f"nothing is measured yet in {given.work}: 'scripts/reproduce' measures, hours on two cores")
    report = Report(given.work, settings)
    if not report.means("full/single"):
        common.fail(f"the fine-tuned models in {given.work} are not scored yet: 'scripts/reproduce' goes on with that")
    made = report.pictures(given.page.with_suffix(""))
    blocks = {"run": report.hours(), "setting": report.setting(), "first": report.first_paper(), "second": report.second_paper(), "subsets": report.subsets(), "truncation": report.errors(), "maps": report.maps(), "claims": report.claims(),
              "pictures": [line for name, words in made.items() for line in (f"![{words}]({given.page.stem}/{name}.svg)", "", words, "")]}
    common.replace_blocks(given.page, blocks)
    print("\n".join(report.claims()))


if __name__ == "__main__":
    main()
