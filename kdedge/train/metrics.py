"""metrics.jsonl: one JSON object a logged step, and the display and TensorBoard that read along."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, final

from torch import Tensor

from kdedge.errors import MissingPackage, RunError
from kdedge.runs import Run, write_bytes

__all__ = ["Display", "MetricsLog", "SilentDisplay", "to_number"]


class Display(Protocol):
    """What a person sees while a run goes on. It decides nothing."""

    def stage(self, name: str, total_steps: int) -> None:
        """A stage begins: `pretrain`, `baseline`, `outer`, `trusted` or `inner`."""

    def step(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""

    def say(self, sentence: str) -> None:
        """A remark: what was chosen, what was left out."""


@final
class SilentDisplay:
    """Shows nothing."""

    def stage(self, name: str, total_steps: int) -> None:
        pass

    def step(self, record: Mapping[str, Any]) -> None:
        pass

    def say(self, sentence: str) -> None:
        pass


def to_number(value: Any) -> Any:
    """Tensors and floats as JSON numbers, lists or null (NaN and infinity are not JSON)."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    if isinstance(value, list):
        return [to_number(v) for v in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


@final
class MetricsLog:
    """Appends to metrics.jsonl. A resume drops the lines that the resumed steps will write again.

    Of many processes that train together one writes; the others have `writes` false. With `tensorboard` its files are
    written too; MissingPackage, before anything is trained, where it is not installed.
    """

    def __init__(self, path: Path, display: Display, *, writes: bool = True, tensorboard: bool = False) -> None:
        self.path, self.display, self.writes = path, display, writes
        self._board = _Board(Run(path.parent).tensorboard_path) if writes and tensorboard else None

    def rewind(self, stage: str, step: int) -> None:
        """Forget what was logged of `stage` after `step`, a half-written last line included."""
        if not self.writes:
            return
        if self._board is not None:
            self._board.open(stage, step)
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # cut off by a kill
            if entry["stage"] != stage or entry["step"] <= step:
                kept.append(line)
        write_bytes(self.path, "".join(line + "\n" for line in kept).encode())

    def write(self, stage: str, step: int, **values: Any) -> None:
        if not self.writes:
            return
        entry = {"stage": stage, "step": step} | {name: to_number(value) for name, value in values.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry, allow_nan=False) + "\n")
        except OSError as error:
            raise RunError(
                f"Cannot write {self.path}: {error.strerror}. Free some space, then go on with --resume."
            ) from error
        if self._board is not None:
            self._board.write(stage, step, entry)
        self.display.step(entry)


@final
class _Board:
    """TensorBoard's files: a folder for each stage, whose numbers then lie over each other in one picture."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingPackage(
                "tensorboard", "engine.tensorboard=true", "pip install 'kdedge[tensorboard]'"
            ) from None
        self._folder, self._stage = folder, ""
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def open(self, stage: str, step: int) -> None:
        """Go on with `stage` after `step`; TensorBoard forgets what it was told of later ones."""
        if self._writer is not None:
            self._writer.close()
        self._stage, self._writer = stage, self._make(str(self._folder / stage), purge_step=step + 1)

    def write(self, stage: str, step: int, entry: Mapping[str, Any]) -> None:
        """Numbers and sentences of one line; lists, which are per class, stay in metrics.jsonl."""
        if stage != self._stage:
            self.open(stage, step - 1)
        for name, value in entry.items():
            if isinstance(value, str) and name != "stage":
                self._writer.add_text(name, value, step)
            elif isinstance(value, int | float) and name not in ("step", "total_steps"):
                self._writer.add_scalar(name, value, step)
        self._writer.flush()
