#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The commands of docs/cookbook.md make what its code makes, byte for byte: sh cookbook.sh TOOL PROGRAM FOLDER
set -eu
page=$(cd "$(dirname "$0")/../.." && pwd)/docs/cookbook.md
tool=$1 program=$2 folder=$3
rm -rf "$folder"
mkdir -p "$folder/commands"
"$program" "$folder/code" > /dev/null
cp -r "$folder/code/base" "$folder/code/french" "$folder/code/code" "$folder/code/adapter" "$folder/commands"
cd "$folder/commands"
sed -n 's/^    \$ taskvec //p' "$page" > ../commands.txt
[ "$(grep -c . ../commands.txt)" = 4 ] || { echo "the cookbook has other commands than four"; exit 1; }
while read -r command; do
    # shellcheck disable=SC2086
    "$tool" $command > /dev/null 2>&1 || { echo "failed: taskvec $command"; exit 1; }
done < ../commands.txt
for file in merged/model.safetensors fused/model.safetensors adapter-r4/adapter_model.safetensors french.delta.safetensors; do
    cmp "$file" "../code/$file"
done
echo "the same four files"
