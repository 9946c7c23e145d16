# SPDX-License-Identifier: Apache-2.0
# check.sh REFERENCE PROGRAM [ARGUMENT…]: both must print the same, and something. PART=BF16: the reference prints that alone.
set -eu
reference=$1
shift
expected=$("$reference" ${PART-})
code=0
found=$("$@") || code=$?
[ "$code" = 0 ] || exit "$code"
[ "$(printf '%s\n' "$expected" | wc -l)" -gt 60 ] || { echo "the reference printed too little"; exit 1; }
[ "$expected" = "$found" ] && exit 0
printf '%s\n' "$found" >"$reference.found.$$"
printf '%s\n' "$expected" | diff - "$reference.found.$$" || true
rm -f "$reference.found.$$"
exit 1
