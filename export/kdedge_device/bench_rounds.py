"""Several measurements in turn, each in a process of its own: A B, B A, A B...

A busy or hot machine slows down whatever runs at that time, so what is to be compared is measured side by side, and
what counts is the ratio within a round (`rounds_ms`). Python 3.8, standard library.
"""

import json
import os
import subprocess
import tempfile
import uuid
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type

from kdedge_device.children import child
from kdedge_device.failures import (
    BudgetFailure,
    CorruptFailure,
    DeviceFailure,
    Failure,
    RuntimeFailure,
    VersionFailure,
)

__all__ = ["Job", "Record", "Told", "in_turn", "new_session", "one_round", "one_turn"]

Record = Dict[str, Any]
Times = Dict[str, Optional[List[int]]]
_CLASSES: Dict[int, Type[Failure]] = {
    each.exit_code: each for each in (BudgetFailure, VersionFailure, DeviceFailure, CorruptFailure, RuntimeFailure)
}


class Job(NamedTuple):
    """One thing to measure: its name, and what `bench` is called with for it."""

    name: str
    arguments: Sequence[str]


class Told(NamedTuple):
    """One process' record, and all its times where it noted them."""

    record: Record
    times_ns: Optional[Times]


def new_session(started_at: str) -> str:
    """Marks the records that were measured in turn with each other."""
    return f"{started_at}-{uuid.uuid4().hex[:8]}"


def in_turn(
    jobs: Sequence[Job], rounds: int, measure: Callable[[Job], Told], log: Callable[[str], None]
) -> Tuple[Dict[str, List[Told]], Dict[str, Failure]]:
    """What each job told, and why it failed where it did: it is left out from then on, the others go on."""
    told: Dict[str, List[Told]] = {job.name: [] for job in jobs}
    failed: Dict[str, Failure] = {}
    for number in range(rounds):
        for name, each in one_turn(jobs, number, rounds, measure, log, failed).items():
            told[name].append(each)
    return {name: each for name, each in told.items() if name not in failed}, failed


def one_turn(
    jobs: Sequence[Job],
    number: int,
    rounds: int,
    measure: Callable[[Job], Told],
    log: Callable[[str], None],
    failed: Dict[str, Failure],
) -> Dict[str, Told]:
    """Round `number`, from 0, of `rounds`: forwards, and every other one backwards. Adds to `failed`, and skips it."""
    told: Dict[str, Told] = {}
    for job in jobs if number % 2 == 0 else reversed(jobs):
        if job.name in failed:
            continue
        try:
            told[job.name] = measure(job)
        except Failure as error:
            failed[job.name] = error
            log(f"{job.name}: {error}")
        else:
            log(f"round {number + 1} of {rounds}, {job.name}: {_headline(told[job.name].record)}")
    return told


def _headline(record: Record) -> str:
    part = record["latency_ms"][record["conditions"]["headline"]] if record["latency_ms"]["compute"] else None
    return "p90 {p90:.3f} ms".format(**part) if part else "{throughput_ips:.1f} images a second".format(**record)


def one_round(job: Job) -> Told:
    """Runs `bench` in a process of its own. The Failure that it told, of the same class, where it failed."""
    with tempfile.TemporaryDirectory(prefix="kdedge-") as folder:
        file = os.path.join(folder, "times.json")
        command = child("__main__", "bench", *job.arguments, "--json", "--times", file)
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            raise Failure(f"The measurement of {job.name} cannot be started: {error}.") from None
        try:
            document = json.loads(done.stdout.decode("utf-8"))
        except ValueError:
            document = {}
        if done.returncode != 0 or "latency_ms" not in document:
            raise _failure(job, document, done)
        if not os.path.exists(file):  # --offline notes none
            return Told(document, None)
        with open(file, encoding="utf-8") as noted:
            return Told(document, json.load(noted))


def _failure(job: Job, document: Dict[str, Any], done: "subprocess.CompletedProcess[bytes]") -> Failure:
    if "error" in document:
        return _CLASSES.get(done.returncode, Failure)(str(document["error"]))
    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["no message"]
    return Failure(f"The measurement of {job.name} ended with code {done.returncode}: {last[0]}")
