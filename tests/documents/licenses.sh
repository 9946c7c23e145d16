#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every file that somebody wrote as code names its license: sh licenses.sh
set -eu
cd "$(dirname "$0")/../.."
files=$(find . -mindepth 1 -name ".*" -prune -o -name build -prune -o -name data -prune -o -type f \
    \( -name '*.hpp' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake' -o -name '*.in' -o -name '*.awk' -o -name '*.py' -o -name '*.sh' \
    -o -name CMakeLists.txt -o -name meson.build -o -name '*.bazel' -o -name '*.toml' \) -print; find scripts -maxdepth 1 -type f; find packaging -name build -type f)
awk '
    FNR <= 12 && /SPDX-License-Identifier: Apache-2.0/ { named[FILENAME] = 1 }
    END {
        for (i = 1; i < ARGC; ++i) {
            if (!(ARGV[i] in named)) { print ARGV[i] " has no line SPDX-License-Identifier: Apache-2.0 at its head"; ++missing }
        }
        print ARGC - 1 " files, " missing + 0 " without a license"
        exit missing > 0 || ARGC < 200
    }' $files
