# SPDX-License-Identifier: Apache-2.0
# A header as doxygen is to read it, line for line: awk -f header.awk HEADER
#
# What stands at its head becomes the file's description, and the public names belong to the module of their room. Left
# out are the namespaces `detail`, `kernels` and `elementwise` (what only the library's own loops and functors are made
# of) and other libraries', specialisations (of options_of, enum_words, method …: the primary template says what they
# are), overloads that only explain a wrong call, and macros that are undefined again or end in an underscore.
#
# Five kinds of names need no comment of their own, and get one here: what is named as the standard library names it
# (size(), begin(), operator== …); constructors and destructors that only make an empty value, copy or move; what a contract names (of a merge method, its body and its keep rule); members that
# the options' own table describes; and overloads of a function that is described before, in the same file.

# The lines first..last, and the comment above them, become empty.
function leave_out(first, last,    k)
{
    while (first > 1 && line[first - 1] ~ /^ *\/\/\//) { --first }
    for (k = first; k <= last; ++k) { line[k] = "" }
}
# The first line from `i` on that matches.
function upto(i, pattern) { while (i < lines && line[i] !~ pattern) { ++i } return i }
# Where the declaration that line `i` belongs to begins.
function beginning(i)
{
    while (i > 1 && (line[i - 1] ~ /^ *(template <|requires|\[\[[^;]*\]\]$)/ || (line[i - 1] !~ /[;{}:]( *\/\/.*)?$/ && line[i - 1] !~ /^ *(\/\/.*|#.*)?$/ && line[i - 1] !~ /\*\/$/))) { --i }
    return i
}
function has_comment(i, first) { return line[first - 1] ~ /^ *\/\/[\/!]/ || line[first - 1] ~ /\*\/$/ || line[i] ~ /\/\/\/</ || line[i + 1] ~ /^ *\/\/\/</ }
function give(i, text) { line[i] = "/** " text " */ " line[i] }

FNR == 1 {
    name = FILENAME
    sub(/^.*\/include\//, "", name); sub(/^include\//, "", name)
    room = name
    sub(/^taskvec\//, "", room)
    if (!sub(/\/.*/, "", room)) { room = "core" }
}
{ line[++lines] = $0 }
/^# *undef / { undefined[$0 ~ /^# undef/ ? $3 : $2] = 1 }
# Rows of tables: option_row("name", &options::member, "what it is"...), weights_row(&options::member) ...
{ whole = whole " " $0 }

END {
    while (match(whole, /option_row\([^&]*&[a-z_]+::[a-z_0-9]+, *"[^"]*"/)) {
        row = substr(whole, RSTART, RLENGTH); whole = substr(whole, RSTART + RLENGTH)
        member = row; sub(/^[^&]*&/, "", member); sub(/,.*/, "", member)
        text = row; sub(/^.*, *"/, "", text); sub(/"$/, "", text)
        described[member] = text
    }
    described["weights"] = "one for each task, or none for all 1"

    # The head: \file takes the place of the license, or of the line behind the head (#pragma once).
    for (i = 1; line[i] ~ /^\/\//; ++i) {
        sub(/^\/\/ ?/, "", line[i])
        if (line[i] ~ /^SPDX/) { spare = i; continue }
        sub(/ *SPDX-License-Identifier.*/, "", line[i])
        if (line[i] !~ /^    |`[^`]*<[^`]*`/) { gsub(/<[a-z_.]+>/, "`&`", line[i]) }
        line[i] = "//! " line[i]
    }
    body_from = i
    for (k = spare ? spare : i; k > 1; --k) { line[k] = line[k - 1] }
    line[1] = "//! \\file " name

    # What is left out.
    for (; i <= lines; ++i) {
        if (line[i] ~ /^namespace (taskvec::inline TASKVEC_ABI::)?(detail|detail::[a-z_]+|kernels|elementwise|calls|Eigen|xt) \{/) {
            space = line[i]
            sub(/ \{.*/, "", space); sub(/^.*[ :]/, "", space)
            end = upto(i, space == "xt" ? "^}$" : "^} // namespace (.*::)?" space "$")
            leave_out(i, end)
            i = end
        } else if (line[i] ~ /^template <>/ || line[i] ~ /^(struct|class) [a-z_0-9:]+</ || line[i] ~ /^inline constexpr [a-z]+ [a-z_0-9]+</) {
            first = beginning(i)
            end = upto(i, ";$")
            if (line[end] !~ /^[^ ].*;$/) { end = upto(end, "^};") }
            leave_out(first, end)
            i = end
        } else if (line[i] ~ /^template </) {
            end = upto(i, "(^{|;$|{$|{ }$)")
            text = ""
            for (k = i; k <= end; ++k) { text = text line[k] }
            if (text ~ /(detail::(flawed_|gpu_without_header|no_policy|no_matrix|right_merge|[a-z_]*wrong|refuse)|requires ?\(?sizeof\.\.\.\(Arguments\) >= 2|!merge_method<Options>)/) {
                if (line[end] ~ /^{/) { end = upto(end, "^}") }
                leave_out(i, end)
                i = end
            } else if (line[end] ~ /^{/) { # what only explains has a body that says so
                last = upto(end, "^}")
                text = ""
                for (k = end; k <= last; ++k) { text = text line[k] }
                if (text ~ /detail::no_result|::explain<|detail::never</) {
                    leave_out(i, last)
                    i = last
                }
            }
        } else if (line[i] ~ /^TASKVEC_(WRONG_CALLS|CALLS_NEED_HEADER)\(/) {
            end = upto(i, "\\)$")
            leave_out(i, end)
            i = end
        } else if (line[i] ~ /^(struct|class|enum class) [a-z_0-9]+( : [a-z_:0-9]+)?;$/) { # declared, not defined
            leave_out(beginning(i), i)
        } else if (line[i] ~ /&& *[a-z]*\)? = delete;/) {
            leave_out(beginning(i), i)
        } else if (line[i] ~ /^[a-z_]+\(.*\) -> /) { # a deduction guide
            leave_out(beginning(i), i)
        } else if (line[i] ~ /^# *define /) {
            macro = line[i]
            sub(/^# *define */, "", macro); sub(/[ (].*/, "", macro)
            end = upto(i, "[^\\\\]$")
            if (macro ~ /_$/ || macro in undefined) { leave_out(i, end) }
            i = end
        }
    }

    # What needs no comment of its own.
    standard = "^(begin|end|size|empty|data|operator\\[\\]|operator=|operator==|operator!=|operator<=>|operator<|operator bool|operator\\*|operator->|operator\\+\\+|operator--|swap|get_deleter)$"
    standard_type = "^ *using (value_type|element_type|size_type|difference_type|iterator|const_iterator|pointer|reference|iterator_category|iterator_concept) ="
    contract = "^(in_place|on_device|needs_base|task_slots|watches|reads_beside|may_add_zeros|walks|bytes_beside|body|with_body|settle|again|beside|examine|pieces|weigh|row_numbers|scratch_rows|constant_until|write)$"
    for (i = body_from; i <= lines; ++i) {
        if (line[i] ~ /^(struct|class) /) { scope = line[i]; sub(/^[a-z]+ /, "", scope); sub(/[ {:].*/, "", scope); type[1] = scope }
        else if (line[i] ~ /^    (struct|class) [a-z_]+ .*{/) { type[2] = line[i]; sub(/^ *[a-z]+ /, "", type[2]); sub(/[ {:].*/, "", type[2]) }
        if (line[i] ~ /^};/) { scope = "" }
        if (line[i] ~ /^ *{( .*)?$/ && line[i] !~ /} *;?$/) { # a function's body
            match(line[i], /^ */)
            indent = RLENGTH
            while (i < lines && !(line[i] ~ /^ *}/ && match(line[i], /^ */) && RLENGTH == indent)) { ++i }
            continue
        }
        match(line[i], /^ */)
        if (line[i] ~ /^ *(private|protected|public):/) {
            if (line[i] ~ /private/) { hidden = 1; hidden_at = RLENGTH }
            else if (RLENGTH <= hidden_at) { hidden = 0 }
            continue
        }
        if (RLENGTH <= hidden_at && line[i] ~ /^ *}/) { hidden = 0 }
        if (hidden || line[i] ~ /^ *($|\/\/|#|:|,|template <|requires|}|return|static_assert|namespace|extern)/) { continue }
        if (beginning(i) != i && line[beginning(i)] !~ /^ *(template <|requires|\[\[[^;]*\]\]$)/) { continue }
        code = line[i]
        sub(/ *\/\/.*/, "", code)
        gsub(/\[\[[^]]*\]\]( |$)/, "", code)
        first = beginning(i)
        if (code ~ standard_type) {
            if (!has_comment(i, first)) { give(first, "As of the standard library's containers and iterators.") }
            continue
        }
        open = index(code, "(")
        id = code
        if (code ~ /operator *\(\)/) { id = "operator()" }
        else if (match(code, /operator *[^ a-z(]+/) || match(code, /operator bool/)) { id = substr(code, RSTART, RLENGTH); gsub(/operator  */, "operator", id); if (id == "operatorbool") { id = "operator bool" } }
        else if (code ~ /^[^(]*[ :] *[a-z_0-9~]+( = .*|\{.*\})?;$/ || code ~ /^[^(]*= /) { sub(/( = .*|\{[^}]*\})?;?$/, "", id); sub(/ =$/, "", id); sub(/\[.*/, "", id); sub(/^.* /, "", id); open = 0 }
        else if (open) { id = substr(code, 1, open - 1); sub(/ $/, "", id); sub(/^.*[ *&]/, "", id) }
        else { continue }
        if (id !~ /^[a-z~]/) { continue }
        if (has_comment(i, first)) { known[scope "::" id] = 1; continue }
        if (id ~ standard) { give(first, "As of the standard library's types.") }
        else if (open && scope != "" && (id == type[1] || id == type[2] || id ~ /^~/) && (code ~ /\(\)( noexcept)?( = default| *{ *})?;?$/ || code ~ /= (default|delete);/ || code ~ /\([^,]*&&[^,]*\) noexcept/ || code ~ /\(const [a-z_]+& other\)/)) {
            give(first, "As usual: makes an empty value, copies, moves or destroys; or is deleted, where it says so.")
        }
        else if ((id ~ contract || (id == "operator()" && code ~ /\(In& in\)/)) && (room == "methods" || name ~ /device\/methods/)) { give(first, "As the contract of merge methods says: see elementwise_method.") }
        else if (!open && (scope "::" id) in described) { give(first, described[scope "::" id] ".") }
        else if (!open && id == "weights" && code ~ /vector<double>/) { give(first, described["weights"] ".") }
        else if (open && (scope "::" id) in known) { give(first, "\\overload") }
    }

    # Concepts without a comment, which doxygen does not miss.
    for (i = body_from; i <= lines; ++i) {
        if (line[i] ~ /^concept / && !has_comment(i, beginning(i))) {
            id = line[i]; sub(/^concept /, "", id); sub(/ .*/, "", id)
            print FILENAME ":" i ": error: Member " id " (concept) of namespace taskvec is not documented." > "/dev/stderr"
        }
    }

    # Several variables in one declaration: doxygen gives the comment to one of them.
    for (i = body_from; i <= lines; ++i) {
        if (line[i] !~ /^ +(static constexpr |const )?[A-Za-z_:0-9]+(<[A-Za-z_: ,]+>)?( const)?[ *]+[a-z_0-9]+( = [^,(]+|\{\})?,( \*)?.*;( \/\/.*)?$/ || line[i] ~ /^[^\/]*\(/ || line[i] ~ /^ *(using|return|friend|\/\/)/) { continue }
        text = ""
        if (match(line[i], /\/\/\/< /)) { text = substr(line[i], RSTART + 5) }
        else if (line[i - 1] ~ /^ *\/\/\/ /) { text = line[i - 1]; sub(/^ *\/\/\/ /, "", text) }
        if (text == "") { continue }
        code = line[i]
        sub(/; *(\/\/.*)?$/, "", code)
        match(code, /^ +(static constexpr |const )?[A-Za-z_:0-9]+(<[A-Za-z_: ,]+>)?( const)?[ *]+/)
        of = substr(code, 1, RLENGTH)
        parts = split(substr(code, RLENGTH + 1), part, /, \*?/)
        line[i] = ""
        for (k = 1; k <= parts; ++k) { line[i] = line[i] "/** " text " */ " of part[k] "; " }
    }

    for (i = 1; i <= lines; ++i) {
        if (line[i] ~ /^namespace taskvec::inline TASKVEC_ABI/) {
            sub(/::inline TASKVEC_ABI/, "", line[i])
            line[i] = line[i] " /** \\addtogroup " room " */ /**@{*/"
        } else if (line[i] ~ /^} \/\/ namespace taskvec/) { line[i] = "/**@}*/ }" }
        print line[i]
    }
}
