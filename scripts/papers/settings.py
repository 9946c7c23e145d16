# SPDX-License-Identifier: Apache-2.0
"""settings.py FILE MODEL WORK [SUBSETS]: the settings of a run, in WORK/settings.json, with another number of rounds of subsets. What was measured by others,
or of another model, is refused. TASKVEC_REPRODUCE_SEEDS ("3 4 5") names other seeds."""
import os
import pathlib
import sys

import common

FREE = ("encoder", "seeds", "paradigms", "methods", "lora_methods", "peru", "densities", "ranks", "planes", "subsets", "subset_methods")  # more or fewer results, not others


def main():
    chosen, place = common.read_json(sys.argv[1]), pathlib.Path(sys.argv[3]) / "settings.json"
    chosen["encoder"] = str(pathlib.Path(sys.argv[2]).resolve())
    chosen["parameters"], chosen["model"] = common.check_model(chosen["encoder"])
    if len(sys.argv) > 4:
        chosen["subsets"] = int(sys.argv[4])
    seeds = os.environ.get("TASKVEC_REPRODUCE_SEEDS", "").split()
    if not all(seed.isdecimal() for seed in seeds):
        common.fail(f"TASKVEC_REPRODUCE_SEEDS is '{' '.join(seeds)}', and not whole numbers with spaces between")
    chosen["seeds"] = [int(seed) for seed in seeds] or chosen["seeds"]
    before = common.read_json(place)
    if before and before.get("model") != chosen["model"]:
        common.fail(f"{place.parent} holds results of another model (SHA-256 {str(before.get('model'))[:12]}…, from {before.get('encoder')}) than {chosen['encoder']} "
                    f"({chosen['model'][:12]}…): remove {place.parent}, or name the first model by TASKVEC_MINILM")
    if before and any(before.get(key) != value for key, value in chosen.items() if key not in FREE):
        common.fail(f"{place.parent} holds results of other settings: remove it to measure anew")
    common.write_json(place, chosen)


if __name__ == "__main__":
    main()
