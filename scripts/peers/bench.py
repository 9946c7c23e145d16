"""Runs taskvec and its peers in turn as whole commands on the same files, and writes what they took: see scripts/bench-peers.

This process stays small, and imports nothing but the standard library: a child's peak RSS begins with its parent's."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import ctypes
import dataclasses
import datetime
import hashlib
import json
import math
import os
import pathlib
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
NO_SYNC = """
int fsync(int file) { return file < 0; }
int fdatasync(int file) { return file < 0; }
int sync_file_range(int file, long at, long bytes, unsigned flags) { return file < 0 && at < 0 && bytes < 0 && flags; }
"""
# A side that took longer than this is not run again in the same state of the page cache.
PATIENCE = 180.0
# How often memory is looked at: in runs of ours for nothing else, and beside what the peers do.
OFTEN, RARELY = 0.002, 0.02


def fail(words):
    sys.exit(f"scripts/bench-peers: error: {words}")


# Files and the page cache


def files_of(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


def bytes_of(folders):
    return sum(path.stat().st_size for folder in folders for path in files_of(folder))


LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def share_in_cache(path):
    """How much of a file is in the page cache, from 0 to 1."""
    size = path.stat().st_size
    if size == 0:
        return 1.0
    pages = -(-size // os.sysconf("SC_PAGE_SIZE"))
    with open(path, "rb") as file:
        at = LIBC.mmap(None, size, 1, 1, file.fileno(), 0)
        if at == ctypes.c_void_p(-1).value:
            fail(f"{path}: cannot be mapped: {os.strerror(ctypes.get_errno())}")
        there = ctypes.create_string_buffer(pages)
        failed = LIBC.mincore(at, size, there)
        LIBC.munmap(at, size)
    if failed:
        fail(f"{path}: mincore failed")
    return 1 - there.raw[:pages].translate(bytes(value & 1 for value in range(256))).count(0) / pages


def prepare(folders, cache):
    """Puts the models' files into the page cache, or out of it; what was written before is on the disk first."""
    os.sync()
    for path in (path for folder in folders for path in files_of(folder)):
        if cache == "cold":
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if share_in_cache(path) > 0.02:
                fail(f"{path} stays in the page cache: is it on a tmpfs, or does a program map it?")
        elif share_in_cache(path) < 1:
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 22):
                    pass


def synchronise(folder):
    if folder.exists():
        for path in [*folder.rglob("*"), folder]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


# Commands


def anonymous(process):
    try:
        with open(f"/proc/{process}/smaps_rollup") as file:
            return next((int(line.split()[1]) << 10 for line in file if line.startswith("Anonymous:")), 0)
    except OSError:
        return 0


def run(command, out, folders, cache, environment, every=0.0):
    """One run of a command that writes `out`: seconds until it ends, and until the disk has what it wrote; processor seconds; peak RSS, and where `every`
    is not 0, peak anonymous memory, looked at after so many seconds (RARELY: and for no more than a fiftieth of the time)."""
    shutil.rmtree(out, ignore_errors=True)
    prepare(folders, cache)
    log = out.parent / "log.txt"
    with open(log, "wb") as file:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=file, stderr=file, cwd=out.parent, env=environment)
        peak, ended = 0, 0
        try:
            while every and not ended:
                ended, status, usage = os.wait4(child.pid, os.WNOHANG)
                if not ended:
                    looked = time.perf_counter()
                    peak = max(peak, anonymous(child.pid))
                    time.sleep(max(every, 50 * (time.perf_counter() - looked)) if every == RARELY else every)
            if not ended:
                ended, status, usage = os.wait4(child.pid, 0)
        finally:
            if not ended:
                child.kill()
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        fail(f"exit code {child.returncode}: {' '.join(map(str, command))}\n{log.read_text(errors='replace')[-2000:]}")
    synchronise(out)
    both = time.perf_counter() - start
    shutil.rmtree(out, ignore_errors=True)
    return {"seconds": seconds, "synced": both, "processor": usage.ru_utime + usage.ru_stime, "rss": usage.ru_maxrss << 10, **({"anonymous": peak} if every else {})}


