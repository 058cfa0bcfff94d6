"""One measurement at a time on a machine, whoever starts it: two would spoil each other's numbers.

A lock on a file that all users share. It ends with the process that holds it, however that ends; its children know by
their environment that they are part of that measurement. Python 3.8, standard library.
"""

import contextlib
import os
import stat
from typing import Callable, Iterator, Optional, Sequence

__all__ = ["MARK", "alone"]

MARK = "KDEDGE_MEASURING"  # in the environment of what belongs to a measurement
_FOLDERS = ("/run/lock", "/tmp")  # not what TMPDIR says: everybody has to find the same one
_NAME = "kdedge-measuring.lock"


@contextlib.contextmanager
def alone(say: Callable[[str], None], folders: Sequence[str] = _FOLDERS) -> Iterator[None]:
    """Waits until nothing else is measured here, and says so where it has to.

    Where no such file can be had, it goes on.
    """
    if os.environ.get(MARK):
        yield
        return
    file = _opened(folders)
    os.environ[MARK] = "1"
    try:
        if file is not None:
            _take(file, say)
        yield
    finally:
        os.environ.pop(MARK, None)
        if file is not None:
            os.close(file)


def _take(file: int, say: Callable[[str], None]) -> None:
    import fcntl  # not on Windows, where there is no such file either

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"Another measurement runs on this machine{_holder(file)}; waiting for it to end.")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)


def _holder(file: int) -> str:
    """Of a file that anybody may write to: a number or nothing."""
    try:
        told = os.pread(file, 16, 0)
    except OSError:
        return ""
    return f" (process {int(told)})" if told.isdigit() else ""


def _opened(folders: Sequence[str]) -> Optional[int]:
    """In the first folder in which every user may make files: then all come to the same answer."""
    if os.name != "posix":
        return None
    for folder in folders:
        try:
            if os.stat(folder).st_mode & stat.S_IWOTH:
                return _open(os.path.join(folder, _NAME))
        except OSError:
            continue
    return None


def _open(path: str) -> int:
    """No link is followed, and nothing but a plain file is taken.

    One that is there is opened without O_CREAT: with it Linux refuses another user's file in such a folder, root too
    (fs.protected_regular).
    """
    kind = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | kind, 0o666)
        os.fchmod(file, 0o666)  # whatever the umask
        return file
    except FileExistsError:
        pass
    try:
        file = os.open(path, os.O_RDWR | kind)
    except PermissionError:
        file = os.open(path, os.O_RDONLY | kind)  # enough for a lock
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise FileExistsError(path)
    return file
