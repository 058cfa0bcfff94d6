"""Opening files that somebody else put into a folder: plain files only, never a link, a pipe or a device.

A link may lead out of the folder, a pipe lets the reader wait forever, /dev/zero never ends, and some devices act on
being opened. Python 3.8, standard library.
"""

import os
import stat
from typing import BinaryIO

from kdedge_device.failures import CorruptFailure

__all__ = ["open_plain"]

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_plain(path: str) -> BinaryIO:
    """The regular file `path`, open for reading; its folder may be reached by links, the file itself may be none.

    CorruptFailure where it is missing, anything but a plain file, or cannot be opened.
    """
    try:
        _refuse(path, os.lstat(path).st_mode)  # before opening, which for a device is an act of its own
        # O_NOFOLLOW and O_NONBLOCK for one that took the file's place since: neither followed nor waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CorruptFailure(f"{path} is missing from the bundle. Copy the whole folder again.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorruptFailure(f"{path} cannot be opened: {reason}. Copy the bundle again.") from None
    file = os.fdopen(descriptor, "rb")
    try:
        _refuse(path, os.fstat(descriptor).st_mode)
    except CorruptFailure:
        file.close()
        raise
    return file


def _refuse(path: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no plain file")
        raise CorruptFailure(
            f"{path} is {kind}; a plain file was expected. Copy the bundle again, the files themselves (cp -rL)."
        )
