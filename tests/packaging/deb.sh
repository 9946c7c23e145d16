#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The Debian packages: made, looked at, installed in a root of their own, run, and removed. deb.sh CPACK CONFIG [LINTIAN]
set -eu
cpack=$1 config=$2 lintian=${3-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
fail() { echo "$*" >&2; exit 1; }

"$cpack" --config "$config" -G DEB > cpack.txt 2>&1 || { cat cpack.txt; exit 1; }
tool=$(echo taskvec_*_*.deb) headers=$(echo libtaskvec-dev_*_all.deb)
[ -f "$tool" ] && [ -f "$headers" ] || fail "packages are missing: $(ls)"
dpkg-deb -f "$tool" Depends | grep -q 'libc6 (>=' || fail "the tool depends on: $(dpkg-deb -f "$tool" Depends)"
dpkg-deb -f "$headers" Depends | grep -q 'libeigen3-dev' || fail "the headers depend on: $(dpkg-deb -f "$headers" Depends)"
dpkg-deb -c "$tool" > tool.txt
for file in bin/taskvec share/man/man1/taskvec-merge.1.gz share/bash-completion/completions/taskvec share/doc/taskvec/copyright; do
    grep -q " ./usr/$file\$" tool.txt || fail "the tool's package lacks $file"
done
if grep -q '/include/' tool.txt; then fail "the tool's package holds headers"; fi

# A root with nothing in it but dpkg's lists: what the packages need is not looked for.
root=$work/root
mkdir -p "$root/var/lib/dpkg/info" "$root/var/lib/dpkg/updates"
: > "$root/var/lib/dpkg/status"
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else "$@" --force-not-root; fi; }
find "$root" | sort > before.txt
as_root dpkg --root="$root" --force-depends --log=/dev/null -i "$tool" "$headers" > dpkg.txt 2>&1 || { cat dpkg.txt; exit 1; }
"$root/usr/bin/taskvec" --version | head -n 1
[ -f "$root/usr/include/taskvec/taskvec.hpp" ] || fail "no header was installed"
[ -f "$root/usr/share/cmake/taskvec/taskvecConfig.cmake" ] || fail "no CMake file was installed"
as_root dpkg --root="$root" --force-depends --log=/dev/null -P taskvec libtaskvec-dev >> dpkg.txt 2>&1 || { cat dpkg.txt; exit 1; }
left=$(find "$root" -path "$root/var/lib/dpkg" -prune -o -type f -print)
[ -z "$left" ] || fail "removing the packages leaves: $left"
if [ -n "$lintian" ]; then "$lintian" --allow-root --fail-on error "$tool" "$headers"; fi
