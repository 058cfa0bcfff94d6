"""Where the time of a FixMatch step goes, and how far the step is from what the machine could do, as one record.

python -m kdedge_bench.engine_profile --out benchmarks/results/NAME/engine-profile.json

Each part of the step is timed for itself, many steps over: views, forward, loss, backward, optimizer, average. The
machine's rates are measured in the same run: floating-point operations a second of its best matrix product and
convolution, bytes a second of a copy. From them follow two floors, each of which the step cannot be faster than: its
operations over the best rate, and the bytes of its maps over the copy's rate if every layer read and wrote its maps
once. `--memory returned` leaves freed memory to the C library, as any program does that says nothing of it.

What a GPU waits for is told by two more figures: the operations of each part (of a plan that compiles nothing), each
of which is a launch or a few, and the time of steps in a row, between which nobody waits for the device.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdedge import __version__
from kdedge.models.zoo import Network, architecture, count_macs
from kdedge.runs import write_json
from kdedge.train import engine
from kdedge.train.engine import EnginePlan, available_cores, pick_device
from kdedge_bench.engine_parts import by_part, wait_for
from kdedge_bench.engine_sides import PX, fixmatch_on_pictures
from kdedge_device.record import load_average, machine, now

__all__ = ["floors", "main", "map_bytes", "measured_rates", "parser", "profile"]

_FORWARD_AND_BACKWARD = 3  # a backward pass is two products for each of the forward pass


def profile(network: str, halvings: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds and shares of each part of a step: the medians of `options.steps`, after one that is not counted."""
    device = pick_device(options.device)
    method, batches = fixmatch_on_pictures(network, halvings, options.labeled, options.ratio, device)
    plan = EnginePlan(
        memory_format=options.format,
        layers=options.layers,
        threads=options.threads,
        precision=options.precision,
        update=options.update,
        compile=options.compile,
        compile_views=options.compile_views,
    )
    times_s, in_a_row_s, operations = by_part(method, batches, plan, device, options.steps)
    parts_ms = {part: 1e3 * statistics.median(each[-options.steps :]) for part, each in times_s.items()}
    step_ms = sum(parts_ms.values())
    return {
        "network": network,
        "halvings": halvings,
        "plan": plan.model_dump(),
        "labeled": options.labeled,
        "unlabeled": options.labeled * options.ratio,
        "step_ms": round(step_ms, 2),
        "step_in_a_row_ms": round(1e3 * in_a_row_s, 2),
        "unlabeled_images_per_second": round(1e3 * options.labeled * options.ratio / step_ms, 2),
        "parts_ms": {part: round(each, 2) for part, each in parts_ms.items()},
        "shares": {part: round(each / step_ms, 4) for part, each in parts_ms.items()},
        "operations": operations or None,
        "work": _work(method.network, batches.images_per_step),
    }


def _work(network: Network, images: int) -> dict[str, float]:
    """Operations and least bytes of forward and backward pass for all images of a step."""
    flops = 2 * count_macs(network, 3, PX, PX) * _FORWARD_AND_BACKWARD * images
    return {"gflop": round(flops / 1e9, 3), "gbyte": round(map_bytes(network, PX) * images / 1e9, 3)}


