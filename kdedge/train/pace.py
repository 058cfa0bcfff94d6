"""How fast the loop goes, what it waits for, and what memory that takes."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch

from kdedge.data.batches import Batches

__all__ = ["Pace", "memory_peak"]

_WAIT_FRACTION = 0.05  # of the loop's time, beyond which it is told
_JUDGED_AFTER_S = 10.0  # the first steps also draw permutations and fill caches


@final
class Pace:
    """Speed and waits of a stage, from one logged line to the next and in all."""

    def __init__(self, stage: str, step: int, batches: Batches) -> None:
        self.stage, self.batches = stage, batches
        self._began_at_s = self._logged_at_s = time.perf_counter()
        self._logged_step, self._logged_waited_s = step, 0.0
        self._waited_s, self._read_before_s = 0.0, batches.pool.images.waited_s
        self._told = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the making of a batch."""
        before_s = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - before_s

    def line(self, step: int) -> dict[str, float]:
        """Images per second and the share of waiting since the last line. Called when `step` steps are done."""
        now_s = time.perf_counter()
        elapsed_s = now_s - self._logged_at_s
        images = self.batches.images_per_step * (step - self._logged_step)
        waited_s = self._waited_s - self._logged_waited_s
        self._logged_at_s, self._logged_step, self._logged_waited_s = now_s, step, self._waited_s
        return {"images_per_second": images / elapsed_s, "loader_wait_fraction": waited_s / elapsed_s}

    def slow_loader(self) -> str | None:
        """A sentence, once, where the stage so far has waited more than 5 % of its time for its images.

        On a CPU only the disk is waited for: views are made by the same cores as the rest of the step.
        """
        elapsed_s = time.perf_counter() - self._began_at_s
        images = self.batches.pool.images
        read_s = images.waited_s - self._read_before_s
        waited_s = read_s if images.device.type == "cpu" else self._waited_s
        if self._told or elapsed_s < _JUDGED_AFTER_S or waited_s <= _WAIT_FRACTION * elapsed_s:
            return None
        self._told = True
        return (
            f"Stage {self.stage} waits {waited_s / elapsed_s:.0%} of its time for its images, "
            f"{read_s / elapsed_s:.0%} for the disk and the rest for their views; {_WAIT_FRACTION:.0%} is fine. "
            "For the disk: kdedge data pack, or a higher data.resident_mib. For the views: fewer views.operations, or "
            "more CPU cores."
        )


def memory_peak(device: torch.device) -> dict[str, float]:
    """The most memory this process has had so far, and the most that tensors have had on a GPU, in MiB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    found = {"memory_peak_mib": peak / 2 ** (20 if sys.platform == "darwin" else 10)}
    if device.type == "cuda":
        found["cuda_memory_peak_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return found
