"""JSON from strangers: one meaning or none, and never a hang, a crash or a full memory.

Python's reader takes NaN, lets the last of two equal keys win, and turns a number of a million digits into an integer
in minutes. Python 3.8, standard library.
"""

import json
import math
from typing import Any, Dict, List, Tuple

from kdedge_device.failures import CorruptFailure
from kdedge_device.plain_files import open_plain

__all__ = ["MAX_BYTES", "MAX_DEPTH", "read_json"]

MAX_BYTES = 16 << 20  # a manifest of 20,000 classes has less than one MiB
MAX_DEPTH = 32
_LONGEST_NUMBER = 400  # characters; the largest float64, written out in full, has 309


def read_json(path: str, limit_bytes: int = MAX_BYTES) -> Any:
    """The document in `path`. CorruptFailure, with the reason, where it is no plain file or no strict JSON."""
    with open_plain(path) as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise CorruptFailure(f"{path} has more than {limit_bytes >> 20} MiB; it was not written by kdedge.")
    try:
        document = json.loads(
            content.decode("utf-8"),
            parse_int=_whole,
            parse_float=_real,
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_duplicates,
        )
        _check_depth(document)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CorruptFailure(f"{path} cannot be read as JSON ({error}). Copy the bundle again.") from None
    return document


def _whole(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _real(text: str) -> float:
    value = float(text) if len(text) <= _LONGEST_NUMBER else math.inf
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]}, which is too large or too long")
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _without_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} stands there twice")
        found[key] = value
    return found


def _check_depth(document: Any) -> None:
    """Level by level rather than by recursion; whoever writes the document again does recurse."""
    level, depth = [document], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels deep")
        containers = [each for each in level if isinstance(each, (dict, list))]
        level = [child for each in containers for child in (each.values() if isinstance(each, dict) else each)]
