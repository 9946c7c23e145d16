#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Wide instructions stay where they are chosen: in a program that was built for any x86-64, only functions that
# run_widest() calls (run_avx2, run_avx512) have instructions with a VEX or EVEX prefix. sh no_leak.sh PROGRAM
set -eu
command -v objdump > /dev/null || { echo "skipped: no objdump (Debian: binutils)"; exit 77; }
objdump -dC --no-show-raw-insn "$1" | awk '
    /^[0-9a-f]+ <.*>:$/ { name = $0; wide = name ~ /kernels::run_avx(2|512)</; wides += wide; ours += name ~ /taskvec/ }
    /^ / && $2 ~ /^(v[a-z]|k(mov|and|or|not|xor|test|shift|add|unpck))/ && $2 !~ /^ver[rw]$/ {
        if (wide) { inside++ }
        else if (name !~ /@plt/ && leaks++ < 5) { print "a wide instruction in " name ": " $0 }
    }
    END {
        print ours + 0 " functions of taskvec, " wides + 0 " of them wide, " inside + 0 " wide instructions there, " leaks + 0 " elsewhere"
        exit !(ours && wides && inside && !leaks)
    }'
