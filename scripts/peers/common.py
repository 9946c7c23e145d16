"""Shared by the scripts that make and check tests/data: a deterministic safetensors writer, cases, comparisons."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import logging
import pathlib
import struct
import warnings

import numpy as np
import torch
from safetensors import safe_open

# The reference writer's order: dtype (its own enum, descending), then name.
_DTYPES = {
    torch.int64: ("I64", 18),
    torch.float64: ("F64", 17),
    torch.float32: ("F32", 15),
    torch.int32: ("I32", 13),
    torch.bfloat16: ("BF16", 12),
    torch.float16: ("F16", 11),
    torch.uint8: ("U8", 4),
}


def save(path, tensors, metadata):
    """Writes a safetensors file whose bytes depend on nothing but its arguments (the reference writer shuffles metadata)."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (-_DTYPES[tensors[name].dtype][1], name.encode()))
    header, offset, body = {"__metadata__": {"format": "pt", **metadata}}, 0, []
    for name in names:
        tensor = tensors[name]
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        header[name] = {"dtype": _DTYPES[tensor.dtype][0], "shape": list(tensor.shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
        body.append(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + b"".join(body))
    load(path)  # the reference reader accepts it


def load(path):
    """(tensors, metadata) of a safetensors file, by the reference reader."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def wide(tensor):
    """Exact f32 (f64 for f64) NumPy copy of a torch tensor."""
    return (tensor.detach() if tensor.dtype == torch.float64 else tensor.detach().to(torch.float32)).numpy().copy()


def narrow(array, dtype):
    """A torch tensor of `dtype`, each element rounded once to nearest even."""
    array = np.asarray(array)
    if array.dtype == np.float64 and dtype not in (torch.float64, torch.float32):
        raise ValueError("f64 to a 16-bit type would round twice")
    return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape)).to(dtype)


def by_name(model):
    """The model's names in the order of their bytes."""
    return sorted(model, key=lambda name: name.encode())


class Goldens:
    """Collects input groups and cases, and writes them as one file with the layout that tests/data/README.md states."""

    def __init__(self):
        self.tensors, self.metadata, self.groups = {}, {}, {}

    def group(self, name, base, tasks, extra=None):
        self.groups[name] = (base, tasks)
        for tensor, value in base.items():
            self.tensors[f"{name}/input/base/{tensor}"] = value
        for index, task in enumerate(tasks):
            for tensor, value in task.items():
                self.tensors[f"{name}/input/task{index}/{tensor}"] = value
        for kind, value in (extra or {}).items():
            self.tensors[f"{name}/input/{kind}"] = value

    def case(self, name, group, method, options, outputs, agreement="exact", tolerance=0.0, note=""):
        """`outputs`: {path below the case: tensor}. Tolerances are absolute plus relative to the largest expected magnitude."""
        assert name not in self.metadata, name
        for path, value in outputs.items():
            self.tensors[f"{name}/{path}"] = value
        row = {"input": group, "tasks": len(self.groups[group][1]), "method": method, "options": options, "agreement": agreement}
        if tolerance:
            row["tolerance"] = tolerance
        if note:
            row["note"] = note
        self.metadata[name] = json.dumps(row)

    def write(self, path, made_with):
        save(path, self.tensors, {"made_with": made_with, "cases": json.dumps(sorted(self.metadata)), **dict(sorted(self.metadata.items()))})


def equal_values(a, b):
    """True when both hold the same values (0 equals -0) in the same dtype and shape."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def largest_difference(a, b):
    """max |a - b| / max(1e-30, max |b|) in f64."""
    if a.numel() == 0:
        return 0.0
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / max(1e-30, float(b.abs().max())))


def tool_arguments(description, needs_data=False):
    """What the scripts that run the tool beside peers are given, --tool and --data; peers keep quiet, on one thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--tool", required=True)
    parser.add_argument("--data", type=pathlib.Path, required=needs_data)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return parser.parse_args()
