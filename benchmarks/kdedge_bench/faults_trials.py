"""Small trainings that are interrupted in every way a machine knows, restarted, and compared with one that was not.

A trial is a folder with a run in it. It is restarted as a person would do it: with --resume once there is a manifest.
"""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image

from kdedge.errors import RunError
from kdedge.runs import Run
from kdedge_bench.faults_equal import differences, litter, summary_of
from kdedge_bench.faults_process import Fault, start

__all__ = ["VARIANTS", "Reference", "Trial", "make_images", "reference"]

_SMALL = [
    "engine.log_every_steps=2",  # what is counted between two lines is state too
    "trust.threshold=0.3",
    "student.arch=wide-resnet-10-1",
    "student.width=1.0",
    "baseline.optim.total_steps=3",
    "teacher.optim.total_steps=6",
    "student.optim.total_steps=4",
]
VARIANTS = {
    # Thresholds that learn, clusters, answers made once. The rates are so high that val chooses an early student.
    "thresholds": [
        "teacher.optim.warmup_steps=0",
        "teacher.optim.learning_rate=0.5",
        "student.optim.warmup_steps=0",
        "student.optim.learning_rate=0.3",
        "teacher.method.thresholds.policy=freematch",
        "student.method.thresholds.policy=flexmatch",
        "student.method.thresholds.alignment=true",
    ],
    # CRD's memory of embeddings, stored features, outliers.
    "memory": [
        "teacher.method.thresholds.policy=flexmatch",
        "student.method.thresholds.policy=softmatch",
        "student.method.distill.loss=crd",
        "student.method.distill.crd_dims=16",
        "student.method.distill.crd_negatives=32",
        "outliers.score=energy",
    ],
    # Starting weights and a linear probe, the inner network from the outer one's weights, which stays beside it.
    "started": [
        "student.init=teacher",
        "student.method.distill.views=same",
        "student.method.distill.mixup=true",
        "trust.filters=confidence",
    ],
}
_CLASSES, _PX = 3, 8
_IMAGES = (("labeled", 8), ("unlabeled", 16), ("val", 6), ("test", 8))  # a class
_ENOUGH_S = 300.0  # a run takes seconds


def make_images(folder: Path) -> Path:
    """labeled/, unlabeled/, val/ and test/ of a few noisy images of three classes, told apart by their brightness."""
    draw = np.random.default_rng(0)
    for split, count in _IMAGES:
        for k in range(_CLASSES):
            place = folder / split / ("" if split == "unlabeled" else f"class{k}")
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = (draw.integers(0, 120, (_PX, _PX, 3)) + 60 * k).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{k}-{i}.png")
    return folder


