"""GGUF adapters of the taskvec tool beside PyPI's gguf: what it writes, read there, and what is written there, read by it."""
# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import subprocess
import tempfile

import gguf
import torch
from safetensors.torch import load_file

from common import tool_arguments
from make_gguf import DTYPES, families, pairs_of, write_gguf, write_peft


def read_gguf(path):
    """Metadata and tensors as torch has them, by gguf's reader."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    kinds = {number: kind for kind, number, _ in DTYPES.values()}
    tensors = {}
    for tensor in reader.tensors:
        shape = [int(extent) for extent in reversed(tensor.shape)]
        tensors[tensor.name] = torch.from_numpy(tensor.data.copy()).view(torch.uint8).reshape(-1).view(kinds[tensor.tensor_type]).reshape(shape)
    return fields, tensors


def main():
    arguments = tool_arguments(__doc__)
    failures, count, apart = [], 0, 0.0

    def run(*words):
        done = subprocess.run([arguments.tool, *map(str, words)], capture_output=True, text=True)
        if done.returncode != 0:
            failures.append(f"taskvec {words[0]} answers {done.returncode}: {done.stderr.strip()}")
        return done.returncode == 0

    with tempfile.TemporaryDirectory() as scratch:
        for name, row in families().items():
            for dtype in DTYPES:
                count += 1
                folder = pathlib.Path(scratch) / f"{name}_{dtype}"
                folder.mkdir()
                write_peft(folder, name, (*row[:4], dtype, row[5]), seed=count)
                pairs, alpha = pairs_of(folder, row[2])
                settings = json.loads((folder / "adapter_config.json").read_text())
                if not run("convert", folder, "--as", "gguf", "--base", folder, "--out", folder / "made.gguf"):
                    continue
                fields, tensors = read_gguf(folder / "made.gguf")
                wanted = {"general.architecture": gguf.MODEL_ARCH_NAMES[row[2]], "general.type": "adapter", "adapter.type": "lora", "general.file_type": DTYPES[dtype][2]}
                for key, value in wanted.items():
                    if fields.get(key) != value:
                        failures.append(f"{folder.name}: {key} is {fields.get(key)}, expected {value}")
                if abs(fields["adapter.lora.alpha"] - alpha) > 1e-6 * alpha:
                    failures.append(f"{folder.name}: alpha {fields['adapter.lora.alpha']}, expected {alpha}")
                expected = {f"{weight}.{half}": value for weight, pair in pairs.items() for half, value in zip(("lora_a", "lora_b"), pair)}
                if set(tensors) != set(expected):
                    failures.append(f"{folder.name}: tensors {sorted(set(tensors) ^ set(expected))}")
                    continue
                for tensor, value in expected.items():
                    if tensors[tensor].dtype != value.dtype or not torch.equal(tensors[tensor], value):
                        failures.append(f"{folder.name}: '{tensor}' differs")

                # The other way: a file of gguf's own, which counts no heads, and the tool's.
                write_gguf(folder / "peer.gguf", pairs, alpha, row[2], dtype)
                before = load_file(folder / "adapter_model.safetensors")
                for source, more in (("peer.gguf", ["--base", folder]), ("made.gguf", [])):
                    back = folder / f"back_{source}"
                    if not run("convert", folder / source, "--as", "peft", "--out", back, *more):
                        continue
                    after = load_file(back / "adapter_model.safetensors")
                    # Prefixes before the layers are not in GGUF: transformers' common ones come back.
                    names = {key: key for key in before}
                    if set(after) != set(names.values()):
                        failures.append(f"{folder.name}: {source} comes back as {sorted(set(after) ^ set(before))}")
                        continue
                    again = json.loads((back / "adapter_config.json").read_text())
                    scale = [s["lora_alpha"] / (s["r"] ** (0.5 if s.get("use_rslora") else 1)) for s in (settings, again)]
                    apart = max(apart, abs(scale[0] - scale[1]) / scale[0])
                    for key, value in before.items():
                        if not torch.equal(after[key], value):
                            failures.append(f"{folder.name}: {source} comes back with another '{key}'")
    print(f"  {count} adapters of {len(families())} families: factors bit for bit, scalings apart by {apart:.1e}")
    if apart > 1e-7:
        failures.append(f"scalings are off by {apart:.1e}")
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} failures:", *failures[:20]]))


if __name__ == "__main__":
    main()
