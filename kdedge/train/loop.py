"""THE loop. Flat, from top to bottom, without callbacks.

Rules for how a stage starts: a sound checkpoint of this stage is resumed; a damaged one is passed over for the one
before it; without any the stage starts at step 0. Everything random in a step follows from (seed, stage, step), so a
resumed run ends with the same weights, bit for bit, as one that was never stopped.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from kdedge.data.batches import Batches, step_seed
from kdedge.errors import RunError
from kdedge.methods.health import COUNTS, SliceHealth, Tally
from kdedge.methods.step import Method
from kdedge.models.ema import Ema
from kdedge.models.zoo import Network
from kdedge.train.checkpoint import Checkpoint, Checkpoints
from kdedge.train.due import due
from kdedge.train.engine import EngineConfig, EnginePlan, as_planned, prepare, using
from kdedge.train.metrics import MetricsLog
from kdedge.train.optim import OptimConfig, learning_rate, make_optimizer, set_batch_norm_momentum

__all__ = ["fit"]

_EVALUATIONS = 10  # of a stage, with a validation split
_WATCHES = 20  # of a stage, for a collapse of its pseudo labels


def fit(
    method: Method,
    batches: Batches,
    optim: OptimConfig,
    engine: EngineConfig,
    plan: EnginePlan,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    *,
    seed: int,
    validate: Callable[[Network], SliceHealth] | None = None,
    class_names: Sequence[str] = (),
) -> tuple[Network, float]:
    """Train `method.network` for `optim.total_steps`; its moving average, in eval mode, and the seconds that took.

    The seconds of a run that was resumed are those of all its parts, up to the checkpoints they left.

    With `validate` (on the validation split) the most accurate average seen at an evaluation is returned, otherwise
    the last one. `class_names` are for what is said only. Raises RunError where the loss is no longer finite.
    """
    total, stage = _resolved(optim.total_steps), checkpoints.stage
    device = next(method.parameters()).device

    # ---- set up
    as_planned(method, plan).train()
    set_batch_norm_momentum(method.network, _resolved(optim.batch_norm_momentum))
    optimizer = make_optimizer(
        method, _resolved(optim.learning_rate), _resolved(optim.momentum), _resolved(optim.weight_decay)
    )
    ema = Ema(method.network, _resolved(optim.ema_decay))
    best: dict[str, Any] = {"accuracy": -1.0, "weights": None}
    tally = Tally(method.network.head.out_features, device)
    labeled_K = torch.bincount(batches.pool.labels.cpu(), minlength=method.network.head.out_features)

    # ---- resume
    checkpoint, notes = checkpoints.load()
    for note in notes:
        metrics.display.say(note)
    first = 0 if checkpoint is None else _restore(checkpoint, method, optimizer, ema, best, tally)
    began_at_s = time.perf_counter() - (0.0 if checkpoint is None else checkpoint.header["elapsed_s"])
    metrics.rewind(stage, first)
    metrics.display.stage(stage, total)
    saved_at_s = logged_at_s = time.perf_counter()
    logged_step, waited_s = first, 0.0

    # ---- train
    with using(plan, device):
        for step in range(first, total):
            torch.manual_seed(step_seed(seed, stage, "network", step))  # dropout

            # batch
            asked_at_s = time.perf_counter()
            batch = batches.at(step)
            batch = dataclasses.replace(batch, images=prepare(batch.images, plan))
            waited_s += time.perf_counter() - asked_at_s

            # forward, backward
            result = method(batch)
            optimizer.zero_grad(set_to_none=True)
            result.loss.backward()

            # update
            rate = learning_rate(step, total, _resolved(optim.learning_rate), _resolved(optim.warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            ema.update(step)
            tally.add(result.logs)
            done = step + 1

            if due(done, engine.log_every_steps, total):
                _check_finite(result.loss, stage, step, rate)
                now_s = time.perf_counter()
                metrics.write(
                    stage,
                    done,
                    total_steps=total,
                    loss=result.loss,
                    lr=rate,
                    images_per_second=batches.images_per_step * (done - logged_step) / (now_s - logged_at_s),
                    loader_wait_fraction=waited_s / (now_s - logged_at_s),
                    **{name: value for name, value in result.logs.items() if name != COUNTS},
                    **tally.line(),
                )
                logged_at_s, logged_step, waited_s = now_s, done, 0.0

            if due(done, max(total // _WATCHES, 1), total):
                for alarm in tally.alarms(labeled_K, len(batches.pool.unlabeled), done / total, class_names):
                    metrics.write(stage, done, total_steps=total, alarm=alarm.sentence)
                    metrics.display.say(f"Stage {stage}, step {done} of {total}: {alarm.sentence}")

            if validate is not None and due(done, max(total // _EVALUATIONS, 1), total):
                checked = validate(ema.network)
                metrics.write(stage, done, total_steps=total, val_accuracy=checked.accuracy, **checked.logs)
                if checked.accuracy >= best["accuracy"]:  # of equals the later one: it has seen more
                    best.update(accuracy=checked.accuracy, weights=_copied(ema.network))

            if done < total and time.perf_counter() - saved_at_s >= engine.checkpoint_every_s:
                _check_finite(result.loss, stage, step, rate)
                _save(checkpoints, done, method, optimizer, ema, best, tally, time.perf_counter() - began_at_s)
                saved_at_s = time.perf_counter()

    if best["weights"] is not None:
        ema.network.load_state_dict(best["weights"])
    return ema.network, time.perf_counter() - began_at_s


Value = TypeVar("Value")


def _resolved(value: Value | None) -> Value:
    if value is None:
        raise ValueError("the optimizer's settings have not been resolved (kdedge.recipe.resolve)")
    return value


def _check_finite(loss: torch.Tensor, stage: str, step: int, rate: float) -> None:
    if not torch.isfinite(loss):
        raise RunError(
            f"The loss of stage {stage} became {loss.item()} at step {step} with learning rate {rate:.4g}. "
            "The last checkpoint is kept. Lower the stage's optim.learning_rate."
        )


def _copied(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _save(
    checkpoints: Checkpoints,
    step: int,
    method: Method,
    optimizer: torch.optim.SGD,
    ema: Ema,
    best: dict[str, Any],
    tally: Tally,
    elapsed_s: float,
) -> None:
    tensors = {f"method.{name}": tensor for name, tensor in method.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.network.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in (best["weights"] or {}).items()}
    for index, state in optimizer.state_dict()["state"].items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{index}"] = state["momentum_buffer"]
    tensors |= {f"tally.{name}": tensor for name, tensor in tally.tensors.items()}
    checkpoints.save(step, tensors, best_accuracy=best["accuracy"], alarmed=tally.alarmed, elapsed_s=elapsed_s)


def _restore(
    checkpoint: Checkpoint,
    method: Method,
    optimizer: torch.optim.SGD,
    ema: Ema,
    best: dict[str, Any],
    tally: Tally,
) -> int:
    """Put everything back where it was after `checkpoint.step` steps."""

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {n.removeprefix(prefix): t for n, t in checkpoint.tensors.items() if n.startswith(prefix)}

    method.load_state_dict(part("method."))
    ema.network.load_state_dict(part("ema."))
    state = optimizer.state_dict()
    state["state"] = {int(index): {"momentum_buffer": tensor} for index, tensor in part("momentum.").items()}
    optimizer.load_state_dict(state)
    best.update(accuracy=checkpoint.header["best_accuracy"], weights=part("best.") or None)
    tally.restore(part("tally."), checkpoint.header["alarmed"])
    return checkpoint.step
