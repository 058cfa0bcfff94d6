"""Another machine decides for speed: what it is given to time while an export looks for layers to leave in float.

A try is a bundle as small as can be, FP32 and INT8 beside the program that times them in turn (A B, B A); whoever
brings it there may send only what changed. Nothing here knows how a machine is reached.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from kdedge.errors import KdedgeError
from kdedge.runs import sha256_file
from kdedge_device.preprocess import Preprocess
from kdedge_export.bundle import ARTIFACTS, write_manifest
from kdedge_export.judging.latency import Speedup
from kdedge_export.pyz import build_pyz

__all__ = ["Elsewhere", "Trials", "write_trial"]


@dataclass(frozen=True)
class Elsewhere:
    """A machine with ONNX Runtime that the files are for. `name`: for people. `target`: which of the export's it is.

    `speed(folder)`: of INT8 against FP32 in the bundle of that folder; KdedgeError where the machine cannot tell.
    """

    name: str
    target: str | None
    speed: Callable[[Path], Speedup]


def write_trial(folder: Path, models: Mapping[str, Path], preprocess: Preprocess, classes: tuple[str, ...]) -> None:
    """A bundle that can be timed and nothing else, of model files by artifact, FP32 among them."""
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # of the try before; it must not list itself
    for name, path in models.items():
        shutil.copyfile(path, folder / ARTIFACTS[name].file)
    if not (folder / "run.pyz").exists():
        build_pyz(folder / "run.pyz")
    known = {name: {"golden_tolerance": 0.0} for name in models}
    write_manifest(folder, known, preprocess, classes, "fp32", {}, {})


@final
class Trials:
    """Files timed there, each content once, until the machine cannot; then no more, and the search goes on without."""

    def __init__(
        self,
        there: Elsewhere,
        folder: Path,
        preprocess: Preprocess,
        classes: tuple[str, ...],
        say: Callable[[str], None],
    ) -> None:
        self.there, self.folder, self.say = there, folder, say
        self.preprocess, self.classes = preprocess, classes
        self.found: dict[str, Speedup] = {}  # by the sha256 of the INT8 file
        self.over = False

    def speed(self, fp32: Path, int8: Path) -> Speedup | None:
        """None where the machine could not tell, now or before: an hour of calibration is not lost for a cable."""
        key = sha256_file(int8)
        if key not in self.found and not self.over:
            write_trial(self.folder, {"fp32": fp32, "int8": int8}, self.preprocess, self.classes)
            self.say(f"Measuring FP32 and INT8 in turn on {self.there.name}")
            try:
                self.found[key] = self.there.speed(self.folder)
            except KdedgeError as error:
                self.over = True
                self.say(
                    f"{error} The search for layers to leave in float goes on by accuracy alone; what ships on "
                    f"{self.there.name} is asked once more at the end."
                )
        return self.found.get(key)
