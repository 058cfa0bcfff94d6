"""A target: what a kind of device runs of a bundle, and how; checked when it is read, explained where it is written.

No table of devices decides what a device can do: that is asked of the device itself (`run.pyz info`). A target only
says what to compare there, and with which settings.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from kdedge.config import Config
from kdedge.errors import ExportError, RecipeError, did_you_mean
from kdedge.recipe_io import parse, read_text, shipped
from kdedge_export.bundle import ARTIFACTS

__all__ = ["Target", "Why", "for_board", "load", "names"]

Sentence = Annotated[str, Field(min_length=10)]
Precision = Literal["int8", "fp16", "fp32"]
Runtime = Literal["tensorrt", "onnxruntime"]

_SHIPPED = ("kdedge_export", "targets")
TAKEN = ("onnxruntime-cpu", "tensorrt")  # what gate.json calls this machine, and any TensorRT
TOO_OLD = ("jetson-nano", "jetson-tx1", "jetson-tx2")
FORMS = {
    "onnxruntime": {ARTIFACTS[name].file: name for name in ("int8", "fp16", "fp32")},
    "tensorrt": {ARTIFACTS[name].file: name for name in ("trt", "trt-fp16", "fp16", "fp32")},
}
"""By runtime, the model files that it reads, and the artifacts they are."""


class Why(Config):
    """A sentence on each setting."""

    runtime: Sentence
    forms: Sentence
    precisions: Sentence
    batch: Sentence
    workspace_mib: Sentence
    threads: Sentence


class Target(Config):
    """One kind of device.

    `boards`: words of which a device's own name (/proc/device-tree/model) has one; none where any name will do.
    `forms`: files of a bundle; of one precision, the first that the installed version reads. `precisions`: those to
    compare, the one to be shipped first. `workspace_mib`: of TensorRT's builder. `threads`: of ONNX Runtime.
    """

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=40)]
    about: Sentence
    boards: tuple[str, ...]
    architectures: Annotated[tuple[str, ...], Field(min_length=1)]
    runtime: Runtime
    forms: Annotated[tuple[str, ...], Field(min_length=1)]
    precisions: tuple[Precision, ...]
    batch: Annotated[int, Field(ge=1, le=1024)]
    workspace_mib: Annotated[int, Field(ge=1)] | None
    threads: Annotated[int, Field(ge=1, le=1024)] | None
    why: Why
    sources: Annotated[tuple[Sentence, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits_together(self) -> "Target":
        known = FORMS[self.runtime]
        for form in self.forms:
            if form not in known:
                hint = did_you_mean(form, known) or f" It reads {', '.join(known)}."
                raise ValueError(f"'forms' names {form}, which is no file for {self.runtime}.{hint}")
        precisions = [ARTIFACTS[known[form]].precision for form in self.forms]
        if len(set(self.forms)) < len(self.forms) or len(set(self.precisions)) < len(self.precisions):
            raise ValueError("'forms' or 'precisions' names one twice. Keep one of each.")
        if set(precisions) != set(self.precisions):
            raise ValueError(
                f"'precisions' are {', '.join(self.precisions)}, and the files of 'forms' are of "
                f"{', '.join(dict.fromkeys(precisions))}; the same were expected."
            )
        if "fp32" not in self.precisions:
            raise ValueError(
                f"'precisions' lacks fp32, which the others are compared with. Add {ARTIFACTS['fp32'].file}."
            )
        if self.name in TAKEN:
            raise ValueError(f"'name' is {self.name}, which every bundle has already. Choose another.")
        wanted, other = ("workspace_mib", "threads") if self.runtime == "tensorrt" else ("threads", "workspace_mib")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(
                f"'{wanted}' has to be a number for {self.runtime}, and '{other}' null: it is not used there."
            )
        return self

    def fits(self, model: str | None, architecture: str) -> bool:
        """Whether a device of this name and `platform.machine()` is one of these."""
        said = (model or "").lower()
        return architecture in self.architectures and (
            not self.boards or any(word.lower() in said for word in self.boards)
        )

    def candidates(self, there: Iterable[str]) -> list[tuple[str, Literal["int8", "fp16"]]]:
        """What could ship instead of FP32: (artifact, precision), of those that are `there`, in the order of wishes."""
        artifacts, found = set(there), []
        for precision in self.precisions:
            ours = [FORMS[self.runtime][form] for form in self.forms]
            ours = [name for name in ours if name in artifacts and ARTIFACTS[name].precision == precision]
            if ours and precision != "fp32":
                found.append((ours[0], precision))
        return found

    def settings(self) -> dict[str, Any]:
        """What gate.json says beside the decision, for whoever measures there."""
        return self.model_dump(
            mode="json", include={"about", "runtime", "forms", "precisions", "batch", "workspace_mib", "threads", "why"}
        )


def names() -> list[str]:
    """The targets that ship, by name."""
    return sorted(shipped(*_SHIPPED))


def load(name_or_path: str) -> Target:
    """A shipped target by name, or one from a file (anything with a slash or .yaml in it).

    ExportError with the nearest name, or with every problem of the file.
    """
    origin, text = _found(name_or_path)
    try:
        return parse(text, origin, Target)
    except RecipeError as error:  # the reader of recipes, which speaks of those
        raise ExportError(str(error).replace("a recipe", "a target")) from None


def for_board(targets: Iterable[Target], model: str | None, architecture: str) -> Target | None:
    """The target that a device is by its own name, or that any name will do for; None where there is none.

    Makers of carrier boards choose names freely, so where a single target has the device's architecture it is that.
    """
    possible = [each for each in targets if architecture in each.architectures]
    fitting = [each for each in possible if each.fits(model, architecture)]
    if fitting:
        return min(fitting, key=lambda each: not each.boards)
    return possible[0] if len(possible) == 1 else None


def _found(name_or_path: str) -> tuple[str, str]:
    """(what messages call it, its text)."""
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        try:
            return str(path), read_text(path, "target")
        except RecipeError as error:
            raise ExportError(str(error)) from None
    if file := shipped(*_SHIPPED).get(name_or_path):
        return f"target {name_or_path}", file.read_text(encoding="utf-8")
    if name_or_path in TOO_OLD:
        raise ExportError(
            f"There is no target '{name_or_path}': the last JetPack for that board is 4, with TensorRT 8.2 and "
            "Python 3.6, and bundles run from JetPack 5 on."
        )
    hint = did_you_mean(name_or_path, names())
    raise ExportError(
        f"There is no target '{name_or_path}'; there are {', '.join(names())}, and any path to a .yaml file.{hint}"
    )
