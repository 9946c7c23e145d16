"""Succeeds when the environment holds exactly the versions of requirements.txt."""
# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import pathlib
import sys

for line in (pathlib.Path(__file__).parent / "requirements.txt").read_text().splitlines():
    if line and not line.startswith("#"):
        package, version = line.split("==")
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            sys.exit(f"{package} {version} is missing")
        if found != version:
            sys.exit(f"{package} is {found}; expected {version}")