@torch.no_grad()
def map_bytes(network: nn.Module, px: int) -> int:
    """Bytes of maps that the layers read and write for one image, forward and backward, each map once a layer.

    Forward: the map that comes in, the one that goes out. Backward: the gradient of the second, the first again, and
    its gradient. Weights are left out: they are few beside the maps of a batch.
    """
    sizes: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        sizes.append(4 * (3 * inputs[0].numel() + 2 * output.numel()))

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(note) for leaf in leaves]
    was_training = network.training
    network.eval()(torch.zeros(1, 3, px, px, device=next(network.parameters()).device))
    network.train(was_training)
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def measured_rates(device: torch.device, side: int = 1536) -> dict[str, float]:
    """What this machine does at its best, with the threads set: a product, a convolution, a copy that fits no cache."""
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    maps = torch.randn(64, 64, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(64, 64, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    source = torch.randn(side * side * 16, device=device)
    target = torch.empty_like(source)
    product_s = _fastest_s(lambda: a @ b, device)
    convolution_s = _fastest_s(lambda: functional.conv2d(maps, kernel, padding=1), device)
    copy_s = _fastest_s(lambda: target.copy_(source), device)
    return {
        "matmul_gflops": round(2 * side**3 / product_s / 1e9, 1),
        "convolution_gflops": round(2 * 9 * 64 * maps.numel() / convolution_s / 1e9, 1),
        "copy_gbytes_per_second": round(2 * source.nbytes / copy_s / 1e9, 2),
    }


def _fastest_s(work: Callable[[], Any], device: torch.device) -> float:
    fastest_s = float("inf")
    for _ in range(9):
        started_at_s = time.perf_counter()
        work()
        wait_for(device)
        fastest_s = min(fastest_s, time.perf_counter() - started_at_s)
    return fastest_s


def floors(found: dict[str, Any], rates: dict[str, float]) -> dict[str, float]:
    """The least milliseconds of forward and backward pass by operations and by bytes, and how many times they took."""
    best_gflops = max(rates["matmul_gflops"], rates["convolution_gflops"])
    compute_ms = 1e3 * found["work"]["gflop"] / best_gflops
    memory_ms = 1e3 * found["work"]["gbyte"] / rates["copy_gbytes_per_second"]
    took_ms = found["parts_ms"]["forward"] + found["parts_ms"]["backward"]
    return {
        "by_operations_ms": round(compute_ms, 2),
        "by_bytes_ms": round(memory_ms, 2),
        "times_the_higher_floor": round(took_ms / max(compute_ms, memory_ms), 2),
        "times_both_in_turn": round(took_ms / (compute_ms + memory_ms), 2),
    }


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.engine_profile", description=__doc__)
    flags.add_argument("--networks", nargs="+", default=["mobilenet-v2", "mobilenet-v2:4", "wide-resnet-28-2"])
    flags.add_argument("--labeled", type=int, default=64)
    flags.add_argument("--ratio", type=int, default=7, help="unlabeled images for each labeled one")
    flags.add_argument("--steps", type=int, default=5)
    flags.add_argument("--device", default="auto")
    flags.add_argument("--threads", type=int, default=available_cores())
    flags.add_argument("--format", choices=("contiguous", "channels-last"), default="channels-last")
    flags.add_argument("--layers", choices=("torch", "own"), default="own")
    flags.add_argument("--update", choices=("foreach", "fused"), default="fused")
    flags.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    modes = ("none", "default", "reduce-overhead")
    flags.add_argument("--compile", choices=modes, default="none", help="mode of torch.compile for the backbone")
    flags.add_argument("--compile-views", choices=modes, default="none")
    flags.add_argument("--memory", choices=("kept", "returned"), default="kept", help="what a step frees")
    flags.add_argument("--out", type=Path, required=True, help="the record")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile the step of every network and write the record; the machine should do nothing else meanwhile."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.memory == "returned":
        engine._keep_freed_memory = lambda: None  # type: ignore[assignment]  # as before it was there
    torch.set_num_threads(options.threads)
    before, rates = load_average(), measured_rates(pick_device(options.device))
    found = []
    for asked in options.networks:
        network, _, halvings = asked.partition(":")  # NAME:4 keeps the last four halvings: a stem of stride 1
        one = profile(network, int(halvings or architecture(network).halvings), options)
        found.append(one | {"floors": floors(one, rates)})
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    record = {
        "schema": 1,
        "command": " ".join(["python", "-m", "kdedge_bench.engine_profile", *arguments]),
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "torch": torch.__version__,
        "conditions": {
            "steps": options.steps,
            "threads": options.threads,
            "freed_memory": options.memory,
            "load_average": {"before": before, "after": load_average()},
        },
        "rates": rates,
        "networks": found,
    }
    write_json(options.out, record)


if __name__ == "__main__":
    main()
