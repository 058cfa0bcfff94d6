"""The sets known by name, on small files of the same layout."""

import gzip
import hashlib
import json
import pickle
import struct
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
import torchvision.datasets.utils

from kdedge.data import make_splits, open_source
from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess

GREY = Preprocess(height=28, width=28, channels=1, resize="squash", mean=(0,), std=(1,))
RNG = np.random.default_rng(0)


def _idx(path: Path, array: np.ndarray, packed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def _mnist(root: Path, name: str = "MNIST", packed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    images = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    raw = root / name / "raw"
    _idx(raw / "train-images-idx3-ubyte", images[:20], packed)
    _idx(raw / "train-labels-idx1-ubyte", labels[:20], packed)
    _idx(raw / "t10k-images-idx3-ubyte", images[20:], packed)
    _idx(raw / "t10k-labels-idx1-ubyte", labels[20:], packed)
    return images, labels


def test_digits() -> None:
    source = open_source("digits")
    assert source.counts() == {"train": 1257, "unlabeled": 0, "val": 0, "test": 540}
    assert (source.channels, source.native_px, source.kind) == (1, (8, 8), "digits")
    assert (source.flip_allowed, source.default_labels, source.classes) == (False, 40, tuple("0123456789"))
    assert (source.ids[0], source.ids[-1]) == ("digits/0000", "digits/1796")
    images = source.load(range(1797), Preprocess(8, 8, 1, "squash", (0,), (1,)))
    assert images.shape == (1797, 1, 8, 8)
    assert (images.min(), images.max()) == (0, 255)
    assert images[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0 sixteenths
    assert source.labels[:10].tolist() == list(range(10))
    assert np.bincount(source.labels[source.part == "test"]).tolist() == [54, 55, 53, 55, 54, 55, 54, 54, 52, 54]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_layout(tmp_path, name, folder, packed) -> None:
    images, labels = _mnist(tmp_path, folder, packed)
    source = open_source(name, root=tmp_path)
    assert source.counts() == {"train": 20, "unlabeled": 0, "val": 0, "test": 10}
    assert source.labels.tolist() == labels.tolist()
    assert source.ids[20] == f"{name}/test/000000"
    assert source.default_labels == 100
    np.testing.assert_array_equal(source.load([25, 3], GREY)[:, 0].numpy(), images[[25, 3]])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is no IDX file"), (b"\0\0\x0d\x03" + bytes(12), "is no IDX file"), (b"\0\0\x08\x03" + bytes(9), "is cut")],
)
def test_damaged_idx(tmp_path, content, message) -> None:
    _mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source("mnist", root=tmp_path)


def test_cut_gzip(tmp_path) -> None:
    _mnist(tmp_path, packed=True)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        open_source("mnist", root=tmp_path)


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _cifar(root: Path, monkeypatch, official: type, per_batch: int, key: str, classes: int) -> np.ndarray:
    """Batches in the official layout, and their md5 sums where the official ones are listed."""
    folder = root / official.base_folder
    folder.mkdir(parents=True)
    everything = []
    for attribute in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(official, attribute):
            data = RNG.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
            labels = [i % classes for i in range(per_batch)]
            (folder / name).write_bytes(pickle.dumps({b"data": data, key.encode(): labels, b"batch_label": b"x"}, 2))
            everything.append(data)
            entries.append([name, _md5(folder / name)])
        monkeypatch.setattr(official, attribute, entries)
    meta = folder / official.meta["filename"]
    names = [f"class{i}" for i in range(classes)]
    meta.write_bytes(pickle.dumps({official.meta["key"]: names}, 2))
    monkeypatch.setattr(official, "meta", official.meta | {"md5": _md5(meta)})
    return np.concatenate(everything)


@pytest.mark.parametrize(
    ("name", "official", "key", "classes"),
    [
        ("cifar10", torchvision.datasets.CIFAR10, "labels", 10),
        ("cifar100", torchvision.datasets.CIFAR100, "fine_labels", 100),
    ],
)
def test_cifar_layout(tmp_path, monkeypatch, name, official, key, classes) -> None:
    data = _cifar(tmp_path, monkeypatch, official, classes, key, classes)
    source = open_source(name, root=tmp_path)
    batches = len(official.train_list)
    assert source.counts() == {"train": batches * classes, "unlabeled": 0, "val": 0, "test": classes}
    assert source.classes == tuple(f"class{i}" for i in range(classes))
    assert (source.channels, source.native_px, source.kind, source.flip_allowed) == (3, (32, 32), "small", True)
    images = source.load([7], Preprocess(32, 32, 3, "squash", (0, 0, 0), (1, 1, 1)))
    np.testing.assert_array_equal(images[0].numpy().reshape(-1), data[7])


def test_a_wrong_md5_is_an_error(tmp_path, monkeypatch) -> None:
    _cifar(tmp_path, monkeypatch, torchvision.datasets.CIFAR10, 10, "labels", 10)
    bad = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    bad.write_bytes(bad.read_bytes() + b" ")
    with pytest.raises(
        DataError, match=r"data_batch_3 is not the official file: its md5 is [0-9a-f]{32}, [0-9a-f]{32}"
    ):
        open_source("cifar10", root=tmp_path)


def test_a_missing_batch_is_named(tmp_path, monkeypatch) -> None:
    _cifar(tmp_path, monkeypatch, torchvision.datasets.CIFAR10, 10, "labels", 10)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(DataError, match="test_batch is missing"):
        open_source("cifar10", root=tmp_path)


def test_svhn_layout(tmp_path, monkeypatch) -> None:
    entries = {}
    pixels = RNG.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    for part in ("train", "test"):
        path = tmp_path / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": pixels, "y": np.arange(1, 21)[:, None] % 10 + 1})
        entries[part] = [f"https://example.invalid/{path.name}", path.name, _md5(path)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", entries)
    source = open_source("svhn", root=tmp_path)
    assert source.counts()["train"] == 20
    assert not source.flip_allowed
    assert source.labels[:10].tolist() == [2, 3, 4, 5, 6, 7, 8, 9, 0, 1]  # 10 in the file is the digit 0
    images = source.load([4], Preprocess(32, 32, 3, "squash", (0, 0, 0), (1, 1, 1)))
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), pixels[:, :, :, 4])
    (tmp_path / "train_32x32.mat").write_bytes(b"text")
    with pytest.raises(DataError, match="not the official file"):
        open_source("svhn", root=tmp_path)


def test_stl10_layout_with_its_unlabeled_part(tmp_path) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = RNG.integers(0, 256, (34, 3, 96, 96), dtype=np.uint8)
    (folder / "train_X.bin").write_bytes(pixels[:20].tobytes())
    (folder / "train_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(20)))
    (folder / "unlabeled_X.bin").write_bytes(pixels[20:24].tobytes())
    (folder / "test_X.bin").write_bytes(pixels[24:].tobytes())
    (folder / "test_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(10)))
    source = open_source("stl10", root=tmp_path)
    assert source.counts() == {"train": 20, "unlabeled": 4, "val": 0, "test": 10}
    assert (source.kind, source.default_labels) == ("photo", 1000)
    assert source.labels[18:26].tolist() == [8, 9, -1, -1, -1, -1, 0, 1]
    images = source.load([33, 0, 21], Preprocess(96, 96, 3, "squash", (0, 0, 0), (1, 1, 1)))
    np.testing.assert_array_equal(images.numpy(), pixels[[33, 0, 21]].transpose(0, 1, 3, 2))
    assert make_splits(source, 10).unlabeled.tolist() == list(range(24))
    (folder / "test_X.bin").write_bytes(pixels[24:].tobytes()[:-1])
    with pytest.raises(DataError, match="it is cut"):
        open_source("stl10", root=tmp_path)


def test_food101_layout(tmp_path, picture) -> None:
    folder = tmp_path / "food-101"
    for i, name in enumerate(["pizza/1", "pizza/2", "ramen/1", "ramen/2"]):
        picture(folder / "images" / f"{name}.jpg", i, size=(80, 70))
    (folder / "meta").mkdir()
    (folder / "meta" / "train.json").write_text(json.dumps({"pizza": ["pizza/1"], "ramen": ["ramen/1"]}))
    (folder / "meta" / "test.json").write_text(json.dumps({"pizza": ["pizza/2"], "ramen": ["ramen/2"]}))
    source = open_source("food101", root=tmp_path)
    assert (source.name, source.classes, source.default_labels) == ("food101", ("pizza", "ramen"), 2525)
    assert source.ids == ("images/pizza/1.jpg", "images/pizza/2.jpg", "images/ramen/1.jpg", "images/ramen/2.jpg")
    assert source.part.tolist() == ["train", "test", "train", "test"]
    (folder / "meta" / "test.json").write_text("[")
    with pytest.raises(DataError, match=r"test\.json cannot be read"):
        open_source("food101", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte.gz"),
        ("fashion-mnist", "FashionMNIST/raw/t10k-labels-idx1-ubyte.gz"),
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("svhn", "train_32x32.mat"),
        ("stl10", "stl10_binary"),
        ("food101", "food-101"),
    ],
)
def test_no_network_names_the_path_wanted(tmp_path, monkeypatch, name, wanted) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", no_network)
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", no_network)
    with pytest.raises(DataError) as error:
        open_source(name, root=tmp_path / "sets")
    assert str(tmp_path / "sets" / wanted) in str(error.value)
    assert "KDEDGE_DATA" in str(error.value)
    assert "Name or service not known" in str(error.value)
    assert list((tmp_path / "sets").iterdir()) == []  # nothing half-made stays


def test_a_download_arrives_whole_or_not_at_all(tmp_path, monkeypatch, capsys) -> None:
    made = tmp_path / "made"
    _mnist(made, packed=True)
    fail_at = ["t10k-images-idx3-ubyte.gz"]

    def download(url: str, folder: str, name: str, md5: str) -> None:
        print("Downloading")  # torchvision's progress must not get into --json
        if name in fail_at:
            raise RuntimeError("File not found or corrupted.")
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes((made / "MNIST" / "raw" / name).read_bytes())

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    root = tmp_path / "sets"
    with pytest.raises(DataError, match="corrupted"):
        open_source("mnist", root=root)
    assert list(root.rglob("*.gz")) == []
    fail_at.clear()
    assert len(open_source("mnist", root=root)) == 30
    assert sorted(path.name for path in root.iterdir()) == ["MNIST"]
    assert capsys.readouterr().out == ""


def test_a_read_only_root_is_a_sentence(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not be downloaded"):
        open_source("mnist", root=tmp_path / "file")