@final
@dataclass
class Trial:
    """One run in `place`/run, started as often as needed."""

    place: Path
    images: Path
    settings: list[str]
    kills: list[str] = field(default_factory=list)  # the stage of each

    @property
    def run(self) -> Run:
        return Run(self.place / "run")

    @property
    def told(self) -> str:
        """Everything that its processes said."""
        return (self.place / "told.txt").read_text(encoding="utf-8")

    def arguments(self, every_s: float = 0.0, more: tuple[str, ...] = ()) -> list[str]:
        """Of the next start. 0 saves a checkpoint after every step and waits for it; else a thread writes it."""
        settings = [*_SMALL, *self.settings, f"engine.checkpoint_every_s={every_s}", *more]
        words = ["train-recipe", "tiny", "--data", str(self.images), "--out", "run"]
        words += [word for setting in settings for word in ("--set", setting)]
        return [*words, "--resume"] if self.run.manifest_path.is_file() else words

    def go_on(self, fault: Fault | None = None, kill_after_s: float | None = None, every_s: float = 0.0) -> int:
        """Start it, end it by the fault or after so many seconds if it still runs, and wait; its exit code."""
        process = start(self.arguments(every_s), self.place, self.place / "told.txt", fault)
        process.join(_ENOUGH_S if kill_after_s is None else kill_after_s)
        late = process.is_alive()
        process.kill()
        process.join()
        if late and kill_after_s is None:
            raise RunError(f"A run in {self.place} did not end in {_ENOUGH_S:.0f} s.")
        return self._ended(process.exitcode)

    def command_line(self, kill_after_s: float | None = None) -> int:
        """The same by `python -m kdedge`, seconds of imports and all."""
        with (self.place / "told.txt").open("ab") as told:
            command = [sys.executable, "-m", "kdedge", *self.arguments()]
            process = subprocess.Popen(command, cwd=self.place, stdout=told, stderr=told)
        try:
            process.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            process.kill()
        return self._ended(process.wait())

    @contextmanager
    def held_at(self, at: int) -> Iterator[BaseProcess]:
        """A process of it that waits at its `at`-th write while the block runs, and is then let go, to its end."""
        heard, go = self.place / "heard.txt", self.place / "go"
        process = start(self.arguments(), self.place, self.place / "told.txt", Fault("hold", at, heard, go))
        until_s = time.monotonic() + _ENOUGH_S
        while not heard.exists() or heard.read_bytes().count(b"\n") < at:
            if not process.is_alive() or time.monotonic() > until_s:
                raise RunError(f"The run in {self.place} did not reach its write {at}: {self.told}")
            time.sleep(0.005)
        try:
            yield process
        finally:
            go.touch()
            process.join()

    @property
    def stage(self) -> str:
        """Where it is: `begin` before the first stage, `end` once the student's file is noted."""
        if not self.run.manifest_path.is_file():
            return "begin"
        manifest = self.run.read_manifest()
        return "end" if "inner" in manifest.get("stages", {}) else manifest.get("stage") or "begin"

    def verdict(self, right: dict[str, Any]) -> list[str]:
        """What is wrong with it, now that it has ended."""
        try:
            found = summary_of(self.run)
        except (RunError, OSError) as error:
            return [f"It did not end: {error}"]
        return differences(right, found) + [f"left behind: {name}" for name in litter(self.run)]

    def _ended(self, code: int | None) -> int:
        if code == -signal.SIGKILL:
            self.kills.append(self.stage)
        return -1 if code is None else code


@final
@dataclass(frozen=True)
class Reference:
    """The run of one variant that nothing interrupted, and how to try it again."""

    folder: Path
    images: Path
    settings: list[str]
    right: dict[str, Any]
    writes: list[str]  # what was written, in order
    elapsed_s: float

    def trial(self, name: str) -> Trial:
        place = self.folder / name
        place.mkdir(parents=True)
        return Trial(place, self.images, self.settings)

    def check(self, trial: Trial) -> list[str]:
        """Let the trial end; what is wrong with it. A sound one is removed, the other kept to be looked at."""
        if (code := trial.go_on()) != 0:
            return [f"The restart ended with exit code {code}: {trial.told[-500:]}"]
        if not (wrong := trial.verdict(self.right)):
            shutil.rmtree(trial.place)
        return wrong

    def first_after(self, name: str) -> int:
        """The number of the first write once a file has got this name, as `outer.2.` or `trusted.npz`."""
        return 2 + next(i for i, w in enumerate(self.writes) if w.startswith("os.rename") and f".{name}" in w)


def reference(name: str, folder: Path, images: Path, start_from: Path | None = None) -> Reference:
    """Train a variant without interruption. RunError where that fails."""
    settings = [*VARIANTS[name], *([] if start_from is None else [f"teacher.init={start_from}"])]
    place = folder / name
    place.mkdir(parents=True)
    trial, heard = Trial(place, images, settings), folder / f"{name}-writes.txt"
    if trial.go_on(Fault("count", heard=heard)) != 0:  # the first also warms the file system
        raise RunError(f"The run that nothing interrupts failed: {trial.told[-2000:]}")
    started_at_s = time.perf_counter()
    again = Trial(place / "again", images, settings)
    again.place.mkdir()
    again.go_on()
    elapsed_s = time.perf_counter() - started_at_s
    right = summary_of(trial.run)
    if wrong := again.verdict(right):
        raise RunError(f"Two runs that nothing interrupted differ: {wrong}")
    writes = heard.read_text(encoding="utf-8").splitlines()
    return Reference(place / "trials", images, settings, right, writes, elapsed_s)
