"""The sets known by name, read from torchvision's on-disk layouts below one root."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdedge.data.download import fetch_archive, fetch_files, require_md5
from kdedge.data.entries import Entry, build_source
from kdedge.data.formats import read_cifar, read_idx, read_stl10, read_svhn
from kdedge.data.source import SMALL_PX, ArrayImages, Source, fingerprint_of
from kdedge.data.unpickle import read_pickle
from kdedge.errors import DataError

__all__ = ["NAMES", "open_named"]

_DIGITS = tuple("0123456789")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_STL10 = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_DIGITS_SPLIT = 0  # random_state of the one 70/30 split of digits there is


class _Block(NamedTuple):
    """One part of a set: uint8 [n, h, w, C] and int64 [n] (None: no labels)."""

    part: str
    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None


def _datasets() -> Any:
    """torchvision's data sets, for their addresses and md5 sums only; imported late since it imports torch."""
    import torchvision.datasets

    return torchvision.datasets


def _from_blocks(
    name: str,
    classes: Sequence[str],
    blocks: Sequence[_Block],
    flip_allowed: bool,
    default_labels: int,
) -> Source:
    """A source over arrays, which stay where they are; ids are NAME/PART/000000."""
    shapes = {block.pixels.shape[1:] for block in blocks}
    if len(shapes) > 1:
        raise DataError(f"The parts of {name} have images of different sizes: {sorted(shapes)}. Fetch its files again.")
    height, width, channels = shapes.pop()
    ids = tuple(f"{name}/{block.part}/{i:06d}" for block in blocks for i in range(len(block.pixels)))
    part = np.concatenate([np.full(len(block.pixels), block.part, dtype="<U9") for block in blocks])
    labels = np.concatenate([np.full(len(b.pixels), -1) if b.labels is None else b.labels for b in blocks]).astype(
        np.int64
    )
    if labels.max(initial=-1) >= len(classes) or labels.min(initial=0) < -1:
        raise DataError(
            f"{name} holds labels up to {labels.max()}, but has {len(classes)} classes. Fetch its files again."
        )
    images = ArrayImages(tuple(block.pixels for block in blocks))
    return Source(
        name=name,
        spec=name,
        classes=tuple(classes),
        ids=ids,
        labels=labels,
        part=part,
        channels=1 if channels == 1 else 3,
        native_px=(height, width),
        kind="small" if min(height, width) <= SMALL_PX else "photo",
        flip_allowed=flip_allowed,
        images=images,
        fingerprint=fingerprint_of(classes, ids, labels, part, images.digest()),
        default_labels=default_labels,
    )


