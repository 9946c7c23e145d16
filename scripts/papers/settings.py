# SPDX-License-Identifier: Apache-2.0
"""settings.py FILE MODEL WORK [SUBSETS]: the settings of a run, in WORK/settings.json, with another number of rounds of subsets. What was measured by others
is refused."""
import pathlib
import sys

import common

chosen = common.read_json(sys.argv[1])
chosen["encoder"] = str(pathlib.Path(sys.argv[2]).resolve())
if len(sys.argv) > 4:
    chosen["subsets"] = int(sys.argv[4])
place = pathlib.Path(sys.argv[3]) / "settings.json"
before = common.read_json(place)
FREE = ("encoder", "seeds", "paradigms", "methods", "peru", "densities", "ranks", "planes", "subsets", "subset_methods")  # more or fewer results, not others
if before and any(before.get(key, value) != value for key, value in chosen.items() if key not in FREE):
    common.fail(f"{place.parent} holds results of other settings: remove it to measure anew")
common.write_json(place, chosen)
