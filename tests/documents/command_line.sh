#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# docs/command-line.md knows the tool: every verb has a row and a section, whose list of options is that of `taskvec VERB --help`, and no
# option stands on the page that no verb has. command_line.sh TOOL; with --write the lists are written instead of compared.
set -eu
tool=$1
page=$(cd "$(dirname "$0")/../.." && pwd)/docs/command-line.md
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "$*" >&2; exit 1; }

"$tool" --help | awk '/^Subcommands:/ { inside = 1; next } inside && !/^  / { exit } inside { print $1 }' > "$work/verbs"
[ "$(grep -c . "$work/verbs")" -gt 20 ] || fail "the tool names these verbs: $(cat "$work/verbs")"
: > "$work/known"
while read -r verb; do
    "$tool" "$verb" --help > "$work/help"
    # `--name VALUE`, without the words on whether it is required or may be repeated.
    sed -n 's/^  \(-[^ ].*\)/\1/p' "$work/help" | sed 's/ [.][.][.].*//; s/   *.*//; s/ REQUIRED//; /^-h,--help/d' > "$work/options"
    grep -o -e '--[a-z][a-z0-9-]*' "$work/options" | sed "s/^/$verb /" >> "$work/known"
    awk -v verb="$verb" '
        BEGIN { print "<!-- options: " verb " -->"; line = "Options:"; separator = " " }
        { item = separator "`" $0 "`"; separator = ", "
          if (length(line) + length(item) > 150) { print line ","; line = substr(item, 3) } else { line = line item } }
        END { if (NR) { print line "." } else { print "It has no options." }; print "<!-- end -->" }' "$work/options" > "$work/list.$verb"
done < "$work/verbs"

# The page with the lists as they should be.
awk -v work="$work" '
    /^<!-- options: / { file = work "/list." $3; inside = 1; while ((getline line < file) > 0) { print line }; close(file); print $3 > (work "/listed") }
    !inside { print }
    /^<!-- end -->$/ { inside = 0 }' "$page" > "$work/page"
sort "$work/verbs" > "$work/verbs.sorted"
sort "$work/listed" | diff "$work/verbs.sorted" - || fail "docs/command-line.md has '<!-- options: VERB -->' for other verbs than the tool has"
if [ "${2-}" = --write ]; then
    cat "$work/page" > "$page"
    exit 0
fi
diff "$page" "$work/page" || fail "docs/command-line.md lists other options than the tool has: sh tests/documents/command_line.sh TOOL --write"

# A list stands in the section of its verb, and the verb in the table.
awk '
    /^## / { section = " " substr($0, 4) " " }
    /^<!-- options: / && index(section, " " $3 " ") == 0 { print $3 " is listed under" section; ++wrong }
    END { exit wrong > 0 }' "$page" || fail "docs/command-line.md lists options in another section than the verb's"
while read -r verb; do
    grep -q "^| .*\[\`$verb\`\](#" "$page" || fail "docs/command-line.md has no row for $verb"
done < "$work/verbs"

# Commands take the options of their verbs, and the text names options of some verb, of cmake, of llama.cpp, or of the method of one's own.
awk '
    { line = held $0; held = "" }
    line ~ /\\$/ { held = substr(line, 1, length(line) - 1); next }
    line ~ /^    (\$ )?taskvec [a-z]/ {
        sub(/^    (\$ )?taskvec /, "", line)
        count = split(line, words, /[ =]/)
        for (i = 2; i <= count && words[i] != "|"; ++i) { if (words[i] ~ /^--[a-z]/) { print words[1], words[i] } }
    }' "$page" | sort -u > "$work/used"
[ "$(grep -c . "$work/used")" -gt 40 ] || fail "docs/command-line.md has hardly a command"
sort -u "$work/known" > "$work/known.sorted"
comm -23 "$work/used" "$work/known.sorted" > "$work/unknown"
[ ! -s "$work/unknown" ] || fail "docs/command-line.md has commands with options that their verbs lack: $(tr '\n' ';' < "$work/unknown")"
{ cut -d ' ' -f 2 "$work/known"; printf '%s\n' --help --version --install --lora --share; } | sort -u > "$work/known.sorted"
grep -o -e '--[a-z][a-z0-9-]*' "$page" | sort -u | comm -23 - "$work/known.sorted" > "$work/unknown"
[ ! -s "$work/unknown" ] || fail "docs/command-line.md names options that no verb has: $(tr '\n' ' ' < "$work/unknown")"
echo "$(grep -c . "$work/verbs") verbs, $(grep -c . "$work/known.sorted") options, $(grep -c . "$work/used") of them in commands"
