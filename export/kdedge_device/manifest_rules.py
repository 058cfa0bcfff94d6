"""What a manifest.json may say: the type and the range of every field that anything reads, and names that fit a folder.

A field beside those listed is kept and not looked at: a newer kdedge may add some. Python 3.8, standard library.
"""

import json
import re
from typing import Any, Callable, Dict, List, Tuple

__all__ = ["MAX_FILE_BYTES", "MAX_SIDE", "problem_of"]

MAX_FILE_BYTES = 8 << 30  # hashing more takes minutes, and an ONNX file ends at 2 GiB
MAX_SIDE = 4096  # pixels: a batch of larger images fills a board's memory
_LARGEST = 1e30

_Rule = Tuple[Callable[[Any], bool], str]  # whether a value is right, and what was expected


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_whole(value) or isinstance(value, float)) and abs(value) < _LARGEST


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}", value) is not None


_FILE_NAME: _Rule = (_is_file_name, "a plain file name (letters, digits, . _ + -)")
_SHA256: _Rule = (
    lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
    "64 hexadecimal digits",
)
_BYTES: _Rule = (
    lambda value: _is_whole(value) and 0 <= value <= MAX_FILE_BYTES,
    f"a whole number from 0 to {MAX_FILE_BYTES}",
)
_TEXT: _Rule = (lambda value: isinstance(value, str), "a text")
_COUNT: _Rule = (lambda value: _is_whole(value) and 0 <= value < 2**31, "a whole number")
_SIDE: _Rule = (
    lambda value: _is_whole(value) and 1 <= value <= MAX_SIDE,
    f"a whole number of pixels from 1 to {MAX_SIDE}",
)
_FRACTION: _Rule = (
    lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
    "a number from 0 to 1, or null",
)
_TOLERANCE: _Rule = (lambda value: _is_number(value) and value >= 0, "a number, 0 or more")
_OBJECT: _Rule = (lambda value: isinstance(value, dict), "an object")
_OBJECT_OR_NULL: _Rule = (lambda value: value is None or isinstance(value, dict), "an object, or null")
_MEANS: _Rule = (
    lambda value: isinstance(value, list) and all(_is_number(each) and abs(each) <= 1e6 for each in value),
    "a list of numbers from -1e6 to 1e6",
)
_STDS: _Rule = (  # in float32 a smaller one is 0
    lambda value: isinstance(value, list) and all(_is_number(each) and 1e-6 <= each <= 1e6 for each in value),
    "a list of numbers from 1e-6 to 1e6",
)
_SHAPE: _Rule = (
    lambda value: (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(each, str) or (_is_whole(each) and 1 <= each < 2**31) for each in value)
    ),
    "a list of 4 sizes, each a whole number or the name of an open one",
)
_CLASSES: _Rule = (
    lambda value: (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, str) for each in value)
        and len(set(value)) == len(value)
    ),
    "a list of different texts, at least one",
)

# A name with "?" may be missing.
_TOP: Dict[str, _Rule] = {
    "artifacts": (lambda value: isinstance(value, dict) and bool(value), "an object with at least one artifact"),
    "files": _OBJECT,
    "input": _OBJECT,
    "preprocess": _OBJECT,
    "classes": _CLASSES,
    "shipped": _TEXT,
    "output?": _OBJECT,
    "accuracy?": _OBJECT,
    "provenance?": _OBJECT,
    "engines?": _OBJECT,
}
_HASHED: Dict[str, _Rule] = {"sha256": _SHA256, "bytes": _BYTES}
_ARTIFACT: Dict[str, _Rule] = {
    "file": _FILE_NAME,
    **_HASHED,
    "golden_tolerance": _TOLERANCE,
    "precision": _TEXT,
    "runtime?": _TEXT,
    "opset?": _COUNT,
    "ir_version?": _COUNT,
    "accuracy?": _FRACTION,
    "verified_against_torch?": _OBJECT_OR_NULL,
}
_ENGINE: Dict[str, _Rule] = {**_HASHED, "gpu?": _TEXT, "tensorrt?": _TEXT, "precision?": _TEXT}
_INPUT: Dict[str, _Rule] = {
    "name": _TEXT,
    "shape": _SHAPE,
    "dtype": (lambda value: value in ("float32", "uint8"), "float32 or uint8"),
    "layout": (lambda value: value in ("NCHW", "NHWC"), "NCHW or NHWC"),
}
_PREPROCESS: Dict[str, _Rule] = {
    "height": _SIDE,
    "width": _SIDE,
    "channels": (lambda value: _is_whole(value) and value in (1, 3), "1 or 3"),
    "resize": _TEXT,
    "mean": _MEANS,
    "std": _STDS,
}


def problem_of(document: Dict[str, Any]) -> str:
    """What is wrong with a manifest of this schema, in half a sentence; empty where it can be used."""
    return (
        _broken(document, _TOP, "")
        or _broken(document["input"], _INPUT, "input.")
        or _broken(document["preprocess"], _PREPROCESS, "preprocess.")
        or _wrong_entry(document)
        or _wrong_names(document)
        or _wrong_input(document)
    )


def _broken(value: Dict[str, Any], rules: Dict[str, _Rule], where: str) -> str:
    for name, (holds, expected) in rules.items():
        key = name.rstrip("?")
        if key not in value:
            if name == key:
                return f"'{where}{key}' is missing; {expected} was expected"
        elif not holds(value[key]):
            return f"'{where}{key}' is {_short(value[key])}; {expected} was expected"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _wrong_entry(document: Dict[str, Any]) -> str:
    for group, rules in (("artifacts", _ARTIFACT), ("files", _HASHED), ("engines", _ENGINE)):
        for name, entry in document.get(group, {}).items():
            where = f"{group}.{name[:80]}"
            if not isinstance(entry, dict):
                return f"'{where}' is {_short(entry)}; an object was expected"
            problem = _broken(entry, rules, where + ".")
            if problem:
                return problem
    return ""


def _wrong_names(document: Dict[str, Any]) -> str:
    """Two names that differ in case only are one file on some disks: which of them was hashed, nobody would know."""
    shipped = document["shipped"]
    if shipped not in document["artifacts"]:
        return f"'shipped' is {_short(shipped)}; one of {', '.join(sorted(document['artifacts']))} was expected"
    names: List[str] = [entry["file"] for entry in document["artifacts"].values()]
    names += [*document["files"], *document.get("engines", {})]
    taken = {"manifest.json"}
    for name in names:
        if not _is_file_name(name):
            return f"it names the file {_short(name)}; {_FILE_NAME[1]} was expected"
        if name.lower() in taken:
            return f"it names the file {name!r} twice, or with letters of another case"
        taken.add(name.lower())
    return ""


def _wrong_input(document: Dict[str, Any]) -> str:
    """The input as the file has it, against what preprocessing makes of an image."""
    preprocess, wanted = document["preprocess"], document["input"]
    sizes = [preprocess[key] for key in ("height", "width", "channels")]
    if wanted["layout"] == "NCHW":
        sizes = [sizes[2], sizes[0], sizes[1]]
    for found, size in zip(wanted["shape"][1:], sizes):
        if isinstance(found, int) and found != size:
            return f"'input.shape' is {wanted['shape']}, and preprocessing makes {wanted['layout']} of {sizes}"
    return ""
