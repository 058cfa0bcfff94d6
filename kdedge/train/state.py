"""What moves while a stage is trained: the method, its optimizer, its average. All that a checkpoint holds."""

from typing import Any, TypeVar, final

import torch
from torch import Tensor

from kdedge.methods.health import Tally
from kdedge.methods.step import Method
from kdedge.models.ema import Ema
from kdedge.models.zoo import Network
from kdedge.train.checkpoint import Checkpoint
from kdedge.train.engine import EnginePlan, as_planned
from kdedge.train.optim import OptimConfig, learning_rate, make_optimizer, set_batch_norm_momentum
from kdedge.train.parts import in_parts

__all__ = ["State"]


@final
class State:
    """A stage at one step. Whatever else a step needs follows from (seed, stage, step)."""

    def __init__(self, method: Method, optim: OptimConfig, plan: EnginePlan) -> None:
        """At step 0, as the plan has it. ValueError where the optimizer's settings are not resolved."""
        self.method, self.optim = method, optim
        self.total_steps = _resolved(optim.total_steps)
        self.device = next(method.parameters()).device
        as_planned(method, plan).train()
        set_batch_norm_momentum(method.network, _resolved(optim.batch_norm_momentum))
        self.optimizer = make_optimizer(
            method,
            _resolved(optim.learning_rate),
            _resolved(optim.momentum),
            _resolved(optim.weight_decay),
            optim.optimizer or "sgd",
            fused=plan.update == "fused",
        )
        self.ema = Ema(method.network, _resolved(optim.ema_decay))
        self.ema.network.compute = None  # an evaluation keeps no activations
        for module in method.modules():
            if isinstance(module, Network):
                module.compute = in_parts(plan.parts) if plan.parts > 1 else None
        self.best_accuracy, self.best_weights = -1.0, dict[str, Tensor]()
        self.tally = Tally(method.network.head.out_features, self.device)

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        optim = self.optim
        peak, warmup_steps = _resolved(optim.learning_rate), _resolved(optim.warmup_steps)
        return learning_rate(step, self.total_steps, peak, warmup_steps, optim.schedule or "fixmatch")

    def update(self, step: int) -> None:
        """Descend the gradients that are there, and let the average follow."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        self.ema.update(step)

    def judge(self, accuracy: float) -> None:
        """Keep the average's weights where they are the most accurate; of equals the later ones: they saw more."""
        if accuracy >= self.best_accuracy:
            self.best_accuracy = accuracy
            self.best_weights = {name: tensor.clone() for name, tensor in self.ema.network.state_dict().items()}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds, as it is now: not copied."""
        tensors = {f"method.{name}": tensor for name, tensor in self.method.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.network.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            if state.get("momentum_buffer") is not None:
                tensors[f"momentum.{index}"] = state["momentum_buffer"]
        return tensors | {f"tally.{name}": tensor for name, tensor in self.tally.tensors.items()}

    def header(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors."""
        return {"best_accuracy": self.best_accuracy, "alarmed": self.tally.alarmed}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Put everything back where it was after `checkpoint.step` steps."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}

        self.method.load_state_dict(part("method."))
        self.ema.network.load_state_dict(part("ema."))
        state = self.optimizer.state_dict()
        # In the parameters' own memory format, which a file does not keep.
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state["state"] = {
            int(index): {"momentum_buffer": torch.empty_like(parameters[int(index)]).copy_(tensor)}
            for index, tensor in part("momentum.").items()
        }
        self.optimizer.load_state_dict(state)
        self.best_accuracy, self.best_weights = checkpoint.header["best_accuracy"], part("best.")
        self.tally.restore(part("tally."), checkpoint.header["alarmed"])


Value = TypeVar("Value")


def _resolved(value: Value | None) -> Value:
    if value is None:
        raise ValueError("the optimizer's settings have not been resolved (kdedge.recipe.resolve)")
    return value
