# SPDX-License-Identifier: Apache-2.0
# Copies headers with every <taskvec/...> include replaced, once, by the text of that header. Each of them stands in a guard
# of its own, so that several single headers go into one program.
# awk -v include=include -f single_header.awk taskvec/taskvec.hpp ...
# -v without=REGEX: of the headers named, only those that include, themselves or through others, nothing that it matches.
function guard_of(name) {
    name = toupper(name)
    gsub(/[^A-Z0-9]/, "_", name)
    return "TASKVEC_SINGLE_" substr(name, 9)
}
function copy(name, conditional,    path, line, status, depth) {
    if (name in copied) { return }
    if (conditional > 1) {
        printf "single_header: %s would stand inside an #if, and is included elsewhere too\n", name > "/dev/stderr"
        failed = 1
        exit 1
    }
    copied[name] = 1
    path = include "/" name
    depth = 0
    printf "\n// ---- %s\n#if !defined(%s)\n#define %s\n", name, guard_of(name), guard_of(name)
    while ((status = (getline line < path)) > 0) {
        if (line ~ /^[ \t]*#[ \t]*if/) { ++depth }
        if (line ~ /^[ \t]*#[ \t]*endif/) { --depth }
        if (line ~ /^[ \t]*#[ \t]*include[ \t]*<taskvec\//) {
            sub(/^[^<]*</, "", line)
            sub(/>.*/, "", line)
            # What an #if brings must not bring what is needed without it.
            copy(line, conditional ? conditional + 1 : depth > 0)
        }
        else if (line !~ /^[ \t]*#[ \t]*pragma[ \t]+once/) { print line }
    }
    if (status < 0) {
        printf "single_header: cannot read %s\n", path > "/dev/stderr"
        failed = 1
        exit 1
    }
    close(path)
    printf "#endif // %s\n", guard_of(name)
}
# Whether a header comes, however far away, to something that `without` matches.
function brings(name,    path, line, status, found, lines, count, i) {
    if (name in known) { return known[name] }
    known[name] = 0
    path = include "/" name
    count = 0
    while ((getline line < path) > 0) {
        if (line ~ /^[ \t]*#[ \t]*include[ \t]*</) {
            sub(/^[^<]*</, "", line)
            sub(/>.*/, "", line)
            lines[++count] = line
        }
    }
    close(path)
    found = 0
    for (i = 1; i <= count; ++i) {
        if (lines[i] ~ /^taskvec\// ? brings(lines[i]) : lines[i] ~ without) { found = 1 }
    }
    return known[name] = found
}
BEGIN {
    print "// taskvec in one header. Generated from the headers of the taskvec project by scripts/single-header: change those instead."
    print "// SPDX-License-Identifier: Apache-2.0"
    print "#pragma once"
    for (i = 1; i < ARGC; ++i) {
        if (without == "" || !brings(ARGV[i])) { copy(ARGV[i], 0) }
    }
    exit failed
}
