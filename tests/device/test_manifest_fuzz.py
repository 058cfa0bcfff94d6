"""Any change of a manifest, of golden.npz or of a model: a working bundle, or a Failure with the right exit code."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdedge_device.check import check
from kdedge_device.evaluate import evaluate, predict
from kdedge_device.failures import BudgetFailure, CorruptFailure, Failure, RuntimeFailure, VersionFailure
from kdedge_device.manifest import Bundle
from kdedge_device.onnx_outside import refuse_outside

from .conftest import entry, linear_model, write_manifest

VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 4096, 1 << 31, 1 << 64, 10**300, 0.5, -0.0, 1e-300, 1e300, "", "x", "fp32", "1",
    "../model.onnx", "golden.npz", "MODEL.ONNX", "\ud800", "\0", "a" * 5000, "tensorrt", "abacus", "squash",
    [], [1], ["x"], [None], [[]], [0.5], [1e300], ["batch", 1, 4, 4], {}, {"x": 1}, {"file": "model.onnx"},
)  # fmt: skip
KEYS = ("schema", "file", "fp32", "int8", "golden.npz", "x", "", "../x", "\ud800", "sha256", "mean")
WRONG: tuple[Any, ...] = (None, True, -1, 1e300, "\0", [], {})  # a value of every type, for every field
CASES = 300


@pytest.fixture
def whole(bundle: Path) -> dict[str, Any]:
    """The manifest with all fields that kdedge export writes, and an eval.npz."""
    images = np.stack([np.full((4, 4, 1), value, np.uint8) for value in (0, 255)])
    np.savez(bundle / "eval.npz", images=images, labels=np.array([0, 1]))
    (bundle / "x.engine").write_bytes(b"engine")
    write_manifest(bundle)
    document: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    document["files"]["eval.npz"] = entry(bundle / "eval.npz")
    document["engines"] = {"x.engine": {**entry(bundle / "x.engine"), "gpu": "Orin", "tensorrt": "10.3.0"}}
    document["artifacts"]["fp32"] |= {"runtime": "onnxruntime", "opset": 17, "ir_version": 8, "accuracy": 0.5}
    document["output"] = {"name": "logits", "shape": ["batch", 2], "dtype": "float32"}
    document["accuracy"] = {"split": "test", "images": 2, "sha256": None, "fp32": 0.5}
    document["provenance"] = {"run": "r", "params": 2, "versions": {"kdedge": "0.1.0"}}
    return document


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys or indices."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from places(child)


def mutated(document: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """One to three changes: a value replaced, taken out, wrapped, copied from elsewhere, or a key renamed or added."""
    changed = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        everywhere = list(places(changed))
        if not everywhere:
            break
        (holder, key), (other, source) = draw.choice(everywhere), draw.choice(everywhere)
        match draw.randrange(6):
            case 0 | 1:
                holder[key] = draw.choice(VALUES)
            case 2:
                del holder[key]
            case 3:
                holder[key] = draw.choice(([holder[key]], {"x": holder[key]}, str(holder[key])))
            case 4:
                holder[key] = copy.deepcopy(other[source])
            case 5 if isinstance(holder, dict):
                holder[draw.choice(KEYS)] = holder.pop(key) if draw.random() < 0.5 else draw.choice(VALUES)
    return changed


def every_field(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The manifest without each of its fields, and with each of a wrong type."""
    for number in range(len(list(places(document)))):
        for value in (..., *WRONG):
            changed = copy.deepcopy(document)
            holder, key = list(places(changed))[number]
            if value is ...:
                del holder[key]
            else:
                holder[key] = value
            yield changed


def outcome(folder: Path) -> Failure | None:
    """What the first of the commands says that does not work; anything but a Failure is let out. None: all work."""
    try:
        bundle = Bundle(folder)
        check(bundle)
        evaluate(bundle)
        answers = predict(bundle, [str(folder / "image.npy")])
        json.dumps(answers, allow_nan=False)
        assert answers[0]["class"] in bundle.classes
        assert 0 < answers[0]["probability"] <= 1
    except Failure as failure:
        return failure
    return None


