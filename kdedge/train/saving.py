"""Checkpoints written beside the loop: its thread copies the state, another hashes, writes and syncs it."""

import contextlib
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, final

import torch
from torch import Tensor

from kdedge.errors import RunError
from kdedge.train.checkpoint import Checkpoints

__all__ = ["Saver"]

_BLOCKED_FRACTION = 0.02  # of the loop's time, at most, goes into copying the state


@final
class Saver:
    """Saves the state of a stage every `every_s` seconds, one write at a time. A context manager: leaving it waits.

    The interval grows where copying takes more than 2 % of it, and a state that is due while the one before is still
    being written is left to the next step. With `every_s` of 0 every step is due, and each waits for the one before it.
    A write that failed raises its RunError at the next `due`, `save` or `wait`, or where the block ends.
    """

    def __init__(self, checkpoints: Checkpoints, every_s: float) -> None:
        self._checkpoints, self._every_s = checkpoints, every_s
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kdedge-checkpoint")
        self._write: Future[None] | None = None
        self._writing_step = self._written_step = 0
        self._copies: dict[str, Tensor] = {}
        self._began_at_s = self._saved_at_s = time.perf_counter()
        self._blocked_s = self._copying_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._writer.shutdown(wait=True)
        if kind is None:  # the first error is the one to tell
            self.wait()

    @property
    def blocked_fraction(self) -> float:
        """Share of the time so far in which the loop's thread was kept by saving."""
        return self._blocked_s / max(time.perf_counter() - self._began_at_s, 1e-9)

    def due(self) -> bool:
        """Whether the state should be saved now. Asked after every step."""
        if not self._checkpoints.writes:
            return False
        if self._every_s == 0:
            return True
        if self._write is not None:
            if not self._write.done():
                return False
            self.wait()
        interval_s = max(self._every_s, self._copying_s / _BLOCKED_FRACTION)
        return time.perf_counter() - self._saved_at_s >= interval_s

    def save(self, step: int, tensors: Mapping[str, Tensor], **header: Any) -> None:
        """Copy the state after `step` steps now, and have it written while the loop goes on."""
        if not self._checkpoints.writes:
            return
        before_s = time.perf_counter()
        self.wait()  # the copies are its own until they are written
        self._copy(tensors)
        self._write = self._writer.submit(self._checkpoints.save, step, self._copies, **header)
        self._writing_step, self._saved_at_s = step, time.perf_counter()
        self._copying_s = self._saved_at_s - before_s
        self._blocked_s += self._copying_s

    def wait(self) -> None:
        """Until nothing is being written; RunError where that failed."""
        write, self._write = self._write, None
        if write is not None:
            write.result()
            self._written_step = self._writing_step

    def settled_step(self) -> int:
        """Of which step the last state is that was written, once what is being written is, or has failed; 0: none."""
        with contextlib.suppress(RunError):  # for who has an error of their own to tell
            self.wait()
        return self._written_step

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        """Into the same host memory every time, so that a long run does not ask for it anew; page-locked for CUDA."""
        kept, self._copies = self._copies, {}
        for name, tensor in tensors.items():
            copy = kept.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._copies[name] = copy.copy_(tensor, non_blocking=tensor.is_cuda)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
