"""Does an ONNX file read other files? Its tensors may name them ("external data"), by any path.

Such files are not in the manifest, so nobody hashed them. The messages of onnx.proto are walked by hand, because a
board has no onnx package: only what leads to tensors is opened, the rest is stepped over. Python 3.8, standard library.
"""

import mmap
from typing import Dict, Iterator, List, NamedTuple, Tuple, Union

from kdedge_device.failures import CorruptFailure
from kdedge_device.plain_files import open_plain

__all__ = ["refuse_outside"]

# Field numbers of onnx.proto, message by message, of what leads to a tensor.
_LEADS: Dict[str, Dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14  # of a tensor: where its bytes are, and whether they are elsewhere
_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # wire types


class _Field(NamedTuple):
    number: int
    wire: int
    value: int  # of a varint; else where the bytes begin
    end: int


def refuse_outside(path: str) -> None:
    """CorruptFailure where the model in `path` keeps tensors in other files, or is no ONNX file at all."""
    with open_plain(path) as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                outside = _reads_outside(content)
        except (ValueError, OSError) as error:  # an empty file cannot be mapped
            raise CorruptFailure(f"{path} is no ONNX file ({error}); copy the bundle again.") from None
    if outside:
        raise CorruptFailure(
            f"{path} keeps tensors in other files, which the manifest does not hash; they are not read. "
            "Export the model with all its weights inside."
        )


def _reads_outside(content: "Union[bytes, mmap.mmap]") -> bool:
    waiting: List[Tuple[str, int, int]] = [("model", 0, len(content))]
    while waiting:
        message, start, end = waiting.pop()
        for field in _fields(content, start, end):
            if message == "tensor" and (
                (field.number == _EXTERNAL_DATA and field.wire == _BYTES)
                or (field.number == _DATA_LOCATION and field.wire == _VARINT and field.value != 0)
            ):
                return True
            inner = _LEADS[message].get(field.number)
            if inner is not None and field.wire == _BYTES:
                waiting.append((inner, field.value, field.end))
    return False


def _fields(content: "Union[bytes, mmap.mmap]", start: int, end: int) -> Iterator[_Field]:
    place = start
    while place < end:
        key, place = _varint(content, place, end)
        number, wire = key >> 3, key & 7
        value = place
        if not 1 <= number < 1 << 29:  # what lies above, other readers cut off: the field would be another to them
            raise ValueError(f"field number {number} at byte {place}")
        if wire == _VARINT:
            value, place = _varint(content, place, end)
        elif wire == _BYTES:
            length, value = _varint(content, place, end)
            place = value + length
        elif wire in (_FOUR, _EIGHT):
            place += 4 if wire == _FOUR else 8
        else:
            raise ValueError(f"wire type {wire} at byte {value}")
        if place > end:
            raise ValueError(f"cut short at byte {value}")
        yield _Field(number, wire, value, place)


def _varint(content: "Union[bytes, mmap.mmap]", place: int, end: int) -> Tuple[int, int]:
    """The number, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= end:
            raise ValueError(f"cut short at byte {place}")
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError(f"a number of more than 10 bytes ends at byte {place}")
