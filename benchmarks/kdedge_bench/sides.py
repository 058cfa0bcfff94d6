"""What `kdedge compare` sets side by side: a run, a bundle that left its run, or a folder of records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdedge.errors import RunError
from kdedge.runs import Run, read_json
from kdedge_bench.facts import Facts, read_facts
from kdedge_bench.records import Record, flags, latency, machine_name, read_records
from kdedge_bench.rows import scored
from kdedge_bench.table import summarize

__all__ = ["Side", "read_side"]


@dataclass(frozen=True)
class Side:
    """One artifact with what is known of it. `right`: image id -> is it right, for test images of known class."""

    path: Path
    name: str
    artifact: str
    accuracy: float | None
    images: int | None
    record: Record | None
    exam: str | None = None  # the hash of the images it was scored on
    right: dict[str, bool] = field(default_factory=dict)

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
            "machine": machine_name(self.record) if self.record else None,
            "flags": flags(self.record) if self.record else [],
        }  # fmt: skip


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
    if manifest is None and any(path.glob("*.json")):
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
    return Side(
        path, facts.name, row.key, row.accuracy, facts.test_images, facts.record(row.key), _exam(facts.bundle), right
    )


def _of_bundle(path: Path, manifest: dict[str, Any], artifact: str | None) -> Side:
    """Its accuracies and records alone: which images are right stays with the run."""
    chosen = artifact or str(manifest.get("shipped"))
    if chosen not in manifest["artifacts"]:
        raise _unknown(path, chosen, manifest["artifacts"])
    records, _ = read_records(path / "bench", manifest)
    sha256 = manifest["artifacts"][chosen].get("sha256")
    record = next((each for each in records if each["artifact"].get("sha256") == sha256), None)
    scored = manifest.get("accuracy") or {}
    accuracy = manifest["artifacts"][chosen].get("accuracy")
    return Side(path, path.name, chosen, accuracy, scored.get("images") or None, record, _exam(manifest))


def _of_records(path: Path, artifact: str | None) -> Side:
    """The newest record of `artifact`, which may be left out where all are of one."""
    records, _ = read_records(path, None)
    named: dict[str, Record] = {}
    for record in records:  # newest first
        named.setdefault(str(record["artifact"].get("name") or record["artifact"].get("precision")), record)
    if artifact is None and len(named) > 1:
        raise RunError(f"{path} has records of {', '.join(sorted(named))}. Say which to compare with --artifact NAME.")
    chosen = artifact or next(iter(named))
    if chosen not in named:
        raise _unknown(path, chosen, named)
    found = scored(named[chosen].get("accuracy"))
    known = (None, None, None) if found is None else (found.value, found.images, found.sha256)
    return Side(path, path.name, chosen, known[0], known[1], named[chosen], known[2])


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