def allowed(document: dict[str, Any], original: dict[str, Any]) -> set[type[Failure] | None]:
    """The answers that are right for a changed manifest. What cannot be used is corrupt, with few exceptions."""
    schema = document.get("schema")
    if isinstance(schema, int) and not isinstance(schema, bool) and schema > 1:
        return {VersionFailure}
    answers: set[type[Failure] | None] = {CorruptFailure, None}
    if document.get("preprocess") != original["preprocess"] or document.get("artifacts") != original["artifacts"]:
        answers.add(BudgetFailure)  # other pixels, or another tolerance
    if '"runtime": "onnxruntime"' not in json.dumps(document.get("artifacts")):
        answers.add(RuntimeFailure)  # one that this machine has not
    files = document.get("files")
    if isinstance(files, dict) and not {"golden.npz", "eval.npz"} <= set(files):
        answers.add(Failure)  # nothing to compare with, or to score
    return answers


def test_manifests(bundle: Path, whole: dict[str, Any]) -> None:
    np.save(bundle / "image.npy", np.full((4, 4), 255, np.uint8))
    seen: dict[type[Failure] | None, int] = {}
    documents = [*every_field(whole), *(mutated(whole, random.Random(seed)) for seed in range(CASES))]
    for document in documents:
        (bundle / "manifest.json").write_text(json.dumps(document))
        try:
            found = outcome(bundle)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}, of {json.dumps(document)}") from error
        kind = None if found is None else type(found)
        assert kind in allowed(document, whole), f"{found} of {json.dumps(document)}"
        seen[kind] = seen.get(kind, 0) + 1
    assert seen[None] > len(documents) // 20, "changes that do no harm are let pass"
    assert seen[CorruptFailure] > len(documents) // 2
    assert {VersionFailure, RuntimeFailure, Failure} <= set(seen), seen


def test_bytes_of_a_manifest(bundle: Path, whole: dict[str, Any]) -> None:
    """Cut off, overwritten or doubled anywhere. One changed digit is another number, which may be as good."""
    np.save(bundle / "image.npy", np.full((4, 4), 255, np.uint8))
    content = json.dumps(whole).encode()
    kinds = set()
    for seed in range(CASES):
        (bundle / "manifest.json").write_bytes(spoiled(content, random.Random(seed)))
        found = outcome(bundle)
        kinds.add(None if found is None else type(found))
    assert {None, CorruptFailure} <= kinds


def spoiled(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    match draw.randrange(4):
        case 0:
            return content[:at]
        case 1:
            return content[:at] + draw.randbytes(draw.randrange(1, 9)) + content[at + 1 :]
        case 2:
            return content[:at] + content[draw.randrange(len(content)) :]
        case _:
            return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]


def test_bytes_of_golden_images(bundle: Path, whole: dict[str, Any]) -> None:
    """With the right hash in the manifest: whoever spoils a file can also write down its hash."""
    content = (bundle / "golden.npz").read_bytes()
    for seed in range(CASES // 2):
        (bundle / "golden.npz").write_bytes(spoiled(content, random.Random(seed)))
        whole["files"]["golden.npz"] = entry(bundle / "golden.npz")
        (bundle / "manifest.json").write_text(json.dumps(whole))
        try:
            Bundle(bundle).golden()
        except CorruptFailure:
            continue


def test_bytes_of_a_model(tmp_path: Path) -> None:
    """The walk over a damaged model ends, with a verdict."""
    content, refused = linear_model(), 0
    for seed in range(CASES):
        (tmp_path / "model.onnx").write_bytes(spoiled(content, random.Random(seed)))
        try:
            refuse_outside(str(tmp_path / "model.onnx"))
        except CorruptFailure:
            refused += 1
    assert CASES // 4 < refused < CASES
