"""Distillation without labels beside lightly-train: one teacher, one set of photographs, as many steps, one probe.

python -m kdedge_bench.distill_peer --data FOLDER --teacher RUN --peer PYTHON --keep DIR --out RECORD

FOLDER has train/ and val/ (or test/), a folder for each class. A ShuffleNetV2 from random weights learns from the
teacher's answers (ours) or features (lightly-train) on the images of train/, 32 a step; neither learns from a label.
Ours keeps a fifth of train/ as validation images, which it does not learn from, and takes the weights that do best on
them; lightly-train learns from all of train/ and gives its last weights. What was learnt is read by a linear probe with
the labels of the other four fifths, and judged on the other images. The last row is the probe on random weights. A seed
is that of everything drawn, on every side. Stopped, the same command goes on.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.models import shufflenet_v2_x1_0

from kdedge import __version__, recipe_io
from kdedge.pipeline import train
from kdedge.runs import Run, open_finished, read_json, sha256_file, write_json
from kdedge_bench.cells import escaped
from kdedge_bench.int8_peers import without_folders
from kdedge_bench.int8_students import PHOTOS, RECIPES, settings
from kdedge_bench.peers_process import measured
from kdedge_bench.seeds import mean_and_interval
from kdedge_bench.table_text import DASH, accuracy, line
from kdedge_device.record import machine, now

__all__ = ["compare", "main", "summary", "table"]

STUDENT, PX = "shufflenet-v2", 96
PEER, OURS, RANDOM = "lightly-train", "kdedge, distillation alone", "random weights"
ADAPTER = Path(__file__).resolve().parent / "peers" / "lightly_train.py"
LIMIT_MIB = 8 * 2**10


def compare(seed: int, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each side did with one seed: `accuracy` of the probe on test images, or `failure`, where it ended."""
    teacher, folder = open_finished(options.teacher).student_path, options.keep / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    theirs, ours, untaught = folder / "lightly.pt", folder / "ours", folder / "random.pt"

    shape = ["--px", str(PX), "--epochs", str(options.epochs), "--seed", str(seed)]
    command = [options.peer, str(ADAPTER), str(options.data / "train"), str(theirs), "--weights", str(teacher), *shape]
    sides = {PEER: _done(folder / "lightly.json", command, options.limit_s)}
    if "failure" in sides[PEER]:
        return sides
    steps = sides[PEER]["steps"]

    command = [sys.executable, "-P", "-m", "kdedge", "train-recipe", str(RECIPES / "distill.yaml"), "--seed", str(seed)]
    command += ["--data", str(options.data), "--out", str(ours), "--set", f"teacher.ready={teacher}"]
    command += ["--set", f"student.optim.total_steps={steps}", "--json"]
    if not (folder / "ours.json").exists():
        shutil.rmtree(ours, ignore_errors=True)  # of a call that was stopped
    sides[OURS] = _done(folder / "ours.json", command, options.limit_s) | {"steps": steps}

    torch.manual_seed(seed)
    torch.save(shufflenet_v2_x1_0().state_dict(), untaught)
    sides[RANDOM] = {"steps": 0}
    for side, weights in ((PEER, theirs), (OURS, ours / "student.safetensors"), (RANDOM, untaught)):
        if "failure" not in sides[side]:
            sides[side] |= _probed(weights, folder / f"probe-{weights.stem}", seed, options.data)
    return sides


def _expect_same_call(options: argparse.Namespace) -> None:
    """What is kept is taken as it is, so it has to be of this teacher, these images and as many epochs."""
    teacher = sha256_file(open_finished(options.teacher).student_path)
    call = {"data": str(options.data.resolve()), "teacher": teacher, "epochs": options.epochs}
    noted = options.keep / "call.json"
    if noted.exists() and read_json(noted) != call:
        raise SystemExit(
            f"{options.keep} holds what a call with another --data, --teacher or --epochs made ({noted}). "
            "Give another --keep."
        )
    options.keep.mkdir(parents=True, exist_ok=True)
    write_json(noted, call)