def _open_digits(_: Path, __: float) -> Source:
    """1,797 grey 8x8 digits that come with scikit-learn; ids follow its order, whatever the split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    _, test = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=_DIGITS_SPLIT)
    part = np.full(len(labels), "train", dtype="<U9")
    part[test] = "test"
    images = ArrayImages((np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None],))
    ids = tuple(f"digits/{i:04d}" for i in range(len(labels)))
    return Source(
        name="digits",
        spec="digits",
        classes=_DIGITS,
        ids=ids,
        labels=labels,
        part=part,
        channels=1,
        native_px=(8, 8),
        kind="digits",
        flip_allowed=False,
        images=images,
        fingerprint=fingerprint_of(_DIGITS, ids, labels, part, images.digest()),
        default_labels=40,
    )


def _open_mnist(root: Path, name: str, folder_name: str, classes: Sequence[str], flip_allowed: bool) -> Source:
    folder = root / folder_name / "raw"
    files = [f"{split}-{what}-ubyte" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    if not all((folder / f).exists() or (folder / f"{f}.gz").exists() for f in files):
        official = _datasets().MNIST if name == "mnist" else _datasets().FashionMNIST
        missing = [(f, md5) for f, md5 in official.resources if not (folder / f.removesuffix(".gz")).exists()]
        fetch_files(name, root, folder, missing, official.mirrors)
    arrays = [read_idx(folder / file) for file in files]
    blocks = []
    for part, images, labels in (("train", arrays[0], arrays[1]), ("test", arrays[2], arrays[3])):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{folder} has {part} images {images.shape} and labels {labels.shape}; one label an image was expected."
            )
        blocks.append(_Block(part, images[..., None], labels.astype(np.int64)))
    return _from_blocks(name, classes, blocks, flip_allowed, 100)


def _open_cifar(root: Path, name: str, key: str, default_labels: int) -> Source:
    official = _datasets().CIFAR10 if name == "cifar10" else _datasets().CIFAR100
    folder = root / official.base_folder
    fetch_archive(name, root, folder, official.url, official.tgz_md5)
    batches = [*official.train_list, *official.test_list, [official.meta["filename"], official.meta["md5"]]]
    for file_name, md5 in batches:
        if not (folder / file_name).is_file():
            raise DataError(f"{folder / file_name} is missing. Delete {folder}, and it is downloaded again.")
        require_md5(folder / file_name, md5)
    names = read_pickle(folder / official.meta["filename"]).get(official.meta["key"], [])
    classes = [n.decode("latin1") if isinstance(n, bytes) else str(n) for n in names]
    blocks = []
    for part, files in (("train", official.train_list), ("test", official.test_list)):
        blocks.append(_Block(part, *read_cifar([folder / file for file, _ in files], key)))
    return _from_blocks(name, classes, blocks, True, default_labels)


def _open_svhn(root: Path, _: float) -> Source:
    blocks = []
    for part in ("train", "test"):
        url, file_name, md5 = _datasets().SVHN.split_list[part]
        fetch_files("svhn", root, root, [(file_name, md5)], [url.removesuffix(file_name)])
        require_md5(root / file_name, md5)
        blocks.append(_Block(part, *read_svhn(root / file_name)))
    return _from_blocks("svhn", _DIGITS, blocks, False, 250)


def _open_stl10(root: Path, _: float) -> Source:
    official = _datasets().STL10
    folder = root / official.base_folder
    fetch_archive("stl10", root, folder, official.url, official.tgz_md5)
    blocks = []
    for part in ("train", "unlabeled", "test"):
        for kind in ("X", "y") if part != "unlabeled" else ("X",):
            if not (folder / f"{part}_{kind}.bin").is_file():
                raise DataError(
                    f"{folder / f'{part}_{kind}.bin'} is missing. Delete {folder}, and it is downloaded again."
                )
        pixels = read_stl10(folder / f"{part}_X.bin")
        labels = None
        if part != "unlabeled":
            labels = np.fromfile(folder / f"{part}_y.bin", np.uint8).astype(np.int64) - 1  # 1 to 10 in the file
            if len(labels) != len(pixels):
                raise DataError(f"{folder} has {len(pixels)} {part} images and {len(labels)} labels. Fetch it again.")
        blocks.append(_Block(part, pixels, labels))
    return _from_blocks("stl10", _STL10, blocks, True, 1000)


def _open_food101(root: Path, max_unreadable_fraction: float) -> Source:
    """Photos in food-101/images, listed in food-101/meta/{train,test}.json."""
    official = _datasets().Food101
    folder = root / "food-101"
    fetch_archive("food101", root, folder, official._URL, official._MD5)
    entries = []
    for part in ("train", "test"):
        path = folder / "meta" / f"{part}.json"
        try:
            listed = json.loads(path.read_text(encoding="utf-8"))
            pairs = [(label, str(item)) for label, items in listed.items() for item in items]
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {error}. Delete {folder}, and it is downloaded again.") from None
        for label, item in pairs:
            entries.append(Entry(f"images/{item}.jpg", folder / "images" / f"{item}.jpg", label, part))
    return build_source("food101", "food101", entries, max_unreadable_fraction, default_labels=2525)


_OPENERS: dict[str, Callable[[Path, float], Source]] = {
    "digits": _open_digits,
    "mnist": lambda root, _: _open_mnist(root, "mnist", "MNIST", _DIGITS, False),
    "fashion-mnist": lambda root, _: _open_mnist(root, "fashion-mnist", "FashionMNIST", _FASHION, True),
    "cifar10": lambda root, _: _open_cifar(root, "cifar10", "labels", 250),
    "cifar100": lambda root, _: _open_cifar(root, "cifar100", "fine_labels", 2500),
    "svhn": _open_svhn,
    "stl10": _open_stl10,
    "food101": _open_food101,
}
NAMES = tuple(_OPENERS)


def open_named(name: str, root: Path, max_unreadable_fraction: float) -> Source:
    """The set `name`, one of NAMES, from below `root`; fetched first where it is not there."""
    return _OPENERS[name](root, max_unreadable_fraction)
