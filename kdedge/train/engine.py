"""How a step is computed: memory format, threads, precision. Measured once, then kept.

Channels-last is up to ten times faster for depthwise networks on a CPU and slower for some others, so it is measured
on the run's own network and batch at the first start. The plan is written to the manifest: a resume and a seed then
mean the same computation.
"""

import copy
import ctypes
import dataclasses
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from kdedge.config import Config
from kdedge.data.batches import Batch, Batches
from kdedge.errors import DeviceError
from kdedge.methods.step import Method
from kdedge_device.record import cores_available

__all__ = [
    "EngineConfig",
    "EnginePlan",
    "as_planned",
    "available_cores",
    "expect_determinism",
    "measure_plan",
    "pick_device",
    "prepare",
    "using",
]

Module = TypeVar("Module", bound=nn.Module)

_BUDGET_S = 1.0  # seconds a candidate may take after its first step


class EnginePlan(Config):
    """How the steps of one stage are computed."""

    memory_format: Literal["contiguous", "channels-last"] = "contiguous"
    threads: Annotated[int, Field(gt=0)] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    parts: Annotated[int, Field(gt=0)] = 1  # a batch goes through the network in as many; more where memory is short
    deterministic: bool = False  # only kernels that give the same bits each time; on a GPU they are the slower ones
    compile: Literal[False] = False  # torch.compile: not used yet; recorded so that a later plan differs visibly


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError(f"There is no device '{name}'. Expected auto, cpu, cuda or cuda:N.")
    return name


class EngineConfig(Config):
    """Where and how a run computes. `plan` fixes the plan beforehand; null measures it at the first start."""

    device: Annotated[str, AfterValidator(_known_device)] = "auto"
    plan: EnginePlan | None = None
    # 0: after every step, waiting for each write; otherwise longer where saving would take over 2 % of the time
    checkpoint_every_s: Annotated[float, Field(ge=0)] = 20.0
    log_every_steps: Annotated[int, Field(gt=0)] = 10
    keep_checkpoints: bool = False
    deterministic: bool = False  # a GPU then gives the same bits each time; the plan keeps it. A CPU does so anyway
    tensorboard: bool = False  # metrics for TensorBoard too, beside metrics.jsonl

    @property
    def fixed_plan(self) -> EnginePlan | None:
        """The plan that was given, if one was, deterministic where either asks for it."""
        if self.plan is None or self.plan.deterministic or not self.deterministic:
            return self.plan
        return self.plan.model_copy(update={"deterministic": True})


def available_cores() -> int:
    """Cores this process may use: by affinity, by the quota of its container (cgroup v2), and its share of them where
    torchrun started several processes on this machine."""
    cores = cores_available()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, round(int(quota) / int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        pass
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def pick_device(name: str) -> torch.device:
    """The device of auto, cpu, cuda or cuda:N (EngineConfig takes no other name); DeviceError where it is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu":
        count = torch.cuda.device_count()
        if int(name.partition(":")[2] or 0) >= count:
            raise DeviceError(
                f"The device {name} was asked for, and torch finds {count} CUDA devices. Use --device cpu."
            )
    return torch.device(name)


def _format(plan: EnginePlan) -> torch.memory_format:
    return torch.channels_last if plan.memory_format == "channels-last" else torch.contiguous_format


def as_planned(module: Module, plan: EnginePlan) -> Module:
    """The module, its weights now in the plan's memory format."""
    return module.to(memory_format=_format(plan))


def prepare(images_BCHW: Tensor, plan: EnginePlan) -> Tensor:
    """`images` in the plan's memory format.

    With one channel both formats have the same bytes, and torch then takes the contiguous path; naming the strides
    settles it.
    """
    if plan.memory_format == "contiguous":
        return images_BCHW.contiguous()
    _, channels, height, width = images_BCHW.shape
    if channels > 1:
        return images_BCHW.contiguous(memory_format=torch.channels_last)
    return images_BCHW.contiguous().as_strided(images_BCHW.shape, (height * width, 1, width, 1))


def expect_determinism() -> None:
    """Before anything is computed on a GPU: cuBLAS looks for this at its first product, and never again."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def using(plan: EnginePlan, device: torch.device) -> Iterator[None]:
    """Threads, precision and kernels of the plan, inside the block.

    RuntimeError of torch, naming the operation, where a deterministic plan needs a kernel that does not exist.
    """
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    torch.set_num_threads(plan.threads)
    cudnn.deterministic, cudnn.benchmark = True, False  # a resume takes the same kernels
    if device.type == "cpu":
        _keep_freed_memory()
    settings: Any = torch.utils.deterministic  # a module with a property, which type checkers do not see
    strict, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    if plan.deterministic:
        expect_determinism()
        torch.use_deterministic_algorithms(True)
        settings.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        # Without its cache: that lives as long as the block, and would go on using the first step's weights.
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bf16", cache_enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
        torch.use_deterministic_algorithms(strict)
        settings.fill_uninitialized_memory = fills


@lru_cache(maxsize=1)
def _keep_freed_memory() -> None:
    """Let this process keep the memory that a step frees, for the next step.

    glibc hands each large block back to the system when it is freed, and the system then clears every page of it anew:
    a sixth to a quarter of a step of MobileNetV2. It costs up to a third more memory, since blocks are no longer placed
    alone. Where the C library is another one nothing is done.
    """
    mmap_max, trim_threshold = -4, -1  # of malloc.h
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def _bf16_pays(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())


def measure_plan(
    method: Method, batches: Batches, device: torch.device, *, deterministic: bool = False
) -> tuple[EnginePlan, list[dict[str, object]]]:
    """The fastest plan for this method and batch, and the milliseconds a step of each candidate.

    First the memory format with all cores, then fewer threads, then bf16 where the hardware has it. The method is
    copied: measuring changes neither its weights nor its statistics.
    """
    cores = available_cores()
    batch = batches.at(0)
    timings: list[dict[str, object]] = []

    def milliseconds(plan: EnginePlan) -> float:
        elapsed_ms = _step_ms(method, batch, plan, device)
        timings.append(plan.model_dump() | {"step_ms": round(elapsed_ms, 2)})
        return elapsed_ms

    start = EnginePlan(threads=cores, deterministic=deterministic)
    candidates = [start, start.model_copy(update={"memory_format": "channels-last"})]
    best_ms, best = min(((milliseconds(plan), plan) for plan in candidates), key=lambda pair: pair[0])
    others = [best.model_copy(update={"threads": cores // 2})] if device.type == "cpu" and cores > 1 else []
    others += [best.model_copy(update={"precision": "bf16"})] if _bf16_pays(device) else []
    for plan in others:
        if (elapsed_ms := milliseconds(plan)) < best_ms:
            best_ms, best = elapsed_ms, plan
    return best, timings


def _step_ms(method: Method, batch: Batch, plan: EnginePlan, device: torch.device) -> float:
    """The fastest of a few forward and backward passes, milliseconds."""
    trial = as_planned(copy.deepcopy(method), plan).train()
    ready = dataclasses.replace(batch, images=prepare(batch.images, plan))
    fastest = float("inf")
    started_at_s = time.perf_counter()
    with using(plan, device):
        for repeat in range(6):
            before_s = time.perf_counter()
            trial(ready).loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat > 0 or time.perf_counter() - started_at_s > _BUDGET_S:
                fastest = min(fastest, time.perf_counter() - before_s)
            if repeat > 0 and time.perf_counter() - started_at_s > _BUDGET_S:
                break
    return fastest * 1e3
