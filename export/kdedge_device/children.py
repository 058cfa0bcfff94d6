"""A module of this package as a process of its own, from a folder or from within run.pyz.

Python 3.8, standard library.
"""

import os
import sys
from typing import Dict, List, Tuple

__all__ = ["child"]


def child(module: str, *arguments: str) -> Tuple[List[str], Dict[str, str]]:
    """The command line and the environment to start `kdedge_device.<module>` with."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # a folder, or run.pyz itself
    known = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([package, *known]))
    return [sys.executable, "-m", f"kdedge_device.{module}", *arguments], environment
