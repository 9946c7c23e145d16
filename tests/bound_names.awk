# What a structured binding names stands in no CAPTURE: awk -f bound_names.awk TEST... doctest's CAPTURE makes a lambda, and
# no lambda captures such a name before clang 16; CAPTURE_BOUND (capture.hpp) does. g++ takes both.
# SPDX-License-Identifier: Apache-2.0

FNR == 1 {
    depth = 0
    files++
}
function indent(line) {
    match(line, /^ */)
    return RLENGTH
}
# Scopes end where a line stands further out than the one that opened them.
NF > 0 { while (depth > 0 && indent($0) < opened[depth]) { --depth } }
match($0, /auto[ &]*\[[^]]*\]/) {
    list = substr($0, RSTART, RLENGTH)
    gsub(/.*\[|\]| /, "", list)
    opened[++depth] = indent($0) + ($0 ~ /^ *(for|if) \(/ ? 1 : 0)
    names[depth] = list
    next
}
match($0, /[^A-Z_]CAPTURE\(.*\)/) {
    what = substr($0, RSTART + 9, RLENGTH - 10)
    for (d = 1; d <= depth; ++d) {
        count = split(names[d], name, ",")
        for (i = 1; i <= count; ++i) {
            if (what !~ "(^|[^A-Za-z0-9_.])" name[i] "($|[^A-Za-z0-9_])") { continue }
            print FILENAME ":" FNR ": CAPTURE of '" name[i] "', which a structured binding names: use CAPTURE_BOUND"
            wrong = 1
        }
    }
}
END {
    if (files < 150) {
        print "only " files " test files were looked at"
        wrong = 1
    }
    exit wrong
}
