"""The restricted unpickler: what CIFAR needs is read, everything else is refused and not run."""

import collections
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from kdedge.data.unpickle import read_pickle
from kdedge.errors import DataError


class _Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_bytes_text_numbers_lists_and_arrays(tmp_path: Path, protocol: int) -> None:
    arrays = [
        np.arange(12, dtype=np.uint8).reshape(3, 4),
        np.arange(6, dtype=np.int64).reshape(2, 3, order="F"),
        np.array([1, 256], dtype=">u2"),
        np.zeros((0, 5), dtype=np.uint8),
    ]
    document = {
        "data": arrays,
        b"raw": b"\x00\xff",
        "name": "cat",
        "labels": [1, 2, -3],
        "nested": {b"key": [b"x", b""]},
    }
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(document, protocol))
    found = read_pickle(path)
    assert set(found) == {"data", "raw", "name", "labels", "nested"}
    for got, expected in zip(found["data"], arrays, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_array_equal(got, expected)
    assert (found["raw"], found["name"], found["labels"]) == (b"\x00\xff", "cat", [1, 2, -3])
    assert found["nested"] == {"key": [b"x", b""]}


def test_a_command_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": _Command(marker)}, 2))
    with pytest.raises(DataError, match=r"it names (posix|nt)\.system, which is refused"):
        read_pickle(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())  # the trap is a real one
    assert marker.exists()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"data": np.array([{"a": 1}], dtype=object)}, "not of whole numbers"),
        ({"data": np.array([1.5])}, "not of whole numbers"),
        ({"data": np.array(["text"])}, "not of whole numbers"),
        ({"data": np.zeros(2, dtype=[("a", "u1"), ("b", "u1")])}, "not of whole numbers"),
        ({"data": collections.OrderedDict()}, "it names collections.OrderedDict"),
        ({"data": {1, 2}}, r"builtins.set|__builtin__.set"),
        ({"data": 1.5}, "a value of type float"),
        ({"data": (1, 2)}, "a value of type tuple"),
        ({"data": None}, "a value of type NoneType"),
        ({"data": eval}, "eval, which is refused"),
        ({"data": np.ndarray}, "a value of type type"),
        ({1: 2}, "a key of type int"),
        ([1, 2], "it holds a list"),
    ],
)
def test_other_types_are_refused(tmp_path: Path, document: object, message: str) -> None:
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(document, 2))
    with pytest.raises(DataError, match=message):
        read_pickle(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02}q\x00(U\x04data", b"c" + b"\n" * 10, b"\x80\xff."])
def test_damage_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "batch"
    path.write_bytes(content)
    with pytest.raises(DataError, match="was refused"):
        read_pickle(path)


def test_an_array_with_too_few_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    whole = pickle.dumps({"data": np.arange(50, dtype=np.uint8)}, 3)
    path.write_bytes(whole.replace(b"K2\x85", b"K3\x85"))  # the shape says 51
    with pytest.raises(DataError, match="cannot reshape"):
        read_pickle(path)


def test_stand_ins_cannot_be_rewritten_by_a_pickle(tmp_path: Path) -> None:
    # BUILD on a class we hand out: {'__init__': ...} must not stick to it for the next file.
    path = tmp_path / "batch"
    path.write_bytes(b"\x80\x02c_codecs\nencode\n}X\x08\x00\x00\x00__init__X\x01\x00\x00\x00xsb.")
    with pytest.raises(DataError, match="was refused"):
        read_pickle(path)
    path.write_bytes(pickle.dumps({b"raw": b"\xff"}, 2))
    assert read_pickle(path) == {"raw": b"\xff"}
