"""Compares freshly made golden data with what tests/data holds."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import pathlib

import torch

from common import equal_values, largest_difference, load


def tolerance_of(name, tensor, metadata):
    """What may differ between processors: results that the case itself claims only to a tolerance, and sums of many products."""
    case = json.loads(metadata[name.split("/")[0]]) if name.split("/")[0] in metadata else {}
    if "/input/" in name or case.get("agreement") == "exact":
        return 0.0
    return case.get("tolerance", 1e-12 if tensor.dtype == torch.float64 else 1e-5)


def largest(tensor):
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def both_vanish(name, new, old, allowed):
    """True for sums that cancel to 0 (the gradient of attention's key bias): rounding beside the other tensors of their kind."""
    kind = name.rpartition("/")[0]
    scale = max(largest(tensor) for other, tensor in old.items() if other.rpartition("/")[0] == kind)
    return max(largest(new[name]), largest(old[name])) <= allowed * scale


def compare_tensors(fresh, stored, failures, what):
    (new, new_metadata), (old, old_metadata) = load(fresh), load(stored)
    for name in sorted(set(new) ^ set(old)):
        failures.append(f"{what}: '{name}' is only in the {'fresh' if name in new else 'stored'} file")
    for name in sorted(set(new) & set(old)):
        allowed = tolerance_of(name, old[name], old_metadata)
        if equal_values(new[name], old[name]):
            continue
        if new[name].dtype != old[name].dtype or new[name].shape != old[name].shape:
            failures.append(f"{what}: '{name}' has another dtype or shape")
        elif largest_difference(new[name], old[name]) > allowed and not both_vanish(name, new, old, allowed):
            failures.append(f"{what}: '{name}' differs by {largest_difference(new[name], old[name]):.2e}, allowed {allowed:.0e}")
    for key in sorted(set(new_metadata) | set(old_metadata)):
        if key != "made_with" and new_metadata.get(key) != old_metadata.get(key):
            failures.append(f"{what}: metadata '{key}' differs")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fresh", type=pathlib.Path)
    parser.add_argument("stored", type=pathlib.Path)
    arguments = parser.parse_args()
    failures, count = [], 0
    made = {path.relative_to(arguments.fresh) for path in arguments.fresh.rglob("*") if path.is_file()}
    folders = {path.parts[0] for path in made}  # tests/data may have others, which no peer made
    kept = {path.relative_to(arguments.stored) for folder in folders for path in (arguments.stored / folder).rglob("*") if path.is_file()}
    for path in sorted(made ^ kept):
        failures.append(f"{path} is only {'fresh' if path in made else 'stored'}")
    for path in sorted(made & kept):
        count += 1
        if path.suffix == ".safetensors":
            compare_tensors(arguments.fresh / path, arguments.stored / path, failures, str(path))
        elif path.suffix == ".json":
            new, old = json.loads((arguments.fresh / path).read_text()), json.loads((arguments.stored / path).read_text())
            for side in (new, old):
                if not isinstance(side, dict):  # a table of cases
                    continue
                side.pop("peft_version", None)
                for key, value in side.items():  # PEFT keeps sets of names and writes them in any order
                    if isinstance(value, list) and all(isinstance(item, str) for item in value):
                        side[key] = sorted(value)
            if new != old:
                failures.append(f"{path} differs")
    if failures:
        raise SystemExit("\n".join(failures[:40] + ([f"… and {len(failures) - 40} more"] if len(failures) > 40 else [])))
    print(f"{count} files in {arguments.stored} are what the peers give today")


if __name__ == "__main__":
    main()
