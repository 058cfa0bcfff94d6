"""run.pyz: the board side as one file that Python runs, built with the standard library's zipapp."""

import os
import shutil
import tempfile
import zipapp
from pathlib import Path

import kdedge_device

__all__ = ["build_pyz"]

_LONG_AGO = 315_619_200  # 1980-01-02, the first day a zip file can name in every time zone: same sources, same bytes
_MAIN = "import sys\n\nfrom kdedge_device.__main__ import main\n\nsys.exit(main())\n"


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
