"""All measurements that want a GPU, in slices that end before a lent machine is taken away; benchmarks/gpu/README.md.

A slice goes through the list of jobs, each a process of its own, stops what is running when its time is over, and
leaves in --out: records.json, what was found so far, and the state from which the next slice goes on, on whichever
machine.
"""

import argparse
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, final

from kdedge import __version__
from kdedge.errors import DataError, KdedgeError
from kdedge.runs import SCHEMA, read_json, sha256_file, write_json
from kdedge_bench.gpu_findings import determinism, horizon
from kdedge_bench.gpu_jobs import IMAGES, PILOT, RESUMED, SAME, Job, Work, jobs
from kdedge_bench.gpu_sizes import REAL, TOY, Sizes
from kdedge_bench.gpu_state import INDEX, pack, unpack, worth_keeping
from kdedge_bench.verdict_sets import CIFAR10_SHA256
from kdedge_device.record import machine, now

__all__ = ["ARCHIVE", "SHA256", "main", "parser", "prepare_images"]

ARCHIVE = "cifar10_jpeg.tar.xz"
SHA256 = CIFAR10_SHA256

_DETERMINISM = "determinism"  # a record of three runs
_RESERVE_S = 30.0  # of a slice: for the last checkpoint, and for packing
_GRACE_S = 20.0  # from SIGTERM to SIGKILL; the checkpoint before is then the one
_RETURNED_BYTES = 60_000_000  # what the machine gives back in all is 64 MiB

Ended = Literal["finished", "stopped", "failed"]


def prepare_images(archive: Path, out: Path, sizes: Sizes) -> None:
    """CIFAR-10's JPEG copy as the packed file `out`, unless it is there already: decoded once for all runs.

    At full size the archive must be the known one; the toy takes any of that layout, and some images of it.
    """
    if out.is_file():
        return
    if not archive.is_file():
        raise DataError(f"{archive} does not exist. --data must name the folder that holds {ARCHIVE}.")
    if sizes.images_a_class is None and (found := sha256_file(archive)) != SHA256:
        raise DataError(f"{archive} has sha256 {found}, {SHA256} was expected. Copy it again.")
    folder, taken = out.with_suffix(""), dict[str, int]()
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as images:
        for member in images:
            kind, _, name = member.name.partition("/")[2].rpartition("/")  # cifar10/train/cat/0000.jpg
            taken[kind] = taken.get(kind, 0) + member.isfile()
            if member.isfile() and (sizes.images_a_class is None or taken[kind] <= sizes.images_a_class):
                content = images.extractfile(member)
                (folder / kind).mkdir(parents=True, exist_ok=True)
                (folder / kind / Path(name).name).write_bytes(content.read() if content else b"")
    from kdedge.data import open_source
    from kdedge.data.pack import pack as pack_images

    pack_images(open_source(str(folder)), out)
    shutil.rmtree(folder)


@final
class _Slice:
    """The time that is left, and whether someone asked to stop sooner."""

    def __init__(self, seconds: float) -> None:
        self.ends_at_s = time.monotonic() + seconds
        self.asked = threading.Event()

    @property
    def left_s(self) -> float:
        return 0.0 if self.asked.is_set() else self.ends_at_s - time.monotonic()

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the slice in order, inside the block."""
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            signal.signal(number, lambda *_: self.asked.set())
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _run(argv: Sequence[str], folder: Path, log: Path, over: Callable[[], bool]) -> Ended:
    """Run `argv` in `folder` until it ends, or until `over`: then it is asked to stop, and killed if it does not."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    asked_at_s: float | None = None
    while process.poll() is None:
        if asked_at_s is None and over():
            process.terminate()
            asked_at_s = time.monotonic()
        elif asked_at_s is not None and time.monotonic() - asked_at_s > _GRACE_S:
            process.kill()
        time.sleep(0.02)
    if process.returncode == 0:
        return "finished"
    return "failed" if asked_at_s is None else "stopped"


