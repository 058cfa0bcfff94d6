"""What `kdedge compare` sets side by side: a run, a bundle that left its run, or a folder of records."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from kdedge.errors import RunError
from kdedge.runs import Run, read_json
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.records import (
    Record,
    flags,
    latency,
    machine_name,
    measured_under,
    model_sha256,
    one_image,
    read_records,
    record_files,
)
from kdedge_bench.rows import scored
from kdedge_bench.table import summarize

__all__ = ["Side", "matched", "read_side"]


@dataclass(frozen=True)
class Side:
    """One artifact with what is known of it. `right`: image id -> is it right, for test images of known class.

    `records`: its measurements, newest first; `record`: the one that is compared, once `matched` has chosen it.
    `runtime`: what the file is made for; another one may have been measured, too.
    """

    path: Path
    name: str
    artifact: str
    accuracy: float | None
    images: int | None
    records: tuple[Record, ...] = ()
    exam: str | None = None  # the hash of the images it was scored on
    right: dict[str, bool] = field(default_factory=dict)
    runtime: str = "onnxruntime"
    record: Record | None = None

    @property
    def p90_ms(self) -> float | None:
        return latency(self.record, "compute").get("p90")

    @property
    def p90_by_round_ms(self) -> list[float]:
        """One a repeat; the record's own where it says of no repeats."""
        rounds = ((self.record or {}).get("rounds_ms") or {}).get("p90")
        return [float(each) for each in rounds] if rounds else [float(self.p90_ms)] if self.p90_ms else []

    @property
    def session(self) -> str | None:
        """Records of one session were measured in turn."""
        return (self.record or {}).get("session")

    def to_json(self) -> dict[str, Any]:
        conditions = self.record["conditions"] if self.record else {}
        return {
            "run": self.name, "artifact": self.artifact, "accuracy": self.accuracy, "latency_ms_p90": self.p90_ms,
            "threads": conditions.get("threads"), "batch": conditions.get("batch"),
            "runtime": self.record["artifact"].get("runtime") if self.record else None,
            "machine": machine_name(self.record) if self.record else None,
            "flags": flags(self.record) if self.record else [],
        }  # fmt: skip


def matched(base: Side, new: Side) -> tuple[Side, Side]:
    """Both with the measurements that tell most about each other.

    Those under the same conditions, of one image rather than a batch, in turn rather than on two occasions, in one
    runtime, which is the file's own where that was measured; and of several such the newest. What a record alone knows
    of accuracy is its side's.
    """

    def worth(pair: tuple[Record | None, Record | None]) -> tuple[int | bool, ...]:
        one, other = pair
        timed = sum(latency(each, "compute").get("p90") is not None for each in pair)
        if one is None or other is None:
            return (timed,)
        alike = _under(one) == _under(other)
        in_turn = one.get("session") is not None and one.get("session") == other.get("session")
        runtimes = [each["artifact"].get("runtime") for each in (one, other)]
        own = sum(runtime == side.runtime for runtime, side in zip(runtimes, (base, new), strict=True))
        return timed, alike, one_image(one), in_turn, runtimes[0] == runtimes[1], own

    pairs = product(base.records or (None,), new.records or (None,))
    one, other = max(pairs, key=worth)  # the first of the best
    return _with(base, one), _with(new, other)


def _under(record: Record) -> tuple[Any, ...]:
    return *measured_under(record), record["conditions"].get("batch")


def _with(side: Side, record: Record | None) -> Side:
    found = scored((record or {}).get("accuracy")) if side.accuracy is None else None
    if found is None:
        return replace(side, record=record)
    return replace(side, record=record, accuracy=found.value, images=found.images, exam=found.sha256)


