"""Writes tests/data/diffusion: what single files call the modules of Stable Diffusion's UNets, by diffusers' own converter."""
# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import os
import pathlib
import shutil

import diffusion_names


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out = parser.parse_args().out / "diffusion"
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    made = {}
    for kind in ("sd1", "sdxl"):
        names = diffusion_names.ldm_names(diffusion_names.unet(kind)).items()
        made[kind] = {name.removesuffix(".weight"): ldm.removesuffix(".weight") for name, ldm in sorted(names) if name.endswith(".weight")}
        print(f"  {kind:5s} {len(made[kind])} modules")
    (out / "names.json").write_text(json.dumps(made, indent=0) + "\n")


if __name__ == "__main__":
    main()
