"""Real files: MNIST as IDX, CIFAR-10 batches written by Python 2's rules, flower photographs."""

import gzip
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from kdedge.data import check, make_splits, open_source
from kdedge.data.duplicates import Shapes, nearest, shrunk
from kdedge.data.formats import read_cifar
from kdedge.data.unpickle import read_pickle
from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess

pytestmark = pytest.mark.shared_data


def test_mnist(shared_data: Path, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (shared_data / "mnist").glob("*.gz"):
        (raw / path.name).symlink_to(path)
    source = open_source("mnist", root=tmp_path)
    assert source.counts() == {"train": 60_000, "unlabeled": 0, "val": 0, "test": 10_000}
    assert source.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    images = source.load(range(60_000), Preprocess(28, 28, 1, "squash", (0,), (1,)))
    assert float(images.float().mean()) / 255 == pytest.approx(0.1307, abs=1e-4)
    splits = make_splits(source)
    assert {name: len(indices) for name, indices in splits.indices().items()} == {
        "labeled": 100,
        "unlabeled": 60_000,
        "val": 0,
        "test": 10_000,
        "calibration": 512,
        "gate": 1000,
    }
    unpacked = raw / "t10k-images-idx3-ubyte"
    unpacked.write_bytes(gzip.decompress((raw / "t10k-images-idx3-ubyte.gz").read_bytes()))
    assert open_source("mnist", root=tmp_path).fingerprint == source.fingerprint


def test_different_digits_of_32_px_are_not_near(shared_data: Path) -> None:
    """Ones are the simplest, so a few of these are near another by chance, as of no other digit."""

    def large(part: str, images: int) -> Shapes:
        content = gzip.decompress((shared_data / "mnist" / f"{part}-images-idx3-ubyte.gz").read_bytes())
        return Shapes.of(shrunk(np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28, 1)[:images]))

    labels = gzip.decompress((shared_data / "mnist" / "train-labels-idx1-ubyte.gz").read_bytes())
    flagged = nearest(large("train", 2000), large("t10k", 10_000))[0] >= 0
    ones = np.frombuffer(labels, np.uint8, offset=8)[:2000] == 1
    assert flagged.mean() < 0.005
    assert flagged[~ones].mean() < 0.001
    assert flagged[ones].mean() < 0.03


def test_cifar10_batches(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "cifar10" / "cifar-10-lossless4000.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = next(tmp_path.rglob("cifar-10-batches-py"))
    pixels, labels = read_cifar([folder / f"data_batch_{i}" for i in range(1, 6)], "labels")
    assert pixels.shape == (3000, 32, 32, 3)
    assert labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert pixels.mean(axis=(0, 1, 2)) / 255 == pytest.approx([0.49, 0.48, 0.45], abs=0.01)
    assert b"airplane" in read_pickle(folder / "batches.meta")["label_names"]
    with pytest.raises(DataError, match="is not the official file"):
        open_source("cifar10", root=folder.parent)


def test_flowers(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "flowers5" / "flowers5_160.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    root = tmp_path / "flowers5"
    source = open_source(str(root))
    assert source.name == "flowers5"
    assert source.classes == ("daisy", "dandelion", "roses", "sunflowers", "tulips")
    assert source.counts() == {"train": 2934, "unlabeled": 0, "val": 736, "test": 0}
    assert source.ignored == ("LICENSE.txt",)
    assert (source.kind, source.channels, min(source.native_px)) == ("photo", 3, 160)
    assert source.test_is_val
    splits = make_splits(source, 100)
    assert np.bincount(source.labels[splits.labeled]).tolist() == [20] * 5
    assert len(splits.test) == 736
    images = source.load(splits.labeled, Preprocess(64, 64, 3, "short-side-crop", (0, 0, 0), (1, 1, 1)))
    assert images.shape == (100, 3, 64, 64)
    for label in source.classes:  # the check below reads every byte: a fifth of the photographs will do
        for path in sorted((root / "train" / label).iterdir())[::2]:
            if "15922772266_1167a06620" not in path.name:
                path.unlink()
    shutil.rmtree(root / "val")
    found = check(str(root))
    assert [{Path(name).parent.name for name in entry["ids"]} for entry in found["label_conflicts"]] == [
        {"roses", "tulips"}
    ]
    assert not found["ok"]
