"""TensorRT's timing cache: how fast each kernel was, kept between builds so that the next one need not measure again.

It may hold compiled code, so it stays in the user's own cache folder and never travels with a bundle. One file for
each TensorRT version, kind of GPU and CUDA version, because TensorRT refuses another's; and for each power mode,
because what is fastest at one clock need not be at another.
"""

import os
from typing import Any, Optional

from kdedge_device.own_key import cache_folder
from kdedge_device.trt import Here
from kdedge_device.trt_cache import slug, write_atomically

__all__ = ["TimingCache", "default_timing_folder"]


def default_timing_folder() -> str:
    return os.path.join(cache_folder(), "tensorrt")


class TimingCache:
    """Lent to a builder's config before a build and taken back after it. A cache that cannot be used never stops one.

    `state`: "off", "new", "used" or "refused" (by TensorRT: a new one is begun), then perhaps ", not saved: ...".
    """

    def __init__(self, folder: Optional[str], here: Here, power_mode: Optional[str]) -> None:
        gpu = here.gpu
        mode = f"-{power_mode}" if power_mode else ""
        name = slug(f"timing-trt{here.version}-{gpu.name}-sm{gpu.capability}-cuda{gpu.cuda}{mode}")
        self.path = os.path.join(folder, name + ".cache") if folder else None
        self.state = "off"

    def lend(self, config: Any) -> None:
        if self.path is None:
            return
        old = self._read()
        cache = config.create_timing_cache(old) if old else None
        if cache is not None and config.set_timing_cache(cache, False):
            self.state = "used"
            return
        self.state = "refused" if old else "new"
        empty = config.create_timing_cache(b"")
        if empty is None or not config.set_timing_cache(empty, False):
            self.state = "refused"

    def take_back(self, config: Any) -> None:
        cache = config.get_timing_cache() if self.path else None
        if cache is None or self.path is None:
            return
        try:
            os.makedirs(os.path.dirname(self.path), mode=0o700, exist_ok=True)
            write_atomically(self.path, bytes(cache.serialize()))
        except OSError as error:
            self.state += f", not saved: {error.strerror}"

    def _read(self) -> bytes:
        assert self.path is not None
        try:
            with open(self.path, "rb") as file:
                return file.read()
        except OSError:
            return b""
