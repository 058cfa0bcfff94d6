"""How an image becomes the input of a network: decode, fit to H x W, normalise. The same code trains, tests and ships.

H, W are the input's height and width, C its channels (1 grey, 3 RGB), N the batch. Python 3.8, numpy; Pillow late.
"""

from dataclasses import dataclass
from typing import Any, Dict, Tuple

import numpy as np

from kdedge_device.failures import Failure
from kdedge_device.images import MAX_PIXELS, Header, ImageUnreadable, Source, decode_image, pillow, read_header

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
        """The image in a file (or in encoded bytes) as uint8 [H, W, C]. Raises ImageUnreadable."""
        return self._shrink(decode_image(source, self.channels, (self.height, self.width)))

    def fit(self, image: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """uint8 [h, w] or [h, w, 1 or 3] of any size as uint8 [H, W, C], resized as `decode` does.

        Where size and channels are right already nothing is changed (and Pillow is not needed).
        """
        if (
            image.dtype != np.uint8
            or image.ndim not in (2, 3)
            or (image.ndim == 3 and image.shape[2] not in (1, 3))
            or 0 in image.shape
        ):
            raise Failure(
                f"An image array has type {image.dtype} and shape {image.shape}; "
                "uint8 [h, w], [h, w, 1] or [h, w, 3] was expected."
            )
        pixels = image[:, :, None] if image.ndim == 2 else image
        if pixels.shape[2] == 1 and self.channels == 3:
            pixels = np.repeat(pixels, 3, axis=2)
        if pixels.shape == (self.height, self.width, self.channels):
            return np.ascontiguousarray(pixels)
        module = pillow()
        picture = module.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
        return self._shrink(picture if self.channels == pixels.shape[2] else picture.convert("L"))

    def _shrink(self, picture: Any) -> "np.ndarray[Any, Any]":
        """A Pillow image of mode L or RGB as uint8 [H, W, C]; bilinear, antialiased when it gets smaller."""
        if picture.size != (self.width, self.height):
            picture = picture.resize(
                (self.width, self.height), 2, box=self._box(*picture.size)
            )  # 2: bilinear in every Pillow
        pixels = np.array(picture, dtype=np.uint8)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def _box(self, width: int, height: int) -> Tuple[float, float, float, float]:
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
