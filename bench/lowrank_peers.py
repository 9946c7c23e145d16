#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Low-rank work of bench_lowrank as NumPy, scikit-learn and PyTorch do it: f32, medians, one thread; two in `exact` and `extraction`.

Each peer is measured before and after bench_lowrank, which runs in between; the ratios printed are a peer's time over taskvec's.
Errors are Frobenius errors beside ||A||. Needs the packages of requirements.txt and a built bench_lowrank:

    python bench/lowrank_peers.py factored build/release/bin/bench/bench_lowrank
    python bench/lowrank_peers.py randomized build/release/bin/bench/bench_lowrank
    python bench/lowrank_peers.py exact build/release/bin/bench/bench_lowrank
    python bench/lowrank_peers.py extraction build/release/bin/bench/bench_lowrank

`extraction` is a layer of 4096 x 4096 at rank 16, as `extract-lora` decomposes it, beside what mergekit-extract-lora does to one:
its own code where mergekit is installed, and torch.linalg.svd, which that calls, otherwise.

Where OPENBLAS_CORETYPE is set, unset it together with OPENBLAS_L2_SIZE: it slows a current NumPy. The kernels that run are printed.
"""
import argparse
import json
import statistics
import subprocess
import time

import numpy as np
import threadpoolctl
import torch
from sklearn.utils.extmath import randomized_svd

SIDE, INNER, RANK = 4096, 128, 16


def times(work, runs):
    """Seconds of each of `runs` runs after one that is not counted."""
    taken = []
    for run in range(-1, runs):
        start = time.perf_counter()
        work()
        if run >= 0:
            taken.append(time.perf_counter() - start)
    return taken


def factored_peers():
    generator = np.random.default_rng(1)
    a, b = (generator.standard_normal((SIDE, INNER), dtype=np.float32) for _ in range(2))

    def by_numpy():
        qa, ra = np.linalg.qr(a)
        qb, rb = np.linalg.qr(b)
        u, s, vt = np.linalg.svd(ra @ rb.T)
        return qa @ u[:, :RANK], s[:RANK], qb @ vt[:RANK].T

    def by_torch(ta=torch.from_numpy(a), tb=torch.from_numpy(b)):
        qa, ra = torch.linalg.qr(ta)
        qb, rb = torch.linalg.qr(tb)
        u, s, vt = torch.linalg.svd(ra @ rb.T)
        return (qa @ u[:, :RANK]).numpy(), s[:RANK].numpy(), (qb @ vt[:RANK].T).numpy()

    return a @ b.T, {"NumPy, QR of both and SVD of the core": by_numpy, "PyTorch, the same": by_torch}


def randomized_peers():
    generator = np.random.default_rng(2)
    u, v = (generator.standard_normal((SIDE, 512), dtype=np.float32) for _ in range(2))
    a = (u / np.arange(1, 513, dtype=np.float32)) @ v.T + 1e-2 * generator.standard_normal((SIDE, SIDE), dtype=np.float32)
    ta = torch.from_numpy(a)

    def by_torch():
        left, s, right = torch.svd_lowrank(ta, q=RANK + 10, niter=2)
        return left[:, :RANK].numpy(), s[:RANK].numpy(), right[:, :RANK].numpy()

    def by_sklearn(**options):
        left, s, right = randomized_svd(a, RANK, n_oversamples=10, random_state=1, **options)
        return left, s, right.T

    return a, {
        "scikit-learn, as it comes": by_sklearn,
        "scikit-learn, 2 iterations with QR": lambda: by_sklearn(n_iter=2, power_iteration_normalizer="QR"),
        "torch.svd_lowrank, 2 iterations": by_torch,
    }


def exact_peers():
    a = randomized_peers()[0][:3072, :3072].copy()
    ta = torch.from_numpy(a)

    def by_torch():
        left, s, right = torch.linalg.svd(ta, full_matrices=False)
        return left[:, :RANK].numpy(), s[:RANK].numpy(), right[:RANK].T.numpy()

    return a, {"torch.linalg.svd": by_torch}


def extraction_peers():
    a = randomized_peers()[0]
    ta = torch.from_numpy(a)

    def as_triples(down, up):
        return up.numpy(), np.ones(RANK, dtype=np.float32), down.T.numpy()

    def by_svd():
        left, s, right = torch.linalg.svd(ta, full_matrices=False)
        root = torch.diag(torch.sqrt(s[:RANK]))
        return as_triples(root @ right[:RANK], left[:, :RANK] @ root)

    def by_lowrank():
        left, s, right = torch.svd_lowrank(ta, q=RANK + 10, niter=2)
        return left[:, :RANK].numpy(), s[:RANK].numpy(), right[:, :RANK].numpy()

    try:
        from mergekit.scripts import extract_lora

        task = extract_lora.TaskVectorDecompositionTask.model_construct(max_rank=RANK)  # of no file
        mergekit = {"mergekit-extract-lora's decomposition": lambda: as_triples(*task.execute(task_vector=ta))}
    except ImportError:
        mergekit = {"torch.linalg.svd, as mergekit calls it": by_svd}
    return a, mergekit | {"torch.svd_lowrank, 2 iterations": by_lowrank}


WORKS = {  # who else does it, which rows of bench_lowrank, threads, at most how many runs
    "factored": (factored_peers, ["factored/1/"], 1, 100),
    "randomized": (randomized_peers, ["randomized/1/1/"], 1, 100),
    "exact": (exact_peers, ["leading/1/2/3072/"], 2, 2),
    "extraction": (extraction_peers, ["leading/1/2/4096/", "randomized/1/2/"], 2, 2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=list(WORKS))
    parser.add_argument("bench", help="the program bench_lowrank")
    parser.add_argument("--runs", type=int, default=7, help="of each peer, before and after")
    arguments = parser.parse_args()
    find, rows, threads, most = WORKS[arguments.work]
    runs = min(arguments.runs, most)
    torch.set_num_threads(threads)
    limits = threadpoolctl.threadpool_limits(threads)
    kernels = {(pool["internal_api"], pool.get("architecture")) for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}
    print(f"numpy {np.__version__}, torch {torch.__version__}; BLAS {sorted(kernels, key=str)}")

    a, peers = find()
    norm = float(np.linalg.norm(a))
    taken = {name: times(work, runs) for name, work in peers.items()}
    answer = subprocess.run([arguments.bench, f"--benchmark_filter={'|'.join(rows)}", "--benchmark_format=json"], check=True, capture_output=True, text=True)
    found = json.loads(answer.stdout)["benchmarks"]
    ours = next(one for one in found if one["name"].startswith(rows[0]))
    for name, work in peers.items():
        taken[name] += times(work, runs)

    print(f"taskvec {ours['ms']:.1f} ms, error {ours['error']:.4f} of the least possible; naive way {ours['naive_s']:.1f} s, {ours['times']:.0f} times")
    for one in found:
        if one is not ours:
            print(f"taskvec, {one['name'].split('/')[0]}: {one['ms']:.1f} ms, error {one['error']:.4f} of the least possible")
    for name, work in peers.items():
        left, s, right = work()
        error = float(np.linalg.norm(a - (left * s) @ right.T)) / norm
        median = 1e3 * statistics.median(taken[name])
        print(f"{name:40s} {median:8.1f} ms, {median / ours['ms']:5.2f} times taskvec's; error {error:.6f} of the norm")
    del limits


if __name__ == "__main__":
    main()
