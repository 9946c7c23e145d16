"""Eigen 5, whose headers PyPI has in eigency: the tests of what touches Eigen, and two examples, compiled with it and run."""
# SPDX-License-Identifier: Apache-2.0
import os
import pathlib
import subprocess
import sys
import tempfile

from common import tool_arguments

ROOT = pathlib.Path(__file__).resolve().parents[2]
TESTS = ["interop/eigen_test.cpp", "linalg/factored_svd_test.cpp", "linalg/randomized_svd_test.cpp", "jvp/linear_test.cpp", "jvp/dual_test.cpp"]


def main():
    tool_arguments(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", scratch, "eigency==5.0.1.1"], check=True)
        eigen = pathlib.Path(scratch) / "eigency/eigen"
        assert '"5.0.1"' in (eigen / "Eigen/Version").read_text()

        def build(name, *sources, flags=()):
            program = pathlib.Path(scratch) / name
            subprocess.run([os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-I", ROOT / "include", "-I", ROOT / "tests",
                            "-isystem", eigen, *flags, *sources, "-o", program, "-pthread"], check=True)
            return program

        # As it is, and in another configuration, which is then that of all files of a program.
        for flags, files in (((), TESTS), (("-DEIGEN_DONT_VECTORIZE", "-DEIGEN_MAX_ALIGN_BYTES=0"), TESTS[:2])):
            tests = build("tests", ROOT / "tests/main.cpp", *(ROOT / "tests" / test for test in files), flags=flags)
            done = subprocess.run([tests], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
            print(*flags, next(line for line in done.stdout.splitlines() if "test cases:" in line))
        for name in ("neighbours", "linearize_layer"):
            done = subprocess.run([build(name, ROOT / f"examples/{name}.cpp")], capture_output=True, text=True, check=True)
            assert done.stdout == (ROOT / f"examples/{name}.out").read_text(), done.stdout
    print("Eigen 5.0.1: the same output of two examples")


if __name__ == "__main__":
    main()
