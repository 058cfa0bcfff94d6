"""`kdedge bench`: the latency of every artifact, one record a file; here, and on boards that ssh reaches.

The device's own program measures in either place: a process for each measurement, because two sessions in one share
thread pools and caches, and the artifacts in turn, because a machine that gets hot slows down whatever runs then.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kdedge.errors import DeviceError, KdedgeError, RunError
from kdedge.runs import Run, read_json
from kdedge_bench.here import LOCAL, measure_here
from kdedge_bench.measured import Names, Outcome, Target
from kdedge_bench.records import Record
from kdedge_bench.remote_place import Place
from kdedge_device.clock import EFFORTS, usual_rounds

__all__ = ["BoardsFailed", "bench", "target_of"]


class BoardsFailed(KdedgeError):
    """Something failed on some machine. `records`: all that were measured, and written. `failures`: why, by machine."""

    def __init__(self, machines: int, records: list[Record], errors: Mapping[str, Sequence[KdedgeError]]) -> None:
        self.records = records
        self.failures = {place: " ".join(str(error) for error in each) for place, each in errors.items()}
        told = "\n".join(f"  {place}: {why}" for place, why in self.failures.items())
        super().__init__(
            f"{len(errors)} of {machines} machines did not measure everything; {len(records)} records are written.\n"
            f"{told}"
        )
        # The user can fix it where the user can fix all of it.
        self.exit_code = 2 if all(error.exit_code == 2 for each in errors.values() for error in each) else 1


def bench(
    targets: Sequence[Path],
    effort: str = "quick",
    out: Path | None = None,
    *,
    threads: int = 1,
    on: Sequence[str] = (LOCAL,),
    repeats: int | None = None,
    clean: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> list[Record]:
    """Measure each artifact of each target (RUN, BUNDLE or MODEL.onnx); return the records as written.

    `on`: "local" and ssh://[user@]host[:port]. All boards at once, and then this machine, alone. A record goes to
    `out`, else to RUN/bench, else to bench/ beside a model file or a bundle that is in no run. What was copied to a
    board stays there, unless `clean`. `repeats` share the effort: 6 unless given, 1 of mlperf, whose rules ask for one
    unbroken run. RunError where a target is nothing that can be measured, DeviceError where a
    measurement fails; BoardsFailed where others did not.
    """
    repeats = usual_rounds(effort) if repeats is None else repeats
    _refuse_what_is_not_there(effort, threads, repeats)
    # What is named wrongly is told before anything is timed; a machine named twice is measured once.
    places = {text: None if text == LOCAL else Place.parse(text) for text in on}
    work = list(dict.fromkeys(target_of(target, out) for target in targets))
    _refuse_one_name_for_two(work)
    records: list[Record] = []
    errors: dict[str, list[KdedgeError]] = {}
    names = Names()
    outcomes: dict[str, Outcome] = {}
    boards = {text: place for text, place in places.items() if place}
    if boards:
        from kdedge_bench.remote_bench import measure_all

        arguments = ["--rounds", str(repeats), "--effort", effort, "--threads", str(threads)]
        others = len(places) > 1
        found = measure_all(
            list(boards.values()), work, arguments, names, say, lambda error: say(str(error)) if others else None, clean
        )
        outcomes |= dict(zip(boards, found, strict=True))
    if LOCAL in places:  # alone, since sending files to boards takes a processor, and last: a wrong name is told soon
        outcomes[LOCAL] = measure_here(work, effort, repeats, threads, names, say)
    for place, outcome in outcomes.items():
        records += outcome.records
        if outcome.errors:
            errors[place] = outcome.errors
    if errors:
        if len(places) == 1 and not records:
            raise _one_error(next(iter(errors.values())))
        raise BoardsFailed(len(places), records, errors)
    return records


def _one_error(errors: Sequence[KdedgeError]) -> KdedgeError:
    """Of the one machine that was asked for, and measured nothing."""
    told = list(dict.fromkeys(str(error) for error in errors))
    error = type(errors[0])(" ".join(told))
    error.exit_code = errors[0].exit_code
    return error


def _refuse_what_is_not_there(effort: str, threads: int, repeats: int) -> None:
    if effort not in EFFORTS:
        raise DeviceError(f"The effort '{effort}' is not known. Expected one of: {', '.join(EFFORTS)}.")
    for count, what in ((threads, "threads"), (repeats, "repeats")):
        if count < 1:
            raise DeviceError(f"{count} {what} were asked for; expected at least 1.")


def _refuse_one_name_for_two(work: Sequence[Target]) -> None:
    if not work:
        raise RunError("Nothing to measure was named. Expected a run folder, a bundle or a .onnx file.")
    taken: dict[tuple[Path, str | None], Target] = {}
    for target in work:
        other = taken.setdefault((target.out, target.name), target)
        if other is not target:
            raise RunError(
                f"The records of {other.path} and {target.path} would have the same names in {target.out}. "
                "Leave out --out, or measure one at a time."
            )


def target_of(path: Path, out: Path | None = None) -> Target:
    """What is measured of `path`, and where its records go. RunError where it is none of RUN, BUNDLE, MODEL.onnx."""
    if path.is_file():
        if path.suffix not in (".onnx", ".engine"):
            raise RunError(
                f"{path} is no ONNX file or engine. Expected a run folder, a bundle, a file named *.onnx or *.engine."
            )
        return Target(path, path.stem, out or _records_of(path.parent))
    if not path.is_dir():
        raise RunError(f"{path} does not exist. Expected a run folder, a bundle or a .onnx file.")
    bundle = path if _is_bundle(path) else Run(path).bundle_path
    if not _is_bundle(bundle):
        Run(path).read_manifest()  # a folder that is neither says so itself
        raise RunError(f"The run {path} has no bundle to measure. Make one first: kdedge export {path} --int8")
    return Target(bundle, None, out or _records_of(bundle))


def _is_bundle(folder: Path) -> bool:
    """A run has a manifest.json as well, without artifacts."""
    manifest = folder / "manifest.json"
    document = read_json(manifest) if manifest.is_file() else None
    return isinstance(document, dict) and isinstance(document.get("artifacts"), dict)


def _records_of(folder: Path) -> Path:
    """RUN/bench where `folder` is the bundle of a run, else bench/ in the folder itself."""
    run = Run(folder.parent)
    if folder.name == run.bundle_path.name and run.manifest_path.is_file():
        return run.bench_path
    return folder / "bench"
