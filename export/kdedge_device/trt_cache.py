"""Engines on disk: which one belongs to this GPU, TensorRT, driver, model and options, and which may be loaded at all.

An engine holds native code that runs as soon as TensorRT reads it, and it works on one kind of GPU, one driver and one
TensorRT only. So each has a side file, `NAME.engine.json`, that says what it is made of and is signed with a key that
only the user who built it has; both are checked byte by byte before TensorRT sees the engine. One that was built
elsewhere, altered, or has no side file is refused, not tried.
"""

import hashlib
import json
import os
import re
from typing import Any, Dict, Optional, Tuple

from kdedge_device.failures import CorruptFailure, DeviceFailure, Failure, VersionFailure
from kdedge_device.manifest import sha256_file
from kdedge_device.own_key import is_own, own_key, signature
from kdedge_device.plain_files import open_plain
from kdedge_device.strict_json import read_json
from kdedge_device.trt import Here
from kdedge_device.trt_errors import REBUILD

__all__ = [
    "SCHEMA",
    "engine_name",
    "fingerprint",
    "read_engine",
    "read_side",
    "side_path",
    "slug",
    "write_atomically",
    "write_engine",
]

SCHEMA = 1
_KINDS = {"fingerprint": dict, "sha256": str, "bytes": int, "onnx_file": str, "report": dict}


def fingerprint(here: Here, onnx_sha256: str, options: Dict[str, Any]) -> Dict[str, Any]:
    """All that an engine depends on. Engines of equal fingerprints may stand in for each other; no others may."""
    return {
        "gpu": here.gpu.name,
        "capability": here.gpu.capability,
        "driver": here.gpu.driver,
        "cuda": here.gpu.cuda,
        "tensorrt": here.version,
        "onnx_sha256": onnx_sha256,
        "options": options,
    }


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


def engine_name(mark: Dict[str, Any]) -> str:
    """The file name of the engine with the fingerprint `mark`."""
    digest = hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()[:12]
    precision = mark["options"].get("precision", "engine")
    return slug("{}-sm{capability}-trt{tensorrt}-{}".format(precision, digest, **mark)) + ".engine"


def side_path(path: str) -> str:
    return path + ".json"


def write_engine(path: str, content: bytes, mark: Dict[str, Any], onnx_file: str, report: Dict[str, Any]) -> None:
    """The engine, then its side file, each whole or not at all. Failure where the folder cannot be written."""
    side: Dict[str, Any] = {
        "schema": SCHEMA,
        "fingerprint": mark,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "onnx_file": onnx_file,
        "report": report,
    }
    side = json.loads(json.dumps(side))  # as it will be read
    side["signature"] = signature(own_key(), side)
    try:
        write_atomically(path, content)
        write_atomically(side_path(path), json.dumps(side, indent=1).encode("utf-8"))
    except OSError as error:
        raise Failure(f"Cannot write {path}: {error.strerror}. Choose another folder with --engines.") from None


def write_atomically(path: str, content: bytes) -> None:
    """Under a temporary name first, and on the disk before it takes its own: boards lose their power."""
    temporary = f"{path}.{os.getpid()}.part"
    try:
        with open(temporary, "xb") as file:  # never through a link that lies there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def read_engine(path: str, here: Here, expected: Optional[Dict[str, Any]] = None) -> Tuple[bytes, Dict[str, Any]]:
    """The engine's bytes and its side file, once everything matched; `expected` is the whole fingerprint, if known.

    VersionFailure: another TensorRT, driver, model or options. DeviceFailure: another GPU. CorruptFailure: altered, or
    not signed by this user. The signature comes last of what the side file says: what stands in the way of a copy from
    another board is told first.
    """
    side = read_side(path)
    _match(path, side["fingerprint"], here)
    if expected is not None and side["fingerprint"] != json.loads(json.dumps(expected)):
        raise VersionFailure(f"{path} was built from another model or with other options. {REBUILD}")
    model = os.path.join(os.path.dirname(path), os.path.basename(side["onnx_file"]))
    if os.path.isfile(model) and sha256_file(model) != side["fingerprint"].get("onnx_sha256"):
        raise VersionFailure(f"{path} was built from another {os.path.basename(model)} than lies beside it. {REBUILD}")
    if not is_own(side):
        raise CorruptFailure(
            f"{path} was not built here by you, or its side file was altered. Engines hold native code; one of unknown "
            f"origin is not loaded. {REBUILD}"
        )
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != side["bytes"]:
            said = side["bytes"]
            raise CorruptFailure(f"{path} has {size} bytes; its side file says {said}. {REBUILD}")
        content = file.read()
    found = hashlib.sha256(content).hexdigest()  # of the very bytes that TensorRT gets
    if found != side["sha256"]:
        raise CorruptFailure(
            "{} has sha256 {}...; its side file says {}.... It was altered. {}".format(
                path, found[:12], side["sha256"][:12], REBUILD
            )
        )
    return content, side


def read_side(path: str) -> Dict[str, Any]:
    """The side file of the engine `path`, its form checked; what it says of this machine, and who says it, are not."""
    if not os.path.lexists(path):
        raise Failure(f"The engine {path} does not exist.")
    if not os.path.lexists(side_path(path)):
        raise CorruptFailure(
            f"{path} has no {os.path.basename(side_path(path))} that tells where it was built. Engines hold native "
            f"code; one of unknown origin is not loaded. {REBUILD}"
        )
    try:
        side = read_json(side_path(path))
    except CorruptFailure as error:
        raise CorruptFailure(f"The side file of {path} cannot be used. {error} {REBUILD}") from None
    if not isinstance(side, dict) or not isinstance(side.get("schema"), int):
        raise CorruptFailure(f"{side_path(path)} has no whole number 'schema'. {REBUILD}")
    if side["schema"] > SCHEMA:
        raise VersionFailure(
            f"{side_path(path)} has schema {side['schema']}; this program reads up to {SCHEMA}. {REBUILD}"
        )
    for key, kind in _KINDS.items():
        if not isinstance(side.get(key), kind):
            raise CorruptFailure(f"{side_path(path)} has no {kind.__name__} '{key}'. {REBUILD}")
    return side


def _match(path: str, mark: Dict[str, Any], here: Here) -> None:
    present = fingerprint(here, "", {})
    wrong = [key for key in ("gpu", "capability", "tensorrt", "cuda", "driver") if mark.get(key) != present[key]]
    if not wrong:
        return
    key = wrong[0]
    words = {"gpu": "GPU", "capability": "compute capability", "tensorrt": "TensorRT", "cuda": "CUDA"}
    failure = DeviceFailure if key in ("gpu", "capability") else VersionFailure
    raise failure(
        f"{path} was built for {words.get(key, key)} {mark.get(key)}; this machine has {present[key]}. {REBUILD}"
    )
