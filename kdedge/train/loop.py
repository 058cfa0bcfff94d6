"""THE loop. Flat, from top to bottom, without callbacks.

Rules for how a stage starts: a sound checkpoint of this stage is resumed; a damaged one is passed over for the one
before it; without any the stage starts at step 0. Everything random in a step follows from (seed, stage, step), so a
resumed run ends with the same weights, bit for bit, as one that was never stopped.

Rules for how it is left early: SIGTERM and Ctrl-C let the step end and save it; an error saves nothing more. Either
way what is being written is written to its end.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from kdedge.data.batches import Batches, step_seed
from kdedge.methods.health import COUNTS, SliceHealth
from kdedge.methods.step import Method
from kdedge.models.zoo import Network
from kdedge.runs import Run
from kdedge.train.checkpoint import Checkpoints
from kdedge.train.distributed import ALONE, Ranks
from kdedge.train.due import due
from kdedge.train.engine import EngineConfig, EnginePlan, arranged, as_planned, prepare, using
from kdedge.train.guard import Guard, gradient_norm
from kdedge.train.metrics import MetricsLog
from kdedge.train.optim import OptimConfig
from kdedge.train.pace import Pace, memory_peak
from kdedge.train.saving import Saver
from kdedge.train.state import State
from kdedge.train.stop import stop_asked

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
    watch: Callable[[Network], Mapping[str, float | None]] | None = None,
    class_names: Sequence[str] = (),
    ranks: Ranks = ALONE,
) -> tuple[Network, float]:
    """Train `method.network` for `optim.total_steps`; its moving average, in eval mode, and the seconds that took.

    The seconds of a run that was resumed are those of all its parts, up to the checkpoints they left.

    With `validate` (on the validation split) the most accurate average seen at an evaluation is returned, otherwise
    the last one. What `watch` says of an average is logged as often, and chooses nothing. `class_names` are for what is
    said only. Raises RunError where the loss is no longer finite or a checkpoint cannot be written, and
    KeyboardInterrupt, after saving, where SIGTERM or Ctrl-C came.

    `ranks` share every step: the share of `batches` is theirs, and of `checkpoints` and `metrics` one writes.
    """
    # ---- set up
    step_of = ranks.parallel(as_planned(method, plan))  # sends the first one's weights, so before they are copied
    state, stage = State(method, optim, plan), checkpoints.stage
    total, tally, device = state.total_steps, state.tally, state.device
    labeled_K = torch.bincount(batches.pool.labels.cpu(), minlength=method.network.head.out_features)

    # ---- resume
    checkpoint, notes = checkpoints.load()
    for note in notes:
        metrics.display.say(note)
    if checkpoint is not None:
        state.restore(checkpoint)
    first = 0 if checkpoint is None else checkpoint.step
    began_at_s = time.perf_counter() - (0.0 if checkpoint is None else checkpoint.header["elapsed_s"])
    metrics.rewind(stage, first)
    metrics.display.stage(stage, total)
    pace = Pace(stage, first, batches)

    # ---- train
    computing, sharing = arranged([method], plan, batches), ranks.sharing(method, batches.images_per_step)
    saving = Saver(checkpoints, engine.checkpoint_every_s)
    with stop_asked() as stop, using(plan, device), computing, sharing, saving as saver:
        run = Run(metrics.path.parent) if metrics.writes else None
        guard = Guard(stage, state, batches, run, first, lambda: max(first, saver.settled_step()))
        for step in range(first, total):
            torch.manual_seed(step_seed(seed, stage, "network", step))  # dropout

            done = step + 1
            logging = due(done, engine.log_every_steps, total)

            # batch
            with pace.waiting():
                batch = batches.at(step)
                batch = dataclasses.replace(batch, images=prepare(batch.images, plan))

            # forward, backward
            result = step_of(batch)
            state.optimizer.zero_grad(set_to_none=True)
            result.loss.backward()  # type: ignore[no-untyped-call]
            guard.see(result)
            norm = gradient_norm(method) if logging else None

            # update
            state.update(step)
            tally.add(result.logs)

            if logging:
                guard.check(done, norm=norm)
                metrics.write(
                    stage,
                    done,
                    total_steps=total,
                    loss=result.loss,
                    lr=state.rate(step),
                    gradient_norm=norm,
                    **pace.line(done),
                    **memory_peak(device),
                    checkpoint_blocked_fraction=saver.blocked_fraction,
                    **{name: value for name, value in result.logs.items() if name != COUNTS},
                    **tally.line(),
                )
                if slow := pace.slow_loader():
                    metrics.write(stage, done, total_steps=total, loader_wait=slow)
                    metrics.display.say(slow)

            if due(done, max(total // _WATCHES, 1), total):
                for alarm in tally.alarms(labeled_K, len(batches.pool.unlabeled), done / total, class_names):
                    metrics.write(stage, done, total_steps=total, alarm=alarm.sentence)
                    metrics.display.say(f"Stage {stage}, step {done} of {total}: {alarm.sentence}")
                if told := method.alarm(result, done / total):
                    metrics.write(stage, done, total_steps=total, alarm=told)
                    metrics.display.say(f"Stage {stage}, step {done} of {total}: {told}")

            if validate is not None and due(done, max(total // _EVALUATIONS, 1), total):
                checked = validate(state.ema.network)
                metrics.write(stage, done, total_steps=total, val_accuracy=checked.accuracy, **checked.logs)
                state.judge(checked.accuracy)
            if watch is not None and due(done, max(total // _EVALUATIONS, 1), total):
                metrics.write(stage, done, total_steps=total, **watch(state.ema.network))

            stopping = ranks.any(stop.asked)  # at the same step everywhere
            if stopping or (done < total and saver.due()):
                guard.check(done)
                saver.save(done, state.tensors(), **state.header(), elapsed_s=time.perf_counter() - began_at_s)
            if stopping:
                saver.wait()
                ranks.barrier()  # a launcher that sees one process end ends the others, the one that saves too
                raise KeyboardInterrupt

    if state.best_weights:
        state.ema.network.load_state_dict(state.best_weights)
    return state.ema.network, time.perf_counter() - began_at_s
