# SPDX-License-Identifier: Apache-2.0
# fwd.hpp declares every public type: awk -f fwd.awk FWD STORAGE_LIST HEADER...
#
# A type is public that a header outside device/ has at the level of namespace taskvec. Its declaration is in fwd.hpp (or in
# core/storage_list.hpp, which that includes), and so are its default template arguments: the header that defines it has none.
# fwd.hpp declares nothing that no header has. The bodies of methods may be left out: walks name them, programs do not.

BEGIN {
    # Their constraints need definitions.
    undeclared["disentanglement_meter"] = undeclared["dlpack_handle"] = undeclared["tensor_group"] = 1
}

FNR == 1 {
    files++
    level = 0
    others = 0
    head = ""
}

# Namespaces stand in the first column, and their ends say what they end.
/^namespace .*\{$/ {
    ++level
    if (!/^namespace taskvec::inline TASKVEC_ABI \{$/) { ++others }
    opened[level] = /^namespace taskvec::inline TASKVEC_ABI \{$/ ? 0 : 1
}
/^\}.*\/\/ namespace/ {
    others -= opened[level]
    --level
}

/^template/ { head = $0; next }
head != "" && /^[ \t]+(requires|&&|\|\|)/ { head = head " " $0; next }

/^(class|struct|union|enum( class)?) / && !others && level > 0 {
    text = $0
    sub(/^(class|struct|union|enum class|enum) +/, "", text)
    sub(/^\[\[[^\]]*\]\] */, "", text)
    name = text
    sub(/[^A-Za-z_0-9].*/, "", name)
    if (head ~ /^template <>/ || text ~ /^[A-Za-z_0-9]+</) { } # a specialisation
    else if (FILENAME ~ /\/taskvec\/(fwd|core\/storage_list)\.hpp$/) {
        declared[name] = FNR
        if (/\{/) { defined[name] = 1 }
        count++
    }
    else {
        defined[name] = 1
        if (!(name in declared) && !(name in undeclared) && name !~ /_body$/) {
            print FILENAME ":" FNR ": taskvec/fwd.hpp does not declare " name
            faults++
        }
        if (name in declared && head ~ /=/) {
            print FILENAME ":" FNR ": " name " has a default template argument here: it belongs in taskvec/fwd.hpp"
            faults++
        }
        if (name in undeclared) { met[name] = 1 }
    }
}

/^[^ \t]/ { head = "" }

END {
    for (name in declared) {
        if (!(name in defined)) {
            print "taskvec/fwd.hpp:" declared[name] ": " name " is declared, and no header has it"
            faults++
        }
    }
    for (name in undeclared) {
        if (!(name in met)) { print "fwd.awk: take it off the list: " name; faults++ }
    }
    if (files < 50 || count < 100) { print "fwd.awk: " files " headers and " count " declarations found: nothing was checked"; exit 2 }
    exit faults > 0
}
