#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# packaging/consumers/meson, with this checkout as its subproject, where a wrap would put it. meson.sh MESON COMPILER
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
mkdir -p consumer/subprojects/taskvec
cp "$root/packaging/consumers/meson/meson.build" "$root/packaging/consumers/main.cpp" consumer
cp -R "$root/meson.build" "$root/include" "$root/LICENSE" consumer/subprojects/taskvec
# An environment that names folders of other packages must not matter.
CXX=$2 "$1" setup consumer built > setup.txt || { cat setup.txt; exit 1; }
"$1" compile -C built > said.txt || { cat said.txt; exit 1; }
built/consumer
if [ -x built/consumer_io ]; then built/consumer_io; else sed -n 's/^Message: /without files: /p' setup.txt; fi
