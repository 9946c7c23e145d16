#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The tool, the examples and the pages do with the library's public names: none reaches into detail or kernels. sh public_names.sh
set -eu
cd "$(dirname "$0")/../.."
files=$(find tools examples support docs -type f \( -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.md' \) -print; echo README.md CONTRIBUTING.md)
awk '
    {
        line = $0
        gsub(/nlohmann::detail::/, "", line)
        if (FILENAME !~ /[.]md$/) { gsub(/\/\/.*/, "", line) }
        if (line ~ /(detail|kernels)::[a-z_]/) { print FILENAME ":" FNR ": " $0; ++found }
    }
    END {
        print ARGC - 1 " files, " found + 0 " names that are not public"
        exit found > 0 || ARGC < 150
    }' $files
