#!/usr/bin/env bash
# An environment for measure.py on a machine without a network: the machine's own torch, and the wheels that were
# carried. Usage: setup.sh WHEELS VENV        (PYTHON=python3.12 chooses the interpreter, the one that has torch)
# Ends with 1 and the list where a dependency of kdedge is missing or too old.
set -euo pipefail

wheels=${1:?the folder of the wheels}
venv=${2:?the folder of the environment to make}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)

"$python" -m venv --without-pip --system-site-packages "$venv"
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# The machine's python3 may itself be of an environment, and --system-site-packages then means the interpreter below
# that one: its packages are named here. They come after the venv's own, so that a carried wheel wins.
{
  printf '%s\n' "$root" "$root/recipes" "$root/export" "$root/benchmarks"
  "$python" -c 'import sysconfig; print(*sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")}), sep="\n")'
} >"$site/kdedge-checkout.pth"

shopt -s nullglob
found=("$wheels"/*.whl)
if [ ${#found[@]} -gt 0 ]; then
  # Into the folder itself, without pip inside the venv, and without asking any index.
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --upgrade --target "$site" "${found[@]}"
fi

"$venv/bin/python" - "$root/pyproject.toml" <<'CHECK'
import re
import sys
import tomllib
from importlib import metadata

with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


lacking = []
for wanted in project["dependencies"]:
    name, least = wanted.split(">=")
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        lacking.append(f"{wanted} (not there)")
        continue
    if numbers(found) < numbers(least):
        lacking.append(f"{wanted} (found {found})")
if lacking:
    sys.exit(f"Carry wheels of: {', '.join(lacking)}")
print(f"Python {sys.version.split()[0]}, torch {metadata.version('torch')}: every dependency is there.")
CHECK
