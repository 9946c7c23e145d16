# SPDX-License-Identifier: Apache-2.0
# The order of rooms: awk -f rooms.awk docs/design.md HEADER..., each header as include/taskvec/<room>/<name>.hpp.
#
# A header includes headers of its own room and of rooms above it in the list of docs/design.md, and no others. What lies
# in device/<room>/, and device/<room>.hpp, may include what <room> may, and the devices' part of the same rooms; the
# folders of device/ that are no room (memory, streams, vendors) are below none of them. taskvec/*.hpp may include all, but for
# fwd.hpp, which is above all rooms: it includes what names alone are made of, and any header may include it. compiled/ is no
# room: it says which bodies taskvec::compiled has, and its headers stand for those that they are included by.

BEGIN {
    # What is still to be mended; an entry that is mended must go.
}

FNR == NR {
    if (/^\| `[a-z]+\/` \|/) {
        name = $0
        sub(/^\| `/, "", name)
        sub(/\/`.*/, "", name)
        place[name] = ++rooms
    }
    next
}

FNR == 1 {
    header = FILENAME
    sub(/^.*include\/taskvec\//, "", header)
    headers++
}

/^[ \t]*#[ \t]*include[ \t]*<taskvec\// {
    included = $0
    sub(/^[^<]*<taskvec\//, "", included)
    sub(/>.*/, "", included)
    if (header == "fwd.hpp") {
        if (included !~ /^core\/(config|storage_list)\.hpp$/) { fault("is included by fwd.hpp, which declares alone") }
        next
    }
    if (included == "fwd.hpp") { next }
    if (header !~ /\// || header ~ /^compiled\// || included ~ /^compiled\//) { next }
    from = room(header)
    to = room(included)
    if (included !~ /\//) { fault("is included by a room; it is for users") }
    else if (!(from in place)) { fault("stands in a folder that is no room of docs/design.md: " from "/") }
    else if (!(to in place)) { fault("is in no room of docs/design.md") }
    else if (from == "device") {
        # The mirror: neither rooms of the CPU nor their devices' part from further down.
        inner = mirrored(header)
        other = to == "device" ? mirrored(included) : to
        if (inner in place && other in place && place[other] > place[inner]) { fault("is below " inner "/") }
    }
    else if (place[to] > place[from]) { fault("is below " from "/") }
    # Files know no method: the other arrow would close a circle as soon as a method reads a file.
    else if (from == "formats" && to == "methods" && !(header " " included in known)) { fault("is a method; formats/ includes none") }
    else if (header " " included in known) { met[header " " included] = 1 }
}

END {
    if (rooms < 10 || headers < 50) { print "rooms.awk: " rooms " rooms and " headers " headers found: nothing was checked"; exit 2 }
    for (entry in known) {
        if (!(entry in met)) { print "rooms.awk: mended, take it off the list: " entry; faults++ }
    }
    exit faults > 0
}

function room(path) {
    sub(/\/.*/, "", path)
    return path
}

function mirrored(path) {
    sub(/^device\//, "", path)
    sub(/(\/|\.hpp).*/, "", path)
    return path
}

function fault(what) {
    print FILENAME ":" FNR ": <taskvec/" included "> " what
    faults++
}
