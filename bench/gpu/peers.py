#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The work of bench/gpu as PyTorch does it on the same device: medians by events, beside the device's copy bandwidth.

Needs torch with CUDA. Prints what bench/results/ keeps; without a device it says so and exits with 77.
"""
import statistics
import sys

try:
    import torch
except ImportError:
    print("torch is not installed: nothing measured")
    sys.exit(77)


def seconds(work, runs=7):
    """Median seconds of work() after one run that is not counted."""
    times = []
    for run in range(-1, runs):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        stop.record()
        stop.synchronize()
        if run >= 0:
            times.append(start.elapsed_time(stop) * 1e-3)
    return statistics.median(times)


def report(name, time, bytes_moved=None, bandwidth=None):
    share = f" {bytes_moved / time / bandwidth:8.1%} of copy bandwidth" if bytes_moved else ""
    print(f"{name:<56} {time * 1e3:10.3f} ms{share}")


def dare(vector, density):
    """DARE as its authors write it: a mask of random bits, and the rest divided by the density."""
    return vector * torch.bernoulli(torch.full_like(vector, density)) / density


def ties(base, tasks, density, scale):
    """TIES as its authors write it: threshold per task, elected signs, mean of those that agree."""
    vectors = torch.stack([task - base for task in tasks])
    for vector in vectors:
        count = max(1, int(density * vector.numel()))
        threshold = vector.abs().kthvalue(vector.numel() - count + 1).values
        vector.masked_fill_(vector.abs() < threshold, 0)
    signs = torch.sign(vectors.sum(dim=0))
    agreeing = torch.where(torch.sign(vectors) == signs, vectors, torch.zeros_like(vectors))
    return base + scale * agreeing.sum(dim=0) / (agreeing != 0).sum(dim=0).clamp(min=1)


def main():
    if not torch.cuda.is_available():
        print("no CUDA device answers here: nothing measured")
        return 77
    print(f"device {torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(1)

    block = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    copy = torch.empty_like(block)
    bandwidth = 2 * block.numel() / seconds(lambda: copy.copy_(block))
    del block, copy
    print(f"copy bandwidth {bandwidth * 1e-9:.1f} GB/s")

    count, number = 1 << 26, 3
    for dtype in (torch.float32, torch.bfloat16):
        base = torch.randn(count, device="cuda", dtype=dtype)
        tasks = [torch.randn(count, device="cuda", dtype=dtype) for _ in range(number)]
        moved = (number + 2) * count * base.element_size()
        report(f"average, 3 x 2^26 {dtype}", seconds(lambda: torch.stack(tasks).mean(dim=0)), moved - count * base.element_size(), bandwidth)
        report(f"task arithmetic, 3 x 2^26 {dtype}", seconds(lambda: base + 0.3 * sum(task - base for task in tasks)), moved, bandwidth)
        report(f"DARE, 3 x 2^26 {dtype}", seconds(lambda: base + sum(dare(task - base, 0.5) for task in tasks)), moved, bandwidth)
        report(f"TIES, density 0.2, 3 x 2^26 {dtype}", seconds(lambda: ties(base.float(), [task.float() for task in tasks], 0.2, 1.0), 3), moved, bandwidth)
    values = torch.randn(count, device="cuda")
    report("kthvalue of 2^26 magnitudes", seconds(lambda: values.abs().kthvalue(count - count // 5), 3), count * 4, bandwidth)
    report("topk of 2^26 magnitudes, a fifth", seconds(lambda: values.abs().topk(count // 5), 3), count * 4, bandwidth)
    del base, tasks, values

    size = 4096
    matrix = torch.randn(size, 200, device="cuda") @ torch.randn(200, size, device="cuda") + 0.5 * torch.randn(size, size, device="cuda")
    report("svd_lowrank 4096 x 4096, q = 26, niter = 2", seconds(lambda: torch.svd_lowrank(matrix, q=26, niter=2)))
    for rank in (16, 64):
        left, right = torch.randn(64, size, rank, device="cuda"), torch.randn(64, size, rank, device="cuda")

        def factored():
            qa, ra = torch.linalg.qr(left)
            qb, rb = torch.linalg.qr(right)
            u, s, vh = torch.linalg.svd(ra @ rb.mT)
            return qa @ u[..., :8], s[..., :8], qb @ vh.mT[..., :8]

        report(f"64 LoRA layers of rank {rank}, to rank 8, batched", seconds(factored, 3))
    return 0


if __name__ == "__main__":
    sys.exit(main())
