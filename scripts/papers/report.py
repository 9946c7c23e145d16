# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures of results.json: docs/reproduction.md between its markers, and the SVG files beside it. Needs gnuplot."""
import argparse
import math
import pathlib
import re
import statistics
import subprocess

import common

WAYS = {"full": "full fine-tuning", "lora16": "LoRA, r = 16", "llora16": "L-LoRA, r = 16", "lora128": "LoRA, r = 128"}
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

    def second_paper(self):
        ways = [way for way in ("full", "lora16", "llora16") if self.seeds(f"{way}/single")]
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
        lines.append("| the paper's authors (CLIP) | " + " | ".join({"full": "0.202", "lora16": "0.233", "llora16": "0.102"}[way] for way in ways) + " |")
        return lines

    def cosine(self, way, phi=True):
        """Mean over pairs of tasks, of what is trained: for adapters their own parameters, or the updates that they make."""
        found = []
        for seed in self.settings["seeds"]:
            rows = self.results.get(f"seed{seed}/{way}/cosines" + (" of phi" if phi and way != "full" else ""))
            if rows:
                found += [rows[r][c] for r in range(len(rows)) for c in range(r)]
        return statistics.fmean(found) if found else None

    def subset_scores(self, way, method, normalized):
        """{size: [mean over all tasks]} of the subsets that were measured."""
        seed = self.settings["seeds"][0]
        single, found = self.results.get(f"seed{seed}/{way}/single"), {}
        for key, value in self.results.items():
            head = f"seed{seed}/{way}/subset/{method}/"
            if key.startswith(head):
                found.setdefault(key[len(head):].count("+") + 1, []).append(value["test"])
        every = self.results.get(f"seed{seed}/{way}/merge/{method}")
        if every and found:
            found[len(self.names)] = [every["test"]]
        return {size: [statistics.fmean(one[name] / (single[name] if normalized else 1) for name in self.names) for one in list_] for size, list_ in sorted(found.items())}

    def subsets(self):
        lines = []
        for normalized in (True, False):
            sizes = range(2, len(self.names) + 1)
            rows = []
            for way in ("full", "lora16", "llora16"):
                for method in self.settings["subset_methods"]:
                    found = self.subset_scores(way, method, normalized)
                    if found:
                        rows.append(f"| {WAYS[way]}, {MERGES[method]} | " + " | ".join(f"{statistics.fmean(found[size]):.3f}" if size in found else "–" for size in sizes) + " |")
            if rows:
                lines += [f"| {'normalized' if normalized else 'absolute'}, over all eight tasks; tasks merged: | " + " | ".join(map(str, sizes)) + " |",
                          "|---" * (1 + len(sizes)) + "|", *rows, ""]
        if lines:
            counts = {size: len(found) for size, found in self.subset_scores("full", self.settings["subset_methods"][0], True).items()}
            lines.append("Subsets measured of each size, drawn at random, the same for all rows: " + ", ".join(f"{size}: {count}" for size, count in counts.items())
                         + f". Seed {self.settings['seeds'][0]} alone.")
        else:
            lines.append("No subsets were measured in this run.")
        return lines

    # What the papers say

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
        noise = 0.45 * math.sqrt(2 / self.tested())
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
                word = ("holds" if a >= b else "does not hold") + (", within noise" if abs(a - b) < 0.02 else "")
                lines.append(f"| L Table 1, Figures 9–11 | L-LoRA merges better than LoRA by {MERGES[method]}, normalized, all tasks | {word} | {a:.3f} against {b:.3f}; absolute {absolute[0]:.1f} against {absolute[1]:.1f} |")
        cosines = {way: self.cosine(way) for way in ("full", "lora16", "llora16")}
        for way in ("lora16", "full"):
            if cosines[way] is not None and cosines["llora16"] is not None:
                word = "holds" if cosines["llora16"] < cosines[way] else "does not hold"
                lines.append(f"| L Figures 2, 8 | L-LoRA's task vectors are closer to orthogonal than those of {WAYS[way]} | {word} | mean cosine {cosines['llora16']:.3f} against {cosines[way]:.3f} |")
        for way in ("full", "llora16"):
            found = self.subset_scores(way, "task-arithmetic", True)
            if found:
                sizes = sorted(found)
                low, high = statistics.fmean(found[sizes[0]]), statistics.fmean(found[sizes[-1]])
                lines.append(f"| L Table 1 | {WAYS[way]}: Task Arithmetic's average over all tasks rises with the number merged | {'holds' if high > low else 'does not hold'} | "
                             f"{low:.3f} with {sizes[0]}, {high:.3f} with {sizes[-1]} |")
        return lines

    # Pictures

    def chart(self, path, title, x_label, y_label, curves, extra=""):
        """`curves`: [(label, [(x, y)], dashed)]."""
        blocks, plots, greys = [], [], iter(("#333333", "#888888", "#bbbbbb"))
        for place, (label, points, dashed) in enumerate(curves):
            blocks.append(f"$data{place} << EOD\n" + "".join(f"{x} {y}\n" for x, y in points) + "EOD\n")
            style = "lines dashtype 2 linewidth 1.5" if dashed else "linespoints linewidth 1.8 pointtype 7 pointsize 0.6"
            colour = f"rgb '{next(greys)}'" if dashed else str(place + 1)
            plots.append(f"$data{place} using 1:2 with {style} linecolor {colour} title '{label}'")
        program = (f"set terminal svg size 760,460 dynamic background 'white' font 'Helvetica,13'\nset output '{path}'\nset title '{title}'\nset xlabel '{x_label}'\n"
                   f"set ylabel '{y_label}'\nset grid linecolor '#dddddd'\nset key outside bottom center horizontal\nset bmargin 7.5\nset autoscale xfix\nset border 3\nset tics nomirror\n{extra}\n"
                   + "".join(blocks) + "plot " + ", ".join(plots) + "\n")
        done = subprocess.run(["gnuplot"], input=program, text=True, capture_output=True)
        if done.returncode != 0:
            common.fail(f"gnuplot: {done.stderr.strip()}")

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
        for normalized in (True, False):
            curves = []
            for way in ("full", "lora16", "llora16"):
                for method in self.settings["subset_methods"]:
                    found = self.subset_scores(way, method, normalized)
                    if found:
                        curves.append((f"{WAYS[way]}, {MERGES[method]}", [(size, statistics.fmean(values)) for size, values in found.items()], method == "average"))
            if curves:
                word = "normalized" if normalized else "absolute"
                self.chart(folder / f"{word}-against-tasks.svg", "Mean over all eight tasks, merged or not", "tasks merged", f"{word} accuracy", curves)
                made[f"{word}-against-tasks"] = f"{word.capitalize()} accuracy over all eight tasks against the number of tasks merged."
        return made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--settings", type=pathlib.Path, required=True)
    parser.add_argument("--page", type=pathlib.Path, required=True, help="its blocks between markers are replaced, pictures go to the folder of its name")
    given = parser.parse_args()
    report = Report(given.work, common.read_json(given.settings))
    made = report.pictures(given.page.with_suffix(""))
    blocks = {"setting": report.setting(), "first": report.first_paper(), "second": report.second_paper(), "subsets": report.subsets(), "claims": report.claims(),
              "pictures": [line for name, words in made.items() for line in (f"![{words}]({given.page.stem}/{name}.svg)", "", words, "")]}
    text = given.page.read_text()
    for name, lines in blocks.items():
        pattern = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(text):
            common.fail(f"{given.page} has no markers '<!-- measured: {name} -->' and '<!-- end -->'")
        text = pattern.sub(lambda found: found[1] + "\n".join(lines).rstrip() + "\n" + found[2], text)
    given.page.write_text(text)
    print("\n".join(report.claims()))


if __name__ == "__main__":
    main()
