"""A program of a bundle on a board: what changed is sent, `python3 run.pyz ...` runs there, its document comes back.

It runs detached: a connection that breaks costs nothing, and the same call made again takes up what runs or has ended
meanwhile. Afterwards nothing of it is left on the board but the bundle itself, below ~/.cache/kdedge/bundles.
"""

import contextlib
import hashlib
import json
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdedge.errors import DeviceError
from kdedge_bench.remote_link import ConnectionLost, Link, Say
from kdedge_bench.remote_parcel import Parcel, pack
from kdedge_bench.remote_place import Place
from kdedge_bench.remote_told import failed, lacking

__all__ = ["ConnectionLost", "Place", "finished_on", "reach", "run_remote"]

PIECE_BYTES = 4 << 20
NO_RUNTIME = 6  # the exit code of run.pyz
DAY_S = 86_400.0  # a result that nobody fetched is taken for this call's only when it is younger
Document = dict[str, Any]


def reach(place: Place, say: Say = lambda _: None) -> None:
    """Log in and find a Python and a folder for files there, in a second; DeviceError where anything is amiss."""
    with Link(place, say) as link:
        link.ask("look", bundle="none", files={}, job="none")


def run_remote(
    place: Place,
    bundle: Path,
    arguments: Sequence[str],
    *,
    extra: Mapping[str, Path] | None = None,
    say: Say = lambda _: None,
    clean: bool = False,
    known_as: Path | None = None,
) -> Document:
    """The JSON document of `run.pyz ARGUMENTS` in the copied `bundle`; with `clean` the copy is removed afterwards.

    `extra` files travel along, under their names there. `known_as`: the path that the board's copy is named after,
    where `bundle` is one that will lie there. BudgetFailed, BundleError or DeviceError with the board's own sentence;
    ConnectionLost where it was reached and is gone.
    """
    with finished_on(place, bundle, arguments, extra=extra, say=say, clean=clean, known_as=known_as) as document:
        return document


@contextlib.contextmanager
def finished_on(
    place: Place,
    target: Path,
    arguments: Sequence[str],
    *,
    extra: Mapping[str, Path] | None = None,
    say: Say = lambda _: None,
    clean: bool = False,
    stopped: threading.Event | None = None,
    known_as: Path | None = None,
) -> Iterator[Document]:
    """As `run_remote`, also for a model file; a block that fails, say for a full disk here, leaves the result there.

    KeyboardInterrupt, and `stopped` set in another thread, end the board's work too. A DeviceError of the block says
    that the document is no good, and the board forgets it.
    """
    with tempfile.TemporaryDirectory() as work, Link(place, say, stopped) as link:
        parcel = pack(target, Path(work), extra, known_as)
        # run.pyz finds a bundle around itself; a model has to be named.
        given = [arguments[0], *([parcel.model] if parcel.model else []), *arguments[1:], "--json"]
        job = _Job(link, say, parcel, given, clean)
        try:
            document = job.document()
            try:
                yield document
            except DeviceError:
                job.forget()
                raise
            job.forget()
        except KeyboardInterrupt:
            job.stop()
            raise


