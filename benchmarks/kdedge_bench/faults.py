"""Kill a training at any moment and at any write, fill its disk, damage its checkpoints: does it end the same?

python -m kdedge_bench.faults --kills 100 --out FILE.json

Small recipes are trained once without interruption, and then again and again with one, restarted as a person would
do it. Weights are compared hash for hash and everything else by value, times left out. Exit code 1 where a run ended
otherwise; its folder under --scratch is then kept.
"""

import argparse
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from kdedge import __version__
from kdedge.runs import write_json
from kdedge_bench.faults_process import Fault
from kdedge_bench.faults_trials import VARIANTS, Reference, Trial, make_images, reference
from kdedge_device.record import machine, now

__all__ = [
    "damaged",
    "full_disk",
    "killed_at_a_moment",
    "killed_at_a_write",
    "killed_from_outside",
    "killed_on_and_on",
    "main",
    "parser",
    "second_writer",
    "stopped",
]

_KILLED = -signal.SIGKILL


def killed_at_a_moment(found: Reference, name: str, draw: random.Random) -> tuple[Trial, list[str]]:
    """Killed at a moment drawn over the whole duration, one time in three again; what is wrong with its end."""
    trial = found.trial(name)
    while not trial.kills or draw.random() < 1 / 3:
        every_s = draw.choice((0.0, 0.05))  # the second has checkpoints written by a thread, some steps apart
        code = trial.go_on(kill_after_s=draw.uniform(0, found.elapsed_s), every_s=every_s)
        if code == 0 and trial.kills:
            break
        if code == 0:  # it was faster than the kill
            shutil.rmtree(trial.place)
            trial.place.mkdir()
    return trial, found.check(trial)


def killed_at_a_write(found: Reference, at: int) -> tuple[Trial, list[str]]:
    """Killed at its `at`-th write; what is wrong with its end."""
    trial = found.trial(f"write-{at}")
    code = trial.go_on(Fault("kill", at))
    wrong = [] if code == _KILLED else [f"Write {at} did not come: exit code {code}, {trial.told[-500:]}"]
    return trial, wrong + found.check(trial)


def killed_on_and_on(found: Reference, name: str, draw: random.Random, at_most: int) -> tuple[Trial, list[str]]:
    """Killed after so many writes as are drawn, and again, until it ends; what is wrong with its end."""
    trial = found.trial(name)
    while trial.go_on(Fault("kill", draw.randint(1, at_most))) == _KILLED:
        pass
    return trial, found.check(trial)


def killed_from_outside(found: Reference, name: str, draw: random.Random) -> tuple[Trial, list[str]]:
    """`python -m kdedge train-recipe` in a process of its own, imports and all, killed once and typed again."""
    trial = found.trial(name)
    started_at_s = time.perf_counter()
    trial.command_line()
    elapsed_s = time.perf_counter() - started_at_s
    shutil.rmtree(trial.place)
    trial.place.mkdir()
    while not trial.kills:
        trial.command_line(kill_after_s=draw.uniform(0, elapsed_s))
    code = trial.command_line()
    return trial, ([] if code == 0 else [f"exit code {code}: {trial.told[-500:]}"]) + found.check(trial)


def full_disk(found: Reference, at: int) -> list[str]:
    """No space from its `at`-th write on: one sentence and exit code 2; with space again it ends the same."""
    trial = found.trial(f"full-{at}")
    code, wrong = trial.go_on(Fault("full", at)), []
    if code != 2 or "Traceback" in trial.told or "No space left" not in trial.told:
        wrong = [f"On a full disk (write {at}) it ended with exit code {code}: {trial.told[-500:]}"]
    return wrong + found.check(trial)


