"""Memory of reading a packed file batch by batch, by the number of images, as a record.

python -m kdedge_bench.pack_memory --images 1000000 --px 32 --out FILE.json

Each size is measured in a process of its own, on generated images: the file is opened, random batches are read ahead
of being asked for, as in training, and then all images in their order, as in scoring. Some of each batch are compared
with what was written. Memory is the peak of the resident set, less what it was before. Then the same random images are
read through a memory map and through the store, after the system was told to forget the file.
"""

import argparse
import hashlib
import os
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdedge import __version__
from kdedge.data import Source, open_source
from kdedge.data.packfile import PIXELS_AT, encode_tail
from kdedge.data.store import Store, open_store
from kdedge.errors import BugError
from kdedge.runs import write_json
from kdedge_bench.peak_memory import measured_apart, peak_mib
from kdedge_device.preprocess import Preprocess
from kdedge_device.record import machine, now

__all__ = ["main", "measure", "parser", "write_packed"]

_PATTERN = 2048  # images that are drawn; the others are those, with another number added
_BATCH = 448
_SCORED = 256
_WARM_UP = 20  # batches before memory is looked at: what torch and threads take once


def write_packed(path: Path, images: int, px: int) -> None:
    """A packed file of `images` generated unlabeled ones, 3 x px x px; image i is `_image(i)`."""
    image_bytes, block = 3 * px * px, max(1, 2**18 // (3 * px * px))
    ends, digests = [], []
    with path.open("wb") as file:
        file.seek(PIXELS_AT)
        for start in range(0, images, block):
            content = _image(np.arange(start, min(start + block, images)), px).tobytes()
            file.write(content)
            ends.append(min(start + block, images))
            digests.append(hashlib.sha256(content).digest())
        tables = {
            "labels": np.full(images, -1, dtype="<i8").tobytes(),
            "part": np.ones(images, dtype=np.uint8).tobytes(),
            "block_ends": np.array(ends, dtype="<i8").tobytes(),
            "block_sha256": b"".join(digests),
            "ids": "\0".join(f"unlabeled/{i:08d}.png" for i in range(images)).encode(),
        }
        begin, tail = encode_tail(_header(images, px), tables, PIXELS_AT + images * image_bytes)
        file.write(tail)
        file.seek(0)
        file.write(begin)


@lru_cache(maxsize=1)
def _pattern(px: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (_PATTERN, 3, px, px), dtype=np.uint8)


def _image(numbers: NDArray[np.int64], px: int) -> NDArray[np.uint8]:
    """uint8 [n, 3, px, px] of images by their number."""
    return _pattern(px)[numbers % _PATTERN] + (numbers // _PATTERN % 256).astype(np.uint8)[:, None, None, None]


def _header(images: int, px: int) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": "generated",
        "spec": "generated",
        "shape": [images, 3, px, px],
        "preprocess": _preprocess(px).to_json(),
        "classes": [],
        "channels": 3,
        "native_px": [px, px],
        "kind": "small",
        "flip_allowed": True,
        "default_labels": None,
        "fingerprint": f"generated-{images}-{px}",
        "warnings": [],
        "unreadable": [],
        "ignored": [],
    }


def _preprocess(px: int) -> Preprocess:
    return Preprocess(px, px, 3, "short-side-crop", (0.0,) * 3, (1.0,) * 3)


def measure(images: int, px: int, batches: int, folder: Path) -> dict[str, Any]:
    """Read the packed file of `images` images that lies in `folder`, after the one that warms up, in this process."""
    path = _path(folder, images)
    _read(*_open(_path(folder, _BATCH), px), _WARM_UP, px)
    before_mib = peak_mib(reset=True)
    source, store = _open(path, px)
    opening_mib = peak_mib()
    opened_mib = peak_mib(reset=True)
    facts = _read(source, store, batches, px)
    return {
        "images": images,
        "pixels_mib": round(images * 3 * px * px / 2**20, 1),
        "opening_above_start_mib": round(opening_mib - before_mib, 1),
        "opened_above_start_mib": round(opened_mib - before_mib, 1),
        "reading_above_opened_mib": round(peak_mib() - opened_mib, 1),
        **facts,
        "cold_batch_ms": _cold(path, source, images, px),
    }


def _path(folder: Path, images: int) -> Path:
    return folder / f"images-{images}.pack"


def _open(path: Path, px: int) -> tuple[Source, Store]:
    source = open_source(str(path))
    return source, open_store(source, np.arange(len(source)), _preprocess(px), torch.device("cpu"), resident_mib=0)


def _read(source: Source, store: Store, batches: int, px: int) -> dict[str, Any]:
    """Random batches, everything in order, and random batches again: by then every block was hashed."""
    hashed_per_second = _read_randomly(source, store, batches, px)
    scoring_at_s = time.perf_counter()
    scored = sum(len(part) for part in store.chunks(_SCORED))
    in_order_per_second = round(scored / (time.perf_counter() - scoring_at_s))
    return {
        "batches": batches,
        "random_images_per_second_at_first": hashed_per_second,
        "images_in_order_per_second": in_order_per_second,
        "random_images_per_second": _read_randomly(source, store, batches, px),
    }


def _read_randomly(source: Source, store: Store, batches: int, px: int) -> int:
    """Images per second; the next batch is expected while one is looked at, which is not counted."""
    draw = torch.Generator().manual_seed(0)
    asked = torch.randint(len(source), (_BATCH,), generator=draw)
    started_at_s, looked_s = time.perf_counter(), 0.0
    for _ in range(batches):
        following = torch.randint(len(source), (_BATCH,), generator=draw)
        store.expect(following)
        found = store.rows(asked)
        looking_at_s = time.perf_counter()
        if not np.array_equal(found[:4].numpy(), _image(asked[:4].numpy(), px)):
            raise BugError("an image that was read is not the one that was written")
        looked_s += time.perf_counter() - looking_at_s
        asked = following
    return round(batches * _BATCH / (time.perf_counter() - started_at_s - looked_s))


def _cold(path: Path, source: Source, images: int, px: int, repeats: int = 5) -> dict[str, float] | None:
    """Milliseconds for a batch of random images that the system does not hold: through a map, and as the store reads.

    Medians, taken in turns; None where the system cannot be told to forget a file.
    """
    if not hasattr(os, "posix_fadvise"):
        return None
    draw = np.random.default_rng(1)

    def through_map(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        # Mapped anew each time: what is mapped the system does not forget.
        mapped = np.memmap(path, np.uint8, "r", offset=PIXELS_AT, shape=(images, 3, px, px))
        return np.asarray(mapped[np.sort(rows)])

    ways: dict[str, Callable[[NDArray[np.int64]], NDArray[np.uint8]]] = {
        "memory_map": through_map,
        "store": source.images.planes,  # type: ignore[union-attr]  # packed images have them
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, read in ways.items():
            rows = draw.integers(0, images, _BATCH)
            _forget(path)
            started_at_s = time.perf_counter()
            read(rows)
            found[name].append(1000 * (time.perf_counter() - started_at_s))
    return {name: round(statistics.median(times), 2) for name, times in found.items()}


def _forget(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # what is not on the disk yet cannot be forgotten
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.pack_memory", description=__doc__)
    flags.add_argument("--images", type=int, default=1_000_000, help="and a tenth, a hundredth, a thousandth of it")
    flags.add_argument("--px", type=int, default=32, help="of the images, in colour: 32 px are 3 GB a million")
    flags.add_argument("--batches", type=int, default=200, help=f"of {_BATCH} random images")
    flags.add_argument("--scratch", type=Path, help="where the packed files go; the system's unless given")
    flags.add_argument("--out", type=Path, required=True, help="the record")
    flags.add_argument("--one", action="store_true", help="read images-IMAGES.pack in --scratch, in this process")
    return flags


def _in_a_process(images: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the file here, so that what that takes is not the memory of the process that reads it."""
    path = _path(folder, images)
    write_packed(path, images, options.px)
    try:
        flags = ["--px", str(options.px), "--batches", str(options.batches)]
        return measured_apart("kdedge_bench.pack_memory", images, flags, folder)
    finally:
        path.unlink()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a thousandth, a hundredth, a tenth and all of `--images`, and write the record."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        write_json(options.out, measure(options.images, options.px, options.batches, options.scratch))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        write_packed(_path(Path(folder), _BATCH), _BATCH, options.px)
        found = [_in_a_process(options.images // part, options, Path(folder)) for part in (1000, 100, 10, 1)]
    small, large = found[0], found[-1]
    more = large["images"] - small["images"]
    typed = [f"--{key} {getattr(options, key)}" for key in ("images", "px", "batches")]
    record = {
        "schema": 1,
        "command": " ".join(["python -m kdedge_bench.pack_memory", *typed, "--out", shlex.quote(options.out.name)]),
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "threads": 1,
        "batch_images": _BATCH,
        "sizes": found,
        # Of the smallest and the largest size: of the pixels, and of what is known of each image.
        "reading_bytes_an_image": round(
            (large["reading_above_opened_mib"] - small["reading_above_opened_mib"]) * 2**20 / more, 2
        ),
        "opened_bytes_an_image": round(
            (large["opened_above_start_mib"] - small["opened_above_start_mib"]) * 2**20 / more, 1
        ),
        "pixel_bytes_an_image": 3 * options.px**2,
    }
    write_json(options.out, record)
    print(
        f"{record['reading_bytes_an_image']} bytes an image while they are read, {record['opened_bytes_an_image']} for "
        f"its id, label and part, of {record['pixel_bytes_an_image']}."
    )


if __name__ == "__main__":
    main()
