"""Fetching the official files with torchvision's own downloader: md5 checked, and under their names only when whole."""

import contextlib
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kdedge.errors import DataError

__all__ = ["fetch", "fetch_archive", "fetch_files", "md5_of", "require_md5"]

_TIMEOUT_S = 30.0


def md5_of(path: Path) -> str:
    import hashlib

    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def require_md5(path: Path, md5: str) -> None:
    """DataError where `path` is not the official file."""
    found = md5_of(path)
    if found != md5:
        raise DataError(
            f"{path} is not the official file: its md5 is {found}, {md5} was expected. It is damaged or of another "
            "set. Delete it, and it is downloaded again; images of your own are read from a folder of class folders."
        )


def fetch(name: str, wanted: Sequence[Path], get: Callable[[Path], None], root: Path) -> None:
    """Make all of `wanted` exist: `get` writes them below a temporary folder as they are to lie below `root`.

    DataError, with the paths wanted, where the network, the disk or the md5 says no.
    """
    if all(path.exists() for path in wanted):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder, _polite():
            get(Path(folder))
            for path in wanted:
                _place(Path(folder) / path.relative_to(root), path)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; torchvision raises RuntimeError for an md5
        missing = [str(path) for path in wanted if not path.exists()]
        raise DataError(
            f"The data set {name} is not on this machine and could not be downloaded ({error}). Wanted: "
            f"{', '.join(missing)}. Put the official files there, or name the folder they are below with KDEDGE_DATA "
            "or --set data.root=FOLDER. Without any download: --data digits, or a folder of images."
        ) from None


def _place(made: Path, path: Path) -> None:
    """Rename into place; what another process has put there meanwhile stays."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made.rename(path)


@contextlib.contextmanager
def _polite() -> Iterator[None]:
    """Standard output stays free for --json, and a dead network does not hang."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        socket.setdefaulttimeout(before)


def fetch_files(
    name: str, root: Path, folder: Path, resources: Sequence[tuple[str, str]], mirrors: Sequence[str]
) -> None:
    """Single files: (file name, md5) from the first mirror that answers, into `folder`."""

    def get(temporary: Path) -> None:
        from torchvision.datasets.utils import download_url

        for file_name, md5 in resources:
            if (folder / file_name).exists():
                continue
            failures: list[str] = []
            for mirror in mirrors:
                try:
                    download_url(mirror + file_name, str(temporary / folder.relative_to(root)), file_name, md5)
                    break
                except (OSError, RuntimeError) as error:
                    failures.append(f"{mirror}{file_name}: {error}")
            else:
                raise RuntimeError("; ".join(failures))

    fetch(name, [folder / file_name for file_name, _ in resources], get, root)


def fetch_archive(name: str, root: Path, folder: Path, url: str, md5: str) -> None:
    """A tar that holds `folder`, which lies right below `root`."""

    def get(temporary: Path) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(url, str(temporary), md5=md5)

    fetch(name, [folder], get, root)
