"""Python in a process of its own: a module of this package, from a folder or from within run.pyz, or a few statements.

`python -m` and `python -c` look for every module in the current folder first. Whoever may write there would write a
part of the program, also of the one that holds the clocks as root. A child does not look there. Python 3.8, standard
library.
"""

import os
import sys
from typing import List

__all__ = ["child", "python"]

# Before anything is imported but what is built in. -I would do it, and hide what `pip install --user` installed; -P is
# Python 3.11's. What the user's own PYTHONPATH names stays.
_NOT_HERE = "import sys\nif sys.path[:1] == ['']:\n    del sys.path[0]\n"

# The package is found where the parent has it and stays known; its folder is not searched for other modules.
_RUN = (
    "sys.path.insert(0, {folder!a})\n"
    "import kdedge_device\n"
    "del sys.path[0]\n"
    "import runpy\n"
    "runpy.run_module({module!a}, run_name='__main__', alter_sys=True)\n"
)


def child(module: str, *arguments: str) -> List[str]:
    """The command line to start `kdedge_device.<module>` with."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # or run.pyz itself
    return python(_RUN.format(folder=folder, module=f"kdedge_device.{module}"), *arguments)


def python(statements: str, *arguments: str) -> List[str]:
    """The command line of this Python to run `statements` with; `sys` is imported, `arguments` are sys.argv[1:]."""
    isolated = ["-I"] if sys.flags.isolated else []  # as this process was started
    return [sys.executable, *isolated, "-c", _NOT_HERE + statements, *arguments]