# What is measured


@dataclasses.dataclass
class Row:
    """One line of the table: the peer's command and ours, the folders that both read."""

    words: str
    peer: str
    reads: list
    theirs: list
    ours: list
    caches: tuple = ("warm", "cold")
    like: str = ""  # the row whose peer's measurements hold here too


def configuration(method, models, base=None, parameters=None, every=None):
    lines = [f"merge_method: {method}"] + ([f"base_model: {base}"] if base else []) + ["dtype: bfloat16", "models:"]
    for model in models:
        lines.append(f"  - model: {model}")
        if every and model != base:
            lines.append(f"    parameters: {json.dumps(every)}")
    return "\n".join(lines + ([f"parameters: {json.dumps(parameters)}"] if parameters else [])) + "\n"


def rows_of(work, models, adapters, tool, venv):
    base, *tasks = models
    out = work / "out"
    rows, count = {}, f"{len(tasks)} models"

    def merge(name, words, reads, text):
        path = work / f"{name}.yml"
        path.write_text(text)
        rows[name] = Row(words, "mergekit", reads, [venv / "bin/mergekit-yaml", path, out], [tool, "run", path, "--out", out, "--quiet"])

    weight = round(1 / len(tasks), 3)
    merge("linear", f"linear, {count}", tasks, configuration("linear", tasks, every={"weight": weight}))
    merge("task-arithmetic", f"task arithmetic, {count} and a base", models, configuration("task_arithmetic", tasks, base, every={"weight": weight}))
    merge("ties", f"TIES, {count} and a base", models, configuration("ties", tasks, base, {"density": 0.2, "normalize": True}, {"weight": weight}))
    merge("dare-ties", f"DARE-TIES, {count} and a base", models, configuration("dare_ties", tasks, base, {"density": 0.2}, {"weight": weight}))
    merge("slerp", "SLERP, 2 models", models[:2], configuration("slerp", models[:2], base, {"t": 0.4}))
    merge("model-stock", f"Model Stock, {count} and a base", models, configuration("model_stock", tasks, base))
    rows["ties-model-wide"] = Row(f"TIES over the whole model, {count} and a base", "", models, [],
                                  [tool, "run", work / "ties.yml", "--semantics", "paper", "--out", out, "--quiet"])

    theirs = [venv / "bin/mergekit-extract-lora", "--model", tasks[0], "--base-model", base, "--out-path", out, "--max-rank", "16",
              "--exclude-regex", "embed_tokens|lm_head", "--skip-undecomposable"]
    ours = [tool, "extract-lora", "--base", base, "--task", tasks[0], "--rank", "16", "--exclude", "embed_tokens|lm_head", "--out", out, "--quiet"]
    rows["extract-lora"] = Row("extracting a LoRA of rank 16, exact", "mergekit", models[:2], theirs, ours)
    rows["extract-lora-randomized"] = Row("the same, ours randomized", "mergekit", models[:2], [], [*ours, "--randomized"], like="extract-lora")

    weights = (0.7, 0.4)
    parts = [part for adapter, weight in zip(adapters, weights) for part in ("--adapter", f"{adapter}={weight}")]
    for name, words, density in (("linear", "PEFT's linear, 2 adapters of rank 16", None), ("ties", "PEFT's ties", 0.2), ("svd", "PEFT's svd", None)):
        theirs = [venv / "bin/python", HERE / "bench_peft.py", "--base", base, "--type", name, "--out", out, *parts]
        ours = [tool, "merge-lora", "--semantics", "peft", "--method", name, *parts, "--out", out, "--quiet"]
        if density:
            theirs, ours = [*theirs, "--density", str(density)], [*ours, "--density", str(density)]
        rows[f"peft-{name}"] = Row(words, "PEFT", [base, *adapters], theirs, ours, ("warm",))
    rows["mergekit-start"] = Row("starting mergekit, nothing else", "mergekit", [], [venv / "bin/mergekit-yaml", "--help"], [tool, "run", "--help"], ("warm",))
    rows["peft-start"] = Row("starting PEFT, loading the base", "PEFT", [base], [venv / "bin/python", HERE / "bench_peft.py", "--base", base], [], ("warm",))
    return rows


