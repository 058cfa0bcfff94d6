"""The small print of the report: how it was measured, where it comes from, how to make it again."""

import shlex
from datetime import UTC, datetime
from typing import Any

from kdedge_bench import formats
from kdedge_bench.facts import Facts
from kdedge_bench.records import flags, machine_name
from kdedge_bench.report_tables import Column, Table

__all__ = ["commands", "conditions", "hashes", "provenance", "stages"]


def conditions(facts: Facts) -> list[tuple[str, str]]:
    """How the newest measurement was made; others of its session differ in what the tables say, and in temperature."""
    record = facts.newest
    if record is None:
        return []
    artifact = record["artifact"]
    rows = [("Machine", machine_name(record))]
    machine = record.get("machine")
    if isinstance(machine, dict):
        rows += [
            (_words(key), _text(value))
            for key, value in machine.items()
            if _measured(value) and key != "name" and value != machine_name(record)
        ]
    rows.append(("Runtime", f"{artifact.get('runtime') or ''} {artifact.get('version') or ''}".strip() or formats.DASH))
    conditions = record.get("conditions") or {}
    rows += [(_words(key), _text(value)) for key, value in conditions.items() if _measured(value)]
    rows.append(("Repeats", _text(record.get("repeats"))))
    rows.append(("Flags", ", ".join(flags(record)) or "none"))
    rows.append(("Measured at", _text(record.get("started_at"))))
    absent = [_lower(_words(key)) for key, value in conditions.items() if not _measured(value)]
    if absent:
        rows.append(("Not measured", ", ".join(absent)))
    return rows


def _measured(value: Any) -> bool:
    """Is there anything in it? A dict of nothing but None is nothing."""
    if isinstance(value, dict):
        return any(_measured(item) for item in value.values())
    return value is not None and value != "" and value != []


def _words(key: str) -> str:
    units = {"c": "°C", "ms": "ms", "mhz": "MHz", "mib": "MiB", "mw": "mW", "w": "W", "s": "s", "bytes": "bytes"}
    acronyms = {
        "cpu": "CPU",
        "gpu": "GPU",
        "jpeg": "JPEG",
        "cuda": "CUDA",
        "jetpack": "JetPack",
        "os": "OS",
        "sha256": "SHA-256",
        "id": "id",
    }
    *head, last = key.split("_")
    if head and last in units:
        return f"{_words('_'.join(head))}, {units[last]}"
    text = " ".join(acronyms.get(word, word) for word in (*head, last))
    return text[:1].upper() + text[1:]


def _lower(words: str) -> str:
    """As inside a sentence; "CPU" stays as it is."""
    return words if words[:2].isupper() else words[:1].lower() + words[1:]


def _text(value: Any) -> str:
    if value is None:
        return formats.DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{_lower(_words(str(key)))} {_text(item)}" for key, item in value.items() if item is not None)
    return str(value)


def stages(facts: Facts) -> Table:
    """A row a stage of the training: steps, time, images a second, and the engine plan."""
    rows = []
    plans = facts.manifest.get("engine_plan") or {}
    for stage, done in (facts.manifest.get("stages") or {}).items():
        plan = (plans.get(stage) or {}).get("plan") or {}
        rows.append(
            {
                "stage": stage,
                "steps": max((line["step"] for line in facts.metrics if line.get("stage") == stage), default=None),
                "seconds": done.get("seconds"),
                "images_per_second": done.get("images_per_second"),
                "plan": ", ".join(f"{_lower(_words(key))} {_text(value)}" for key, value in plan.items()) or None,
            }
        )
    columns = (
        Column("Stage", ("stage",), text=True),
        Column("Steps", ("steps",), formats.count),
        Column("Time", ("seconds",), formats.span),
        Column("Images a second", ("images_per_second",), formats.count),
        Column("Engine plan", ("plan",), text=True),
    )
    return Table("stages", "Stages of the training", columns, tuple(rows))


def provenance(facts: Facts) -> list[tuple[str, str]]:
    """Where the run comes from, as its manifest and result say."""
    result, manifest = facts.result or {}, facts.manifest
    rows = [(_words(key), _text(result.get(key))) for key in ("recipe", "data", "labels", "seed") if key in result]
    started = manifest.get("started_at_s")
    if isinstance(started, int | float):
        rows.append(("Started at", f"{datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M} UTC"))
    if "seconds" in result:
        rows.append(("Training took", formats.span(result["seconds"])))
    known = ("versions", "host", "device", "failure")
    return rows + [(_words(key), _text(manifest[key])) for key in known if _measured(manifest.get(key))]


def hashes(facts: Facts) -> list[tuple[str, str]]:
    """What each hash is of, and the hash: enough to tell whether two runs saw and made the same."""
    manifest = facts.manifest
    rows: list[tuple[str, object]] = [
        ("Recipe as asked for", manifest.get("recipe_sha256")),
        ("Data set", manifest.get("data_fingerprint")),
    ]
    test = ((facts.splits or {}).get("splits") or {}).get("test") or {}
    rows.append(("Ids of the test images", test.get("sha256")))
    for name, entry in ((facts.bundle or {}).get("artifacts") or {}).items():
        rows.append((str(entry.get("file") or name), entry.get("sha256")))
    return [(name, str(value)) for name, value in rows if value]


def commands(facts: Facts) -> list[str]:
    """The lines that make this run again."""
    result = facts.result
    if result is None:
        return []
    words = ["kdedge", "train-recipe", str(result.get("recipe")), "--data", str(result.get("data"))]
    if result.get("labels") is not None:
        words += ["--labels", str(result["labels"])]
    train = shlex.join([*words, "--seed", str(result.get("seed", 0))])
    effort = ((facts.newest or {}).get("conditions") or {}).get("effort") or "quick"
    export = "kdedge export" + (" --int8" if "int8" in ((facts.bundle or {}).get("artifacts") or {"int8": 1}) else "")
    return [train, export, f"kdedge bench --effort {effort}", "kdedge report"]
