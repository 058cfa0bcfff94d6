"""Records from boards: each artifact of each target is measured there, by run.pyz, and written here."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from kdedge.errors import KdedgeError
from kdedge_bench.accuracy_there import score_there
from kdedge_bench.measured import Names, Outcome, Target, reasons, unmeasured, written
from kdedge_bench.records import Record
from kdedge_bench.remote import Place, finished_on
from kdedge_bench.remote_link import Say

__all__ = ["measure_all", "measure_remote"]


def measure_all(
    places: Sequence[Place],
    targets: Sequence[Target],
    arguments: Sequence[str],
    names: Names,
    say: Say,
    failed: Callable[[KdedgeError], None] = lambda _: None,
    clean: bool = False,
) -> list[Outcome]:
    """All boards at once, each one's targets in turn. Errors are in the outcomes; Ctrl-C ends the boards' work too.

    `failed` is told of an error at once, while other machines still measure.
    """

    def one(place: Place) -> Outcome:
        outcome = Outcome()
        for target in targets:
            try:
                outcome.records += measure_remote(
                    place, target, arguments, names, say, stopped=stopped, errors=outcome.errors, clean=clean
                )
            except KdedgeError as error:
                outcome.errors.append(error)
                failed(error)
                if not outcome.records:  # a board that cannot be reached, or lacks something, does so for every target
                    break
        return outcome

    stopped = threading.Event()
    with ThreadPoolExecutor(max_workers=max(1, len(places))) as pool:
        work = [pool.submit(one, place) for place in places]
        try:
            wait(work)
        except KeyboardInterrupt:
            stopped.set()
            say("Stopping the boards; this takes up to 15 s.")
            raise
    return [each.result() for each in work]


def measure_remote(
    place: Place,
    target: Target,
    arguments: Sequence[str],
    names: Names | None = None,
    say: Say = lambda _: None,
    *,
    stopped: threading.Event | None = None,
    errors: list[KdedgeError] | None = None,
    clean: bool = False,
) -> list[Record]:
    """The records of one target, written. Artifacts that failed go to `errors`; without it the first one is raised.

    `arguments`: of `run.pyz bench`, but for what is measured. With `clean` the copied bundle is removed afterwards.
    """
    which = [] if target.name else ["--artifact", "all", "--build"]  # engines too: they are made where they run
    given = ["bench", *which, *arguments]
    with finished_on(place, target.path, given, say=say, clean=clean, stopped=stopped) as document:
        records = written(document, target, str(place), names or Names())
    for why in reasons(document, "not_run"):
        say(f"{place.name}: {why}")
    score_there(place, target, records, names or Names(), say, stopped=stopped, clean=clean)
    failures = unmeasured(document, place.name)
    if failures and errors is None:
        raise failures[0]
    if errors is not None:
        errors += failures
    return records