def copies(reads, out):
    """Commands that read the same files and write as much as a model has, with nothing in between: {cache: command}."""
    commands = {}
    for cache, reading in (("warm", "cat {0}"), ("cold", "dd if={0} iflag=direct bs=8M status=none")):
        lines = [f"set -e; mkdir {out}"]
        for place, folder in enumerate(reads):
            for file in files_of(folder):
                lines.append(reading.format(f"'{file}'") + (f" > '{out}/{file.name}'" if place == 0 else " > /dev/null"))
        commands[cache] = ["sh", "-c", "\n".join(lines)]
    return commands


# Models


def made_models(work, size, venv):
    folder = work / f"models-{size}"
    folders = [folder / name for name in ("base", "task0", "task1", "task2")]
    if not all((each / "made").exists() for each in folders):
        need, free = 4.5 * size, shutil.disk_usage(work).free
        if free < need:
            fail(f"four models of {decimal(size)} and a result need {decimal(need)} in {work}, where {decimal(free)} are free: --work names another place")
        print(f"Making four models of {decimal(size)} in {folder}", flush=True)
        subprocess.run([venv / "bin/python", HERE / "bench_models.py", "models", folder, str(size)], check=True)
    return folders


def made_adapters(work, base, venv):
    folder = work / ("adapters-" + hashlib.sha256(str(base).encode()).hexdigest()[:8])
    if not (folder / "made").exists():
        subprocess.run([venv / "bin/python", HERE / "bench_models.py", "adapters", folder, base], check=True)
    return [folder / "adapter0", folder / "adapter1"]


def parsed_size(text):
    found = re.fullmatch(r"([0-9.]+) *(MB|GB)", text)
    try:
        size = int(float(found[1]) * {"MB": 1e6, "GB": 1e9}[found[2]])
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"'{text}' is no size: 1.5GB or 200MB is meant") from None
    if not 50e6 <= size <= 200e9:
        raise argparse.ArgumentTypeError(f"{text} is below 50MB or above 200GB")
    return size


# The machine


def cpu_name():
    text = pathlib.Path("/proc/cpuinfo").read_text()
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), platform.machine())


def setting(tool, venv):
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0].split()[-1]
    program = "import importlib.metadata as m, json; print(json.dumps({p: m.version(p) for p in ('mergekit', 'peft', 'torch')}))"
    peers = json.loads(subprocess.run([venv / "bin/python", "-c", program], capture_output=True, text=True, check=True).stdout)
    memory = int(re.search(r"MemTotal: +(\d+)", pathlib.Path("/proc/meminfo").read_text())[1]) << 10
    return {"versions": {"taskvec": version, **peers, "Python": platform.python_version(), "Linux": platform.release().split("-")[0]},
            "tool": hashlib.sha256(pathlib.Path(tool).read_bytes()).hexdigest(), "processor": cpu_name(), "processors": len(os.sched_getaffinity(0)), "memory": memory}


# Measuring


