"""run.pyz: the board side as one file that Python runs, built with the standard library's zipapp."""

import os
import shutil
import tempfile
import zipapp
from pathlib import Path

import kdedge_device

__all__ = ["build_pyz"]

_LONG_AGO = 315_619_200  # 1980-01-02, the first day a zip file can name in every time zone: same sources, same bytes
# Python 3.6, and 2.7, read this much: they have to be told what is missing (too_old).
_MAIN = """\
import sys

from kdedge_device import too_old

if too_old.sentence():
    sys.exit(too_old.stop(sys.argv))

from kdedge_device.__main__ import main

sys.exit(main())
"""


def build_pyz(target: Path) -> None:
    """Write kdedge_device as a zipapp to `target`, executable."""
    package = Path(kdedge_device.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "kdedge_device").mkdir()
        for source in sorted(package.glob("*.py")):
            shutil.copyfile(source, root / "kdedge_device" / source.name)
        (root / "__main__.py").write_text(_MAIN, encoding="utf-8")
        for path in (*root.rglob("*"), root):
            path.chmod(0o755 if path.is_dir() else 0o644)
            os.utime(path, (_LONG_AGO, _LONG_AGO))
        zipapp.create_archive(root, target, interpreter="/usr/bin/env python3", compressed=True)
