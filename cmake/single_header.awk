# SPDX-License-Identifier: Apache-2.0
# Copies headers with every <taskvec/...> include replaced, once, by the text of that header.
# awk -v include=include -f single_header.awk taskvec/taskvec.hpp ...
function copy(name,    path, line, status) {
    if (name in copied) { return }
    copied[name] = 1
    path = include "/" name
    printf "\n// ---- %s\n", name
    while ((status = (getline line < path)) > 0) {
        if (line ~ /^[ \t]*#[ \t]*include[ \t]*<taskvec\//) {
            sub(/^[^<]*</, "", line)
            sub(/>.*/, "", line)
            copy(line)
        }
        else if (line !~ /^[ \t]*#[ \t]*pragma[ \t]+once/) { print line }
    }
    if (status < 0) {
        printf "single_header: cannot read %s\n", path > "/dev/stderr"
        failed = 1
        exit 1
    }
    close(path)
}
BEGIN {
    print "// taskvec in one header. Generated from the headers of the taskvec project: change those instead."
    print "// SPDX-License-Identifier: Apache-2.0"
    print "#pragma once"
    for (i = 1; i < ARGC; ++i) { copy(ARGV[i]) }
    exit failed
}
