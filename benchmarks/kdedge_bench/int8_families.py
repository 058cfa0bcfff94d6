"""How well each family of the zoo takes INT8: its speed beside FP32, and how far the logits move, as one record.

python -m kdedge_bench.int8_families --out benchmarks/results/NAME/int8-families.json

Beside the families stands the geometric mean of the speed-ups of those that are students of the project's own tables.

The weights are random (batch normalisation has seen images, nothing has learned): speed does not depend on them, and
the distances compare families with each other, not with trained networks, which round far better.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kdedge import __version__
from kdedge.intervals import signed_rank
from kdedge.models.zoo import ARCHITECTURES, ModelSpec, architecture, build
from kdedge.runs import write_json
from kdedge_device.preprocess import Preprocess
from kdedge_device.record import load_average, machine, now
from kdedge_device.runners import OrtRunner
from kdedge_export.calibration.calibrate import calibrate
from kdedge_export.calibration.ranges import make_table, measured
from kdedge_export.cpu.cpu_form import cpu_form
from kdedge_export.cpu.lint import lint_float, lint_int8, require_clean
from kdedge_export.cpu.plan import make_plan
from kdedge_export.cpu.qdq import write_int8
from kdedge_export.float_form.onnx_export import export_float

__all__ = [
    "STUDENTS",
    "geometric_mean",
    "main",
    "measure_family",
    "settled",
    "smooth_images",
    "speed_ratio",
    "times_ms",
]

CLASSES = 1000
STUDENTS = ("mobilenet-v2", "mobilenet-v3-small", "mobilenet-v3-large", "efficientnet-b0", "resnet18", "shufflenet-v2")
IMAGES = 32  # to settle batch normalisation, again to calibrate, and others to compare
MIN_ROUNDS = 6  # below, no interval of 95 % can be told
SETTLE_S = 2.0  # of work before anything is timed: a cold core is not yet at its speed


def smooth_images(count: int, px: int, seed: int) -> npt.NDArray[np.uint8]:
    """uint8 [count, px, px, 3]: noise of three scales, each as strong, drawn large: edges and shades, no classes."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for cells in (4, 16, max(px // 4, 4)):
        noise = torch.rand(count, 3, cells, cells, generator=generator)
        layers.append(nn.functional.interpolate(noise, (px, px), mode="bilinear", align_corners=False))
    mixed = torch.stack(layers).mean(0)
    low, high = mixed.amin((1, 2, 3), keepdim=True), mixed.amax((1, 2, 3), keepdim=True)
    return np.asarray(((mixed - low) / (high - low) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


def measure_family(arch: str, px: int, *, rounds: int, queries: int) -> dict[str, Any]:
    """One family at its standard strides: FP32 and INT8 files made as `kdedge export` makes them (min-max), timed in
    turn in this process on one thread, batch 1, and compared on images that calibration has not seen.

    Each of `rounds` times both, `queries` times each; a round's ratio is that of its two medians.
    """
    preprocess = Preprocess(px, px, 3, "squash", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    seen, others = smooth_images(IMAGES, px, seed=0), smooth_images(IMAGES, px, seed=1)
    torch.manual_seed(0)
    network = settled(build(ModelSpec(arch, CLASSES, halvings=architecture(arch).halvings)), preprocess, seen)
    model = export_float(network, preprocess, [str(k) for k in range(CLASSES)])
    require_clean(lint_float(model), f"{arch} in FP32")
    form = cpu_form(model)
    plan = make_plan(form)
    table = make_table("minmax", form, plan, calibrate(form, measured(plan), seen, preprocess))
    int8 = write_int8(form, plan, table)
    require_clean(lint_int8(int8, frozenset(plan.kept_float)), f"{arch} in INT8")

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.onnx" for name in ("fp32", "int8")}
        for file, made in zip(files.values(), (model, int8), strict=True):
            file.write_bytes(made.SerializeToString())
        with OrtRunner(files["fp32"]) as fp32_runner, OrtRunner(files["int8"]) as int8_runner:
            batch = preprocess.normalize(others)
            fp32, found = (np.concatenate([r.run(x[None]) for x in batch]) for r in (fp32_runner, int8_runner))
            times = times_ms({"fp32": fp32_runner, "int8": int8_runner}, batch, rounds, queries)
        sizes = {name: file.stat().st_size for name, file in files.items()}
    return {
        "latency_ms": {name: float(np.median(values)) for name, values in times.items()},
        "speedup": speed_ratio(times),
        "same_class": float((fp32.argmax(1) == found.argmax(1)).mean()),
        "relative_rms": float(np.sqrt(np.mean((found - fp32) ** 2)) / fp32.std()),
        "bytes": sizes,
        "left_in_float": sorted({node.op_type for node in form.graph.node if node.name in plan.kept_float}),
    }


def speed_ratio(times_ms: Mapping[str, npt.NDArray[np.float64]]) -> dict[str, Any]:
    """FP32 over INT8 from times [rounds, queries]: the ratio of the two medians of each round, over rounds.

    `interval`: 95 %, of the pseudo-median of the rounds' logarithms by signed ranks (Hodges and Lehmann), which one
    disturbed round does not move; fewer than 6 rounds give none.
    """
    ratios = np.median(times_ms["fp32"], 1) / np.median(times_ms["int8"], 1)
    told = len(ratios) >= MIN_ROUNDS
    _, *ends = signed_rank([float(each) for each in np.log(ratios)]) if told else (0.0,)
    return {
        "median": float(np.median(ratios)),
        "min": float(ratios.min()),
        "max": float(ratios.max()),
        "interval": [float(np.exp(end)) for end in ends] or None,
    }


def geometric_mean(families: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Of the speed-ups of STUDENTS, a family that INT8 would slow down counted as 1: it ships in float."""
    if not set(families) >= set(STUDENTS):
        return None
    return float(np.exp(np.mean([np.log(max(1.0, families[name]["speedup"]["median"])) for name in STUDENTS])))


@torch.no_grad()
def settled(network: nn.Module, preprocess: Preprocess, images: npt.NDArray[np.uint8]) -> nn.Module:
    """In eval mode, its batch normalisation set by `images`, and nothing dropped."""
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
            module.reset_running_stats()
            module.train()
    for start in range(0, len(images), 8):
        network(torch.from_numpy(preprocess.normalize(images[start : start + 8])))
    return network.eval()


def times_ms(
    runners: Mapping[str, OrtRunner], batch: npt.NDArray[np.float32], rounds: int, queries: int
) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds [rounds, queries] of each runner. In turns, so that whatever slows the machine slows both."""
    until = time.perf_counter() + SETTLE_S
    while time.perf_counter() < until:
        for runner in runners.values():
            runner.run(batch[:1])
    times = {name: np.zeros((rounds, queries)) for name in runners}
    for round_ in range(rounds):
        for name, runner in runners.items():
            runner.run(batch[:1])  # the other one's weights leave the cache
            for query in range(queries):
                image = batch[query % len(batch)][None]
                begin = time.perf_counter_ns()
                runner.run(image)
                times[name][round_, query] = (time.perf_counter_ns() - begin) / 1e6
    return times


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.int8_families", description=__doc__)
    flags.add_argument("--families", nargs="+", default=list(ARCHITECTURES), help="all of the zoo unless given")
    flags.add_argument("--px", type=int, default=224)
    flags.add_argument("--rounds", type=int, default=9)
    flags.add_argument("--queries", type=int, default=30)
    flags.add_argument("--out", type=Path, required=True, help="the record")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every family and write the record; the machine should do nothing else meanwhile."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    before, families = load_average(), {}
    for arch in options.families:
        found = measure_family(arch, options.px, rounds=options.rounds, queries=options.queries)
        print(
            f"{arch}: INT8 {found['speedup']['median']:.2f} times as fast as FP32, {found}", file=sys.stderr, flush=True
        )
        families[arch] = found
    record = {
        "schema": 1,
        "command": " ".join(["python", "-m", "kdedge_bench.int8_families", *arguments]),
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "conditions": {
            "px": options.px,
            "threads": 1,
            "batch": 1,
            "rounds": options.rounds,
            "queries": options.queries,
            "weights": "random",
            "load_average": {"before": before, "after": load_average()},
        },
        "families": families,
        "students_geometric_mean": geometric_mean(families),
    }
    write_json(options.out, record)


if __name__ == "__main__":
    main()
