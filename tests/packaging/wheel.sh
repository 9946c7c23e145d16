#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# pyproject.toml: what it says fits the project, and what CMake installs for it is the command and its pages alone. Nothing is compiled:
# an empty program stands for the tool. What it cannot be built without is an error, not a wheel without a command. wheel.sh PYTHON CMAKE NINJA COMPILER VERSION
set -eu
python=$1 cmake=$2 ninja=$3 compiler=$4 version=$5
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "$*" >&2; exit 1; }

"$python" -c 'import tomllib' 2>/dev/null || { echo "skipped: $python reads no TOML (3.11 does)"; exit 77; }
"$python" - "$root" "$version" > "$work/defines" <<'END'
import pathlib, re, sys, tomllib
root, version = pathlib.Path(sys.argv[1]), sys.argv[2]
project = tomllib.loads((root / "pyproject.toml").read_text())
metadata = project["tool"]["scikit-build"]["metadata"]["version"]
found = re.search(metadata["regex"], (root / metadata["input"]).read_text())
said = metadata["result"].format(**found.groupdict())
if said != version:
    sys.exit(f"pyproject.toml finds version {said}, CMake {version}")
if project["project"]["dynamic"] != ["version"] or "version" in project["project"]:
    sys.exit("the version is to come from config.hpp alone")
if project["project"].get("dependencies") or project["project"].get("scripts"):
    sys.exit("the command needs nothing of Python")
for name in [project["project"]["readme"], *project["project"]["license-files"]]:
    if not (root / name).is_file():
        sys.exit(f"pyproject.toml names {name}, which is not there")
if project["tool"]["scikit-build"]["install"]["components"] != ["wheel"]:
    sys.exit("the wheel is to hold the component 'wheel' alone")
options = (root / "CMakeLists.txt").read_text()
for name, value in project["tool"]["scikit-build"]["cmake"]["define"].items():
    if name not in options:
        sys.exit(f"pyproject.toml sets {name}, which is no option")
    print(f"-D{name}={value}")
END

configure() { # ARGUMENT...
    "$cmake" -S "$root" -B "$work/built" -G Ninja -DCMAKE_MAKE_PROGRAM="$ninja" -DCMAKE_CXX_COMPILER="$compiler" $(cat "$work/defines") \
        -DSKBUILD=2 -DSKBUILD_SCRIPTS_DIR="$work/wheel/scripts" -DSKBUILD_DATA_DIR="$work/wheel/data" "$@" > "$work/said.txt" 2>&1
}
# refuses SENTENCE ARGUMENT...
refuses() {
    sentence=$1
    shift
    if configure "$@"; then fail "a wheel is made with $*"; fi
    tr -s ' \n' '  ' < "$work/said.txt" | grep -qF "$sentence" || { cat "$work/said.txt"; fail "'$sentence' is not said with $*"; }
    [ "$(grep -c 'CMake Error' "$work/said.txt")" = 1 ] || { cat "$work/said.txt"; fail "more than one error with $*"; }
    rm -rf "$work/built"
}
needs='the command line tool cannot be built: it needs CLI11 and nlohmann_json (Debian: libcli11-dev nlohmann-json3-dev)'
refuses "$needs" -DCMAKE_DISABLE_FIND_PACKAGE_CLI11=ON
refuses "$needs" -DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON
refuses "the command line tool cannot be built: it needs POSIX" -DWIN32=ON
refuses "'taskvec run' cannot be built: it needs yaml-cpp's libyaml-cpp.a (Debian: libyaml-cpp-dev)" -DCMAKE_DISABLE_FIND_PACKAGE_yaml-cpp=ON
configure || {
    grep -q 'static C and C++ libraries' "$work/said.txt" && { echo "skipped: no program without shared libraries can be linked here"; exit 77; }
    grep -q 'libyaml-cpp.a' "$work/said.txt" && { echo "skipped: there is no libyaml-cpp.a here"; exit 77; }
    cat "$work/said.txt"
    exit 1
}
"$ninja" -C "$work/built" -t commands bin/taskvec | tail -n 1 > "$work/link.txt"
grep -q -e ' -static' "$work/link.txt" || fail "the tool is linked with shared libraries: $(cat "$work/link.txt")"
if grep -q '[.]so' "$work/link.txt"; then fail "the tool is linked with a shared library: $(cat "$work/link.txt")"; fi
mkdir -p "$work/built/bin" "$work/built/pages/man1"
cp /bin/true "$work/built/bin/taskvec"
: > "$work/built/pages/man1/taskvec.1"
"$cmake" --install "$work/built" --component wheel > "$work/said.txt" 2>&1 || { cat "$work/said.txt"; exit 1; }
files=$(cd "$work/wheel" && find . -type f | sort | tr '\n' ' ')
[ "$files" = "./data/share/man/man1/taskvec.1 ./scripts/taskvec " ] || fail "the wheel holds: $files"
echo "version $version; the wheel holds: $files"
