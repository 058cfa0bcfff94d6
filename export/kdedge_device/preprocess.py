"""How an image becomes the input of a network: decode, fit to H x W, normalise. The same code trains, tests and ships.

Resizing and grey are defined in whole numbers (resize.py), so a raw array gives the same bytes on every machine, with
Pillow or without it. Only the decoding of image files needs Pillow.

H, W are the input's height and width, C its channels (1 grey, 3 RGB), N the batch. Python 3.8, numpy; Pillow late.
"""

import os
from dataclasses import dataclass
from typing import Any, Dict, Iterator, Tuple

import numpy as np

from kdedge_device.arrays import ArraysUnreadable, read_npy, read_npz, why_no_image
from kdedge_device.failures import Failure
from kdedge_device.images import (
    MAX_PIXELS,
    Header,
    ImageUnreadable,
    Source,
    decode_image,
    picture_of,
    pillow_agrees,
    read_header,
    shrink,
)
from kdedge_device.resize import Box, resize, to_grey

__all__ = ["MAX_PIXELS", "Header", "ImageUnreadable", "Preprocess", "read_header"]

RESIZES = ("short-side-crop", "squash")


@dataclass(frozen=True)
class Preprocess:
    """`resize` "short-side-crop" scales the image to cover H x W and keeps its middle; "squash" changes proportions.

    `mean` and `std` are those of pixel / 255, one number a channel.
    """

    height: int
    width: int
    channels: int
    resize: str
    mean: Tuple[float, ...]
    std: Tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        problem = self._problem()
        if problem:
            raise Failure(f"The preprocessing cannot be used: {problem}.")

    def _problem(self) -> str:
        if self.channels not in (1, 3):
            return f"channels is {self.channels!r}; 1 (grey) or 3 (RGB) was expected"
        if not (isinstance(self.height, int) and isinstance(self.width, int) and self.height > 0 and self.width > 0):
            return f"height and width are {self.height!r} and {self.width!r}; whole numbers above 0 were expected"
        if self.resize not in RESIZES:
            return "resize is {!r}; one of {} was expected".format(self.resize, ", ".join(RESIZES))
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            return (
                f"mean and std have {len(self.mean)} and {len(self.std)} numbers; {self.channels} of each were expected"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and min(self.std) > 0):
            return f"mean is {self.mean} and std is {self.std}; finite numbers, and std above 0, were expected"
        return ""

    def to_json(self) -> Dict[str, Any]:
        return {
            "height": self.height,
            "width": self.width,
            "channels": self.channels,
            "resize": self.resize,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, document: Dict[str, Any]) -> "Preprocess":
        """Raises Failure where a key is missing or unknown, or a value makes no sense."""
        names = ("height", "width", "channels", "resize", "mean", "std")
        if not isinstance(document, dict) or sorted(document) != sorted(names):
            found = sorted(document) if isinstance(document, dict) else document
            raise Failure(f"The preprocessing has {found}; exactly {sorted(names)} were expected.")
        try:
            return cls(**document)
        except TypeError as error:
            raise Failure(f"The preprocessing cannot be used: {error}.") from None

    def decode(self, source: Source) -> "np.ndarray[Any, Any]":
        """The image in a file (or in encoded bytes) as uint8 [H, W, C]. Raises ImageUnreadable.

        A path that ends in .npy is a raw array, as for `fit`. Anything else is decoded by Pillow.
        """
        if not isinstance(source, bytes) and os.fspath(source).lower().endswith(".npy"):
            return self.fit(read_npy(os.fspath(source)))
        quick = pillow_agrees()
        picture = decode_image(source, self.channels if quick else 3, (self.height, self.width))
        return self._shrunk(picture) if quick else self.fit(np.asarray(picture))

    def each(self, path: str) -> Iterator[Tuple[str, "np.ndarray[Any, Any]"]]:
        """(name, uint8 [H, W, C]) of what `path` holds: one image, or those of the array `images` in an .npz.

        Raises ImageUnreadable.
        """
        if not path.lower().endswith(".npz"):
            yield path, self.decode(path)
            return
        try:
            images = read_npz(path, ("images",))["images"]
        except ArraysUnreadable as error:
            raise ImageUnreadable(path, error.reason) from None
        if images.ndim not in (3, 4):
            raise ImageUnreadable(path, f"its images have shape {images.shape}; [N, h, w] or [N, h, w, C] was expected")
        for index, image in enumerate(images):
            why = why_no_image(image)
            if why:
                raise ImageUnreadable(f"{path}[{index}]", why)
            yield f"{path}[{index}]", self.fit(image)

    def fit(self, image: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """uint8 [h, w] or [h, w, 1 or 3] of any size as uint8 [H, W, C], resized as `decode` does.

        Needs no Pillow. Where size and channels are right already nothing is changed.
        """
        why = why_no_image(image)
        if why:
            raise Failure(f"An image array cannot be used: {why}.")
        pixels = image[:, :, None] if image.ndim == 2 else image
        if pixels.shape[2] == 3 and self.channels == 1:
            pixels = to_grey(pixels)
        if pixels.shape[:2] != (self.height, self.width):
            pixels = self._resized(pixels)
        if pixels.shape[2] < self.channels:
            pixels = np.repeat(pixels, 3, axis=2)
        return np.ascontiguousarray(pixels)

    def _resized(self, pixels: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        height, width = pixels.shape[:2]
        if pillow_agrees():
            return self._shrunk(picture_of(pixels))
        return resize(pixels, self.height, self.width, self._box(width, height))

    def _shrunk(self, picture: Any) -> "np.ndarray[Any, Any]":
        return shrink(picture, self.height, self.width, self._box(*picture.size))

    def _box(self, width: int, height: int) -> Box:
        """The part that is kept: left, top, right, bottom. Cutting while resizing spares a rounding in between."""
        if self.resize == "squash":
            return (0.0, 0.0, float(width), float(height))
        scale = min(width / self.width, height / self.height)
        left = max(0.0, (width - self.width * scale) / 2)
        top = max(0.0, (height - self.height * scale) / 2)
        return (left, top, min(float(width), left + self.width * scale), min(float(height), top + self.height * scale))

    def normalize(self, images: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """uint8 [N, H, W, C] -> float32 [N, C, H, W]: (pixel / 255 - mean) / std. Any H and W."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != self.channels:
            raise Failure(
                f"A batch has type {images.dtype} and shape {images.shape}; "
                f"uint8 [N, H, W, {self.channels}] was expected."
            )
        mean = np.asarray(self.mean, dtype=np.float32)
        std = np.asarray(self.std, dtype=np.float32)
        values = (images.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2))
