"""One recipe over several seeds, through the command line a user types: accuracy with its spread, as a record.

python -m kdedge_bench.seeds --recipe mobilenet --labels 40 --seeds 0 1 2 3 4 --out benchmarks/results/NAME.json
"""

import argparse
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdedge import __version__
from kdedge.runs import read_json, write_json
from kdedge_device.record import machine, now

__all__ = ["main", "markdown_row", "mean_and_interval", "parser"]

COLUMNS = ("baseline", "teacher", "student", "fp32", "int8")


def mean_and_interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and the half width of its 95 % interval over seeds (Student's t; None for one seed)."""
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"mean": mean, "half_width_95": None}
    half = float(t.ppf(0.975, count - 1)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return {"mean": mean, "half_width_95": half}


def markdown_row(record: dict[str, Any]) -> str:
    """The record as a row of the README's table of results; a test holds the README to it.

    Percent right of the test images: over several seeds the mean and its 95 % interval, for one seed the interval
    that its number of test images allows (Wilson).
    """
    from kdedge_bench.stats import wilson

    images, cells = record["test_images"], []
    for key in COLUMNS:
        found = record["test_accuracy"].get(key)
        if found is None:
            cells.append("-")
        elif found["half_width_95"] is not None:
            cells.append(f"{100 * found['mean']:.1f} ± {100 * found['half_width_95']:.1f}")
        else:
            low, high = wilson(round(found["mean"] * images), images)
            cells.append(f"{100 * found['mean']:.1f} ({100 * low:.1f}-{100 * high:.1f})")
    seeds = len(record["seeds"])
    what = f"{record['title']}, {record['labels']} labels, {seeds} seed{'s' if seeds > 1 else ''}"
    return f"| {what} | {' | '.join(cells)} |"


def _typed(arguments: Sequence[str]) -> str:
    """The command, without the folders of absolute paths: a record is committed, and says what, not where."""
    words = ["python", "-m", "kdedge_bench.seeds", *arguments]
    return shlex.join(re.sub(r"(^|=)/(?:[^/ ]+/)*([^/ ]+)$", r"\1\2", word) for word in words)


def _kdedge(*arguments: str) -> None:
    """Run one command; its output is that of this program, and so is its exit code where it fails."""
    print("$ kdedge", *arguments, file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "kdedge", *arguments], check=False, stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)


def _runs(options: argparse.Namespace) -> Path:
    runs: Path = options.runs or Path("runs") / f"seeds-{options.out.stem}"
    return runs


def _one(options: argparse.Namespace, seed: int, extra: Sequence[str]) -> dict[str, Any]:
    """Train (or go on, or find finished), export, and read what was measured."""
    out = _runs(options) / f"s{seed}"
    flags = [value for key in ("data", "labels") if (v := getattr(options, key)) for value in (f"--{key}", str(v))]
    # A finished run is used, if it is of this recipe and data: --resume refuses another.
    resume = ["--resume"] if (out / "manifest.json").is_file() else []
    _kdedge("train-recipe", options.recipe, *flags, "--seed", str(seed), "--out", str(out), *extra, *resume)
    if not (out / "bundle" / "manifest.json").is_file():
        _kdedge("export", str(out), "--int8", "--max-drop", f"{options.max_drop:g}")
    result, exported = read_json(out / "result.json"), read_json(out / "bundle" / "manifest.json")
    gate = read_json(out / "bundle" / "gate.json")
    rows = {key: result[key]["test_accuracy"] for key in COLUMNS[:3] if result[key]}
    rows |= {key: exported["artifacts"][key]["accuracy"] for key in COLUMNS[3:]}
    return {
        "seed": seed,
        "test_accuracy": rows,
        "int8_drop_points": 100 * (rows["fp32"] - rows["int8"]),
        "trusted": result["trusted"] and {key: result["trusted"][key] for key in ("size", "coverage")},
        "seconds": result["seconds"],
        "gate": gate,
    }


def parser() -> argparse.ArgumentParser:
    """Its flags; any other goes to `kdedge train-recipe`."""
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.seeds", description=__doc__)
    flags.add_argument("--recipe", default="mobilenet")
    flags.add_argument("--data")
    flags.add_argument("--labels", type=int)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    flags.add_argument("--runs", type=Path, help="where the runs go; runs/seeds-NAME unless given")
    flags.add_argument("--out", type=Path, required=True, help="the record")
    flags.add_argument("--max-drop", type=float, default=1.0, help="of the export, in points")
    flags.add_argument("--title", help="what the README calls the row; the name of the data unless given")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export and score every seed, and write the record."""
    options, extra = parser().parse_known_args(arguments)
    found = [_one(options, seed, extra) for seed in options.seeds]
    summary = {
        key: mean_and_interval([one["test_accuracy"][key] for one in found])
        for key in COLUMNS
        if key in found[0]["test_accuracy"]
    }
    result = read_json(_runs(options) / f"s{options.seeds[0]}" / "result.json")
    record = {
        "schema": 1,
        "command": _typed(arguments or sys.argv[1:]),
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "title": options.title or result["data"],
        "data": result["data"],
        "labels": result["labels"],
        "test_images": result["test_images"],
        "input": result["input"],
        "networks": {key: {k: result[key][k] for k in ("arch", "params")} for key in COLUMNS[:3] if result[key]},
        "test_accuracy": summary,
        "int8_drop_points": mean_and_interval([one["int8_drop_points"] for one in found]),
        "seeds": found,
    }
    write_json(options.out, record)
    print(json.dumps({key: record[key] for key in ("test_accuracy", "int8_drop_points")}, indent=1))


if __name__ == "__main__":
    main()