class Bench:
    def __init__(self, given, work, tool, venv):
        self.given, self.work, self.tool, self.venv = given, work, tool, venv
        self.path = work / "results.json"
        now = setting(tool, venv)
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {"setting": now, "begun": str(datetime.date.today()), "load": 0.0, "sizes": {}}
        for key, value in now.items():
            if self.results["setting"][key] != value and key != "tool":
                fail(f"{self.path} was measured with another {key}: remove it to begin anew, or name another folder by --work")
        if self.results["setting"]["tool"] != now["tool"]:
            print("Another taskvec: ours is measured anew, what the peers and the copies took stays", flush=True)
            self.results["setting"]["tool"] = now["tool"]
            for size in self.results["sizes"].values():
                for row in size["rows"].values():
                    for state in (value for value in row.values() if isinstance(value, dict)):
                        state.pop("ours", None)
                        state.pop("ours-unsynced", None)
            self.store()
        self.environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.environment.pop("LD_PRELOAD", None)
        self.shim = self.made_shim()

    def made_shim(self):
        """The tool's own calls of fsync do nothing under this library; None where it has no effect, or there is no compiler."""
        compiler = next((found for found in map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")) if found), None)
        with open(self.tool, "rb") as file:
            dynamic = b"/ld-" in file.read(1 << 16)
        if not compiler or not dynamic:
            print("Ours is not measured without sync: " + ("the tool is a static program" if compiler else "no C compiler"), flush=True)
            return None
        source, library = self.work / "no_sync.c", self.work / "no_sync.so"
        source.write_text(NO_SYNC)
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        return library

    def store(self):
        fresh = self.path.with_suffix(".new")
        fresh.write_text(json.dumps(self.results, indent=1))
        fresh.replace(self.path)

    def measured(self, kept, key, runs, once):
        """`once()` until there are `runs` results under `key`, each stored as it comes; fewer where one takes very long."""
        found = kept.setdefault(key, [])
        if len(found) < runs and not (found and found[0].get("seconds", 0) > PATIENCE):
            found.append(once())
            self.store()
            return True
        return False

    def size(self, key, models):
        adapters = made_adapters(self.work, models[0], self.venv)
        kept = self.results["sizes"].setdefault(key, {"bytes": bytes_of(models[:1]), "rows": {}})
        every = rows_of(self.work, models, adapters, self.tool, self.venv)
        rows = {name: row for name, row in every.items() if re.search(self.given.only, name)}
        if not rows:
            fail(f"--only {self.given.only} names no row; there are: {', '.join(every)}")
        out = self.work / "out"
        room = int(re.search(r"MemAvailable: +(\d+)", pathlib.Path("/proc/meminfo").read_text())[1]) << 10
        without = {**self.environment, "LD_PRELOAD": str(self.shim)}
        for name, row in rows.items():
            mine = kept["rows"].setdefault(name, {})
            mine |= {"words": row.words, "peer": row.peer, "like": row.like}
            kept["rows"] = {name: kept["rows"][name] for name in every if name in kept["rows"]}  # in order, whichever came first
            moved = bytes_of(row.reads) + kept["bytes"]
            for cache in row.caches:
                if cache == "warm" and 1.3 * moved > room:
                    print(f"{name}: {decimal(moved)} do not stay in the page cache: not measured warm", flush=True)
                    continue
                state = mine.setdefault(cache, {})
                sides = {"theirs": (row.theirs, self.environment), "ours": (row.ours, self.environment)}
                if self.shim:
                    sides["ours-unsynced"] = (row.ours, without)
                if len(row.caches) == 2 and not name.startswith("extract"):
                    sides["copy"] = (copies(row.reads, out)[cache], self.environment)
                for turn in range(self.given.runs):
                    for side, (command, environment) in sides.items():
                        if command and self.measured(state, side, turn + 1, lambda: run(command, out, row.reads, cache, environment,
                                                                                                  RARELY if side == "theirs" else 0.0)):
                            print(f"{name}, {cache}, {side}: {state[side][-1]['seconds']:.2f} s, synced {state[side][-1]['synced']:.2f} s", flush=True)
            if row.ours:
                self.measured(mine.setdefault("memory", {}), "ours", 1, lambda: run(row.ours, out, row.reads, row.caches[0], self.environment, OFTEN))


# The page


def decimal(number, unit="B"):
    for factor, prefix in ((1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}{unit}"
    return f"{number / 1e3:.0f} k{unit}"


def seconds(value):
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(theirs, ours):
    return "" if theirs is None or ours is None else f"{theirs / ours:.0f}" if theirs >= 10 * ours else f"{theirs / ours:.1f}"


def median(state, side, what):
    found = [one[what] for one in state.get(side, [])]
    return statistics.median(found) if found else None


def with_peer(rows, row):
    """A row with the measurements of its peer that another row has."""
    if not row["like"] or row["like"] not in rows:
        return row
    other = rows[row["like"]]
    return row | {part: {**row.get(part, {}), **{side: found for side, found in other.get(part, {}).items() if side == "theirs"}}
                  for part in ("warm", "cold") if part in row}


def sides(state):
    """Medians of one row in one state of the cache: (theirs, ours, copy) until the program ends, and until all is on the disk."""
    ended = [median(state, side, "seconds") for side in ("theirs", "ours-unsynced", "copy")]
    synced = [median(state, side, "synced") for side in ("theirs", "ours", "copy")]
    return ended, synced


def table(results):
    head = results["setting"]
    lines = [f"{', '.join(f'{name} {version}' for name, version in head['versions'].items())}; {head['processors']} processors of "
             f"{re.sub(r'[(](R|TM)[)]', '', head['processor'])}, {decimal(head['memory'])} of memory; measured on {results['begun']}"
             + (f", with others at work (load {results['load']:.1f})" if results["load"] > 0.5 else "") + ". Seconds are medians of whole commands.", ""]
    lines += ["| a model's size, work | cache | peer, s | ours, s | times | both synced: peer, s | ours, s | times | of the copy's rate, unsynced, synced | processor, s: peer, ours | anonymous memory: peer, ours | RSS: peer, ours |",
              "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for size in sorted(results["sizes"].values(), key=lambda size: size["bytes"]):
        for row in (with_peer(size["rows"], row) for row in size["rows"].values()):
            for cache in ("warm", "cold"):
                state = row.get(cache)
                if not state:
                    continue
                ended, synced = sides(state)
                rates = [f"{copy / ours:.2f}" if copy and ours else "–" for _, ours, copy in (ended, synced)]
                processor = [seconds(median(state, side, "processor")) or "–" for side in ("theirs", "ours")]
                cells = [f"{decimal(size['bytes'])}: {row['words']}" if cache == "warm" or "warm" not in row else "", cache,
                         *map(seconds, ended[:2]), times(*ended[:2]), *map(seconds, synced[:2]), times(*synced[:2]),
                         ", ".join(rates) if rates != ["–", "–"] else "", ", ".join(processor)]
                first = cache == next(each for each in ("warm", "cold") if row.get(each))
                for what in ("anonymous", "rss"):
                    peaks = [median(state, "theirs", what), median(row.get("memory", {}), "ours", what)]
                    cells.append(", ".join(decimal(peak) if peak is not None else "–" for peak in peaks) if first and any(peak is not None for peak in peaks) else "")
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def chart(results, path):
    """How many times as long the peers take, both synced, of the largest size; warm and cold."""
    size = max(results["sizes"].values(), key=lambda size: size["bytes"])
    bars = []
    for row in (with_peer(size["rows"], row) for row in size["rows"].values()):
        found = {}
        for cache in ("warm", "cold"):
            _, synced = sides(row.get(cache, {}))
            if synced[0] and synced[1] and "start" not in row["words"]:
                found[cache] = synced[0] / synced[1]
        if found:
            bars.append((row["words"], found))
    if not bars:
        return False
    top = max(ratio for _, found in bars for ratio in found.values())
    decades = max(1, math.ceil(math.log10(top)))
    left, width, step = 330, 420, 44
    bottom = 62 + step * len(bars)

    def at(ratio):
        return left + width * max(0.0, math.log10(ratio)) / decades

    title = f"Times as long as taskvec, whole commands, bf16 models of {decimal(size['bytes'])}"
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {bottom + 58}" width="860" height="{bottom + 58}" font-family="sans-serif">',
             f"<title>{title}</title>", f'<rect width="860" height="{bottom + 58}" fill="#fff"/>', f'<text x="20" y="28" font-size="16">{title}</text>']
    for decade in range(decades + 1):
        x, style = at(10.0**decade), 'stroke="#333" stroke-dasharray="5 4"' if decade == 0 else 'stroke="#ddd"'
        lines.append(f'<path d="M{x:.1f} 48V{bottom}" {style}/><text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle" font-size="12">{10**decade}</text>')
    for place, (words, found) in enumerate(bars):
        y = 58 + step * place
        lines.append(f'<text x="{left - 10}" y="{y + 20}" text-anchor="end" font-size="13">{words}</text>')
        for offset, (cache, colour) in zip((0, 17), (("warm", "#e69f00"), ("cold", "#0072b2"))):
            if cache in found:
                end = at(found[cache])
                lines.append(f'<rect x="{left}" y="{y + offset}" width="{max(1.0, end - left):.1f}" height="14" fill="{colour}"/>'
                             f'<text x="{max(left + 1.0, end) + 6:.1f}" y="{y + offset + 12}" font-size="12">{times(found[cache], 1.0)}</text>')
    versions = results["setting"]["versions"]
    lines.append(f'<rect x="20" y="{bottom + 30}" width="12" height="12" fill="#e69f00"/><text x="38" y="{bottom + 41}" font-size="12">files in the page cache</text>'
                 f'<rect x="200" y="{bottom + 30}" width="12" height="12" fill="#0072b2"/><text x="218" y="{bottom + 41}" font-size="12">files on the disk</text>'
                 f'<text x="840" y="{bottom + 41}" text-anchor="end" font-size="12">mergekit {versions["mergekit"]}, PEFT {versions["peft"]}; until all is on the disk</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</svg>"]) + "\n")
    return True


def write_page(results):
    """The table in docs/performance.md, its chart beside it, and the chart in the README, each between its markers."""
    page, readme = ROOT / "docs/performance.md", ROOT / "README.md"
    lines = table(results)
    words = "How many times as long the peers take"
    drawn = chart(results, page.with_suffix("") / "peers.svg")
    blocks = {page: [f"![{words}](performance/peers.svg)", ""] * drawn + lines}
    if drawn:
        blocks[readme] = ["Whole commands beside mergekit's and PEFT's on the same files:", "", f"![{words}](docs/performance/peers.svg)"]
    for path, block in blocks.items():
        text, pattern = path.read_text(), re.compile(r"(<!-- measured: peers -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(text):
            fail(f"{path} has no markers '<!-- measured: peers -->' and '<!-- end -->'")
        path.write_text(pattern.sub(lambda found: found[1] + "\n".join(block) + "\n" + found[2], text))


def main():
    parser = argparse.ArgumentParser(prog="scripts/bench-peers")
    parser.add_argument("--venv", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--tool", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=parsed_size, action="append", help="bytes of each of four models that are made; repeatable (default: 100MB)")
    parser.add_argument("--models", type=pathlib.Path, nargs="+", metavar="DIR", help="a base and two or more models, instead of random ones")
    parser.add_argument("--runs", type=int, default=3, help="of each command in each state of the cache, by turns; medians count (default: 3)")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose names match")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "build/bench-peers", help="models, results and outputs: on the disk that is measured")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md, and the chart beside it and into the README")
    given = parser.parse_args()
    if given.models and given.size:
        parser.error("--size makes models, --models names them: give one of both")
    if given.runs < 1:
        parser.error(f"--runs {given.runs} measures nothing")
    try:
        re.compile(given.only)
    except re.error as error:
        parser.error(f"--only '{given.only}' is no regular expression: {error}")
    if given.models and len(given.models) < 3:
        parser.error("--models takes a base and two or more models")
    for folder in given.models or []:
        if not folder.is_dir() or not files_of(folder) or not (folder / "config.json").exists():
            parser.error(f"--models {folder}: no directory with config.json and safetensors files")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    given.work.mkdir(parents=True, exist_ok=True)
    # A virtual environment's interpreter is a link: only its folder's own path is made absolute.
    work, tool, venv = given.work.resolve(), given.tool.resolve(), given.venv.absolute()
    bench = Bench(given, work, tool, venv)
    busy = os.getloadavg()[0]
    bench.results["load"] = max(bench.results["load"], busy)
    if busy > 0.5:
        print(f"Others are at work on this machine (load {busy:.1f}): times will vary", flush=True)
    if given.models:
        models = [folder.resolve() for folder in given.models]
        bench.size(" ".join(map(str, models)), models)
    else:
        for size in given.size or [100_000_000]:
            bench.size(str(size), made_models(work, size, venv))
    print("\n".join(["", *table(bench.results)]))
    chart(bench.results, work / "peers.svg")
    if given.write:
        write_page(bench.results)


if __name__ == "__main__":
    main()