def _done(noted: Path, command: Sequence[str], limit_s: float) -> dict[str, Any]:
    """One side's training as a process of its own, or what is noted of it."""
    if noted.exists():
        found: dict[str, Any] = read_json(noted)
        return found
    done = measured(command, limit_s=limit_s, limit_mib=LIMIT_MIB)
    if done.failure is not None:
        return {"failure": done.failure}
    told = json.loads(done.told) if done.told.startswith("{") else {}
    found = {"cpu_s": done.cpu_s, "peak_mib": done.peak_mib, "steps": told.get("steps"), "version": told.get("version")}
    write_json(noted, found)
    return found


def _probed(weights: Path, out: Path, seed: int, data: Path) -> dict[str, float]:
    """Test accuracy of a new head on the features of `weights`, and the number of test images."""
    probe = settings(STUDENT, argparse.Namespace(px=PX, init=weights, probe=True))
    recipe = recipe_io.load(str(PHOTOS), probe, data=str(data), seed=seed)
    _, result = train(recipe, out, resume=Run(out).manifest_path.is_file())
    return {"accuracy": result["student"]["test_accuracy"], "test_images": result["test_images"]}


def summary(seeds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """For each side: means over seeds, the half width of 95 % of its accuracy, and our accuracy minus its, paired."""
    found: dict[str, dict[str, Any]] = {}
    for side in (PEER, OURS, RANDOM):
        told = [each.get(side, {"failure": "not begun"}) for each in seeds]
        failures = [each["failure"] for each in told if "failure" in each]
        if failures:
            found[side] = {"failure": failures[0]}
            continue
        found[side] = {"accuracy": mean_and_interval([each["accuracy"] for each in told]), "steps": told[0]["steps"]}
        if side != RANDOM:
            found[side]["cpu_s"] = sum(each["cpu_s"] for each in told) / len(told)
            found[side]["peak_mib"] = max(each["peak_mib"] for each in told)
    if all("failure" not in each for each in found.values()):
        for side in (PEER, RANDOM):
            differences = [each[OURS]["accuracy"] - each[side]["accuracy"] for each in seeds]
            found[side]["ours_minus_it"] = mean_and_interval(differences)
    return found


def table(record: dict[str, Any]) -> str:
    """The record as Markdown; the README holds these lines, and a test holds it to them."""
    lines = [
        "| student's features from | steps | test accuracy | ours minus it | CPU time | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for side, found in record["summary"].items():
        if "failure" in found:
            lines.append(line([side, DASH, f"failed: {escaped(found['failure'])}", DASH, DASH, DASH]))
            continue
        cost = [f"{found['cpu_s']:.0f} s", f"{found['peak_mib']:,.0f} MiB"] if "cpu_s" in found else [DASH, DASH]
        gain = _gain(found.get("ours_minus_it"))
        lines.append(line([side, str(found["steps"]), accuracy(found["accuracy"]), gain, *cost]))
    return "\n".join(lines) + "\n"


def _gain(told: dict[str, float | None] | None) -> str:
    """`+29.0 ± 4.8`, in points."""
    return DASH if told is None else "+" * ((told["mean"] or 0) >= 0) + accuracy(told)


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.distill_peer", description=__doc__)
    flags.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    flags.add_argument("--teacher", type=Path, required=True, metavar="RUN", help="of a ResNet18 on the same images")
    flags.add_argument("--peer", required=True, metavar="PYTHON", help="of int8/requirements/lightly_train.txt")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--epochs", type=int, default=3, help="over train/, on both sides")
    flags.add_argument("--limit-s", type=float, default=3600.0, help="of one training")
    flags.add_argument("--keep", type=Path, required=True, metavar="DIR", help="weights and probes, so far")
    flags.add_argument("--out", type=Path, required=True, help="the record")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Seed by seed; the record is written anew after each."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    _expect_same_call(options)
    seeds: list[dict[str, dict[str, Any]]] = []
    for seed in range(options.seeds):
        seeds.append(compare(seed, options))
        record = {
            "schema": 1,
            "command": " ".join(["python", "-m", "kdedge_bench.distill_peer", *map(without_folders, arguments)]),
            "date": now(),
            "machine": machine(),
            "kdedge": __version__,
            "student": STUDENT,
            "px": PX,
            "seeds": seeds,
            "summary": summary(seeds),
        }
        write_json(options.out, record)
        print(table(record), flush=True)


if __name__ == "__main__":
    main()