def _here() -> dict[str, Any]:
    """The machine, its GPU and the versions. torch is not asked: the GPU's memory is the jobs'."""
    found = machine() | {"gpu": None, "driver": None}
    if (program := shutil.which("nvidia-smi")) is not None:
        words = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        said = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
        if said:
            found["gpu"], _, found["driver"] = said.splitlines()[0].partition(", ")
    versions = {name: metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {"machine": found, "versions": versions | {"kdedge": __version__}}


def _next(chosen: Sequence[Job], everything: Sequence[Job], work: Work, tried: set[str], left_s: float) -> Job | None:
    """The first job that is not done, can be, and fits into what is left."""
    done = {job.name for job in everything if job.done(work)}
    for job in chosen:
        if job.name not in done | tried and done.issuperset(job.needs) and job.least_s <= left_s:
            return job
    return None


def _make(job: Job, work: Work, recipe: Path, device: str, time_slice: _Slice) -> Ended:
    """One job, up to its end or the slice's; slices.json says so."""
    started_at, started_at_s = now(), time.monotonic()
    print(f"{job.name}: {job.about}", flush=True)
    ended = _run(
        job.argv(work, recipe, device),
        work.path.parent,
        work.path / "logs" / f"{job.name}.log",
        lambda: time_slice.left_s <= 0 or job.stop_here(work),
    )
    seconds = round(time.monotonic() - started_at_s, 1)
    print(f"{job.name}: {ended} after {seconds} s", flush=True)
    entry = {"job": job.name, "started_at": started_at, "seconds": seconds, "ended": ended}
    write_json(work.slices_path, [*work.slices(), entry])
    return ended


def _note(everything: Sequence[Job], work: Work, sizes: Sizes, minutes: float, here: dict[str, Any]) -> None:
    """The records of what is done and has none, and what follows from them."""

    def write(name: str, about: str, findings: dict[str, Any]) -> None:
        spent_s = round(sum(entry["seconds"] for entry in work.slices() if entry["job"] == name), 1)
        facts = {"schema": SCHEMA, "name": name, "about": about, "date": now(), "toy": sizes is TOY}
        write_json(work.record(name), facts | {"seconds": spent_s} | here | {"findings": findings})

    for job in everything:
        if job.done(work) and not work.record(job.name).is_file():
            write(job.name, job.about, job.findings(work))
    if work.record(PILOT).is_file() and not work.horizon_path.is_file():
        write_json(work.horizon_path, horizon(work, sizes, minutes))
    made = all(work.record(name).is_file() for name in (PILOT, SAME, RESUMED))
    if made and not work.record(_DETERMINISM).is_file():
        write(_DETERMINISM, "what engine.deterministic gives and costs", determinism(work))


def _leave(work: Work, everything: Sequence[Job], out: Path) -> None:
    """Write records.json and the state to `out`."""
    waiting = [job for job in everything if not job.done(work)]
    records = [read_json(path) for path in sorted((work.path / "records").glob("*.json"))]
    document = {
        "schema": SCHEMA,
        "waiting": [job.name for job in waiting],
        "horizon": read_json(work.horizon_path) if work.horizon_path.is_file() else None,
        "slices": work.slices(),
        "records": records,
    }
    write_json(out / "records.json", document)
    weights = [work.run(job.teacher_of).teacher_path for job in waiting if job.teacher_of is not None]
    size = pack(work.path, worth_keeping(work.path, weights), out)
    print(f"{out}: {len(records)} records, a state of {size / 1e6:.1f} MB.", flush=True)
    if size > _RETURNED_BYTES:
        print(
            f"The state is larger than the {_RETURNED_BYTES / 1e6:.0f} MB that come back; it would be lost.", flush=True
        )


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(prog="benchmarks/gpu/measure.py", description=__doc__)
    flags.add_argument("--data", type=Path, required=True, metavar="DIR", help=f"the folder that holds {ARCHIVE}")
    flags.add_argument("--out", type=Path, required=True, metavar="DIR", help="where records and state are left")
    flags.add_argument(
        "--from", dest="state", type=Path, metavar="DIR", help="the state to go on from; --out unless given"
    )
    flags.add_argument(
        "--scratch", type=Path, metavar="DIR", help="images and runs; a folder for temporary files unless given"
    )
    flags.add_argument("--what", choices=("all", "cifar", "speed", "determinism"), default="all")
    flags.add_argument("--slice-s", type=float, default=540.0, help="this call ends after so many seconds")
    flags.add_argument(
        "--minutes", type=float, default=18.0, help="of training, for all of cifar; fixes its steps once"
    )
    flags.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:N]")
    flags.add_argument("--toy", action="store_true", help="tiny networks, images and runs: whether it works")
    return flags


def main(recipe: Path, arguments: Sequence[str] | None = None) -> int:
    """Do what fits into the slice; 0 where nothing failed, 2 where the call itself cannot work."""
    options = parser().parse_args(arguments)
    time_slice, sizes = _Slice(options.slice_s - _RESERVE_S), TOY if options.toy else REAL
    scratch = (options.scratch or Path(tempfile.gettempdir()) / "kdedge-gpu").resolve()
    work, state = Work(scratch / "work"), options.state or options.out
    try:
        with time_slice.hearing():
            if (state / INDEX).is_file():
                unpack(state, work.path)
            work.path.mkdir(parents=True, exist_ok=True)
            prepare_images(options.data / ARCHIVE, scratch / IMAGES, sizes)
            failed = _all(work, sizes, time_slice, recipe.resolve(), options)
    except KdedgeError as error:
        print(f"Error: {error}", flush=True)
        return 2
    return 1 if failed else 0


def _all(work: Work, sizes: Sizes, time_slice: _Slice, recipe: Path, options: argparse.Namespace) -> set[str]:
    """Job after job until the slice is over; the names of those that failed. The state is left after each."""
    from kdedge.train.engine import pick_device  # late, as all that imports torch: the slice has begun by then

    everything, here, failed = jobs(sizes), _here(), set[str]()
    device = str(pick_device(options.device))
    chosen = [job for job in everything if options.what == "all" or options.what in job.what]
    _note(everything, work, sizes, options.minutes, here)
    while (job := _next(chosen, everything, work, failed, time_slice.left_s)) is not None and time_slice.left_s > 0:
        ended = _make(job, work, recipe, device, time_slice)
        if ended == "failed" or (ended == "finished" and not job.done(work)):
            failed.add(job.name)
            print(f"{job.name} failed; its log is logs/{job.name}.log in the state, and ends with:", flush=True)
            print("".join((work.path / "logs" / f"{job.name}.log").read_text(errors="replace")[-2000:]), flush=True)
        _note(everything, work, sizes, options.minutes, here)
        _leave(work, everything, options.out)
    if not (options.out / INDEX).is_file():
        _leave(work, everything, options.out)
    return failed