def _document(ended: Document) -> Document | None:
    try:
        document = json.loads(ended.get("stdout") or "", parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON, and a record could not be written with it")


@dataclass
class _Job:
    """One call of run.pyz on one board."""

    link: Link
    say: Say
    parcel: Parcel
    arguments: list[str]
    clean: bool
    listing: dict[str, list[str | int]] = field(init=False)
    seen: Document = field(init=False)  # of the board, at first
    name: str = field(init=False)  # the same call has the same name, and so finds what it began before

    def __post_init__(self) -> None:
        self.listing = self.parcel.listing()
        call = json.dumps([self.parcel.name, self.listing, self.arguments], sort_keys=True)
        self.name = hashlib.sha256(call.encode()).hexdigest()[:16]

    def document(self) -> Document:
        """What it printed when it had ended well."""
        ended = self._result()
        found = _document(ended)
        if ended["state"] == "finished" and ended["exit_code"] == 0 and found is not None:
            return found
        error = self._lacking(ended) or failed(self.link.place, ended, found)
        self.forget()
        raise error

    def _result(self) -> Document:
        """How it ended: {state, exit_code, stdout, stderr}."""
        board = self.link.place.name
        self.seen = self._ask("look")
        found = self.seen["job"]
        if found["state"] == "running":
            self.say(f"{board}: this measurement was begun {_ago(found['age_s'])} and still runs; taking it up")
            return self._wait()
        if found["state"] == "finished" and found["exit_code"] == 0 and found["age_s"] < DAY_S:
            self.say(f"{board}: this measurement was begun {_ago(found['age_s'])} and has ended; taking its result")
            return self._wait()
        if found["state"] != "none":
            self._ask("forget", clean=False)
        self._send(self.seen)
        return self._start()

    def _lacking(self, ended: Document) -> DeviceError | None:
        """What to install, where the program lacked something; not asked for before, since it takes seconds."""
        if ended.get("exit_code") != NO_RUNTIME:
            return None
        info = _document(self._ask("call", arguments=["info", "--json"]))
        return lacking(self.link.place, self.arguments[0], self.seen, info or {})

    def stop(self) -> None:
        board = self.link.place.name
        self.say(f"{board}: stopping what runs there")
        try:
            self._ask("stop", heed=False, clean=self.clean)
        except DeviceError as error:
            self.say(f"{board}: it was not told to stop and goes on; the same command takes it up. {error}")

    def forget(self) -> None:
        self._ask("forget", clean=self.clean)

    def _ask(self, do: str, content: bytes = b"", heed: bool = True, heard: Say | None = None, **more: Any) -> Document:
        same = {"bundle": self.parcel.name, "files": self.listing, "job": self.name, "arguments": self.arguments}
        return self.link.ask(do, content, heed, heard, **same | more)

    def _start(self) -> Document:
        board = self.link.place.name
        started = self._ask("start")
        while started["state"] == "stale":  # somebody else sent this bundle in the meantime
            self._send(self._ask("look"))
            started = self._ask("start")
        wait = ", after the measurement that is running there" if started.get("busy") else ""
        self.say(f"{board}: running run.pyz {self.arguments[0]}{wait}")
        return self._wait()

    def _wait(self) -> Document:
        board = self.link.place.name
        return self._ask("wait", heard=lambda line: self.say(f"{board}: {line}"), seen=0)

    def _send(self, seen: Document) -> None:
        """The files that the board does not have, from where each one stopped the last time."""
        paths = {str(self.listing[name][0]): path for name, path in self.parcel.files.items()}
        wanted = {sha256: paths[sha256] for sha256 in seen["missing"]}
        size = sum(path.stat().st_size for path in wanted.values()) - sum(seen["missing"].values())
        self._check_room(size, seen)
        board = self.link.place.name
        if wanted:
            self.say(f"{board}: sending {len(wanted)} of {len(self.listing)} files, {_size(size)}, to {seen['root']}")
        else:
            self.say(f"{board}: all {len(self.listing)} files are there, in {seen['root']}")
        self._send_pieces(wanted, dict(seen["missing"]))
        while busy := self._ask("place").get("busy"):
            self.say(f"{board}: waiting for a measurement of this bundle as it was before")
            self._ask("wait", job=busy, seen=0)

    def _send_pieces(self, wanted: Mapping[str, Path], have: dict[str, int]) -> None:
        """As many pieces at a time as make a good request; what arrives altered is sent once more."""
        sizes = {sha256: path.stat().st_size for sha256, path in wanted.items()}
        left = [sha256 for sha256 in wanted if have[sha256] < sizes[sha256] or not sizes[sha256]]
        tries = 2 * (1 + len(left) + sum(sizes.values()) // PIECE_BYTES)
        while left and tries:
            pieces: list[dict[str, Any]] = []
            content, tries = b"", tries - 1
            for sha256 in left:
                with wanted[sha256].open("rb") as file:
                    file.seek(have[sha256])
                    piece = file.read(PIECE_BYTES - len(content))
                count, offset = len(piece), have[sha256]
                pieces.append({"sha256": sha256, "bytes": sizes[sha256], "offset": offset, "count": count})
                content += piece
                if len(content) >= PIECE_BYTES:
                    break
            have |= self._ask("put", content, pieces=pieces)["have"]
            done = {piece["sha256"] for piece in pieces if have[piece["sha256"]] == piece["bytes"]}
            left = [sha256 for sha256 in left if sha256 not in done]
        if left:
            raise DeviceError(f"{wanted[left[0]]} does not arrive whole on {self.link.place.name}. Is its disk sound?")

    def _check_room(self, size: int, seen: Document) -> None:
        if size > seen["free_bytes"]:
            raise DeviceError(
                f"The disk of {self.link.place.name} is full: {_size(size)} have to go to {seen['root']}, "
                f"{_size(seen['free_bytes'])} are free. Free some space there."
            )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"


def _ago(seconds: float) -> str:
    for unit, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} s ago"
