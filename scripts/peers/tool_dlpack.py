"""Tensors of torch and NumPy go into a merge as DLPack capsules, legacy and versioned, and the result comes back the same
way: without a copy, each given back exactly once, read-only ones read and not written."""
# SPDX-License-Identifier: Apache-2.0
import ctypes
import os
import pathlib
import subprocess
import tempfile
import weakref

import numpy
import torch

from common import tool_arguments

root = pathlib.Path(__file__).resolve().parents[2]
python = ctypes.pythonapi
python.PyCapsule_GetPointer.restype = ctypes.c_void_p
python.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
python.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
python.PyCapsule_New.restype = ctypes.py_object
python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

names = {"legacy": b"dltensor", "versioned": b"dltensor_versioned"}
used = {"legacy": b"used_dltensor", "versioned": b"used_dltensor_versioned"}


def build(folder):
    library = pathlib.Path(folder) / "exchange.so"
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-shared", "-fPIC", "-I", root / "include",
         root / "scripts/peers/dlpack.cpp", "-o", library, "-pthread"], check=True)
    exchange = ctypes.CDLL(str(library))
    exchange.last_message.restype = ctypes.c_char_p
    for kind in names:
        call = getattr(exchange, "merge_" + kind)
        call.restype = ctypes.c_void_p
        call.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t]
    return exchange


def taken(array, kind):
    """The pointer of an array's capsule, taken over: the capsule is marked as used."""
    capsule = array.__dlpack__(max_version=(1, 0)) if kind == "versioned" else array.__dlpack__()
    pointer = python.PyCapsule_GetPointer(capsule, names[kind])
    assert python.PyCapsule_SetName(capsule, used[kind]) == 0
    return pointer


class handed_out:
    """What from_dlpack of any framework takes."""

    def __init__(self, pointer, kind):
        self.pointer, self.kind = pointer, kind

    def __dlpack__(self, **_):
        return python.PyCapsule_New(self.pointer, names[self.kind], None)

    def __dlpack_device__(self):
        return (1, 0)


def merge(exchange, kind, base, *tasks):
    pointers = (ctypes.c_void_p * len(tasks))(*[taken(task, kind) for task in tasks])
    result = getattr(exchange, "merge_" + kind)(taken(base, kind), pointers, len(tasks))
    if not result:
        raise RuntimeError(exchange.last_message().decode())
    return handed_out(result, kind)


def main():
    tool_arguments(__doc__)
    checks = 0
    with tempfile.TemporaryDirectory() as folder:
        exchange = build(folder)
        generator = torch.Generator().manual_seed(1)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            base, one, two = (torch.randn(5, 7, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            expected = (base.to(wide) + 0.5 * ((one.to(wide) - base.to(wide)) + (two.to(wide) - base.to(wide)))).to(dtype)
            for kind in names:
                got = torch.from_dlpack(merge(exchange, kind, base, one, two))
                assert got.dtype == dtype and torch.equal(got, expected), (dtype, kind, got - expected)
                got += 1  # it may be written
                checks += 1
                if dtype != torch.bfloat16:  # which NumPy lacks
                    parts = [x.numpy() for x in (base, one, two)]
                    got = numpy.from_dlpack(merge(exchange, kind, *parts))
                    assert numpy.array_equal(got, expected.numpy()), (dtype, kind)
                    checks += 1
        # A part of a tensor, with an offset; strides that are not one run are refused with a sentence.
        for kind in names:
            rows = torch.arange(24, dtype=torch.float32).reshape(6, 4)
            got = torch.from_dlpack(merge(exchange, kind, rows[2:4], rows[4:6]))
            assert torch.equal(got, rows[2:4] + 4)
            try:
                merge(exchange, kind, rows.t(), rows.t())
                raise AssertionError("a transposed tensor was taken")
            except RuntimeError as error:
                assert "not contiguous" in str(error) or "row-major" in str(error), error
            checks += 2
        # Each is given back once: the arrays live as long as somebody refers to them, and no longer.
        for kind in names:
            class watched(numpy.ndarray):
                pass
            arrays = [numpy.full((3,), float(i), dtype=numpy.float32).view(watched) for i in range(2)]
            gone = [weakref.ref(array) for array in arrays]
            result = numpy.from_dlpack(merge(exchange, kind, *arrays))
            assert result.tolist() == [0.5] * 3
            del arrays
            assert all(array() is None for array in gone), "an input was not given back"
            checks += 1
        # Read-only arrays can only say so in the versioned form.
        frozen = numpy.ones(4, dtype=numpy.float32)
        frozen.flags.writeable = False
        got = numpy.from_dlpack(merge(exchange, "versioned", frozen, frozen * 3))
        assert got.tolist() == [2.0] * 4
        checks += 1
    print(f"{checks} exchanges, torch {torch.__version__}, NumPy {numpy.__version__}")


if __name__ == "__main__":
    main()
