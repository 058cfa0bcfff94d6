"""Reading what Linux tells about a machine: small files under /proc, /sys and /etc, all below a `root`.

`root` is "/" on a machine, and a folder with a copy of such a tree elsewhere. What is absent, may not be read, or does
not answer is None: drivers refuse a read while their part of the chip is off. Python 3.8, standard library.
"""

import glob
import os
import re
from typing import List, Optional

__all__ = ["at", "paths", "read", "read_int"]


def at(root: str, path: str) -> str:
    """`path`, as on the machine (with a leading slash), below `root`."""
    return os.path.join(root, path.lstrip("/"))


def read(root: str, path: str) -> Optional[str]:
    """The file's text without the zero bytes and line ends around it; None where that is empty, too."""
    try:
        with open(at(root, path), "rb") as file:
            return file.read().decode("utf-8", "replace").strip("\0\r\n\t ") or None
    except OSError:
        return None


def read_int(root: str, path: str) -> Optional[int]:
    """The file's whole number; None where it holds something else."""
    try:
        return int(read(root, path) or "")
    except ValueError:
        return None


def paths(root: str, pattern: str) -> List[str]:
    """Paths as on the machine that a glob pattern matches, 2 before 10."""
    below = os.path.join(glob.escape(root), pattern.lstrip("/"))
    found = ["/" + os.path.relpath(path, root) for path in glob.glob(below)]
    return sorted(found, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)])
