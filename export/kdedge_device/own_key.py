"""A mark that this user built a file: HMAC-SHA256 by a key that nobody else has.

What a hash proves, whoever brings the file can prove as well, for he brings the hash, too. The key is 32 random bytes
in the user's own cache folder; it is made at the first build and travels neither with a bundle nor to a board.
Python 3.8, standard library.
"""

import contextlib
import hashlib
import hmac
import json
import os
import pwd
import stat
from typing import Any, Dict, Iterator, Optional

from kdedge_device.failures import Failure

__all__ = ["cache_folder", "is_own", "own_key", "signature"]

_BYTES = 32


def cache_folder(home: Optional[str] = None) -> str:
    """The present user's, where XDG_CACHE_HOME may move it, or of the user whose home folder is `home`."""
    base = os.environ.get("XDG_CACHE_HOME", "") if home is None else ""
    # A relative one would depend on the current folder, which may be a bundle.
    base = base if os.path.isabs(base) else os.path.join(os.path.expanduser("~") if home is None else home, ".cache")
    return os.path.join(base, "kdedge")


def own_key() -> bytes:
    """The key to sign with, made where there is none. Failure where it cannot be kept."""
    key = next(_keys(), None)
    return _make() if key is None else key


def signature(key: bytes, document: Dict[str, Any]) -> str:
    """Of all that `document` says, but for its own "signature"; the order of its keys does not matter."""
    told = json.dumps({name: value for name, value in document.items() if name != "signature"}, sort_keys=True)
    return hmac.new(key, told.encode("ascii"), hashlib.sha256).hexdigest()


def is_own(document: Dict[str, Any]) -> bool:
    """Whether "signature" is by this user, or for root by the one who called sudo."""
    found = document.get("signature")
    if not isinstance(found, str):
        return False
    return any(
        hmac.compare_digest(signature(key, document).encode(), found.encode("utf-8", "replace")) for key in _keys()
    )


def _keys() -> Iterator[bytes]:
    """The caller of sudo comes first: what root builds for him is his afterwards, too."""
    caller = _sudo_user()
    if caller is not None:
        with contextlib.suppress(KeyError):  # one whom this machine does not know
            yield from _read(_path(pwd.getpwuid(caller).pw_dir), caller)
    yield from _read(_path(), os.geteuid())


def _sudo_user() -> Optional[int]:
    told = os.environ.get("SUDO_UID", "")
    return int(told) if os.geteuid() == 0 and told.isascii() and told.isdigit() else None


def _path(home: Optional[str] = None) -> str:
    return os.path.join(cache_folder(home), "engine.key")


def _read(path: str, owner: int) -> Iterator[bytes]:
    """The key, where it is a plain file that `owner` alone can read; none where it is not."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_uid == owner and not found.st_mode & 0o077:
            content = file.read(_BYTES + 1)
            if len(content) == _BYTES:
                yield content


def _make() -> bytes:
    """One that was there and was of no use, cut off by a loss of power or open to others, is replaced."""
    path, key = _path(), os.urandom(_BYTES)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Failure(
            f"Cannot keep {path}, the key that tells your engines from those of strangers: {error.strerror}. "
            "Name a folder that you can write with: XDG_CACHE_HOME=FOLDER"
        ) from None
    return key
