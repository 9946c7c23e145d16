"""The code of docs/formats.md that applies a delta, taken from the page and run: it makes what `taskvec apply` makes."""
# SPDX-License-Identifier: Apache-2.0
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file

from common import tool_arguments

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "formats.md"


def main():
    tool = str(pathlib.Path(tool_arguments(__doc__).tool).resolve())
    (code,) = re.findall(r"<!-- python: apply_delta.py -->\n```python\n(.*?)```", PAGE.read_text(), re.S)
    torch.manual_seed(7)
    base = {"a.weight": torch.randn(40, 30), "b.weight": torch.randn(64, 50).bfloat16(), "c.weight": torch.randn(9, 11, 5).half(),
            "d.bias": torch.randn(300, dtype=torch.float64)}
    task = {name: (value + 0.1 * torch.randn(value.shape, dtype=torch.float64)).to(value.dtype) for name, value in base.items()}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)

        def run(*words):
            subprocess.run(words, cwd=scratch, check=True, capture_output=True, text=True)

        (scratch / "apply_delta.py").write_text(code)
        save_file(base, scratch / "base.safetensors")
        save_file(task, scratch / "task.safetensors")
        for density, kind in (("0.02", ".indices"), ("0.2", ".bitmask")):
            run(tool, "prune", "--base", "base.safetensors", "--task", "task.safetensors", "--density", density, "--out", "delta.safetensors")
            assert any(name.endswith(kind) for name in load_file(scratch / "delta.safetensors")), kind
            run(tool, "apply", "--base", "base.safetensors", "--delta", "delta.safetensors", "--out", "expected.safetensors")
            run(sys.executable, "apply_delta.py", "base.safetensors", "delta.safetensors", "found.safetensors")
            expected, found = load_file(scratch / "expected.safetensors"), load_file(scratch / "found.safetensors")
            assert expected.keys() == found.keys() == base.keys()
            for name, value in expected.items():
                assert torch.equal(value, found[name]) and value.dtype == found[name].dtype, (density, name)
            assert not all(torch.equal(value, base[name]) for name, value in expected.items())
            print(f"  density {density}: the same {len(expected)} tensors")


if __name__ == "__main__":
    main()
