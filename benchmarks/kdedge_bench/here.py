"""This machine: the artifacts of all targets in turn, round after round, each measurement in a process of its own.

Records of one call share their `session`: within a round they were measured side by side, so that what is slower can be
told from what met a busy machine (`kdedge compare`).
"""

from collections.abc import Callable, Sequence

from kdedge.errors import BundleError, DeviceError, KdedgeError
from kdedge_bench.accuracy import accuracy_of
from kdedge_bench.measured import Names, Outcome, Target, reasons, written
from kdedge_device.alone import alone
from kdedge_device.bench_all import field
from kdedge_device.bench_pool import pooled
from kdedge_device.bench_rounds import Job, in_turn, new_session, one_round
from kdedge_device.clock import EFFORTS, told_effort
from kdedge_device.failures import CorruptFailure, Failure
from kdedge_device.manifest import Bundle
from kdedge_device.record import now

__all__ = ["LOCAL", "measure_here"]

LOCAL = "local"


def measure_here(
    targets: Sequence[Target], effort: str, repeats: int, threads: int, names: Names, say: Callable[[str], None]
) -> Outcome:
    """What came of all targets; `effort` is shared among `repeats` rounds. One that fails leaves the others."""
    share = EFFORTS[effort].split(repeats)
    words = ["--seconds", repr(share.seconds), "--runs", str(share.runs), "--warm-up", repr(share.warm_up_seconds)]
    words += ["--threads", str(threads)]
    outcome = Outcome()
    work: dict[str, Target] = {}
    jobs: list[Job] = []
    for target in targets:
        try:
            found = _jobs(target, words, say)
        except Failure as error:
            outcome.errors.append(_error(str(target.path), error))
            continue
        for job in found:
            # Of several targets each is told by the run, or the folder, that it is of.
            folder = target.path.parent if target.path.name == "bundle" else target.path
            name = f"{folder.name} {job.name}" if len(targets) > 1 and target.name is None else job.name
            name = name if name not in work else f"{target.path} {job.name}"
            work[name] = target
            jobs.append(job._replace(name=name))
    session = new_session(now())
    with alone(say):
        told, failed = in_turn(jobs, repeats, one_round, say)
    for name, each in told.items():
        record = pooled(each, session)
        record["conditions"]["effort"] = told_effort(effort, repeats)
        record["artifact"]["name"] = work[name].name or record["artifact"]["name"]
        record["accuracy"] = accuracy_of(record, work[name].path, say)
        outcome.records += written(record, work[name], LOCAL, names)
    outcome.errors += [_error(name, error) for name, error in failed.items()]
    return outcome


def _jobs(target: Target, words: Sequence[str], say: Callable[[str], None]) -> list[Job]:
    """What of a target runs here. Failure where nothing does."""
    if target.name is not None:
        return [Job(target.name, [str(target.path), *words])]
    found = field(Bundle(target.path), words)
    why = reasons({"not_run": found.not_run}, "not_run")
    if not found.jobs:
        raise Failure(" ".join(why) or "it has no artifact that runs here.")
    for each in why:
        say(each)
    return list(found.jobs)


def _error(what: str, error: Failure) -> KdedgeError:
    kind: type[KdedgeError] = BundleError if isinstance(error, CorruptFailure) else DeviceError
    told = str(error)
    return kind(told if told.startswith("The measurement of ") else f"The measurement of {what} failed: {told}")
