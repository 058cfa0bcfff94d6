"""The image folders of the planned verdicts, made from the sources that the plan names.

python -m kdedge_bench.verdict_sets --from DATA --out SETS

DATA holds `mnist/` (the four IDX files), `cifar10/cifar10_jpeg.tar.xz` and `flowers5/flowers5_160.tar`. MNIST's pool is
cut to 1,000 training images a class, CIFAR-10's to 500, and its test images to 400 a class: there every look at all of
them costs a photograph's network on a core. What is kept is drawn once, with a fixed seed; other test images all stay.
"""

import argparse
import gzip
import hashlib
import io
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdedge.errors import DataError
from kdedge.runs import sha256_file

__all__ = ["CIFAR10_SHA256", "main", "parser"]

CIFAR10_SHA256 = "cadfdcb5ef0cffaeccaeb0e3a37352f96e1e3affc55285a7352920bd840629c2"  # of the JPEG copy
_SHA256 = {
    "cifar10/cifar10_jpeg.tar.xz": CIFAR10_SHA256,
    "flowers5/flowers5_160.tar": "6db16514ae91e94b189ddb1041bc05fc376066931a8c0c03a18e5bac3741c3ff",
}
_MNIST_TRAIN_MD5 = "6bbc9ace898e44ae57da46a324031adb"  # of the unpacked training images, as torchvision lists it
_A_CLASS = {("mnist", "train"): 1000, ("cifar10", "train"): 500, ("cifar10", "test"): 400}


def _checked(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{path} is missing. It was expected in the folder given by --from.")
    wanted = _SHA256.get(name)  # not of MNIST's: gzip wrappers differ between mirrors, so `_idx` checks the content
    if wanted is not None and (found := sha256_file(path)) != wanted:
        raise DataError(f"{path} has sha256 {found}, but the plan was made with {wanted}. Copy it again.")
    return path


def _idx(path: Path) -> npt.NDArray[np.uint8]:
    """The array of an IDX file of bytes: two zeros, type 8, number of dimensions, sizes, values."""
    content = gzip.decompress(path.read_bytes())
    if path.name == "train-images-idx3-ubyte.gz" and hashlib.md5(content, usedforsecurity=False).hexdigest() != (
        _MNIST_TRAIN_MD5
    ):
        raise DataError(f"{path} does not hold MNIST's training images (md5 {_MNIST_TRAIN_MD5} was expected).")
    sizes = np.frombuffer(content, ">u4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes.astype(int))


def _kept(labels: npt.NDArray[np.int64], name: str, part: str, seed: int = 0) -> npt.NDArray[np.int64]:
    """Positions of each class, as many as `_A_CLASS` says of this part, or all; drawn once, ascending."""
    rng, count = np.random.default_rng(seed), _A_CLASS.get((name, part))
    drawn = [rng.permutation(np.flatnonzero(labels == k))[:count] for k in np.unique(labels)]
    return np.sort(np.concatenate(drawn))


def _write(folder: Path, images: Iterable[tuple[npt.NDArray[np.uint8], str, int]]) -> None:
    """Lossless PNG files folder/class/position.png."""
    from PIL import Image

    for pixels, label, position in images:
        path = folder / label / f"{position:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def mnist(source: Path, out: Path) -> None:
    """28 px, grey: 1,000 training images a class and the 10,000 test images."""
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images = _idx(_checked(source, f"mnist/{prefix}-images-idx3-ubyte.gz"))
        labels = _idx(_checked(source, f"mnist/{prefix}-labels-idx1-ubyte.gz")).astype(np.int64)
        rows = _kept(labels, "mnist", part)
        _write(out / part, ((images[i], str(labels[i]), int(i)) for i in rows))


def cifar10(source: Path, out: Path) -> None:
    """32 px, RGB, from the JPEG copy: 500 training and 400 test images a class."""
    from PIL import Image

    with tarfile.open(_checked(source, "cifar10/cifar10_jpeg.tar.xz")) as archive:
        content = {
            tuple(member.name.split("/")[1:]): file.read()
            for member in archive
            if member.isfile() and (file := archive.extractfile(member)) is not None
        }
    for part in ("train", "test"):
        names = sorted(name for name in content if name[0] == part)
        classes = sorted({name[1] for name in names})
        labels = np.array([classes.index(name[1]) for name in names])
        rows = _kept(labels, "cifar10", part)
        _write(out / part, ((np.asarray(Image.open(io.BytesIO(content[names[i]]))), names[i][1], int(i)) for i in rows))


def flowers5(source: Path, out: Path) -> None:
    """The photographs as they are: train/ (2,934) and val/ (736), which is the test."""
    with tarfile.open(_checked(source, "flowers5/flowers5_160.tar")) as archive:
        archive.extractall(out.with_name(out.name + ".unpacked"), filter="data")
    shutil.move(out.with_name(out.name + ".unpacked") / "flowers5", out)
    out.with_name(out.name + ".unpacked").rmdir()


_MAKERS = {"mnist": mnist, "cifar10": cifar10, "flowers5": flowers5}


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.verdict_sets", description=__doc__)
    flags.add_argument("--from", dest="source", type=Path, required=True, help="the folder of the sources")
    flags.add_argument("--out", type=Path, required=True, help="where the sets go; those that are there are left")
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Make every set that is not there; a set that was begun and not finished is begun anew."""
    options = parser().parse_args(arguments)
    for name, make in _MAKERS.items():
        out = options.out / name
        if out.is_dir():
            print(f"{out} is there already.")
            continue
        begun = options.out / f"{name}.begun"
        shutil.rmtree(begun, ignore_errors=True)
        options.out.mkdir(parents=True, exist_ok=True)
        make(options.source, begun)
        begun.rename(out)
        print(f"{out} made.")


if __name__ == "__main__":
    main()