def read_side(path: Path, artifact: str | None = None) -> Side:
    """What `path` ships, or its `artifact`. RunError where it is none of the three, or has no such artifact."""
    if not path.is_dir():
        raise RunError(f"{path} is no folder. Expected a run, a bundle or a folder of records.")
    in_run = path.name == Run(path.parent).bundle_path.name and Run(path.parent).manifest_path.is_file()
    if in_run:
        return _of_run(path.parent, artifact)
    manifest = _manifest(path)
    if manifest is not None and isinstance(manifest.get("artifacts"), dict):
        return _of_bundle(path, manifest, artifact)
    if manifest is None and record_files(path):
        return _of_records(path, artifact)
    return _of_run(path, artifact)


def _manifest(path: Path) -> dict[str, Any] | None:
    file = path / "manifest.json"
    document = read_json(file) if file.is_file() else None
    return document if isinstance(document, dict) else None


def _of_run(path: Path, artifact: str | None) -> Side:
    facts = read_facts(Run(path))
    found = summarize(facts)
    if found.best is None:
        raise RunError(f"The run {path} has nothing to compare: it has no trained student. Expected a finished run.")
    row = found.best if artifact is None else found.row(artifact)
    if row is None:
        raise _unknown(path, artifact, [each.key for each in found.rows])
    right = _right_by_id(facts, row.key)
    records, exam = facts.measured(row.key), _exam(facts.bundle)
    runtime = facts.artifacts.get(row.key, {}).get("runtime") or Side.runtime
    return Side(path, facts.name, row.key, row.accuracy, facts.test_images, records, exam, right, runtime)


def _of_bundle(path: Path, manifest: dict[str, Any], artifact: str | None) -> Side:
    """Its accuracies and records alone: which images are right stays with the run."""
    chosen = artifact or str(manifest.get("shipped"))
    if chosen not in manifest["artifacts"]:
        raise _unknown(path, chosen, manifest["artifacts"])
    records, _ = read_records(path / "bench", manifest)
    sha256 = manifest["artifacts"][chosen].get("sha256")
    own = tuple(each for each in records if model_sha256(each) == sha256)
    images = (manifest.get("accuracy") or {}).get("images") or None
    accuracy = manifest["artifacts"][chosen].get("accuracy")
    runtime = manifest["artifacts"][chosen].get("runtime") or Side.runtime
    return Side(path, path.name, chosen, accuracy, images, own, _exam(manifest), runtime=runtime)


def _of_records(path: Path, artifact: str | None) -> Side:
    """The records of `artifact`, which may be left out where all are of one."""
    records, _ = read_records(path, None)
    several = len({_model(record) for record in records} - {None}) > 1
    named: dict[str, tuple[Record, ...]] = {}
    for record in records:  # newest first
        name = str(record["artifact"].get("name") or record["artifact"].get("precision"))
        name = f"{_model(record)}-{name}" if several and _model(record) else name
        named[name] = (*named.get(name, ()), record)
    if artifact is None and len(named) > 1:
        raise RunError(f"{path} has records of {', '.join(sorted(named))}. Say which to compare with --artifact NAME.")
    chosen = artifact or next(iter(named))
    if chosen not in named:
        raise _unknown(path, chosen, named)
    return Side(path, str(path), chosen, None, None, named[chosen])  # two suites have one name


def _model(record: Record) -> str | None:
    """Which of a suite's models it is of; the artifacts of several have the same names."""
    return ((record.get("suite") or {}).get("combination") or {}).get("model")


def _exam(manifest: Mapping[str, Any] | None) -> str | None:
    return ((manifest or {}).get("accuracy") or {}).get("sha256")


def _unknown(path: Path, artifact: str | None, known: Any) -> RunError:
    return RunError(f"{path} has no artifact '{artifact}'. Expected one of: {', '.join(sorted(known))}.")


def _right_by_id(facts: Facts, artifact: str) -> dict[str, bool]:
    if facts.logits(artifact) is None and artifact == "fp32":
        artifact = "student"
    right, labels, ids = facts.right(artifact), facts.test_labels, facts.predictions.get("test_id")
    if right is None or labels is None or ids is None:
        return {}
    return dict(zip(map(str, ids[labels >= 0]), map(bool, right), strict=True))
