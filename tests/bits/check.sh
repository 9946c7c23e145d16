# SPDX-License-Identifier: Apache-2.0
# check.sh REFERENCE PROGRAM: both must print the same, and something.
set -eu
expected=$("$1")
code=0
found=$("$2") || code=$?
[ "$code" != 77 ] || echo "skipped: this processor lacks the instructions of $(basename "$2")"
[ "$code" = 0 ] || exit "$code"
[ "$(printf '%s\n' "$expected" | wc -l)" -gt 100 ] || { echo "the reference printed too little"; exit 1; }
[ "$expected" = "$found" ] && exit 0
printf '%s\n' "$expected" > "$2.expected"
printf '%s\n' "$found" | diff "$2.expected" - || true
exit 1
