"""Which plan computes a step fastest, on this machine, for this method and batch."""

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Literal

import torch

from kdedge.data.batches import Batch, Batches
from kdedge.methods.step import Method
from kdedge.train.engine import EnginePlan, arranged, as_planned, available_cores, prepare, using

__all__ = ["measure_plan"]

Timings = list[dict[str, object]]

_BUDGET_S = 1.0  # a candidate, after its first step
_REPEATS = 5
_FEWER_THREADS_PAY = 0.9  # of the time with all: another program that runs just now must not decide for a whole run


def measure_plan(
    method: Method, batches: Batches, device: torch.device, *, deterministic: bool = False
) -> tuple[EnginePlan, Timings]:
    """The fastest plan for this method and batch, and the milliseconds of each candidate.

    First memory format and layers with all cores; then fewer threads, and bf16 where the hardware has it; then, on a
    GPU, torch.compile; last the update. Candidates take turns, so that whatever else the machine does meets all of
    them; and what takes as many threads of a CPU is judged by the CPU's time, from which that is left out. The method
    is copied: measuring changes neither its weights nor its statistics.
    """
    batch, timings = batches.at(0), Timings()
    start = EnginePlan(threads=available_cores(), deterministic=deterministic)
    last = start.model_copy(update={"memory_format": "channels-last"})
    formats = [start, last, last.model_copy(update={"layers": "own"})]  # which are for a CPU
    plan = _fastest(method, batch, formats if device.type == "cpu" else formats[:2], device, timings)
    plan = _fastest(method, batch, [plan, *_fewer_threads_and_bf16(plan, device)], device, timings)
    plan = _fastest(method, batch, [plan, *_compiled(method, batch, plan, device, timings)], device, timings)
    return plan.model_copy(update={"update": _update(method, plan, device, timings)}), timings


def _fewer_threads_and_bf16(plan: EnginePlan, device: torch.device) -> list[EnginePlan]:
    fewer = device.type == "cpu" and plan.threads > 1
    return [
        *([plan.model_copy(update={"threads": plan.threads // 2})] if fewer else []),
        *([plan.model_copy(update={"precision": "bf16"})] if _bf16_pays(device) else []),
    ]


def _bf16_pays(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())


def _compiled(
    method: Method, batch: Batch, plan: EnginePlan, device: torch.device, timings: Timings
) -> list[EnginePlan]:
    """`plan` compiled in the two modes, where that works; what does not is noted in `timings`.

    None on a CPU, where it takes more than a minute and the layers of this package gain more; none for a deterministic
    plan, since the compiler chooses among kernels by their times; none where several processes share a batch.
    """
    if device.type != "cuda" or plan.deterministic or torch.distributed.is_initialized():
        return []
    working = []
    for mode in ("default", "reduce-overhead"):
        candidate = plan.model_copy(update={"compile": mode})
        try:
            with ExitStack() as stack:
                _steps(method, batch, candidate, device, stack)()
        except RuntimeError as error:  # what torch.compile raises is one
            timings.append(candidate.model_dump() | {"failed": str(error).strip().partition("\n")[0]})
        else:
            working.append(candidate)
    return working


def _fastest(
    method: Method, batch: Batch, plans: Sequence[EnginePlan], device: torch.device, timings: Timings
) -> EnginePlan:
    """Of `plans` the one with the fastest step. Fewer threads than the first one's must gain a tenth."""
    if len(plans) == 1:
        return plans[0]
    alike = device.type == "cpu" and len({plan.threads for plan in plans}) == 1
    with ExitStack() as stack:
        found_s = _in_turns([_steps(method, batch, plan, device, stack) for plan in plans], _clock(cpu=alike))
    timings += [
        plan.model_dump() | {"step_ms": round(1e3 * step_s, 2), "of": "cpu" if alike else "clock"}
        for plan, step_s in zip(plans, found_s, strict=True)
    ]
    worth = [1 if plan.threads >= plans[0].threads else 1 / _FEWER_THREADS_PAY for plan in plans]
    return plans[min(range(len(plans)), key=lambda place: found_s[place] * worth[place])]


def _steps(
    method: Method, batch: Batch, plan: EnginePlan, device: torch.device, stack: ExitStack
) -> Callable[[], None]:
    """A forward and backward pass of a copy of the method, to be called again and again within `stack`."""
    trial = as_planned(copy.deepcopy(method), plan).train()
    stack.enter_context(arranged([trial], plan))
    ready = dataclasses.replace(batch, images=prepare(batch.images, plan))

    def step() -> None:
        trial.zero_grad(set_to_none=True)
        with using(plan, device):
            trial(ready).loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step


def _update(method: Method, plan: EnginePlan, device: torch.device, timings: Timings) -> Literal["foreach", "fused"]:
    """Whichever updates the parameters faster."""
    updates = [_updates(method, plan, device, fused=fused) for fused in (False, True)]
    with using(plan, device):
        foreach_s, fused_s = _in_turns(updates, _clock(cpu=device.type == "cpu"))
    timings += [
        {"update": name, "update_ms": round(1e3 * update_s, 3)}
        for name, update_s in (("foreach", foreach_s), ("fused", fused_s))
    ]
    return "fused" if fused_s < foreach_s else "foreach"


def _updates(method: Method, plan: EnginePlan, device: torch.device, *, fused: bool) -> Callable[[], None]:
    parameters = [p for p in as_planned(copy.deepcopy(method), plan).parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, foreach=not fused, fused=fused)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def update() -> None:
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return update


def _clock(*, cpu: bool) -> Callable[[], float]:
    """Seconds that the CPU worked for this process, in all its threads, or that passed."""
    return time.process_time if cpu else time.perf_counter


def _in_turns(works: Sequence[Callable[[], None]], clock: Callable[[], float]) -> list[float]:
    """The fastest seconds of each, round by round, after one call each that is not counted."""
    for work in works:
        work()
    fastest_s, started_at_s = [float("inf")] * len(works), time.perf_counter()
    for _ in range(_REPEATS):
        for place, work in enumerate(works):
            before_s = clock()
            work()
            fastest_s[place] = min(fastest_s[place], clock() - before_s)
        if time.perf_counter() - started_at_s > _BUDGET_S * len(works):
            break
    return fastest_s
