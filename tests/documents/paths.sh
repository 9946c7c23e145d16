#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every file that a page names in backquotes is there: in include/taskvec/, or from the project's root. sh paths.sh PAGE...
set -eu
cd "$(dirname "$0")/../.."
named=0 missing=0
for page in "$@"; do
    for file in $(grep -o '`[A-Za-z0-9_./-]*/[A-Za-z0-9_.-]*\.\(hpp\|cpp\|cu\|sh\|awk\|py\)`' "$page" | tr -d '`' | sort -u); do
        named=$((named + 1))
        [ -e "include/taskvec/$file" ] || [ -e "$file" ] || [ -e "include/$file" ] || {
            echo "$page names $file, which is not there"
            missing=$((missing + 1))
        }
    done
done
echo "$named files named, $missing missing"
[ "$named" -gt 0 ] && [ "$missing" = 0 ]
