"""How a step is computed: memory format, layers, threads, precision, compiler, update. Measured once, then kept.

Channels-last is up to ten times faster for depthwise networks on a CPU and slower for some others, so it is measured
on the run's own network and batch at the first start (`kdedge.train.fastest`). The plan is written to the manifest: a
resume and a seed then mean the same computation.
"""

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor, nn

from kdedge.config import Config
from kdedge.data.batches import Batches, make_views
from kdedge.data.views import ViewConfig
from kdedge.errors import DeviceError, RunError
from kdedge.models.zoo import Network
from kdedge.train.layers import own_layer, replaced
from kdedge_device.record import cores_available

__all__ = [
    "EngineConfig",
    "EnginePlan",
    "arranged",
    "as_planned",
    "available_cores",
    "expect_determinism",
    "pick_device",
    "prepare",
    "using",
]

Module = TypeVar("Module", bound=nn.Module)

Compile = Literal["none", "default", "reduce-overhead"]

_BACKEND = "inductor"  # of torch.compile


def _compile_of_old(value: object) -> object:
    """Runs that began before there was a choice have it as false."""
    return "none" if value is False else value


class EnginePlan(Config):
    """How the steps of one stage are computed."""

    memory_format: Literal["contiguous", "channels-last"] = "contiguous"
    layers: Literal["torch", "own"] = "torch"  # own: kdedge.train.layers, the same sums in another order
    threads: Annotated[int, Field(gt=0)] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    parts: Annotated[int, Field(gt=0)] = 1  # a batch goes through the network in as many; more where memory is short
    deterministic: bool = False  # only kernels that give the same bits each time; on a GPU they are the slower ones
    compile: Annotated[Compile, BeforeValidator(_compile_of_old)] = "none"  # mode of torch.compile for the backbone
    compile_views: Compile = "none"  # and for weak and strong views, which then have fixed shapes
    update: Literal["foreach", "fused"] = "foreach"  # of SGD's kernels; fused rounds elsewhere


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


@contextmanager
def arranged(networks: Sequence[nn.Module], plan: EnginePlan, batches: Batches | None = None) -> Iterator[None]:
    """Inside the block `networks` train with the layers of the plan; their backbones, and the views of `batches`, are
    compiled where it says so.

    Both are compiled at the first batch; loss, update and average are not. RunError where a backbone is to be
    compiled for a batch in parts or one that several processes share, or the views of SimCLR.
    """
    with ExitStack() as stack:
        if plan.layers == "own":
            stack.enter_context(replaced(networks, own_layer))
        if (plan.compile, plan.compile_views) != ("none", "none"):
            stack.callback(torch.compiler.reset)  # what was compiled holds memory, a CUDA graph its maps
        if plan.compile != "none":
            stack.enter_context(_compiled(networks, plan))
        if plan.compile_views != "none" and batches is not None:
            stack.enter_context(_views_compiled(batches, plan.compile_views))
        yield


@contextmanager
def _compiled(networks: Sequence[nn.Module], plan: EnginePlan) -> Iterator[None]:
    if plan.parts > 1 or (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        raise RunError(
            f"The plan asks for torch.compile ({plan.compile}) of a batch that is computed in parts or shared by "
            "several processes, which it is not made for. Set engine.plan.compile to none."
        )
    backbones = [module.backbone for network in networks for module in network.modules() if isinstance(module, Network)]
    for backbone in backbones:
        backbone.compile(dynamic=False, backend=_BACKEND, mode=_mode(plan.compile))
    try:
        yield
    finally:
        for backbone in backbones:
            backbone._compiled_call_impl = None


@contextmanager
def _views_compiled(batches: Batches, asked: Compile) -> Iterator[None]:
    """One function of images and draws that lie on the device already: the host then does nothing else for them."""
    if not isinstance(batches.views, ViewConfig):
        raise RunError(
            f"The plan asks for torch.compile ({asked}) of contrastive views, whose shapes follow from what is drawn. "
            "Set engine.plan.compile_views to none."
        )
    uncompiled, views = batches.make_views, batches.views

    @torch.compile(fullgraph=True, dynamic=False, backend=_BACKEND, mode=_mode(asked))
    def compiled(first_BCHW: Tensor, first_DB: Tensor, second_UCHW: Tensor, second_DU: Tensor) -> Tensor:
        return make_views(views, first_BCHW, first_DB, second_UCHW, second_DU, fixed_shapes=True)

    def make(first_BCHW: Tensor, first_DB: Tensor, second_UCHW: Tensor, second_DU: Tensor) -> Tensor:
        there_DB, there_DU = (each.to(first_BCHW.device, non_blocking=True) for each in (first_DB, second_DU))
        # A copy: a graph writes its answer to the same place in every step, and the backbone's may take it as well.
        return compiled(first_BCHW, there_DB, second_UCHW, there_DU).clone()

    batches.make_views = make
    try:
        yield
    finally:
        batches.make_views = uncompiled


def _mode(asked: Compile) -> str | None:
    return None if asked == "default" else asked


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
