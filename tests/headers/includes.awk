# SPDX-License-Identifier: Apache-2.0
# A header includes what it uses: awk -f includes.awk std_names.txt HEADER...
#
# std_names.txt says for names of the standard library which header has them. A header of taskvec that uses such a name
# includes one of its headers itself, not by way of others; and a standard header all of whose names the table knows is not
# included where none of them is used.

FNR == NR {
    if (/^#/ || NF < 2) { next }
    if ($1 == "complete") { # headers with no names but those of the table
        for (i = 2; i <= NF; ++i) { complete[$i] = 1 }
        next
    }
    for (i = 2; i <= NF; ++i) { homes[$i] = homes[$i] " " $1 " " }
    known[$1] = 1
    next
}

FNR == 1 {
    judge()
    file = FILENAME
    files++
    block = 0
}

{
    line = $0
    gsub(/\\"/, "", line)
    gsub(/"[^"]*"/, "\"\"", line)
    sub(/\/\/.*/, "", line)
    if (line ~ /^[ \t]*#[ \t]*include[ \t]*</) {
        sub(/^[^<]*</, "", line)
        sub(/>.*/, "", line)
        included[line] = FNR
        next
    }
    while (match(line, /(std::|TASKVEC_)?[A-Za-z_][A-Za-z_0-9]*(::[A-Za-z_][A-Za-z_0-9]*)*/)) {
        name = substr(line, RSTART, RLENGTH)
        line = substr(line, RSTART + RLENGTH)
        if (name ~ /^std::/) {
            sub(/^std::/, "", name)
            # std::numeric_limits<T>::max and std::pmr::vector: the longest name that the table has.
            while (!(name in homes) && name ~ /::/) { sub(/::[^:]*$/, "", name) }
            if (name in homes && !(name in used)) { used[name] = FNR }
            else if (!(name in homes) && !(name in strange)) { strange[name] = file ":" FNR }
        }
        else if (("::" name) in homes && !(("::" name) in used)) { used["::" name] = FNR }
    }
}

END {
    judge()
    for (name in strange) { print strange[name] ": std::" name " is not in std_names.txt: add it"; faults++ }
    if (files < 50) { print "includes.awk: " files " headers found: nothing was checked"; exit 2 }
    exit faults > 0
}

function judge(    name, home, count, parts, i, found) {
    if (file == "") { return }
    for (name in used) {
        count = split(homes[name], parts, " ")
        found = 0
        for (i = 1; i <= count; ++i) {
            needed[parts[i]] = 1
            if (parts[i] in included) { found = 1 }
        }
        if (!found) {
            print file ":" used[name] ": uses " (name ~ /^::/ ? substr(name, 3) : "std::" name) " without <" parts[1] ">"
            faults++
        }
    }
    for (home in included) {
        if (home in complete && !(home in needed)) {
            print file ":" included[home] ": includes <" home "> and uses nothing of it"
            faults++
        }
    }
    for (name in used) { delete used[name] }
    for (home in included) { delete included[home] }
    for (home in needed) { delete needed[home] }
}
