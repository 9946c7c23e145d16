# SPDX-License-Identifier: Apache-2.0
"""cost.py --model FOLDER --minilm PROGRAM --page PAGE: the second paper's Table 4 on all-MiniLM-L6-v2, by examples/minilm and by torch and PEFT in one run.

Forward passes and training steps (plain gradient descent) of 32 texts of 16 ids, of all six layers: processor time of one thread, the median of five,
and the most memory beside the model. Times are worth something on an idle machine alone: a loaded one is said on the page."""
import argparse
import datetime
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings

import common
import train

TEXTS, LENGTH, RANK, REPETITIONS = 32, 16, 16, 5
WAYS = ("full fine-tuning", "full linearization", "LoRA", "L-LoRA")


def status(field):
    found = re.search(rf"^{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.M)
    return int(found[1]) if found else 0


def trimmed():
    """What is free but resident would hide growth."""
    import ctypes
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except OSError:
        pass
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def measured(work):
    """Median milliseconds of processor time, and MB that the peak grew by."""
    work()  # once for the caches
    times, memory = [], 0
    for _ in range(REPETITIONS):
        trimmed()
        before, begin = status("VmRSS"), time.process_time()
        work()
        times.append(1e3 * (time.process_time() - begin))
        memory = max(memory, (status("VmHWM") - before) / 1e3)
    return statistics.median(times), memory


def by_torch(folder, way):
    """[trained, forward, MB, step, MB], in a process of its own: what another way left would hide growth."""
    import peft
    import torch
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    encoder = common.load_encoder(folder, attention="eager" if way == "full linearization" else "sdpa")
    ids, cotangent = torch.randint(0, encoder.config.vocab_size, (TEXTS, LENGTH)), torch.full((TEXTS, encoder.config.hidden_size), 1e-3)

    def embedding(model):
        return model(input_ids=ids).last_hidden_state.mean(1)

    if way == "full linearization":
        start = {key: one.detach() for key, one in encoder.named_parameters()}
        change = {key: (1e-3 * one).requires_grad_() for key, one in start.items()}
        trained = [one for key, one in change.items() if not key.startswith("pooler")]

        def forward():
            value, tangent = torch.func.jvp(lambda values: torch.func.functional_call(encoder, values, kwargs={"input_ids": ids}).last_hidden_state.mean(1), (start,), (change,))
            return value + tangent
    else:
        model = encoder
        if way != "full fine-tuning":
            model = peft.get_peft_model(encoder, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"]))
        if way == "L-LoRA":
            train.linearize(model)
        trained = [one for key, one in model.named_parameters() if one.requires_grad and not key.startswith("pooler")]

        def forward():
            return embedding(model)

    def only_forward():
        with torch.no_grad():
            forward()

    def step():
        (forward() * cotangent).sum().backward()
        with torch.no_grad():
            for one in trained:
                one -= 1e-6 * one.grad
                one.grad = None

    return [sum(one.numel() for one in trained) / 1e6, *measured(only_forward), *measured(step)]


def by_program(program, folder):
    done = subprocess.run([program, "--model", folder, "--cost"], capture_output=True, text=True)
    if done.returncode != 0:
        common.fail(f"'{program} --cost' ended with {done.returncode}: {done.stderr.strip()}")
    found = {}
    for line in done.stdout.splitlines()[1:]:
        way, *cells = re.split(r"\s{2,}", line.strip())
        found[way] = [float(cell) for cell in cells]
    return found


def processor():
    try:
        found = re.search(r"model name\s*:\s*(.+)", pathlib.Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--minilm", help="the program of examples/minilm, built for speed")
    parser.add_argument("--page", type=pathlib.Path, help="its block 'cost' is replaced; else printed")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(*by_torch(given.model, given.way))
        return
    if not given.minilm:
        parser.error("--minilm names the program of examples/minilm")
    busy = os.getloadavg()[0]
    rows = []
    program = by_program(given.minilm, given.model)
    for way in WAYS:
        done = subprocess.run([sys.executable, __file__, "--model", given.model, "--way", way], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode != 0:
            common.fail(f"the cost of {way} by torch was not measured: {done.stderr.strip()[-300:]}")
        torch_cells = [float(cell) for cell in done.stdout.split()]
        rows.append((way, program[way], torch_cells))
    import peft
    import torch
    noisy = f" The machine was busy with other work (load {busy:.1f}): take times for the order alone." if busy > 0.5 else ""
    lines = [f"Measured on {datetime.date.today()}, {processor()}, one thread, torch {torch.__version__.split('+')[0]} and PEFT {peft.__version__}.{noisy}", "",
             "| way | trained, M | forward, ms: taskvec | torch | MB: taskvec | torch | step, ms: taskvec | torch | MB: taskvec | torch |", "|---" * 10 + "|"]
    for way, ours, theirs in rows:
        cells = [f"{ours[0]:.3f}", *(f"{value:.0f}" for k in range(1, 5) for value in (ours[k], theirs[k]))]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    if given.page:
        common.replace_blocks(given.page, {"cost": lines})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