def damaged(found: Reference, how: Literal["truncated", "altered", "both"]) -> list[str]:
    """The newest checkpoint cut off, or with one bit turned, or both kept ones so: it is said; the end is the same."""
    trial = found.trial(f"damaged-{how}")
    trial.go_on(Fault("kill", found.first_after("outer.4.")))
    files = sorted(trial.run.checkpoint_path.glob("outer.*.safetensors"))
    for path in files if how == "both" else files[-1:]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content[: len(content) // 2] if how == "truncated" else content)
    code, wrong = trial.go_on(), []
    if code != 0 or len(files) < 2 or files[-1].name not in trial.told:
        wrong = [f"Damaged checkpoints ({how} of {len(files)}) ended with exit code {code}: {trial.told[-500:]}"]
    return wrong + found.check(trial)


def second_writer(found: Reference) -> list[str]:
    """A second process for the same run is refused, and the first one ends as if there had been none."""
    trial = found.trial("second-writer")
    with trial.held_at(found.first_after("outer.2.")) as first:
        code = trial.go_on()
        wrong = [] if code == 2 and "Another kdedge" in trial.told else [f"exit code {code}: {trial.told[-500:]}"]
    if first.exitcode != 0:
        wrong.append(f"The first writer ended with exit code {first.exitcode}: {trial.told[-500:]}")
    return wrong + found.check(trial)


def stopped(found: Reference, at: int, number: signal.Signals) -> tuple[int | None, list[str]]:
    """SIGTERM or Ctrl-C at its `at`-th write: how to go on is said; the exit code, and what is wrong."""
    trial = found.trial(f"{number.name}-{at}")
    with trial.held_at(at) as process:
        os.kill(process.pid or 0, number)
    wrong = []
    if process.exitcode == 0 or "--resume" not in trial.told or "Traceback" in trial.told:
        wrong = [f"{number.name} ended it with exit code {process.exitcode}: {trial.told[-500:]}"]
    return process.exitcode, wrong + found.check(trial)


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.faults", description=__doc__)
    flags.add_argument("--kills", type=int, default=100, help="runs killed at random moments, over all variants")
    flags.add_argument(
        "--writes", type=int, help="runs killed at a write, of the first variant; every write by default"
    )
    flags.add_argument("--full", type=int, default=20, help="runs whose disk is full from one write on")
    flags.add_argument("--outside", type=int, default=5, help="runs killed as a command of their own")
    flags.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    flags.add_argument("--seed", type=int, default=0, help="draws the moments and the writes")
    flags.add_argument("--scratch", type=Path, help="where the runs go; the system's unless given")
    flags.add_argument("--out", type=Path, required=True, help="the record")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Try everything and write the record; exit code 1 where one run ended otherwise."""
    options = parser().parse_args(arguments)
    started_at_s = time.perf_counter()
    folder = Path(tempfile.mkdtemp(prefix="faults-", dir=options.scratch))
    found = _references(options.variants, folder)
    measured = _measure(found, options, random.Random(options.seed))
    wrong = [sentence for part in measured.values() for sentence in part["wrong"]]
    typed = [f"--{key} {getattr(options, key)}" for key in ("kills", "writes", "full", "outside", "seed")]
    record = {
        "schema": 1,
        "command": " ".join(["python -m kdedge_bench.faults", *typed, "--out", shlex.quote(options.out.name)]),
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "torch": torch.__version__,
        "variants": {
            name: {"settings": VARIANTS[name], "writes": len(one.writes), "elapsed_s": round(one.elapsed_s, 2)}
            for name, one in found.items()
        },
        **measured,
        "seconds": round(time.perf_counter() - started_at_s, 1),
    }
    write_json(options.out, record)
    tried = sum(part["runs"] for part in measured.values())
    print(f"{tried} interrupted runs, {sum(part['equal'] for part in measured.values())} ended the same.")
    if wrong:
        print("\n".join(wrong), f"Kept: {folder}", sep="\n")
        sys.exit(1)
    shutil.rmtree(folder)


def _references(names: Sequence[str], folder: Path) -> dict[str, Reference]:
    images, found = make_images(folder / "images"), dict[str, Reference]()
    for name in names:
        weights = next(iter(found.values())).folder.parent / "run" / "teacher.safetensors" if found else None
        found[name] = reference(name, folder, images, weights if name == "started" else None)
    return found


def _measure(found: dict[str, Reference], options: argparse.Namespace, draw: random.Random) -> dict[str, Any]:
    variants = list(found.values())
    first = variants[0]
    every = range(1, len(first.writes) + 1)
    chosen = list(every) if options.writes is None else sorted(draw.sample(every, options.writes))
    moments = [
        killed_at_a_moment(variants[i % len(variants)], f"moment-{i}", draw)
        for i in _counted("killed at a moment", range(options.kills))
    ]
    writes = [killed_at_a_write(first, at) for at in _counted("killed at a write", chosen)]
    full = [full_disk(first, at) for at in _counted("full disk", sorted(draw.sample(every, options.full)))]
    outside = [
        killed_from_outside(first, f"outside-{i}", draw)
        for i in _counted("killed from outside", range(options.outside))
    ]
    moved = ("baseline.1.", "outer.2.", "outer.5.", "trusted.npz", "inner.2.", "result.json")  # 5 is before the last
    signals = {
        f"{number.name} after {name}": stopped(first, first.first_after(name), number)
        for number in (signal.SIGTERM, signal.SIGINT)
        for name in moved
    }
    return {
        "moments": _part([wrong for _, wrong in moments]) | _kills([trial for trial, _ in moments]),
        "writes": _part([wrong for _, wrong in writes]) | _kills([trial for trial, _ in writes]),
        "outside": _part([wrong for _, wrong in outside]) | _kills([trial for trial, _ in outside]),
        "disk_full": _part(full),
        "damaged": _part([damaged(first, "truncated"), damaged(first, "altered"), damaged(first, "both")]),
        "second_writer": _part([second_writer(first)]),
        "signals": _part([wrong for _, wrong in signals.values()])
        | {"exit_codes": {name: code for name, (code, _) in signals.items()}},
    }


def _counted(what: str, items: Sequence[int]) -> Iterator[int]:
    """The items, and on standard error where it is: all of it takes a while."""
    for done, item in enumerate(items, 1):
        print(f"{what}: {done} of {len(items)}", file=sys.stderr, flush=True)
        yield item


def _part(wrong: Sequence[list[str]]) -> dict[str, Any]:
    return {
        "runs": len(wrong),
        "equal": sum(not sentences for sentences in wrong),
        "wrong": [sentence for sentences in wrong for sentence in sentences],
    }


def _kills(trials: Sequence[Trial]) -> dict[str, Any]:
    stages = Counter(stage for trial in trials for stage in trial.kills)
    return {"kills": stages.total(), "kills_in_stage": dict(sorted(stages.items()))}


if __name__ == "__main__":
    main()
