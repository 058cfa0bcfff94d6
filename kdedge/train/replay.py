"""A lost step once more, from the last checkpoint, looked at closely. Nothing is written."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdedge.data.batches import Batches, step_seed
from kdedge.errors import RunError
from kdedge.methods.step import Method
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.engine import EnginePlan, arranged, prepare, using
from kdedge.train.guard import gradient_norm, numbers, terms_of, weights_norm
from kdedge.train.optim import OptimConfig
from kdedge.train.state import State

__all__ = ["Replay", "replay"]

_NAMED = 5  # modules and parameters in a sentence


@dataclass(frozen=True)
class Replay:
    """What the last step looked at was like; it is the first lost one, or, with `lost` empty, the last asked for.

    `step` counts from 1, as metrics.jsonl does. `modules` are those whose outputs were not finite, in the order in
    which they finished; `gradients` are the parameters whose gradients were not. `position_B` and `position_U` are
    the places of its images in splits.json's list of unlabeled images.
    """

    stage: str
    began_after_step: int
    step: int
    lost: tuple[str, ...]  # of "loss", "gradient", "weights"
    learning_rate: float
    terms: dict[str, float | str]
    modules: tuple[str, ...]
    gradients: tuple[str, ...]
    position_B: tuple[int, ...]
    position_U: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def sentences(self) -> list[str]:
        """For a person."""
        terms = ", ".join(f"{name} {value}" for name, value in self.terms.items())
        told = [
            f"Stage {self.stage}, replayed after step {self.began_after_step}, step {self.step}: "
            + (f"{' and '.join(self.lost)} not finite." if self.lost else "everything is finite."),
            f"Learning rate {self.learning_rate:.4g}, {terms}.",
        ]
        if self.modules:
            told.append(f"Outputs that were not finite, first: {_named(self.modules)}.")
        if self.gradients:
            told.append(f"Gradients that were not finite: {_named(self.gradients)}.")
        return told


def replay(
    method: Method,
    batches: Batches,
    optim: OptimConfig,
    plan: EnginePlan,
    checkpoints: Checkpoints,
    *,
    seed: int,
    to_step: int,
) -> Replay:
    """Train on from the last checkpoint and stop at the first step, of up to `to_step`, that loses something.

    `method` is made as for `kdedge.train.loop.fit`, which computed the same: everything random in a step follows from
    (seed, stage, step). Raises RunError where the last checkpoint is of `to_step` or later.
    """
    state, stage = State(method, optim, plan), checkpoints.stage
    checkpoint, _ = checkpoints.load()
    if checkpoint is not None:
        state.restore(checkpoint)
    first = 0 if checkpoint is None else checkpoint.step
    if first >= to_step:
        raise RunError(
            f"The last checkpoint of stage {stage} is of step {first}, and step {to_step} was to be replayed. "
            "Expected one before it; the run has gone past that step since. There is nothing to replay."
        )
    with using(plan, state.device), arranged([method], plan, batches), _outputs(method) as outputs:
        for step in range(first, to_step):
            outputs.clear()
            torch.manual_seed(step_seed(seed, stage, "network", step))
            batch = batches.at(step)
            result = method(dataclasses.replace(batch, images=prepare(batch.images, plan)))
            state.optimizer.zero_grad(set_to_none=True)
            result.loss.backward()
            norm = gradient_norm(method)
            gradients = _not_finite({n: p.grad for n, p in method.named_parameters() if p.grad is not None})
            state.update(step)
            looked_at = {"loss": result.loss, "gradient": norm, "weights": weights_norm(method)}
            lost = tuple(what for what, value in looked_at.items() if not torch.isfinite(value))
            if lost or step + 1 == to_step:
                break
    return Replay(
        stage=stage,
        began_after_step=first,
        step=step + 1,
        lost=lost,
        learning_rate=state.rate(step),
        terms=numbers(terms_of(result) | {"gradient_norm": norm}),
        modules=tuple(dict.fromkeys(name for name, finite in outputs if not finite)),
        gradients=gradients,
        position_B=tuple(batch.position_B.tolist()),
        position_U=tuple(batch.position_U.tolist()),
    )


def _named(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _not_finite(tensors: dict[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))


@contextmanager
def _outputs(method: nn.Module) -> Iterator[list[tuple[str, Tensor]]]:
    """Name and finiteness of every module's output, as they finish, inside the block."""
    found: list[tuple[str, Tensor]] = []

    def note(name: str, _: nn.Module, __: object, output: object) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            found.append((name, torch.isfinite(output).all()))

    handles = [module.register_forward_hook(partial(note, name)) for name, module in method.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
