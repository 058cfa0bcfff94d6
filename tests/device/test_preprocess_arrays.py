"""Images as raw arrays: .npy and .npz of any size, without Pillow and without trusting the file."""

import io
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from kdedge_device import arrays
from kdedge_device.arrays import ArraysUnreadable, read_npy, read_npz
from kdedge_device.images import ImageUnreadable, pillow_agrees
from kdedge_device.preprocess import Preprocess

RGB = Preprocess(6, 8, 3, "short-side-crop", (0.0,) * 3, (1.0,) * 3)
MAGIC = b"\x93NUMPY\x01\x00"


def npy(header: str, data: bytes = b"", magic: bytes = MAGIC) -> bytes:
    return magic + struct.pack("<H", len(header)) + header.encode("latin1") + data


def form(descr: str, shape: str, fortran: str = "False") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


@pytest.fixture
def no_pillow(monkeypatch: pytest.MonkeyPatch) -> object:
    pillow_agrees.cache_clear()
    monkeypatch.setitem(sys.modules, "PIL", None)
    yield
    pillow_agrees.cache_clear()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(60, dtype=np.uint8).reshape(4, 5, 3),
        np.asfortranarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)),
        np.float32([[1.5, -2]]),
        np.arange(5, dtype=">i8"),
        np.array([True, False]),
        np.zeros((0, 3), np.float64),
        np.float16(3),
    ],
)
def test_what_numpy_writes_is_read(array: np.ndarray, tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", x=array, y=array)
        found = read_npz(str(tmp_path / "a.npz"), ("x",), ("y", "z"))
        assert set(found) == {"x", "y"}
        np.testing.assert_array_equal(found["x"], array)
        assert found["x"].dtype == array.dtype


@pytest.mark.usefixtures("no_pillow")
def test_an_npy_of_any_size_is_an_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (5, 9), (13, 7, 1), (31, 45, 3), (6, 8, 3)):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        path = tmp_path / "Image.NPY"
        with path.open("wb") as file:
            np.save(file, image)
        assert [name for name, _ in RGB.each(str(path))] == [str(path)]
        np.testing.assert_array_equal(RGB.decode(path), RGB.fit(image))
        assert RGB.decode(path).shape == (6, 8, 3)


@pytest.mark.usefixtures("no_pillow")
def test_an_npz_holds_many(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 11), dtype=np.uint8)
    path = str(tmp_path / "some.npz")
    np.savez(path, images=images, labels=np.arange(3))
    found = dict(RGB.each(path))
    assert list(found) == [f"{path}[0]", f"{path}[1]", f"{path}[2]"]
    np.testing.assert_array_equal(found[f"{path}[2]"], RGB.fit(images[2]))
    np.savez(path, images=images.astype(np.float32))
    with pytest.raises(ImageUnreadable, match=r"some\.npz\[0\]: it has type float32") as caught:
        list(RGB.each(path))
    assert caught.value.path == f"{path}[0]"
    np.savez(path, images=images[0, 0])
    with pytest.raises(ImageUnreadable, match=r"its images have shape \(11,\)"):
        list(RGB.each(path))


def test_arrays_that_are_no_images_are_told(tmp_path: Path) -> None:
    cases = {
        "type float64": np.zeros((4, 4, 3)),
        "transpose it by": np.zeros((3, 9, 9), np.uint8),
        r"shape \(4, 4, 4\); uint8": np.zeros((4, 4, 4), np.uint8),
        r"shape \(0, 4\)": np.zeros((0, 4), np.uint8),
        r"shape \(4,\)": np.zeros(4, np.uint8),
    }
    for reason, array in cases.items():
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ImageUnreadable, match=reason):
            RGB.decode(str(tmp_path / "a.npy"))


PICKLED = pickle.dumps(np.array([print], dtype=object))

HOSTILE = {
    "starts with b''": b"",
    "starts with b'hello th'": b"hello there",
    "version 3.0": npy(form("|u1", "(1, 1)"), b"a", b"\x93NUMPY\x03\x00"),
    "never loaded": npy(form("|O", "(1, 1)"), PICKLED),
    "type '<U9'": npy(form("<U9", "(1, 1)"), b"a" * 36),
    "type '<f1'": npy(form("<f1", "(1, 1)"), b"a"),
    "type '|b2'": npy(form("|b2", "(1, 1)"), b"ab"),
    "100000000000000000) is none": npy(form("|u1", f"(0, {10**17}, {10**17})")),
    "its header is not one": npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1), 'x': __import__('os')}"),
    "header is not one that numpy writes": MAGIC + b"\xff\xff" + b"(" * 65535,
    "not one that numpy": MAGIC + b"\x10",
    "0 bytes, as its shape": npy(form("|u1", "(0, 5)"), b"more"),
    "should hold 1000000000000 bytes": npy(form("|u1", "(1000000, 1000000)"), b"a" * 10),
    f"should hold {10**34} bytes": npy(form("|u1", f"({10**17}, {10**17})"), b"a"),
    "its shape": npy(form("|u1", f"({10**30}, 1)"), b"a"),
    "should hold 4 bytes": npy(form("|u1", "(2, 2)"), b"abc"),
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_hostile_headers_are_refused(reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(HOSTILE[reason])
    with pytest.raises(ImageUnreadable) as caught:
        read_npy(str(path))
    assert reason in caught.value.reason
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.write(path, "x.npy")
    with pytest.raises(ArraysUnreadable, match="its array 'x' cannot be used") as found:
        read_npz(str(tmp_path / "a.npz"), ("x",))
    assert reason in found.value.reason


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "no.npy", "no such file"), (tmp_path, "it is no file")):
        with pytest.raises(ImageUnreadable, match=reason):
            read_npy(str(path))
        with pytest.raises(ArraysUnreadable, match=reason) as caught:
            read_npz(str(path), ("x",))
        assert caught.value.exit_code == 2


def test_hostile_archives_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"

    def refused(reason: str) -> None:
        with pytest.raises(ArraysUnreadable, match=reason):
            read_npz(str(path), ("x",))

    np.savez(path, y=np.arange(3))
    refused("no array 'x'; it has y")
    one = io.BytesIO()
    np.save(one, np.arange(3))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", one.getvalue())
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", one.getvalue())
    refused("two members of one name")
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(1001):
            archive.writestr(f"{i}.npy", b"")
    refused("1001 members")
    zeros = 64 << 20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy(form("|u1", f"({zeros},)")) + bytes(zeros))
    assert path.stat().st_size < 1 << 20
    monkeypatch.setattr(arrays.os, "sysconf", lambda name: 8192 if "PHYS" in name else 4096)
    refused("takes 64 MiB; half of this machine's memory, 16 MiB")


def test_every_cut_and_every_flipped_byte_is_read_or_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.npz"
    for save in (np.savez, np.savez_compressed):
        save(path, x=rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        whole = path.read_bytes()
        changed = [whole[:length] for length in range(0, len(whole), 5)]
        for place in range(0, len(whole), 2):
            changed.append(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
        wrong = 0
        for content in changed:
            path.write_bytes(content)
            try:
                assert read_npz(str(path), ("x",))["x"].size > 0
            except ArraysUnreadable:
                wrong += 1
        assert wrong > 0.5 * len(changed)
