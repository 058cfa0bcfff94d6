"""What calibration has counted so far, and the file from which an interrupted one goes on."""

import hashlib
import io
import json
import zipfile
import zlib
from array import array
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx

from kdedge.runs import write_bytes
from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.histogram import BINS, Tally
from kdedge_export.images import Images

__all__ = ["Collected", "key_of", "read_state", "write_state"]

SCHEMA = 2


class Collected:
    """A tally of each tensor over the first `images`; `varied`: one of them has two different pixels."""

    def __init__(self, tensors: Sequence[str]) -> None:
        self.tallies = {name: Tally(name) for name in tensors}
        self.images = 0
        self.varied = False


def key_of(model: onnx.ModelProto, tensors: Sequence[str], preprocess: Preprocess, images: Images) -> str:
    """sha256 of all that the counts depend on, the versions of the programs included."""
    facts = {
        "schema": SCHEMA,
        "versions": {name: metadata.version(name) for name in ("kdedge", "onnxruntime")},
        "model": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
        "tensors": list(tensors),
        "preprocess": preprocess.to_json(),
        "images": [len(images), images.fingerprint],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_state(path: Path, key: str, collected: Collected) -> None:
    """Atomic: a reader finds the old state or this one. RunError where it cannot be written."""
    tallies = collected.tallies.values()
    arrays = {
        "key": np.array(key),
        "images": np.array(collected.images, np.int64),
        "varied": np.array(collected.varied),
        "extremes": np.array([[tally.lows, tally.highs] for tally in tallies], np.float32).reshape(
            len(tallies), 2, collected.images
        ),
        "exponents": np.array([tally.exponent for tally in tallies], np.int64),
        "counts": np.array([tally.counts for tally in tallies], np.int64).reshape(-1, BINS),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # its stub takes allow_pickle for one of them
    write_bytes(path, buffer.getvalue())


def read_state(path: Path, key: str, tensors: Sequence[str], say: Callable[[str], None]) -> Collected | None:
    """What `write_state` wrote under `key`, or None: `say` is told why a file that is there is of no use."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays["key"]) != key:
            say(f"{path} is of another model, other images or another version; calibration starts over")
            return None
        return _collected(arrays, tensors)
    except (OSError, ValueError, KeyError, EOFError, IndexError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        say(f"{path} is damaged ({type(error).__name__}); calibration starts over")
        return None


def _collected(arrays: dict[str, "np.typing.NDArray[np.generic]"], tensors: Sequence[str]) -> Collected:
    """ValueError where shapes do not fit; contents are guarded by the checksums of the archive."""
    collected = Collected(tensors)
    extremes, exponents, counts = (arrays[name] for name in ("extremes", "exponents", "counts"))
    images = int(arrays["images"])
    if (
        extremes.shape != (len(tensors), 2, images)
        or exponents.shape != (len(tensors),)
        or counts.shape != (len(tensors), BINS)
    ):
        raise ValueError(f"the state has {len(counts)} tensors; {len(tensors)} were expected")
    for place, tally in enumerate(collected.tallies.values()):
        tally.lows, tally.highs = (array("f", each.astype(np.float32).tobytes()) for each in extremes[place])
        tally.exponent = int(exponents[place])
        tally.counts = counts[place].astype(np.int64)
    collected.images = images
    collected.varied = bool(arrays["varied"])
    return collected
