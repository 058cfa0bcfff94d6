"""A loss, a gradient or a weight that is no longer a number stops the run, and says where.

Steps are counted as in metrics.jsonl: step 1 is the first.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from kdedge.data.batches import Batches
from kdedge.errors import RunError
from kdedge.methods.step import Step
from kdedge.runs import SCHEMA, Run, write_json
from kdedge.train.state import State

__all__ = ["Guard", "gradient_norm", "numbers", "terms_of", "weights_norm"]


def gradient_norm(module: nn.Module) -> Tensor:
    """The Euclidean norm of all gradients. To be taken before the optimizer's step, which writes into them."""
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def weights_norm(module: nn.Module) -> Tensor:
    """The Euclidean norm of all weights and statistics: infinite, too, where they are beyond all use (1e20)."""
    return torch.nn.utils.get_total_norm(
        [t.detach() for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    )


def terms_of(result: Step) -> dict[str, Tensor]:
    """The loss and the scalars that are logged with it, on the device."""
    return {"loss": result.loss.detach()} | {name: value for name, value in result.logs.items() if value.ndim == 0}


def numbers(values: Mapping[str, Tensor | float]) -> dict[str, float | str]:
    """For JSON, which has no word for nan and inf: those as strings."""
    plain = {name: float(value) for name, value in values.items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in plain.items()}


@final
class Guard:
    """Knows the first step whose loss is not finite, without waiting for the device at each.

    It is noted there and looked at in `check`: when a line is logged and before a state is saved, so that no
    checkpoint holds what is lost.
    """

    def __init__(
        self, stage: str, state: State, batches: Batches, run: Run | None, first: int, kept_step: Callable[[], int]
    ) -> None:
        """`run` gets failure.json; None where another process writes. `first` steps are done.

        `kept_step` says of which step the newest checkpoint on the disk is.
        """
        self.stage, self.state, self.batches, self.run = stage, state, batches, run
        self.kept_step = kept_step
        self._sound = torch.ones((), dtype=torch.bool, device=state.device)
        self._sound_steps = torch.full((), first, device=state.device)
        self._names: list[str] = []
        self._terms: Tensor | None = None

    def see(self, result: Step) -> None:
        """Note the terms of one more step, until the first whose loss is lost."""
        terms = terms_of(result)
        self._names = list(terms)
        row = torch.stack([term.float() for term in terms.values()])
        self._terms = row if self._terms is None else torch.where(self._sound, row, self._terms)
        self._sound &= torch.isfinite(row[0])
        self._sound_steps += self._sound

    def check(self, step: int, *, norm: Tensor | None = None) -> None:
        """RunError where a loss up to `step` was lost, or `norm`, its gradient's, or the weights after it are."""
        terms = dict(zip(self._names, [] if self._terms is None else self._terms.tolist(), strict=True))
        if not bool(self._sound):
            bad = int(self._sound_steps) + 1
            raise self._lost(f"The loss of stage {self.stage} became {terms['loss']} at step {bad}", bad, terms)
        if norm is not None:
            if not bool(torch.isfinite(norm)):
                what = f"The gradient of stage {self.stage} had the norm {float(norm)} at step {step}"
                raise self._lost(what, step, terms | {"gradient_norm": float(norm)})
        elif not bool(torch.isfinite(weights_norm(self.state.method))):
            raise self._lost(f"The weights of stage {self.stage} were no longer finite after step {step}", step, terms)

    def _lost(self, what: str, step: int, terms: Mapping[str, float]) -> RunError:
        rate, kept_step, (position_B, position_U) = (
            self.state.rate(step - 1),
            self.kept_step(),
            self.batches.places(step - 1),
        )
        failure: dict[str, Any] = {
            "schema": SCHEMA,
            "what": what + ".",
            "stage": self.stage,
            "step": step,
            "total_steps": self.state.total_steps,
            "checkpoint_step": kept_step,
            "learning_rate": rate,
            "terms": numbers(terms),
            # Places in splits.json's list of unlabeled images.
            "positions": {"labeled": position_B.tolist(), "unlabeled": position_U.tolist()},
        }
        if self.run is not None:
            with contextlib.suppress(RunError):  # the disk is full as well: this error is the one to tell
                write_json(self.run.failure_path, failure)
        # Of processes that share a run the one that writes knows what is kept.
        kept = f" The checkpoint of step {kept_step} is kept, and failure.json names the images of that step."
        return RunError(
            f"{what} of {self.state.total_steps} with learning rate {rate:.4g}.{kept if self.run is not None else ''} "
            "Lower the stage's optim.learning_rate; to see where it begins, give the same command with --replay."
        )
