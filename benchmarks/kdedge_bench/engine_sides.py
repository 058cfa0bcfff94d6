"""One side of the race of steps (`kdedge_bench.engine_race`): a process that does steps when told to.

python -m kdedge_bench.engine_sides --side ours --network mobilenet-v2 --halvings 5

It writes one line of JSON when it is ready; then, for each line with a number of seconds that it reads, it does steps
for at least as long and writes how many they were and how long they took. A side has a process of its own, since memory
allocators, thread pools and loader processes are those of a process.

B labeled images, U unlabeled images, C channels, H and W pixels.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from kdedge.data.batches import Batches, Pool
from kdedge.data.store import Resident
from kdedge.data.views import ViewConfig
from kdedge.methods.fixmatch import FixMatch, FixMatchConfig
from kdedge.methods.thresholds import make_policy
from kdedge.models.zoo import ModelSpec, Network, build
from kdedge.train.engine import EnginePlan, arranged, prepare, using
from kdedge.train.fastest import measure_plan
from kdedge.train.optim import OptimConfig
from kdedge.train.state import State
from kdedge_bench.engine_published import published_step

__all__ = ["PX", "SIDES", "fixmatch_on_pictures", "main", "make_side", "parser", "pictures", "state_of"]

CLASSES, PX = 10, 32
_IMAGES = 4000
_ALWAYS = contextlib.ExitStack()  # what lasts as long as this process, which does nothing but steps
_STEPS = 2**20  # of the schedule; a race ends long before
_OPTIM = OptimConfig(
    total_steps=_STEPS,
    learning_rate=0.03,
    warmup_steps=0,
    momentum=0.9,
    weight_decay=5e-4,
    ema_decay=0.999,
    batch_norm_momentum=0.1,
)
_VIEWS = ViewConfig(
    flip=True,
    shift_fraction=0.125,
    rotate_degrees=30.0,
    shear=0.3,
    translate_fraction=0.3,
    cutout_fraction=0.5,
    fill=127.0,
    geometric_only=False,
)

Side = tuple[Callable[[], object], dict[str, Any]]  # a step, and what is told of it


def pictures(count: int = _IMAGES) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """uint8 [count, 32, 32, 3], shades and edges of three scales, and labels: speed does not ask what is on them."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(count, 3, cells, cells, generator=generator) for cells in (4, 8, 32)]
    mixed = torch.stack([functional.interpolate(x, (PX, PX), mode="bilinear") for x in layers]).mean(0)
    return (mixed * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy(), np.arange(count) % CLASSES


def fixmatch_on_pictures(
    network: str, halvings: int, labeled: int, ratio: int, device: torch.device
) -> tuple[FixMatch, Batches]:
    """FixMatch on pictures of which every tenth is labeled, on `device`, and its batches."""
    images, labels = pictures()
    pool = Pool(
        images=Resident(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().to(device)),
        labeled=torch.arange(0, len(images), 10, device=device),
        labels=torch.from_numpy(labels[::10].copy()).to(device),
        unlabeled=torch.arange(len(images), device=device),
        truth=torch.from_numpy(labels).to(device),
        mean=torch.full((3, 1, 1), 0.47, device=device),
        std=torch.full((3, 1, 1), 0.25, device=device),
    )
    batches = Batches(pool, _VIEWS, labeled_batch=labeled, unlabeled_batch=labeled * ratio, seed=0, stage="race")
    return _fixmatch(_network(network, halvings)).to(device), batches


def _network(name: str, halvings: int) -> Network:
    torch.manual_seed(0)
    return build(ModelSpec(name, CLASSES, halvings=halvings))


def _fixmatch(network: Network) -> FixMatch:
    config = FixMatchConfig()
    return FixMatch(network, config, make_policy(config.thresholds, CLASSES, _IMAGES))


def state_of(method: FixMatch, plan: EnginePlan) -> State:
    """The method with FixMatch's optimizer and average."""
    return State(method, _OPTIM, plan)


def _ours(options: argparse.Namespace, device: torch.device) -> Side:
    """The step of kdedge.train.loop: batch, forward, backward, optimizer, average."""
    method, batches = fixmatch_on_pictures(options.network, options.halvings, options.labeled, options.ratio, device)
    plan = _plan(method, batches, device, options)
    state, at = state_of(method, plan), iter(range(_STEPS))
    _ALWAYS.enter_context(arranged([method], plan))

    def step() -> None:
        number = next(at)
        with using(plan, device):
            batch = batches.at(number)
            result = method(dataclasses.replace(batch, images=prepare(batch.images, plan)))
            state.optimizer.zero_grad(set_to_none=True)
            result.loss.backward()
            state.update(number)
            state.tally.add(result.logs)

    return step, {"plan": plan.model_dump()}


def _plan(method: FixMatch, batches: Batches, device: torch.device, options: argparse.Namespace) -> EnginePlan:
    """The one given, or else the one measured; with the precision and the threads that are raced."""
    if options.plan is None:
        plan, _ = measure_plan(method, batches, device)
    else:
        plan = EnginePlan.model_validate_json(options.plan)
    return plan.model_copy(update={"precision": options.precision, "threads": options.threads})


def _supervised(options: argparse.Namespace, device: torch.device) -> Side:
    """A plain step on as many images, which lie there ready: forward, backward, optimizer. With the plan of `ours`."""
    plan = EnginePlan() if options.plan is None else EnginePlan.model_validate_json(options.plan)
    images, labels = (torch.from_numpy(each[: options.labeled * (1 + 2 * options.ratio)]) for each in pictures())
    x_BCHW = prepare(((images.permute(0, 3, 1, 2) / 255 - 0.47) / 0.25).to(device), plan)
    labels_B = labels.to(device)
    network = _network(options.network, options.halvings).to(device)
    state = state_of(_fixmatch(network), plan)
    _ALWAYS.enter_context(arranged([network], plan))

    def step() -> None:
        with using(plan, device):
            loss = functional.cross_entropy(network(x_BCHW).float(), labels_B)
            state.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            state.optimizer.step()

    return step, {"plan": plan.model_dump()}


def _published(options: argparse.Namespace, device: torch.device) -> Side:
    step = published_step(
        _network(options.network, options.halvings),
        *pictures(),
        labeled=options.labeled,
        ratio=options.ratio,
        workers=options.workers,
        device=device,
        bf16=options.precision == "bf16",
    )
    return step, {"workers": f"{options.workers} for labeled, {options.workers} for unlabeled images"}


def _semilearn(options: argparse.Namespace, device: torch.device) -> Side:
    from kdedge_bench.engine_semilearn import semilearn_step

    return semilearn_step(_network(options.network, options.halvings), *pictures(), options, device)


SIDES: dict[str, Callable[[argparse.Namespace, torch.device], Side]] = {
    "ours": _ours,
    "supervised": _supervised,
    "published": _published,
    "semilearn": _semilearn,
}


def make_side(options: argparse.Namespace) -> Side:
    """A step of `options.side`, and what is told of it."""
    torch.set_num_threads(options.threads)
    return SIDES[options.side](options, torch.device(options.device))


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.engine_sides", description=__doc__)
    flags.add_argument("--side", choices=SIDES, required=True)
    flags.add_argument("--network", default="mobilenet-v2")
    flags.add_argument("--halvings", type=int, default=5)
    flags.add_argument("--labeled", type=int, default=64)
    flags.add_argument("--ratio", type=int, default=7, help="unlabeled images for each labeled one")
    flags.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--workers", type=int, default=2, help="of each loader of a peer")
    flags.add_argument("--plan", metavar="JSON", help="of ours, which measures it unless it is given; and supervised's")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Get ready, then do steps on request until standard input ends."""
    options = parser().parse_args(arguments)
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # a peer prints
        step, told = make_side(options)
        step()
        print(json.dumps(told | {"torch": torch.__version__}), file=answers, flush=True)
        for line in sys.stdin:
            steps, started_at_s = 0, time.perf_counter()
            while steps == 0 or time.perf_counter() - started_at_s < float(line):
                step()
                steps += 1
                if options.device.startswith("cuda"):
                    torch.cuda.synchronize()
            elapsed_s = time.perf_counter() - started_at_s
            print(json.dumps({"steps": steps, "elapsed_s": elapsed_s}), file=answers, flush=True)


if __name__ == "__main__":
    main()
