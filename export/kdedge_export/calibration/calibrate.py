"""What values the tensors of a float model take on real images: the exact extremes and a histogram of each.

One pass, one image at a time: a convolution gains nothing from a batch on one core, the values are looked at while they
are in the cache, and neither memory nor any number depends on how many images there are or how they are grouped.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from kdedge.data.words import counted
from kdedge.errors import DataError
from kdedge_device.preprocess import Preprocess
from kdedge_export.calibration.histogram import Histogram
from kdedge_export.calibration.state import Collected, key_of, read_state, write_state
from kdedge_export.images import Held, Images
from kdedge_export.sessions import open_session

__all__ = ["Say", "calibrate"]

Say = Callable[[str], None]
CHUNK = 32  # images decoded at a time
SAY_EVERY_S = 5.0
SAVE_EVERY_S = 30.0


def calibrate(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    images: Images | npt.NDArray[np.uint8],
    preprocess: Preprocess,
    threads: int = 1,
    *,
    say: Say | None = None,
    state: Path | None = None,
) -> dict[str, Histogram]:
    """The histogram of each of `tensors` over `images`, or over an array uint8 [N, H, W, C]; equal in any order.

    `say` is told how far it is. `state`: a file to go on from after an interruption, with an equal result; it is the
    caller's to remove. DataError without images or where each is of one colour; ExportError where a value is not
    finite.
    """
    source = Held(images) if isinstance(images, np.ndarray) else images
    if len(source) == 0:
        raise DataError("There are no images to calibrate on; INT8 needs some training or unlabeled images.")
    key = key_of(model, tensors, preprocess, source) if state else ""
    told = _Told(len(source), say)
    collected = (read_state(state, key, tensors, told.say) if state else None) or Collected(tensors)
    told.begin(collected.images)
    saved_at_s = time.monotonic()
    take = _values(model, tensors, threads)
    for chunk in source.chunks(preprocess, CHUNK, collected.images):
        for image in chunk:
            values = take(preprocess.normalize(image[None]))
            for name, tally in collected.tallies.items():
                tally.add(values[name])
        collected.images += len(chunk)
        collected.varied |= not _one_colour_each(chunk)
        told.progress(collected.images)
        if state and (time.monotonic() - saved_at_s > SAVE_EVERY_S or collected.images == len(source)):
            write_state(state, key, collected)
            saved_at_s = time.monotonic()
    if not collected.varied:
        raise DataError(
            f"All {counted(len(source), 'image')} to calibrate on are of one colour each, from which no range can be "
            "learned. Expected real images, of training or unlabeled ones; name a set of them with --calibrate."
        )
    return {name: tally.histogram() for name, tally in collected.tallies.items()}


def _values(
    model: onnx.ModelProto, tensors: Sequence[str], threads: int
) -> Callable[[npt.NDArray[np.float32]], dict[str, npt.NDArray[np.float32]]]:
    """A function from a batch of one image to the value of each of `tensors`."""
    entry = model.graph.input[0].name
    watched = [name for name in tensors if name != entry]
    session: Any = open_session(_with_outputs(model, watched), threads) if watched else None

    def take(batch: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
        values = session.run(watched, {entry: batch}) if watched else []
        return {entry: batch, **dict(zip(watched, values, strict=True))}

    return take


def _with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> bytes:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {each.name for each in copy.graph.output}
    copy.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors if name not in known
    )
    return bytes(copy.SerializeToString())


def _one_colour_each(images: npt.NDArray[np.uint8]) -> bool:
    """Whether no image [n, H, W, C] has two different pixels. An image of one pixel may be of any colour."""
    return bool(images[0, :, :, 0].size > 1 and (images == images[:, :1, :1]).all())


class _Told:
    """A line of progress every few seconds, with the time left."""

    def __init__(self, total: int, say: Say | None) -> None:
        self.total = total
        self.say: Say = say or (lambda sentence: None)
        self.begun = 0
        self.begun_at_s = self.said_at_s = time.monotonic()

    def begin(self, done: int) -> None:
        self.begun = done
        if done:
            self.say(f"Calibration goes on after {counted(done, 'image')}")

    def progress(self, done: int) -> None:
        now_s = time.monotonic()
        if done == self.total or now_s - self.said_at_s < SAY_EVERY_S:
            return
        self.said_at_s = now_s
        left_s = (now_s - self.begun_at_s) / (done - self.begun) * (self.total - done)
        left = f"{left_s:.0f} s" if left_s < 90 else f"{left_s / 60:.0f} min"
        self.say(f"Calibrating: {done:,} of {counted(self.total, 'image')}, {left} left")
