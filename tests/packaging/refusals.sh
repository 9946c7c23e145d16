#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A compiler or a standard that cannot do, and a package that is missing, are said in one sentence each: by the headers, by
# taskvec's own CMake project, and by the installed one. refusals.sh COMPILER CMAKE PREFIX
set -eu
compiler=$1 cmake=$2 prefix=$3
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
fail() { echo "$*" >&2; cat said.txt >&2; exit 1; }
refused() { # SENTENCE MOST_ERRORS COMMAND...
    sentence=$1 most=$2
    shift 2
    if "$@" > said.txt 2>&1; then fail "accepted: $*"; fi
    tr -s ' \n' '  ' < said.txt | grep -qF "$sentence" || fail "'$sentence' is not said by: $*"
    [ "$(grep -c 'error:\|CMake Error' said.txt)" -le "$most" ] || fail "more than $most errors by: $*"
}
compile() { "$compiler" -fsyntax-only -I "$root/include" "$@"; }

echo '#include <taskvec/taskvec.hpp>' > whole.cpp
echo '#include <taskvec/methods/ties.hpp>' > core.cpp
for source in whole.cpp core.cpp; do
    refused 'taskvec needs C++20: compile with -std=c++20' 2 compile -std=c++17 $source
done
# An older compiler, as far as its macros go; clang's own number cannot be taken back by an option.
if "$compiler" -dM -E -x c++ /dev/null | grep -q __clang_major__; then number=__clang_major__; else number=__GNUC__; fi
echo "#undef $number
#define $number 11
#include <taskvec/core/config.hpp>" > old.cpp
refused 'taskvec needs g++ 12 or clang 14 (or later): this compiler is older' 2 compile -std=c++20 -w old.cpp

# Processors, by their macros: of big-endian ones, and of those whose arithmetic keeps more digits than its type has.
echo '#include <taskvec/core/config.hpp>' > config.cpp
refused 'taskvec needs a little-endian processor' 2 \
    compile -std=c++20 -w -U__BYTE_ORDER__ -D__BYTE_ORDER__=4321 config.cpp
refused 'add -msse2 -mfpmath=sse' 2 compile -std=c++20 -w -U__FLT_EVAL_METHOD__ -D__FLT_EVAL_METHOD__=2 config.cpp
# What is neither g++ nor clang is not refused, unless it is an old Visual Studio.
if [ $number = __GNUC__ ]; then
    compile -std=c++20 -w -U__GNUC__ config.cpp || fail "another compiler is refused"
    refused 'taskvec needs Visual Studio 2022' 2 compile -std=c++20 -w -U__GNUC__ -D_MSC_VER=1929 config.cpp
fi

# What other projects' headers are missing. Nothing but the standard library is searched.
echo '#include <taskvec/formats/safetensors.hpp>' > files.cpp
for need in 'whole.cpp Eigen libeigen3-dev' 'files.cpp nlohmann_json nlohmann-json3-dev'; do
    set -- $need
    case $2 in
        Eigen) header=Eigen/Core ;;
        *) header=nlohmann/json.hpp ;;
    esac
    if echo "#include <$header>" | "$compiler" -std=c++20 -fsyntax-only -x c++ - > /dev/null 2>&1; then
        [ "$2" = Eigen ] || hidden=1
    fi
    if [ "${hidden-}" = 1 ]; then # the compiler finds it by itself: it is looked for under another name
        sed "s,nlohmann/json.hpp,no-such-folder/json.hpp," "$root/include/taskvec/formats/json.hpp" > json.hpp
        refused "needs $2" 2 compile -std=c++20 json.hpp
    else
        refused "needs $2" 2 compile -std=c++20 "$1"
    fi
    grep -q "$3" said.txt || fail "the package $3 is not named"
done

# CMake, with a compiler that says that it is an older one.
cat > old-compiler <<END
#!/bin/sh
exec "$compiler" -w "\$@" -U$number -D$number=11
END
chmod +x old-compiler
sentence='taskvec needs g++ 12 or clang 14, or later'
refused "$sentence" 1 "$cmake" -S "$root" -B own -DCMAKE_CXX_COMPILER="$work/old-compiler" -DTASKVEC_CORE_ONLY=ON
refused "$sentence" 1 "$cmake" -S "$root/packaging/consumers/core" -B installed -DCMAKE_CXX_COMPILER="$work/old-compiler" -DCMAKE_PREFIX_PATH="$prefix"
# Configured alone, taskvec names the packages of what it cannot find.
refused 'Eigen was not found. Install it (Debian: libeigen3-dev)' 1 "$cmake" -S "$root" -B eigen -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_DISABLE_FIND_PACKAGE_Eigen3=ON -DTASKVEC_CUDA=OFF
