"""The CPythons of this machine, by their minor version: on PATH, and where pyenv keeps them."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SUPPORTED", "found"]

SUPPORTED = tuple(f"3.{minor}" for minor in range(8, 14))
_ASK = "import sys; sys.stdout.write('%d.%d' % sys.version_info[:2])"


def found() -> dict[str, str]:
    """{"2.7": path, ..., "3.13": path}: the first of each version that starts. A shim of pyenv often does not."""
    interpreters: dict[str, str] = {}
    for path in _candidates():
        name = re.fullmatch(r"python(\d\.\d+)", path.name)
        if name is None or name.group(1) in interpreters:
            continue
        done = subprocess.run([str(path), "-c", _ASK], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout == name.group(1):
            interpreters[name.group(1)] = str(path)
    return dict(sorted(interpreters.items(), key=lambda item: [int(part) for part in item[0].split(".")]))


def _candidates() -> Iterator[Path]:
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [*sorted(pyenv.glob("versions/*/bin")), *(Path(each) for each in os.get_exec_path() if each)]
    for folder in folders:
        if folder.is_dir():
            yield from sorted(path for path in folder.glob("python*") if os.access(path, os.X_OK))
