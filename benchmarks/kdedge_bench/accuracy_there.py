"""Accuracy on a board of the files that were measured there: `run.pyz eval` on the labelled images in the bundle."""

import threading
from collections.abc import Sequence

from kdedge.errors import DeviceError, KdedgeError
from kdedge.runs import write_json
from kdedge_bench.accuracy import Exam, carried_exam, keep, kept, told
from kdedge_bench.measured import Names, Target
from kdedge_bench.records import Record
from kdedge_bench.remote import Place, finished_on
from kdedge_bench.remote_link import Say

__all__ = ["score_there"]


def score_there(
    place: Place,
    target: Target,
    records: Sequence[Record],
    names: Names,
    say: Say,
    *,
    stopped: threading.Event | None = None,
    clean: bool = False,
) -> None:
    """Completes `records`, and writes them again. Accuracy stays null without eval.npz, and where it cannot be had."""
    exam = carried_exam(target.path) if target.path.is_dir() else None
    if exam is None:
        return
    for record in records:
        found = kept(record, exam)
        if found is None:
            try:
                found = _asked(place, target, record, exam, say, stopped, clean)
            except KdedgeError as error:
                say(f"{place.name}: {record['artifact']['name']} is not scored on the eval images: {error}")
                continue
            keep(record, exam, found)
        record["accuracy"] = found
        write_json(names.path(str(place), target.out, record, record["artifact"]["name"]), record)


def _asked(
    place: Place,
    target: Target,
    record: Record,
    exam: Exam,
    say: Say,
    stopped: threading.Event | None,
    clean: bool,
) -> dict[str, object]:
    """DeviceError where the board scored another file than it measured."""
    artifact = record["artifact"]
    engine = artifact.get("runtime") == "tensorrt"
    which = [str(artifact["precision"]), "--runtime", "tensorrt"] if engine else [str(artifact["name"])]
    with finished_on(
        place, target.path, ["eval", "--artifact", *which], say=say, clean=clean, stopped=stopped
    ) as document:
        correct, images = document.get("correct"), document.get("images")
        whole = isinstance(correct, int) and isinstance(images, int) and 0 <= correct <= images and images > 0
        if not whole or document.get("sha256") != artifact["sha256"]:
            raise DeviceError(f"{place.name} scored another file than it measured; the same was expected. Try again.")
        assert isinstance(correct, int)
        assert isinstance(images, int)
        return told(correct, images, exam)
