# SPDX-License-Identifier: Apache-2.0
# Public names come before detail: awk -f order.awk HEADER..., each header as include/taskvec/<room>/<name>.hpp.
#
# A header that declares anything at the level of namespace taskvec, or of a namespace of it that is not detail's, opens
# with that: what a user calls is read first, and what it is made of stands below it. Headers with no such name are not
# asked. A block that only says that a header of devices was included (gpu_header_included) may come before all: what is
# called in that header asks for it.

BEGIN {
    # Views by traits: the concepts of detail are the constraints of all that is public there.
    excepted["interop/mdspan.hpp"] = excepted["interop/xtensor.hpp"] = 1
}

FNR == 1 {
    judge()
    file = FILENAME
    files++
    within = inside = first = public = 0
}

# Namespaces stand in the first column, and their ends say what they end.
/^namespace taskvec/ { within = 1 }
!within { next } # another project's names
/^namespace .*detail.*\{$/ {
    ++inside
    opened = FNR
    next
}
/^\}.*\/\/ namespace .*detail/ {
    --inside
    next
}
/^namespace / || /^TASKVEC_[A-Z_]+(\(.*\))?$/ || /^(#|\/\/|\}|$)/ { next }
/^(static_assert|extern "C"|using [a-z_:]+;$|[ \t])/ { next }

!inside && !public { public = FNR }
inside && !first && !/^template <>$/ && !/^inline constexpr bool gpu_header_included</ { first = opened }

END {
    judge()
    for (header in excepted) {
        if (!(header in met)) { print "order.awk: take it off the list: " header; faults++ }
    }
    if (files < 50 || asked < 50) { print "order.awk: " files " headers, " asked " with public names: nothing was checked"; exit 2 }
    exit faults > 0
}

function judge(    header) {
    if (file == "") { return }
    if (public) { asked++ }
    if (!public || !first || first > public) { return }
    header = file
    sub(/^.*include\/taskvec\//, "", header)
    if (header in excepted) { met[header] = 1; return }
    print file ":" first ": detail comes before the first public name, at line " public
    faults++
}
