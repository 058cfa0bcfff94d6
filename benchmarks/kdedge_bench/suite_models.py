"""What the models of a suite are on this machine: bundles, files, and networks of the zoo that are exported for it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from kdedge.errors import BundleError, RecipeError, RunError
from kdedge.runs import open_finished, sha256_file
from kdedge_bench.latency import target_of
from kdedge_bench.suite import Found, Model, Suite
from kdedge_device.failures import Failure
from kdedge_device.manifest import Bundle

__all__ = ["Subject", "built", "subjects"]

Say = Callable[[str], None]


@final
@dataclass(frozen=True)
class Subject:
    """A model of a suite. `path`: a bundle's folder or a .onnx file; None: of the zoo, and not exported yet.

    `precision`: what a bare file is in.
    """

    name: str
    model: Model
    path: Path | None
    precision: str | None = None

    @property
    def random(self) -> bool:
        """Whether nothing was learned, so that there is nothing but speed to measure."""
        return self.model.zoo is not None

    @property
    def bundle(self) -> Path | None:
        return self.path if self.path is not None and self.path.is_dir() else None

    def hashes(self) -> Mapping[str, str]:
        """sha256 of each of its files, by artifact: what was measured before is of these bytes or of no use."""
        if self.path is None:
            return {}
        if self.bundle is None:
            return {"file": sha256_file(self.path)}
        return {name: entry["sha256"] for name, entry in Bundle(self.bundle).artifacts.items()}


def subjects(found: Found, say: Say) -> list[Subject]:
    """All models by name, those of the zoo not exported yet. RunError where one is not there; RecipeError where two
    would have one name, or the base is none of them."""
    named: dict[str, Subject] = {}
    for model in found.suite.models:
        subject = _subject(found, model, say)
        if subject.name in named:
            raise RecipeError(
                f"{found.origin}: two models are called {subject.name}. Give one of them a 'name' of its own."
            )
        named[subject.name] = subject
    base = found.suite.base.model
    if base is not None and base not in named:
        raise RecipeError(f"{found.origin}: 'base.model' is {base}; one of {', '.join(named)} was expected.")
    return list(named.values())


def _subject(found: Found, model: Model, say: Say) -> Subject:
    if model.zoo is not None:
        parts = [model.zoo.replace("/", "-")]
        parts += [f"w{model.width:g}"] if model.width is not None else []
        parts += [f"{model.px}px"] if model.px is not None else []
        return Subject(model.name or "-".join(parts), model, None)
    if model.run is not None:
        run = open_finished(None)
        say(f"Using the latest finished run: {run.path}")
        path = run.path
    else:
        assert model.path is not None
        path = found.folder / model.path
    target = target_of(path)
    if target.path.is_dir():
        folder = target.path.parent if target.path.name == "bundle" else target.path
        try:
            Bundle(target.path)
        except Failure as error:
            raise BundleError(str(error)) from None
        return Subject(model.name or folder.resolve().name, model, target.path)
    if target.path.suffix != ".onnx":
        raise RunError(f"{path} is an engine, which a suite does not build. Measure it by itself: kdedge bench {path}")
    return Subject(model.name or target.path.stem, model, target.path, _precision(target.path))


def _precision(path: Path) -> str:
    """Of a bare file: what its operators and weights say."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # of protobuf, which has several
        raise RunError(f"{path} cannot be read as ONNX: {error}. Expected a file named *.onnx.") from None
    kinds = {node.op_type for node in graph.node}
    if any("Quantize" in kind or kind.startswith("QLinear") or kind.endswith("Integer") for kind in kinds):
        return "int8"
    half = any(weight.data_type == onnx.TensorProto.FLOAT16 for weight in graph.initializer)
    return "fp16" if half else "fp32"


def built(found: Sequence[Subject], suite: Suite, scratch: Path, say: Say) -> list[Subject]:
    """The same, with those of the zoo exported into `scratch`; equal weights on each call."""
    made = []
    for subject in found:
        if subject.random:
            from kdedge_bench.suite_zoo import zoo_bundle

            say(f"Exporting {subject.name} with random weights")
            folder = zoo_bundle(subject.model, suite, scratch / subject.name)
            subject = replace(subject, path=folder)
        made.append(subject)
    return made
