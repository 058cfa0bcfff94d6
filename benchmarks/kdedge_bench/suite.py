"""A suite: which models are measured in which ways, as YAML that is checked when it is read.

Models x precisions x runtimes x threads x batches, in single stream and offline, everything in turn in one session.
Those that ship lie in `suites/`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, final

from pydantic import Field, model_validator

from kdedge.config import Config
from kdedge.errors import RecipeError, did_you_mean
from kdedge.recipe_io import parse, read_text, shipped

__all__ = ["Base", "Found", "Model", "Precision", "Runtime", "Suite", "find", "load", "names", "with_models"]

Precision = Literal["fp32", "fp16", "int8"]
Runtime = Literal["onnxruntime", "tensorrt", "openvino"]
Count = Annotated[int, Field(ge=1, le=1024)]
_SHIPPED = ("kdedge_bench", "suites")
MOST = 1000
"""Combinations; a suite of more would not end."""


@final
class Model(Config):
    """One of three: a network of the zoo, whose weights are random, so that only its speed means something; `run:
    latest`; or the path of a run, a bundle or a .onnx file, from the suite's folder on.
    """

    zoo: str | None = None
    run: Literal["latest"] | None = None
    path: Path | None = None
    px: Annotated[int, Field(ge=8, le=4096)] | None = None  # of zoo; null: the family's own
    classes: Annotated[int, Field(ge=2, le=100_000)] | None = None  # of zoo; null: 1000
    width: Annotated[float, Field(gt=0, le=4)] | None = None  # of zoo; null: 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=40)] | None = None  # null: its own

    @model_validator(mode="after")
    def _one_of_three(self) -> "Model":
        given = [key for key in ("zoo", "run", "path") if getattr(self, key) is not None]
        if len(given) != 1:
            told = f"has {' and '.join(given)}" if given else "has none of them"
            raise ValueError(f"it {told}; exactly one of 'zoo', 'run' and 'path' was expected.")
        sizes = [key for key in ("px", "classes", "width") if getattr(self, key) is not None]
        if self.zoo is None and sizes:
            raise ValueError(f"'{sizes[0]}' is of a network of the zoo; a file has its own. Leave it out.")
        if self.zoo is not None:
            from kdedge.models.zoo import architecture

            try:
                architecture(self.zoo)
            except RecipeError as error:
                raise ValueError(str(error)) from None
        return self


@final
class Base(Config):
    """The row that each row's speed is told against. What is null is as in the row itself; so are batch and mode."""

    model: str | None = None
    precision: Precision | None = None
    runtime: Runtime | None = None
    threads: Count | None = None


@final
class Suite(Config):
    """`single_stream` and `offline`: images a call; one query in flight, or batch after batch for throughput."""

    schema_: Annotated[Literal[1], Field(alias="schema")] = 1
    models: tuple[Model, ...]
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    runtimes: tuple[Runtime, ...] = ("onnxruntime",)
    threads: tuple[Count, ...] = (1,)
    single_stream: tuple[Count, ...] = (1,)
    offline: tuple[Count, ...] = ()
    effort: Literal["quick", "standard", "mlperf"] = "standard"
    repeats: Annotated[int, Field(ge=1, le=1000)] | None = None  # that share the effort; null: 6, or 1 of mlperf
    base: Base = Base()  # null in all: the first precision

    @model_validator(mode="after")
    def _measures_something(self) -> "Suite":
        for key in ("models", "precisions", "runtimes", "threads"):  # a Field's own length is told beside a wrong value
            if not getattr(self, key):
                raise ValueError(f"'{key}' is empty, so that nothing would be measured; name at least one.")
        if not self.single_stream and not self.offline:
            raise ValueError("'single_stream' and 'offline' are both empty, so that nothing would be measured.")
        for key in ("models", "precisions", "runtimes", "threads", "single_stream", "offline"):
            values = getattr(self, key)
            twice = [value for place, value in enumerate(values) if value in values[:place]]
            if twice:
                shown = twice[0].model_dump(exclude_none=True) if isinstance(twice[0], Model) else twice[0]
                raise ValueError(f"'{key}' has {shown} twice; keep one.")
        if self.count > MOST:
            raise ValueError(f"it has {self.count:,} combinations, and {MOST:,} are the most. Leave some out.")
        for key, known in (("precision", self.precisions), ("runtime", self.runtimes), ("threads", self.threads)):
            value = getattr(self.base, key)
            if value is not None and value not in known:
                listed = ", ".join(map(str, known))
                raise ValueError(f"'base.{key}' is {value}, which is not measured; one of {listed} was expected.")
        return self

    @property
    def count(self) -> int:
        """Combinations."""
        ways = len(self.precisions) * len(self.runtimes) * len(self.threads)
        return len(self.models) * ways * (len(self.single_stream) + len(self.offline))


@final
class Found(Config):
    """A suite with its name, what messages call it, and the folder that its paths begin in."""

    name: str
    origin: str
    folder: Path
    suite: Suite


def names() -> list[str]:
    """The suites that ship with kdedge, by name."""
    return sorted(shipped(*_SHIPPED))


def load(name_or_path: str) -> Found:
    """A shipped suite by name, or a file (anything with a slash or .yaml in it).

    RecipeError with the nearest name, or with every problem of the file at once.
    """
    name, origin, folder, text = find(name_or_path)
    try:
        return Found(name=name, origin=origin, folder=folder, suite=parse(text, origin, Suite))
    except RecipeError as error:  # the reader of recipes, which speaks of those
        told = str(error).replace("a recipe", "a suite").replace("kdedge recipes show mobilenet", "kdedge bench --help")
        raise RecipeError(told) from None


def find(name_or_path: str) -> tuple[str, str, Path, str]:
    """(its name, what messages call it, its folder, its text)."""
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        return path.stem, str(path), path.resolve().parent, read_text(path, "suite")
    if file := shipped(*_SHIPPED).get(name_or_path):
        return name_or_path, f"suite {name_or_path}", Path.cwd(), file.read_text(encoding="utf-8")
    hint = did_you_mean(name_or_path, names())
    raise RecipeError(
        f"The suite '{name_or_path}' is not known; there are {', '.join(names())}, and any path to a .yaml file.{hint}"
    )


def with_models(found: Found, paths: Sequence[Path]) -> Found:
    """The same ways for other models: files that were named beside the suite."""
    models = tuple(Model(path=path) for path in dict.fromkeys(paths))
    return found.model_copy(update={"folder": Path(), "suite": found.suite.model_copy(update={"models": models})})
