"""Which plan computes a step fastest, on this machine, for this method and batch."""

import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Literal

import torch

from kdedge.data.batches import Batches
from kdedge.data.views import ViewConfig
from kdedge.methods.step import Method
from kdedge.models.ema import Ema
from kdedge.train.engine import EnginePlan, arranged, as_planned, available_cores, prepare, using

__all__ = ["measure_plan"]

Timings = list[dict[str, object]]

_BUDGET_S = 1.0  # a candidate, after its first step
_REPEATS = 5
_IN_A_ROW = 4  # steps between two looks at a GPU's clock: training waits for it as seldom
_APART = 64  # steps from one candidate's to the next one's: each finds the images that a store read ahead for it
_FIRST_CALLS = 3  # of what is compiled: CUDA graphs are traced, recorded and replayed, and may fail in each
_FEWER_THREADS_PAY = 0.9  # of the time with all: another program that runs just now must not decide for a whole run


def measure_plan(
    method: Method, batches: Batches, device: torch.device, *, deterministic: bool = False
) -> tuple[EnginePlan, Timings]:
    """The fastest plan for this method and its batches, and the milliseconds of each candidate's step.

    First memory format and layers with all cores; then fewer threads, and bf16 where the hardware has it; then, on a
    GPU, torch.compile of the backbone and, with the faster of those, of the views; last the update. Candidates take
    turns, so that whatever else the machine does meets all of them; and what takes as many threads of a CPU is judged
    by the CPU's time, from which that is left out. The method is copied: measuring changes neither its weights nor its
    statistics.
    """
    timings = Timings()
    start = EnginePlan(threads=available_cores(), deterministic=deterministic)
    last = start.model_copy(update={"memory_format": "channels-last"})
    formats = [start, last, last.model_copy(update={"layers": "own"})]  # which are for a CPU
    plan = _fastest(method, batches, formats if device.type == "cpu" else formats[:2], device, timings)
    plan = _fastest(method, batches, [plan, *_fewer_threads_and_bf16(plan, device)], device, timings)
    for candidates in (_backbone_compiled, _views_compiled):
        plan = _fastest(method, batches, [plan, *candidates(plan, batches, device)], device, timings)
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


def _backbone_compiled(plan: EnginePlan, _: Batches, device: torch.device) -> list[EnginePlan]:
    """`plan` with the backbone compiled in the two modes.

    None on a CPU, where it takes more than a minute and the layers of this package gain more; none for a deterministic
    plan, since the compiler chooses among kernels by their times; none where several processes share a batch.
    """
    if device.type != "cuda" or plan.deterministic or torch.distributed.is_initialized():
        return []
    return [plan.model_copy(update={"compile": mode}) for mode in ("default", "reduce-overhead")]


def _views_compiled(plan: EnginePlan, batches: Batches, device: torch.device) -> list[EnginePlan]:
    """`plan` with the views compiled in the two modes; none where no backbone would be, or where views contrast."""
    if not _backbone_compiled(plan, batches, device) or not isinstance(batches.views, ViewConfig):
        return []
    return [plan.model_copy(update={"compile_views": mode}) for mode in ("default", "reduce-overhead")]


def _fastest(
    method: Method, batches: Batches, plans: Sequence[EnginePlan], device: torch.device, timings: Timings
) -> EnginePlan:
    """Of `plans` the one with the fastest step. Fewer threads than the first one's must gain a tenth.

    What does not compile is noted in `timings` and left out.
    """
    if len(plans) == 1:
        return plans[0]
    alike = device.type == "cpu" and len({plan.threads for plan in plans}) == 1
    with ExitStack() as stack:
        steps = dict[EnginePlan, Callable[[], None]]()
        for place, plan in enumerate(plans):
            with ExitStack() as own:
                work = _steps(method, batches, plan, device, own, _APART * place)
                if (plan.compile, plan.compile_views) != (plans[0].compile, plans[0].compile_views):
                    try:
                        for _ in range(_FIRST_CALLS):
                            work()
                    except Exception as error:  # of a compiler, of kernels, of memory: training goes on without
                        timings.append(plan.model_dump() | {"failed": str(error).strip().partition("\n")[0]})
                        continue  # and what it held is let go
                stack.enter_context(own.pop_all())
                steps[plan] = work
        found_s = _in_turns(list(steps.values()), _clock(cpu=alike))
    in_a_row = _steps_in_a_row(device)
    timings += [
        plan.model_dump() | {"step_ms": round(1e3 * turn_s / in_a_row, 2), "of": "cpu" if alike else "clock"}
        for plan, turn_s in zip(steps, found_s, strict=True)
    ]
    worth = [1 if plan.threads >= plans[0].threads else 1 / _FEWER_THREADS_PAY for plan in steps]
    return list(steps)[min(range(len(steps)), key=lambda place: found_s[place] * worth[place])]


def _steps_in_a_row(device: torch.device) -> int:
    return _IN_A_ROW if device.type == "cuda" else 1


def _steps(
    method: Method, batches: Batches, plan: EnginePlan, device: torch.device, stack: ExitStack, first: int = 0
) -> Callable[[], None]:
    """Whole steps from `first` on of a copy of the method, as training computes them, to be called again and again
    within `stack`.
    """
    trial = as_planned(copy.deepcopy(method), plan).train()
    average, optimizer = Ema(trial.network, 0.0), _optimizer(trial, fused=plan.update == "fused")
    ahead, at = copy.copy(batches), itertools.count(first)  # a copy: other candidates make their views in other ways
    stack.enter_context(arranged([trial], plan, ahead))

    def steps() -> None:
        for _ in range(_steps_in_a_row(device)):
            with using(plan, device):
                batch = ahead.at(next(at))
                result = trial(dataclasses.replace(batch, images=prepare(batch.images, plan)))
                optimizer.zero_grad(set_to_none=True)
                result.loss.backward()
                optimizer.step()
                average.update(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return steps


def _optimizer(method: Method, *, fused: bool) -> torch.optim.SGD:
    """Updates that take their time and, with a rate of 0, learn nothing."""
    parameters = [p for p in method.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9, nesterov=True, foreach=not fused, fused=fused)


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
    optimizer = _optimizer(as_planned(copy.deepcopy(method), plan), fused=fused)
    for parameter in optimizer.param_groups[0]["params"]:
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
