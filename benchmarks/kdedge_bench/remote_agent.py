"""What runs on the board: this file, sent through ssh to `python3`, answers one request and ends.

It is written for Python 3.8 and its standard library, and imports nothing of kdedge. A request is one line of JSON on
standard input, and the bytes of files behind it where it says so; each answer is a line `kdedge-MARK LENGTH`, MARK
being the request's own, and that many bytes of JSON: a shell may print what it likes before. No word of a user ever
stands in a command line, so there is nothing to quote.

All is kept below one folder, ~/.cache/kdedge: `bundles/` stays, so that only changes travel; `incoming/` has files on
their way; `jobs/` has measurements, each in a session of its own that outlives the connection. A job is alive as long
as its `lock` is held, by its supervisor and by its program: the system lets go of it however they end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import select
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Request = dict[str, Any]

__all__ = ["main"]

STAMP = ".files.json"  # in a bundle's folder: the files it was last made of
DAY_S = 86_400.0
STOP_S = 10.0  # for a program to end by itself, and put back what it changed


def main() -> None:
    """Answer the request on standard input."""
    request = json.loads(sys.stdin.buffer.readline())
    try:
        root, kept = _root()
        _reply(request, _ANSWERS[request["do"]](root, {**request, "kept": kept}))
    except OSError as error:
        _reply(request, {"error": _told(error)})


def _reply(request: Request, document: Request) -> None:
    content = json.dumps(document).encode()
    sys.stdout.buffer.write(b"\nkdedge-%s %d\n%s" % (request["mark"].encode(), len(content), content))
    sys.stdout.buffer.flush()


def _told(error: OSError) -> Request:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return {"full": full, "text": error.strerror or str(error), "path": str(error.filename or "")}


def _root() -> tuple[Path, bool]:
    """The folder for everything, and whether it is to be kept; one among temporary files where home is read-only."""
    cache = os.environ.get("XDG_CACHE_HOME") or ""
    home = Path(cache if Path(cache).is_absolute() else Path("~/.cache").expanduser()) / "kdedge"
    try:
        return _writable(home), True
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        spare = Path(tempfile.gettempdir(), f"kdedge-{os.getuid()}")
        with contextlib.suppress(OSError):
            return _writable(spare), False
        raise


def _writable(folder: Path) -> Path:
    """`folder`, made where it is not there; it is nobody else's, which matters among temporary files."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, "Belongs to somebody else", str(folder))
    for part in ("bundles", "incoming", "jobs"):
        (folder / part).mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        return folder


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """While files and jobs change, one request at a time."""
    with (root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _plain(name: str) -> str:
    """`name`, which must not lead out of its folder. The sender has looked as well."""
    if "/" in name or name.startswith(".") or not name:
        raise PermissionError(errno.EPERM, "Not a plain file name", name)
    return name


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


# --- files -----------------------------------------------------------------------------------------------------------


def _look(root: Path, request: Request) -> Request:
    """What is here of a bundle and of a job: {missing: {sha256: bytes already here}, job, python...}."""
    with _alone(root):
        _prune(root)
    folder = root / "bundles" / _plain(request["bundle"])
    missing = {}
    for name, (sha256, size) in request["files"].items():
        path = folder / _plain(name)
        if not path.is_file() or path.stat().st_size != size or _sha256(path) != sha256:
            missing[sha256] = _arrived(root, sha256)
    standard = sysconfig.get_path("stdlib") or ""
    return {
        "missing": missing,
        "job": _state(root, request["job"]),
        "root": str(root),
        "kept": request["kept"],
        "free_bytes": shutil.disk_usage(root).free,
        "python": platform.python_version(),
        "venv": _python() != sys.executable,
        "pip": importlib.util.find_spec("pip") is not None,
        "ensurepip": importlib.util.find_spec("ensurepip") is not None,
        "managed": Path(standard, "EXTERNALLY-MANAGED").is_file(),
        "apt": shutil.which("apt-get") is not None,
    }


def _prune(root: Path) -> None:
    """What nobody came back for: files that did not arrive whole, and results nobody fetched."""
    for path in (*(root / "incoming").iterdir(), *(root / "jobs").iterdir()):
        if time.time() - path.stat().st_mtime > 7 * DAY_S and not _held(path / "lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _arrived(root: Path, sha256: str) -> int:
    whole, part = (root / "incoming" / f"{_plain(sha256)}{end}" for end in ("", ".part"))
    return next((path.stat().st_size for path in (whole, part) if path.exists()), 0)


def _put(root: Path, request: Request) -> Request:
    """The next piece of each of some files. {have: {sha256: bytes that are here}}: from there the sender goes on."""
    have = {}
    # Read before anybody is kept waiting: a sender that vanished without a word is noticed only after hours.
    pieces = [(piece, sys.stdin.buffer.read(piece["count"])) for piece in request["pieces"]]
    with _alone(root):
        for piece, content in pieces:
            arrived = _arrived(root, piece["sha256"])
            if arrived == piece["offset"] and len(content) == piece["count"]:
                arrived = _append(root / "incoming" / f"{piece['sha256']}.part", content, piece)
            have[piece["sha256"]] = arrived
    return {"have": have}


def _append(part: Path, content: bytes, piece: Request) -> int:
    """Bytes of the file that are here now; 0 where it is whole and not what it was to be."""
    try:
        with part.open("ab") as file:
            file.write(content)
    except OSError:
        part.unlink()  # a disk that is full is not left so
        raise
    size = part.stat().st_size
    if size == piece["bytes"]:
        if _sha256(part) != piece["sha256"]:
            part.unlink()
            return 0
        part.rename(part.with_suffix(""))
    return size


def _place(root: Path, request: Request) -> Request:
    """Give the files their names in the bundle's folder; engines made there stay. {busy: job} while it is measured."""
    folder, files = root / "bundles" / _plain(request["bundle"]), request["files"]
    arrived = {name: root / "incoming" / _plain(sha256) for name, (sha256, _) in files.items()}
    with _alone(root):
        if _stamp(folder) == files and not any(path.exists() for path in arrived.values()):
            return {}
        for job in (root / "jobs").iterdir():
            if _held(job / "lock") and _json(job / "job.json").get("bundle") == request["bundle"]:
                return {"busy": job.name}
        folder.mkdir(mode=0o700, exist_ok=True)
        _remove(folder / STAMP)
        for name, path in arrived.items():
            if path.exists():
                _link(path, folder / f"{_plain(name)}.part")
                (folder / f"{name}.part").replace(folder / name)
        for path in folder.iterdir():
            if path.name not in files and ".engine" not in path.name and not path.is_dir():
                path.unlink()
        for path in arrived.values():
            _remove(path)
        (folder / STAMP).write_text(json.dumps(files), encoding="utf-8")
    return {}


def _link(old: Path, new: Path) -> None:
    """A second name, since two files of a bundle may be equal, and a copy could fill the disk."""
    _remove(new)
    try:
        os.link(old, new)
    except OSError:  # a file system without
        shutil.copyfile(old, new)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _stamp(folder: Path) -> Request:
    """The files a bundle's folder was made of, all of them still there; empty where not."""
    files = _json(folder / STAMP)
    return files if all((folder / name).is_file() for name in files) else {}


def _json(path: Path) -> Request:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


# --- jobs ------------------------------------------------------------------------------------------------------------


def _python() -> str:
    """The user's own environment for kdedge, where there is one: a board's system often refuses pip."""
    own = Path("~/.kdedge/venv/bin/python3").expanduser()
    return str(own) if os.access(own, os.X_OK) else sys.executable


def _held(lock: Path) -> bool:
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _state(root: Path, job: str) -> Request:
    """{state: none | running | finished | died, exit_code, age_s}."""
    folder = root / "jobs" / _plain(job)
    if not (folder / "job.json").is_file():
        return {"state": "none"}
    age_s = time.time() - (folder / "job.json").stat().st_mtime
    if _held(folder / "lock"):
        return {"state": "running", "age_s": age_s}
    ended = _json(folder / "exit.json")
    return {"state": "finished", "age_s": age_s, **ended} if ended else {"state": "died", "age_s": age_s}


def _call(root: Path, request: Request) -> Request:
    """A command of run.pyz that is quick: {exit_code, stdout, stderr}."""
    command = [_python(), "run.pyz", *request["arguments"]]
    folder = root / "bundles" / _plain(request["bundle"])
    try:
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {"exit_code": -int(signal.SIGALRM), "stdout": "", "stderr": "It did not answer for 120 s."}
    return {"exit_code": done.returncode, "stdout": _text(done.stdout), "stderr": _text(done.stderr)[-4000:]}


def _start(root: Path, request: Request) -> Request:
    """Start a job that outlives this connection, unless it runs or is finished: {state, busy: another one runs}."""
    folder, bundle = root / "jobs" / _plain(request["job"]), root / "bundles" / _plain(request["bundle"])
    with _alone(root):
        found = _state(root, request["job"])
        if found["state"] in ("running", "finished"):
            return found
        shutil.rmtree(folder, ignore_errors=True)
        if _stamp(bundle) != request["files"]:
            return {"state": "stale"}
        (folder / "tmp").mkdir(mode=0o700, parents=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # before anybody can look
            try:
                (folder / "job.json").write_text(json.dumps({"bundle": request["bundle"]}), encoding="utf-8")
            except OSError:  # a disk that is full is not left fuller
                shutil.rmtree(folder, ignore_errors=True)
                raise
            pid = os.fork()
            if pid == 0:
                try:
                    _supervise(root, folder, bundle, request["arguments"], lock.fileno())
                except OSError as error:
                    os.write(2, f"{error}\n".encode())
                finally:
                    os._exit(0)
            (folder / "pid").write_text(str(pid), encoding="utf-8")
    return {"state": "started", "busy": _held(root / "board.lock")}


def _supervise(root: Path, folder: Path, bundle: Path, arguments: list[str], lock: int) -> None:
    """Run the program to its end and write down how it ended. Only `lock` is kept of what was open."""
    os.setsid()
    children: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the program; it gets them as well
        signal.signal(number, lambda *_: None if children else os._exit(1))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for target, path in enumerate((Path(os.devnull), folder / "stdout", folder / "stderr")):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(opened, target)
    os.closerange(3, lock)
    os.closerange(lock + 1, 1024)
    with (root / "board.lock").open("w") as board:
        fcntl.flock(board, fcntl.LOCK_EX)  # two at a time would spoil each other's numbers
        environment = {**os.environ, "KDEDGE_JOB": str(folder), "TMPDIR": str(folder / "tmp")}
        if root.name != "kdedge":  # home is read-only, and engines are signed with a key that is kept
            environment["XDG_CACHE_HOME"] = str(root)
        command = [_python(), "run.pyz", *arguments]
        program = subprocess.Popen(command, cwd=bundle, env=environment, pass_fds=(lock,))
        children.append(program.pid)
        code = program.wait()
        _kill(folder)
    (folder / "exit.part").write_text(json.dumps({"exit_code": code}), encoding="utf-8")
    (folder / "exit.part").replace(folder / "exit.json")


def _kill(folder: Path) -> None:
    """End every process of a job, whatever group or session it is in: each has the job in its environment."""
    mark = f"KDEDGE_JOB={folder}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def _wait(root: Path, request: Request) -> Request:
    """Until the job has ended and its lock is free: {state, exit_code, stdout, stderr}.

    It sleeps meanwhile, in this one process, so as not to disturb what is measured. New lines of the job's standard
    error are answers of their own, {progress}. Ends as well where nobody listens any more.
    """
    folder = root / "jobs" / _plain(request["job"])
    ended, told = os.pipe()
    if folder.is_dir():
        threading.Thread(target=_until_free, args=(folder / "lock", told), daemon=True).start()
    else:
        os.close(told)
    seen = request["seen"]
    while True:
        ready = select.select([0, ended], [], [], 2.0)[0]
        if 0 in ready and not os.read(0, 1):
            os._exit(0)
        lines = _read(folder / "stderr")[seen:].rpartition(b"\n")[0]
        if lines:
            seen += len(lines) + 1
            _reply(request, {"progress": _text(lines), "seen": seen})
        if ended in ready:
            break
    output = {"stdout": _text(_read(folder / "stdout")), "stderr": _text(_read(folder / "stderr"))[-4000:]}
    return {**_state(root, request["job"]), **output, "free_bytes": shutil.disk_usage(root).free}


def _until_free(lock: Path, told: int) -> None:
    with contextlib.suppress(OSError), lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
    os.close(told)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _text(content: bytes) -> str:
    return content.decode(errors="replace")


def _stop(root: Path, request: Request) -> Request:
    """End a job and forget it: asked first, as Ctrl-C would, and after STOP_S made to."""
    folder = root / "jobs" / _plain(request["job"])
    for number, patience_s in ((signal.SIGINT, STOP_S), (signal.SIGKILL, 2.0)):
        if _held(folder / "lock"):
            with contextlib.suppress(OSError, ValueError):
                os.killpg(int(_text(_read(folder / "pid"))), number)
        until = time.monotonic() + patience_s
        while _held(folder / "lock") and time.monotonic() < until:
            time.sleep(0.02)
        _kill(folder)
    return _forget(root, request)


def _forget(root: Path, request: Request) -> Request:
    """A job's folder goes; with `clean` the bundle's too, and what is left of the root where nothing else is in it."""
    job = root / "jobs" / _plain(request["job"])
    with _alone(root):
        if not _held(job / "lock"):  # another call may have begun it again
            shutil.rmtree(job, ignore_errors=True)
        if request["clean"] or not request["kept"]:
            shutil.rmtree(root / "bundles" / _plain(request["bundle"]), ignore_errors=True)
            for sha256, _ in request["files"].values():
                for end in ("", ".part"):
                    _remove(root / "incoming" / f"{_plain(sha256)}{end}")
            if not any(any((root / part).iterdir()) for part in ("bundles", "incoming", "jobs")):
                shutil.rmtree(root, ignore_errors=True)
    return {}


_ANSWERS: dict[str, Callable[[Path, Request], Request]] = {
    "look": _look,
    "put": _put,
    "place": _place,
    "call": _call,
    "start": _start,
    "wait": _wait,
    "stop": _stop,
    "forget": _forget,
}

if __name__ == "__main__":
    main()
