"""The images of a run where the training finds them: on its device, or read from a file ahead of each step.

Both stores answer alike, so that no stage knows which one it has. N images, n of them, C channels, H and W pixels.
"""

import shlex
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdedge.data.memory import MOST_FRACTION, available_bytes
from kdedge.data.source import Indices, PackedImages, Source
from kdedge.data.words import counted
from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess

__all__ = ["Pixels", "Resident", "Store", "Streamed", "open_store"]

_AHEAD = 4  # batches read before they are asked for: the labeled and the unlabeled images of two steps
_DEVICE_FRACTION = 0.5  # of a GPU's free memory that images may take; the rest is for activations
_HOST_FRACTION = 0.25  # of the free memory of a machine that trains on its CPU, where other programs live too
_Shape: TypeAlias = tuple[int, int, int, int]


class Pixels(Protocol):
    """Images uint8 [N, C, H, W] that lie somewhere else."""

    @property
    def shape(self) -> _Shape: ...

    def read_into(self, rows: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Write image rows[i] into out[i]; `out` is uint8 [n, C, H, W]. Called by one thread at a time."""


@final
class Resident:
    """All images in the memory of the device that trains: the fastest, where they fit."""

    waited_s = 0.0

    def __init__(self, images_u8: Tensor) -> None:
        self.images_u8 = images_u8

    def __len__(self) -> int:
        return len(self.images_u8)

    @property
    def shape(self) -> _Shape:
        count, channels, height, width = self.images_u8.shape
        return count, channels, height, width

    @property
    def device(self) -> torch.device:
        return self.images_u8.device

    def rows(self, positions: Tensor) -> Tensor:
        """uint8 [n, C, H, W] of the images at `positions` [n], in the order asked for."""
        return self.images_u8.index_select(0, positions.to(self.device, non_blocking=True))

    def expect(self, positions: Tensor) -> None:
        """Nothing to do: all images are here."""

    def chunks(self, size: int) -> Iterator[Tensor]:
        """All images in their order, `size` at a time."""
        yield from torch.split(self.images_u8, size)


@final
class Streamed:
    """Images read as they are needed; what `expect` names is read by a thread while the device computes.

    One batch and the few expected ones are in memory, however many images there are. `places` [N] are rows of
    `pixels`, of all of them unless given. `waited_s` is the time that `rows` spent waiting for pixels since the start.
    """

    def __init__(self, pixels: Pixels, device: torch.device, places: NDArray[np.int64] | None = None) -> None:
        self._pixels, self._places, self.device = pixels, places, device
        self.waited_s = 0.0
        # One thread: what `pixels` has looked at is its own, and a second one would take a core from the training.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kdedge-store")
        self._ahead: dict[bytes, Future[Tensor]] = {}

    def __len__(self) -> int:
        return self._pixels.shape[0] if self._places is None else len(self._places)

    @property
    def shape(self) -> _Shape:
        return len(self), *self._pixels.shape[1:]

    def rows(self, positions: Tensor) -> Tensor:
        """uint8 [n, C, H, W] of the images at `positions` [n], in the order asked for.

        DataError where the file cannot be read or its pixels are not those that were packed.
        """
        wanted = positions.cpu().numpy()
        started_at_s = time.perf_counter()
        found = (self._ahead.pop(wanted.tobytes(), None) or self._thread.submit(self._read, wanted)).result()
        self.waited_s += time.perf_counter() - started_at_s
        return found.to(self.device, non_blocking=True)  # torch keeps pinned memory until it is copied

    def expect(self, positions: Tensor) -> None:
        """Read the images at `positions` now, since `rows` will be asked for exactly these soon."""
        wanted = positions.cpu().numpy()
        key = wanted.tobytes()
        if key in self._ahead:
            return
        while len(self._ahead) >= _AHEAD:  # never asked for: the run skipped a step
            self._ahead.pop(next(iter(self._ahead))).cancel()
        self._ahead[key] = self._thread.submit(self._read, wanted)

    def chunks(self, size: int) -> Iterator[Tensor]:
        """All images in their order, `size` at a time, the next ones read meanwhile."""
        parts = torch.split(torch.arange(len(self)), size) if len(self) else ()
        for number, part in enumerate(parts):
            self.expect(part)
            if number + 1 < len(parts):
                self.expect(parts[number + 1])
            yield self.rows(part)

    def _read(self, wanted: NDArray[np.int64]) -> Tensor:
        out = torch.empty(
            (len(wanted), *self._pixels.shape[1:]), dtype=torch.uint8, pin_memory=self.device.type == "cuda"
        )
        self._pixels.read_into(wanted if self._places is None else self._places[wanted], out.numpy())
        return out


Store: TypeAlias = Resident | Streamed


def open_store(
    source: Source, indices: Indices, preprocess: Preprocess, device: torch.device, resident_mib: int | None = None
) -> Store:
    """Images `indices` of `source` for training on `device`: resident where they take at most `resident_mib`.

    Without it half of a GPU's free memory or a quarter of the machine's may be taken. Larger sets are streamed where
    they are packed at the size asked for. Others are resident where they fit at all; DataError where they do not, or
    are more than `resident_mib`, with what to pack.
    """
    size = (preprocess.channels, preprocess.height, preprocess.width)
    needed_mib = len(indices) * int(np.prod(size, dtype=np.int64)) / 2**20
    usual_mib, most_mib = _memory_mib(device)
    if needed_mib > (usual_mib if resident_mib is None else resident_mib):
        pixels = source.images
        if isinstance(pixels, PackedImages) and pixels.shape[1:] == size:
            return Streamed(pixels, device, np.asarray(indices, dtype=np.int64))
        if resident_mib is not None or needed_mib > most_mib:
            limit = f"{_shown(most_mib)} MiB of {device} may be taken"
            if resident_mib is not None:
                limit = f"data.resident_mib allows {resident_mib}"
            raise DataError(
                f"{counted(len(indices), 'training image')} of {' x '.join(map(str, size))} take "
                f"{_shown(needed_mib)} MiB, and {limit}. A packed file is streamed instead: kdedge data pack "
                f"{shlex.quote(source.spec)} --out FILE --px {preprocess.height} --channels "
                f"{preprocess.channels}, then --data FILE."
            )
    return Resident(source.load(indices, preprocess).to(device))


def _shown(mib: float) -> str:
    return f"{mib:.0f}" if mib >= 10 else f"{max(mib, 0.1):.1f}"


def _memory_mib(device: torch.device) -> tuple[float, float]:
    """What images take without being asked, and the most that they can take, where they are to lie."""
    available = available_bytes()
    host_mib = float("inf") if available is None else available / 2**20
    if device.type != "cuda":
        return _HOST_FRACTION * host_mib, MOST_FRACTION * host_mib
    free_mib = torch.cuda.mem_get_info(device)[0] / 2**20
    # They pass through the machine's memory on their way to the GPU.
    return min(_DEVICE_FRACTION * free_mib, MOST_FRACTION * host_mib), MOST_FRACTION * min(free_mib, host_mib)
