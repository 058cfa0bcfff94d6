"""Images decoded once into a file, and read from it in normalised batches as often as a choice needs them.

N images, H x W pixels, C channels, K classes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final, overload

import numpy as np
import numpy.typing as npt

from kdedge_device.preprocess import Preprocess
from kdedge_export.images import Images
from kdedge_export.sessions import open_session

__all__ = ["Stored", "store"]

BATCH = 16  # images: enough for a kernel to be busy, few enough that the tensors of one layer stay small
_CHUNK = 64  # decoded at a time


@final
class Stored(Sequence[npt.NDArray[np.float32]]):
    """Batches float32 [up to BATCH, C, H, W] of the uint8 images [N, H, W, C] in a memory-mapped file."""

    def __init__(self, pixels: npt.NDArray[np.uint8], preprocess: Preprocess) -> None:
        self.pixels, self.preprocess = pixels, preprocess

    def __len__(self) -> int:
        return -(-len(self.pixels) // BATCH)

    @overload
    def __getitem__(self, index: int) -> npt.NDArray[np.float32]: ...
    @overload
    def __getitem__(self, index: slice) -> "Stored": ...
    def __getitem__(self, index: int | slice) -> "npt.NDArray[np.float32] | Stored":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1
            return Stored(self.pixels[start * BATCH : stop * BATCH], self.preprocess)
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start = index % len(self) * BATCH
        return self.preprocess.normalize(np.asarray(self.pixels[start : start + BATCH]))

    def __iter__(self) -> Iterator[npt.NDArray[np.float32]]:
        return (self[index] for index in range(len(self)))

    def chunks(self) -> Iterator[npt.NDArray[np.uint8]]:
        """uint8 [up to BATCH, H, W, C] in turn."""
        for start in range(0, len(self.pixels), BATCH):
            yield np.asarray(self.pixels[start : start + BATCH])

    def first(self, count: int) -> "Stored":
        """The first `count` images."""
        return Stored(self.pixels[:count], self.preprocess)

    def logits(self, content: bytes, threads: int) -> npt.NDArray[np.float32]:
        """float32 [N, K] of a file; [0, 0] without images."""
        if not len(self):
            return np.zeros((0, 0), np.float32)
        session = open_session(content, threads)
        name = session.get_inputs()[0].name
        return np.concatenate([session.run(None, {name: batch})[0] for batch in self])


def store(images: Images, preprocess: Preprocess, path: Path, most: int | None = None) -> Stored:
    """Decode `images`, or the first `most` of them, into `path`, an .npy file; few are in memory at a time."""
    count = len(images) if most is None else min(most, len(images))
    shape = (count, preprocess.height, preprocess.width, preprocess.channels)
    if not count:
        return Stored(np.zeros(shape, np.uint8), preprocess)
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    place = 0
    for chunk in images.chunks(preprocess, _CHUNK):
        pixels[place : place + len(chunk)] = chunk[: count - place]
        place += len(chunk)
        if place >= count:
            break
    pixels.flush()
    return Stored(np.load(path, mmap_mode="r"), preprocess)
