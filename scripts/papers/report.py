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

WAYS = {"full": "full fine-tuning", "lora16": "LoRA, r = 16", "llora16": "L-LoRA, r = 16", "linearized": "full linearization", "lora128": "LoRA, r = 128"}
MERGED = ("full", "lora16", "llora16", "linearized")  # the second paper's
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
                found.append(value["test"] if isinstance(value, dict) and "test" in value else value)
        return found

    def means(self, key):
        return [sum(one.values()) / len(one) for one in self.seeds(key)]

    def parameters(self):
        """Of the trained layers, and of an adapter of rank 1."""
        from safetensors import safe_open
        with safe_open(self.work / "base" / "model.safetensors", "np") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        adapted = [shape for key, shape in shapes.items() if re.search(r"\.(query|value)\.weight$", key)]
        return sum(math.prod(shape) for shape in shapes.values()), sum(sum(shape) for shape in adapted), len(adapted)

    def tested(self):
        tasks = common.read_json(self.work / "tasks.json")
        return sum(min(self.settings["limits"]["test"], len(task["test"])) for task in tasks.values())

    # Text

    @staticmethod
    def percent(values):
        if not values:
            return "–"
        mean = f"{100 * statistics.fmean(values):.1f}"
        return mean + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")

    def row(self, words, key, parameters):
        found = self.seeds(key)
        if not found:
            return []
        tasks = [f"{100 * statistics.fmean(one[name] for one in found):.1f}" for name in self.names]
        return ["| " + " | ".join([words, f"{parameters / 1e6:.2f}", *tasks, self.percent(self.means(key))]) + " |"]

    def head(self, first):
        words = [first, "parameters (M)", *self.names, "mean"]
        return ["| " + " | ".join(words) + " |", "|---" * len(words) + "|"]

    def measured_seeds(self):
        """Which seeds went how far: some may be of the first paper alone."""
        last = {"the first paper's tables": f"lora128/peru-lora/{self.settings['ranks'][-1]}", "the second's": "llora16/merge/lorahub"}
        found = {words: [str(seed) for seed in self.settings["seeds"] if f"seed{seed}/{key}" in self.results] for words, key in last.items()}
        return "Seeds: " + ", ".join(f"{', '.join(seeds) or 'none'} for {words}" for words, seeds in found.items()) + " (a figure without ± is of one seed)"

    def setting(self):
        s, tasks = self.settings, common.read_json(self.work / "tasks.json")
        total, _, _ = self.parameters()
        count = {name: min(s["limits"]["test"], len(task["test"])) for name, task in tasks.items()}
        lines = [f"{self.measured_seeds()}; the upper {s['layers']} of 6 layers are trained ({total / 1e6:.2f} million parameters), what is below "
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

    def first_paper(self):
        total, of_rank, layers = self.parameters()
        n = len(self.names)
        lines = self.head("full fine-tuning")
        base = self.results["base"]
        lines += ["| " + " | ".join(["Pre-Trained", f"{total / 1e6:.2f}", *(f"{100 * base[name]:.1f}" for name in self.names), f"{100 * statistics.fmean(base.values()):.1f}"]) + " |"]
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
        for method in ("average", "task-arithmetic", "ties"):
            lines += self.row(MERGES[method], f"lora128/merge/{method}", total)
        for rank in self.settings["ranks"]:
            lines += self.row(f"PERU-LoRA, q = {rank}", f"lora128/peru-lora/{rank}", total + n * rank * (of_rank + layers))
        return lines

    def ways(self):
        return [way for way in MERGED if self.seeds(f"{way}/single")]

    def second_paper(self):
        ways = self.ways()
        lines = ["| all eight tasks merged | " + " | ".join(f"{WAYS[way]}: absolute | normalized" for way in ways) + " |", "|---" * (1 + 2 * len(ways)) + "|"]

        def cells(key):
            result = []
            for way in ways:
                found, single = self.seeds(f"{way}/{key}"), self.seeds(f"{way}/single")
                normalized = [statistics.fmean(one[name] / own[name] for name in self.names) for one, own in zip(found, single)]
                result += [self.percent(self.means(f"{way}/{key}")), self.percent(normalized)]
            return result

        lines.append("| Single-Task | " + " | ".join(cells("single")) + " |")
        for method in ("average", "task-arithmetic", "ties", "lorahub"):
            lines.append(f"| {MERGES[method]} | " + " | ".join(cells(f"merge/{method}")) + " |")
        lines += ["", "| cosines of task vectors, mean over pairs | " + " | ".join(WAYS[way] for way in ways) + " |", "|---" * (1 + len(ways)) + "|"]
        for words, phi in (("here, of what is trained (L's)", True), ("here, of the weights' changes", False)):
            found = [self.cosine(way, phi) for way in ways]
            lines.append(f"| {words} | " + " | ".join(f"{value:.3f}" if value is not None else "–" for value in found) + " |")
        lines.append("| the paper's authors (CLIP) | " + " | ".join({"full": "0.202", "lora16": "0.233", "llora16": "0.102"}.get(way, "–") for way in ways) + " |")
        lines += ["", *self.of_each_task(ways)]
        return lines

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

    def cosine(self, way, phi=True):
        """Mean over pairs of tasks, of what is trained: for adapters their own parameters, or the updates that they make."""
        found = []
        for seed in self.settings["seeds"]:
            rows = self.results.get(f"seed{seed}/{way}/cosines" + (" of phi" if phi and way not in WHOLE else ""))
            if rows:
                found += [rows[r][c] for r in range(len(rows)) for c in range(r)]
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
        single, found = self.results.get(f"seed{self.settings['seeds'][0]}/{way}/subset single"), {}
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
                         f"{limits['validation']} texts to choose by and the first {limits['test']} to test.")
            far = self.results.get(f"seed{self.settings['seeds'][0]}/linearized/combined against merged")
            if far is not None:
                lines.append(f"Scores of the average of all eight fully linearized models that follow from derivatives, and those of the model that the tool merged, differ by at most {100 * far:.1f} percent points on a task.")
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

    def judged(self, first, second, least=0.0):
        """Whether `first` - `second` is at least `least`, over the seeds that have both: a word and the numbers."""
        a, b = [], []
        for seed in self.settings["seeds"]:
            both = [self.results.get(f"seed{seed}/{key}") for key in (first, second)]
            if all(both):
                for value, list_ in zip(both, (a, b)):
                    list_.append(statistics.fmean((value["test"] if "test" in value else value).values()))
        if not a:
            return None
        differences = [x - y for x, y in zip(a, b)]
        mean = statistics.fmean(differences)
        deviation = statistics.stdev(differences) if len(differences) > 1 else None
        noise = self.noise(self.tested())
        word = "holds" if mean >= least else "does not hold"
        if abs(mean - least) <= max(noise, deviation or 0):
            word += ", within noise"
        numbers = f"{100 * statistics.fmean(a):.1f} against {100 * statistics.fmean(b):.1f}" + (f" (difference {100 * mean:+.1f} ± {100 * deviation:.1f})" if deviation is not None else "")
        return word, numbers

    def claims(self):
        merges = [f"full/merge/{method}" for method in self.settings["methods"] if self.means(f"full/merge/{method}")]
        best = max(merges, key=lambda key: statistics.fmean(self.means(key)), default=None)
        lora = [f"lora128/merge/{method}" for method in ("average", "task-arithmetic", "ties") if self.means(f"lora128/merge/{method}")]
        best_lora = max(lora, key=lambda key: statistics.fmean(self.means(key)), default=None)
        peru = f"full/peru-fft/{self.settings['peru'][0]}"
        name = MERGES[best.split("/")[-1]] if best else ""
        tables = "P §4.1–2, Tables 1–4"
        rows = [
            (tables, f"no merge comes near the single-task models: 5 points or more below (best: {name})", "full/single", best, 0.05),
            (tables, f"Post-Pruning (10%) is far above every merge: 5 points or more (best: {name})", "full/post-pruning/0.1", best, 0.05),
            (tables, f"PERU-FFT (10%) is above every merge (best: {name})", f"{peru}/0.1", best, 0.0),
            (tables, "PERU-FFT (10%) is close to the single-task models: within 3 points", f"{peru}/0.1", "full/single", -0.03),
            ("P §4.1, Figure 5", "PERU-FFT is above Post-Pruning at m = 10%", f"{peru}/0.1", "full/post-pruning/0.1", 0.0),
            ("P §4.1", "PERU-FFT (5%) is as good as Post-Pruning (10%)", f"{peru}/0.05", "full/post-pruning/0.1", -0.005),
            ("P Figure 5", "PERU-FFT is saturated at m = 20%: 40% gains less than 0.5 points", f"{peru}/0.2", f"{peru}/0.4", -0.005),
            (tables, "PERU-LoRA (16) is far above every merge of LoRA adapters: 5 points or more", "lora128/peru-lora/16", best_lora, 0.05),
            ("P §4.1–2", "PERU-LoRA (16) is above PERU-FFT (10%), with fewer parameters", "lora128/peru-lora/16", f"{peru}/0.1", 0.0),
            ("P §4.1–2", "LoRA (r = 128) is as good as full fine-tuning: within 1 point", "lora128/single", "full/single", -0.01),
            ("P Figure 6", "q = 40 of 128 is as good as the whole adapter: within 0.5 points", "lora128/peru-lora/40", "lora128/single", -0.005),
            ("L §4.1", "full fine-tuning's own models are above LoRA's", "full/single", "lora16/single", 0.0),
            ("L §4.1", "LoRA's own models are above L-LoRA's", "lora16/single", "llora16/single", 0.0),
        ]
        lines = ["| where | claim | here | |", "|---|---|---|---|"]
        for where, claim, first, second, least in rows:
            found = self.judged(first, second, least) if second else None
            if found:
                lines.append(f"| {where} | {claim} | {found[0]} | {found[1]} |")
        for method in ("task-arithmetic", "ties", "lorahub"):
            values = {}
            for way in ("lora16", "llora16"):
                found, single = self.seeds(f"{way}/merge/{method}"), self.seeds(f"{way}/single")
                values[way] = [statistics.fmean(one[task] / own[task] for task in self.names) for one, own in zip(found, single)]
            if values["lora16"] and values["llora16"]:
                a, b = statistics.fmean(values["llora16"]), statistics.fmean(values["lora16"])
                absolute = [100 * statistics.fmean(self.means(f"{way}/merge/{method}")) for way in ("llora16", "lora16")]
                word = ("holds" if a >= b else "does not hold") + (", within noise" if abs(a - b) <= self.noise(self.tested()) / statistics.fmean(self.means("lora16/single")) else "")
                lines.append(f"| L Table 1, Figures 9–11 | L-LoRA merges better than LoRA by {MERGES[method]}, normalized, all tasks | {word} | {a:.3f} against {b:.3f}; absolute {absolute[0]:.1f} against {absolute[1]:.1f} |")
        cosines = {way: self.cosine(way) for way in ("full", "lora16", "llora16")}
        for way in ("lora16", "full"):
            if cosines[way] is not None and cosines["llora16"] is not None:
                word = "holds" if cosines["llora16"] < cosines[way] else "does not hold"
                lines.append(f"| L Figures 2, 8 | L-LoRA's task vectors are closer to orthogonal than those of {WAYS[way]} | {word} | mean cosine {cosines['llora16']:.3f} against {cosines[way]:.3f} |")
        values = [self.disentanglement(way) for way in ("llora16", "lora16")]
        if all(values):
            a, b = (statistics.fmean(one.values()) for one in values)
            noise = ", within noise" if abs(a - b) <= 2 * self.noise(2 * len(values[0]) * self.settings["plane_texts"]) else ""  # two shares are added
            lines.append(f"| L Figure 6 | L-LoRA's tasks are more disentangled than LoRA's: ξ over the box, mean over pairs | {'holds' if a < b else 'does not hold'}{noise} | {a:.3f} against {b:.3f} |")
        _, found = self.truncation()
        if found:
            explained = statistics.fmean(one["explained"] for one in found)
            lines.append(f"| P §1, Figure 6 | the error of truncation falls exponentially with q: a line explains 95 % of its logarithm | {'holds' if explained >= 0.95 else 'does not hold'} | {100 * explained:.0f} % |")
        for way in MERGED:
            found = self.subset_scores(way, "task-arithmetic", True)
            if found:
                sizes = sorted(found)
                low, high = statistics.fmean(found[sizes[0]]), statistics.fmean(found[sizes[-1]])
                spread = statistics.stdev(found[sizes[0]]) if len(found[sizes[0]]) > 1 else 0.0
                error = self.noise(self.settings["subset_limits"]["test"] * len(self.names)) / statistics.fmean(self.means(f"{way}/single"))
                noise = ", within noise" if abs(high - low) <= max(error, spread) else ""
                lines.append(f"| L Table 1 | {WAYS[way]}: Task Arithmetic's average over all tasks rises with the number merged | {'holds' if high > low else 'does not hold'}{noise} | "
                             f"{low:.3f} with {sizes[0]}, {high:.3f} with {sizes[-1]} |")
        return lines

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
        text = f"set terminal svg size {width},{height} dynamic background 'white' font 'Helvetica,{letters}'\nset output '{path}'\n{program}"
        done = subprocess.run(["gnuplot"], input=text, text=True, capture_output=True)
        if done.returncode != 0:
            common.fail(f"gnuplot: {done.stderr.strip()}")

    def heats(self, path, panels, columns, settings):
        """`panels`: [(title, matrix, gnuplot's words for its axes)], `columns` of them in a row."""
        rows, side, gap, left, top, bottom = -(-len(panels) // columns), 200, 145, 115, 40, 150
        width, height = left + columns * (side + gap), top + bottom + rows * side + (rows - 1) * gap
        program = (f"set multiplot layout {rows},{columns} margins {left / width},{(width - gap) / width},{bottom / height},{1 - top / height} spacing {gap / width},{gap / height}\n"
                   f"set palette defined (0 '#ffffff', 0.5 '#6baed6', 1 '#08306b')\nset palette maxcolors 40\nunset key\n{settings}\n")
        for place, (title, matrix, words) in enumerate(panels):
            program += f"$m{place} << EOD\n" + "".join(" ".join(f"{value:.5g}" for value in row) + "\n" for row in matrix) + f"EOD\nset title '{title}'\n{words.format(f'$m{place}')}\n"
        self.gnuplot(path, width, height, program + "unset multiplot\n")

    def of_pairs(self, folder, made):
        """The second paper's Figure 4: Task Arithmetic on pairs, one task's normalized score against the other's."""
        blocks, plots, seed = [], [], self.settings["seeds"][0]
        for place, way in enumerate(MERGED):
            single = self.results.get(f"seed{seed}/{way}/subset single")
            pairs = [(names, one) for names, one in self.subset_results(way, "task-arithmetic") if len(names) == 2 and single]
            if pairs:
                blocks.append(f"$data{place} << EOD\n" + "".join(f"{one[a] / single[a]} {one[b] / single[b]}\n" for (a, b), one in pairs) + "EOD\n")
                plots.append(f"$data{place} using 1:2 with points pointtype {place + 5} pointsize 0.9 linecolor {place + 1} title '{WAYS[way]}'")
        if plots:
            words = "Task Arithmetic on pairs of tasks: the normalized accuracy of one against that of the other."
            self.gnuplot(folder / "pairs-of-tasks.svg", 520, 520, "set grid linecolor '#dddddd'\nset key outside bottom center horizontal\nset xlabel 'first task'\nset ylabel 'second task'\n"
                         + "".join(blocks) + "plot " + ", ".join(plots) + "\n")
            made["pairs-of-tasks"] = words

    def of_cosines(self, folder, made):
        panels, tics = [], ", ".join(f"'{name}' {place}" for place, name in enumerate(self.names))
        for way in MERGED:
            rows = self.results.get(f"seed{self.settings['seeds'][0]}/{way}/cosines" + (" of phi" if way not in WHOLE else ""))
            if rows:
                panels.append((WAYS[way], rows, "set xrange [-0.5:7.5]\nset yrange [7.5:-0.5]\nplot {} matrix with image pixels"))
        if panels:
            self.heats(folder / "cosines.svg", panels, 2, f"set cbrange [0:0.3]\nset xtics ({tics}) rotate by 90 right\nset ytics ({tics})")
            made["cosines"] = f"Cosines of task vectors, of what is trained (0.3 and more in the darkest colour; the diagonal is 1). Seed {self.settings['seeds'][0]}."

    def of_planes(self, folder, made):
        box = "set object 1 rectangle from 0,0 to 1,1 fillstyle empty border linecolor rgb '#cc0000' linewidth 2 front"
        for kind, name, words in (("xi", "disentanglement", "ξ(λ1, λ2): predictions on two tasks that change when the other task's vector is added, both tasks' shares added; the paper's box in red."),
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
                           f"set cbrange [{0 if kind == 'xi' else min(values):.3f}:{top:.3f}]\n{box}\nset xlabel 'λ1'\nset ylabel 'λ2'\nset autoscale fix")
                made[name] = words

    def of_embeddings(self, folder, made):
        found = self.results.get(f"seed{self.settings['seeds'][0]}/full/embeddings")
        if found:
            classes = max(found["labels"]) + 1
            program = "set multiplot layout 1,4 margins 0.01,0.99,0.03,0.88 spacing 0.02,0.02\nunset key\nunset tics\nunset colorbox\n"
            for place, words in enumerate(("Pre-Trained", "Task Arithmetic", "PERU-FFT, m = 10%", "Single-Task")):
                points = found["points"][words]
                program += f"$e{place} << EOD\n" + "".join(f"{a} {b} {label}\n" for (a, b), label in zip(points, found["labels"])) + "EOD\n"
                program += f"set title '{words}'\nset palette model HSV functions gray,0.9,0.8\nset cbrange [0:{classes}]\nplot $e{place} using 1:2:3 with points pointtype 7 pointsize 0.5 linecolor palette\n"
            self.gnuplot(folder / "embeddings.svg", 1100, 300, program + "unset multiplot\n")
            made["embeddings"] = f"Embeddings of the {len(found['labels'])} test texts of '{found['task']}' in the plane (t-SNE by scikit-learn), a colour for each class."

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
            ends = (line[0][0], line[-1][0])
            curves = [("PERU-LoRA", line, False)]
            for label, key in (("LoRA, r = 128", "lora128/single"), ("its Task Arithmetic", "lora128/merge/task-arithmetic")):
                if self.means(key):
                    value = 100 * statistics.fmean(self.means(key))
                    curves.append((label, [(ends[0], value), (ends[1], value)], True))
            self.chart(folder / "accuracy-against-q.svg", "Eight tasks, LoRA of rank 128 cut to rank q", "rank kept, q", "mean accuracy (%)", curves, "set logscale x 2")
            made["accuracy-against-q"] = "Accuracy against the rank that PERU-LoRA keeps."
        errors, _ = self.truncation()
        if errors:
            self.chart(folder / "error-against-q.svg", "LoRA of rank 128 cut to rank q", "rank kept, q", "relative error of the update",
                       [("mean over layers, tasks and seeds", sorted(errors.items()), False)], "set logscale y")
            made["error-against-q"] = "What the cut to rank q loses of the updates, on a logarithmic scale: an exponential is a line."
        for normalized in (True, False):
            curves = []
            for way in MERGED:
                for method in ("task-arithmetic", "average"):
                    found = self.subset_scores(way, method, normalized)
                    if len(found) > 1:
                        curves.append((f"{WAYS[way]}, {MERGES[method]}", [(size, statistics.fmean(values)) for size, values in found.items()], method == "average"))
            if curves:
                word = "normalized" if normalized else "absolute"
                self.chart(folder / f"{word}-against-tasks.svg", "Mean over all eight tasks, merged or not", "tasks merged", f"{word} accuracy", curves)
                made[f"{word}-against-tasks"] = f"{word.capitalize()} accuracy over all eight tasks against the number of tasks merged."
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
    report = Report(given.work, common.read_json(given.settings))
    made = report.pictures(given.page.with_suffix(""))
    blocks = {"setting": report.setting(), "first": report.first_paper(), "second": report.second_paper(), "subsets": report.subsets(), "truncation": report.errors(), "maps": report.maps(), "claims": report.claims(),
              "pictures": [line for name, words in made.items() for line in (f"![{words}]({given.page.stem}/{name}.svg)", "", words, "")]}
    common.replace_blocks(given.page, blocks)
    print("\n".join(report.claims()))


if __name__ == "__main__":
    main()
