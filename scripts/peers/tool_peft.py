"""Round trips through the taskvec tool: adapters that it writes load in PEFT, and give the update that they should."""
# SPDX-License-Identifier: Apache-2.0
import json
import pathlib
import subprocess
import tempfile

import torch

from common import largest_difference, load, save, tool_arguments
from tiny_model import deltas, load_adapter, tiny

TOLERANCE = 1e-5


class Checks:
    def __init__(self, tool, data):
        self.tool, self.data, self.count, self.failures = tool, data, 0, []

    def run(self, *arguments):
        done = subprocess.run([self.tool, *map(str, arguments)], capture_output=True, text=True)
        return done.returncode, done.stderr.strip()

    def same_updates(self, what, folder, expected, tolerance=TOLERANCE):
        """PEFT loads `folder` and computes `expected` from it: every module, nothing but those modules, and a forward pass."""
        from peft import get_peft_model_state_dict

        self.count += 1
        try:
            model, _ = load_adapter(folder)
            found = deltas(model)
            with torch.no_grad():
                model(torch.arange(9)[None])
        except Exception as problem:  # whatever PEFT dislikes is the finding
            self.failures.append(f"{what}: PEFT does not load it: {problem}")
            return
        written, _ = load(pathlib.Path(folder) / "adapter_model.safetensors")
        held = get_peft_model_state_dict(model, save_embedding_layers=any(name.endswith(".base_layer.weight") for name in written))
        if set(held) != set(written) or any(not torch.equal(held[name], written[name].to(held[name].dtype)) for name in written):
            self.failures.append(f"{what}: PEFT does not hold just the tensors of the file: {sorted(set(held) ^ set(written))}")
        if set(found) != set(expected):
            self.failures.append(f"{what}: modules {sorted(found)}; expected {sorted(expected)}")
            return
        apart = max(largest_difference(found[module], expected[module]) for module in expected)
        print(f"  {what:44s} apart by {apart:.1e}")
        if not apart <= tolerance:
            self.failures.append(f"{what}: the update is off by {apart:.2e}, allowed {tolerance:.0e}")


def truncated(update, rank):
    u, s, vt = torch.linalg.svd(update.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ vt[:rank]).float()


def main():
    arguments = tool_arguments(__doc__, needs_data=True)
    checks, data = Checks(arguments.tool, arguments.data / "peft"), arguments.data / "peft"
    index = json.loads((data / "index.json").read_text())

    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)

        def attempt(what, *command):
            out = scratch / what.replace(" ", "_")
            code, words = checks.run(*command, "--out", out)
            if code != 0:
                checks.failures.append(f"{what}: the tool answers {code}: {words}")
                return None
            return out

        for name, row in index.items():
            folder = data / name
            if row["read"] == "no":
                checks.count += 1
                out = scratch / f"refused_{name}"
                code, words = checks.run("peru-lora", "--adapter", folder, "--rank", 1, "--out", out)
                print(f"  {name:44s} exit code {code}: {words.splitlines()[0] if words else ''}")
                if code != 1 or out.exists():
                    checks.failures.append(f"{name}: should be refused with exit code 1 and no output, and got {code}")
                continue
            if row["read"] != "yes":
                continue
            expected, metadata = load(folder / "expected.safetensors")
            wanted = 1e-2 if name == "bf16" else TOLERANCE
            # bf16 factors are compared in f32: the tool may write them back as bf16.
            out = attempt(f"peru-lora {name} rank 1", "peru-lora", "--adapter", folder, "--rank", 1)
            if out:
                checks.same_updates(f"peru-lora {name} rank 1", out, {module: truncated(value, 1) for module, value in expected.items()}, wanted)
            out = attempt(f"merge-lora {name} alone", "merge-lora", "--method", "linear", "--adapter", f"{folder}=1.5")
            if out:
                checks.same_updates(f"merge-lora {name} alone", out, {module: 1.5 * value for module, value in expected.items()}, wanted)

        expected, metadata = load(data / "merged_a_b.safetensors")
        a, b = json.loads(metadata["weights"])
        pair = ["--adapter", f"{data / 'merge_a'}={a}", "--adapter", f"{data / 'merge_b'}={b}"]
        out = attempt("merge-lora exact", "merge-lora", "--method", "linear", *pair)
        if out:
            checks.same_updates("merge-lora exact", out, expected)
        out = attempt("merge-lora rank 2", "merge-lora", "--method", "linear", *pair, "--rank", 2)
        if out:
            checks.same_updates("merge-lora rank 2", out, {module: truncated(value, 2) for module, value in expected.items()})

        # Different ranks, scalings, targets and dtypes, one with an embedding and the copy of its weight.
        several = {"patterns_rslora": 0.5, "embedding_saved": -1.0, "regex_target": 2.0, "merge_b": 0.25}
        total = {}
        for name, weight in several.items():
            for module, value in load(data / name / "expected.safetensors")[0].items():
                total[module] = total.get(module, 0) + weight * value
        options = [word for name, weight in several.items() for word in ("--adapter", f"{data / name}={weight}")]
        for rank in (None, 3):
            name = f"merge-lora of four, {f'rank {rank}' if rank else 'exact'}"
            out = attempt(name, "merge-lora", *options, *(["--rank", rank] if rank else []))
            if out:
                checks.same_updates(name, out, {module: truncated(value, rank) if rank else value for module, value in total.items()})

        # Adapters of two checkpoints: plain layers with an embedding, and GPT-2's transposed layers.
        base = tiny().state_dict()
        for what, modules, options in (
            ("plain", ["embed", "head", "layers.0.attn.q_proj", "layers.1.attn.v_proj"], ["--embedding", "^embed$"]),
            ("transposed", ["layers.0.c_fc", "layers.1.c_fc"], ["--fan-in-fan-out", "--include", "c_fc"]),
        ):
            torch.manual_seed(3)
            tuned = {name: value.clone() for name, value in base.items()}
            for module in modules:
                tuned[f"{module}.weight"] += 0.1 * torch.randn_like(tuned[f"{module}.weight"])
            save(scratch / "base.safetensors", base, {})
            save(scratch / "tuned.safetensors", tuned, {})
            change = {module: tuned[f"{module}.weight"] - base[f"{module}.weight"] for module in modules}
            for rank, way in ((2, []), (2, ["--randomized"]), (5, ["--clamp"])):
                name = f"extract-lora {what} rank {rank}" + (" randomized" if way == ["--randomized"] else "")
                models = ["--base", scratch / "base.safetensors", "--task", scratch / "tuned.safetensors"]
                out = attempt(name, "extract-lora", *models, "--rank", rank, *options, *way)
                if out:
                    checks.same_updates(name, out, {module: truncated(value, rank) for module, value in change.items()})

        # Factors merged around an initialisation, and the same made a plain adapter.
        for name in ("merge_a", "patterns_rslora", "embedding_saved", "fan_in_fan_out"):
            out = attempt(f"merge-lora phi {name}", "merge-lora", "--space", "phi", "--init", data / name, "--adapter", data / name)
            if out:
                expected, _ = load(data / name / "expected.safetensors")
                checks.same_updates(f"merge-lora phi {name}", out, expected)
                folded = attempt(f"fold-llora {name}", "fold-llora", "--init", data / name, "--adapter", out)
                if folded:
                    checks.same_updates(f"fold-llora {name}", folded, expected)

    if checks.failures:
        raise SystemExit("\n".join(checks.failures))
    print(f"{checks.count} round trips")


if __name__ == "__main__":
    main()
