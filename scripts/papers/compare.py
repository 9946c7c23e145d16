# SPDX-License-Identifier: Apache-2.0
"""compare.py --work FOLDER --other FOLDER [--page PAGE]: whether the results of two runs agree, mean by mean: the intervals of mean ± standard deviation over
seeds overlap. Where a run has one seed: within the standard error of its test texts for accuracies, and 5 % of the larger for other numbers. What differs is
printed, and the exit status is 1 then."""
import argparse
import math
import pathlib
import re
import statistics
import sys

import common
import settings


def numbers(key, value, texts):
    """[(what, number, is an accuracy, of so many texts)] of a result."""
    if isinstance(value, (int, float)):
        return [("", float(value), False, 0)]
    if key.endswith("cosines") or key.endswith("cosines of phi"):
        return [("mean", statistics.fmean(value[r][c] for r in range(len(value)) for c in range(r)), False, 0)]
    if "/plane/" in key:
        return [(f"mean {kind}", statistics.fmean(one for row in value[kind] for one in row), False, 0) for kind in ("loss", "xi")]
    if key.endswith("truncation"):
        return [(f"error at q = {rank}", error, False, 0) for rank, error in value["errors"].items()] + [("decay", value["decay"], False, 0)]
    if key.endswith("embeddings"):
        return []  # a picture
    return [("mean accuracy", statistics.fmean(common.accuracies(value).values()), True, texts["subset" if "/subset" in key else "test"])]


def facts(settings, tasks):
    """What the comparison needs of the tasks: how many texts there are to test on, and which they are."""
    limits = {"test": settings["limits"]["test"], "subset": settings["subset_limits"]["test"]}
    return {"texts": {kind: sum(min(limit, len(task["test"])) for task in tasks.values()) for kind, limit in limits.items()}, "digest": common.digest(tasks)}


class Run:
    def __init__(self, work):
        self.settings, self.results = common.read_json(work / "settings.json"), common.read_json(work / "results.json")
        tasks = common.read_json(work / "tasks.json")
        if not (self.settings and self.results and (tasks or "tasks" in self.settings)):
            common.fail(f"nothing is measured in {work}: it lacks settings.json, tasks.json or results.json of scripts/reproduce")
        of_tasks = self.settings["tasks"] if tasks is None else facts(self.settings, tasks)  # published results have no texts
        texts = of_tasks["texts"]
        self.means, self.digest = {}, of_tasks["digest"]
        for key, value in self.results.items():
            for what, number, accuracy, count in numbers(key, value, texts):
                row = re.sub(r"^seed\d+/", "", key) + (f": {what}" if what else "")
                self.means.setdefault(row, ([], accuracy, count))[0].append(number)


def spread(found):
    """What a mean may be off by."""
    values, accuracy, texts = found
    if len(values) > 1:
        return statistics.stdev(values)
    return 0.45 / math.sqrt(texts) if accuracy else 0.05 * abs(values[0])


def compare(mine, other):
    """(how many rows agree, of which to the last digit, [what differs], [what one of them lacks])."""
    agree, same, differ, lacking = 0, 0, [], []
    for row in sorted(mine.means.keys() | other.means.keys()):
        if row not in mine.means or row not in other.means:
            lacking.append(f"{row} is measured in {'the first' if row in mine.means else 'the second'} alone")
            continue
        a, b = mine.means[row], other.means[row]
        first, second, room = statistics.fmean(a[0]), statistics.fmean(b[0]), spread(a) + spread(b)
        if abs(first - second) <= room + 1e-12:
            agree, same = agree + 1, same + (sorted(a[0]) == sorted(b[0]))
        else:
            differ.append(f"{row} is {first:.4f} ± {spread(a):.4f} ({len(a[0])} seeds) and {second:.4f} ± {spread(b):.4f} ({len(b[0])} seeds)")
    return agree, same, differ, lacking


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--other", type=pathlib.Path, required=True)
    parser.add_argument("--page", type=pathlib.Path, help="its block 'again' is replaced")
    given = parser.parse_args()
    mine, other = Run(given.work), Run(given.other)
    if mine.settings.get("model") != other.settings.get("model"):
        common.fail(f"{given.work} and {given.other} are of different models: {mine.settings.get('encoder')} and {other.settings.get('encoder')}")
    different = sorted(key for key in mine.settings.keys() | other.settings.keys()
                       if key != "tasks" and key not in settings.FREE and mine.settings.get(key) != other.settings.get(key))
    if different:
        common.fail(f"{given.work} and {given.other} are of different settings ({', '.join(different)}): no comparison says anything")
    agree, same, differ, lacking = compare(mine, other)
    if not agree + len(differ):
        common.fail(f"{given.work} and {given.other} have no result in common")
    texts = "" if mine.digest == other.digest else " apt's lists gave them different texts."
    seeds = " and ".join(", ".join(map(str, run.settings["seeds"])) for run in (mine, other))
    words = (f"Two runs, each from nothing (seeds {seeds}): of {agree + len(differ)} means {agree} agree within their deviations, {same} of them to the last digit; "
             f"{len(differ)} differ.{texts}")
    print("\n".join([*lacking, *differ, words]))
    if given.page and given.page.exists():
        common.replace_blocks(given.page, {"again": [words, *(["", *(f"- {line}" for line in differ)] if differ else [])]})
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
