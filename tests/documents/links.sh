#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every link of a page to another file, and to a heading, leads somewhere: sh links.sh PAGE... Links to other machines are not followed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# What a page's headings are called in links: lower case, hyphens for spaces, without punctuation.
anchors() { sed '/^```/,/^```/d' "$1" | sed -n 's/^##* //p' | tr 'A-Z' 'a-z' | sed 's/`//g; s/[^a-z0-9 _-]//g; s/ /-/g'; }
links=0 broken=0
for page in "$@"; do
    folder=$(dirname "$page")
    sed '/^```/,/^```/d; s/`[^`]*`//g' "$page" | grep -o '](\([^()]*\))' | sed 's/^](//; s/)$//' | sort -u > "$work/links" || true
    while read -r link; do
        case $link in
            *://* | mailto:*) continue ;;
        esac
        links=$((links + 1))
        file=${link%%#*}
        heading=
        case $link in *#*) heading=${link#*#} ;; esac
        target=${file:+$folder/$file}
        target=${target:-$page}
        if [ ! -e "$target" ]; then
            echo "$page links to $link, which is not there"
            broken=$((broken + 1))
        elif [ -n "$heading" ] && ! anchors "$target" | grep -qxF -e "$heading"; then
            echo "$page links to $link, and $target has no such heading"
            broken=$((broken + 1))
        fi
    done < "$work/links"
done
echo "$links links, $broken broken"
[ "$links" -gt 50 ] && [ "$broken" = 0 ]
