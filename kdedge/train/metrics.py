"""metrics.jsonl: one JSON object a logged step, and the display that reads along."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, final

from torch import Tensor

from kdedge.errors import RunError
from kdedge.runs import write_bytes

__all__ = ["Display", "MetricsLog", "SilentDisplay", "to_number"]


class Display(Protocol):
    """What a person sees while a run goes on. It decides nothing."""

    def stage(self, name: str, total_steps: int) -> None:
        """A stage begins: `baseline`, `outer`, `trusted` or `inner`."""

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

    Of many processes that train together one writes; the others have `writes` false.
    """

    def __init__(self, path: Path, display: Display, *, writes: bool = True) -> None:
        self.path, self.display, self.writes = path, display, writes

    def rewind(self, stage: str, step: int) -> None:
        """Forget what was logged of `stage` after `step`, a half-written last line included."""
        if not self.writes or not self.path.exists():
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
        self.display.step(entry)
