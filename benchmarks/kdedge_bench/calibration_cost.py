"""What calibration costs: our collection and our whole choice beside ONNX Runtime's calibrators, as one record.

python -m kdedge_bench.calibration_cost --out benchmarks/results/NAME/calibration-cost.json

Every way is measured in a process of its own, pinned to one processor, on one model and the same generated images; the
ways take turns, round by round. Seconds are those of the calibration alone; memory is the peak of the resident set, and
what of it came after the model was loaded and had run once. Then our collection alone runs over many images, which are
generated while they are read, since the promise is that memory does not depend on their number.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdedge import __version__
from kdedge.runs import write_json
from kdedge_bench.peak_memory import measured_apart, peak_mib
from kdedge_device.preprocess import Preprocess
from kdedge_device.record import load_average, machine, now

__all__ = ["WAYS", "Generated", "main", "measure", "parser"]

MODEL, DRAWN = "model.onnx", "images.npy"
CLASSES = 10
POOL = 64  # images that are drawn; the others are those, moved and lightened
Seconds = dict[str, float]


class Generated:
    """`count` images of the size of `pool` uint8 [n, H, W, 3], made when they are asked for."""

    def __init__(self, pool: npt.NDArray[np.uint8], count: int) -> None:
        self.pool, self.count = pool, count

    def __len__(self) -> int:
        return self.count

    @property
    def fingerprint(self) -> str:
        return f"generated {self.pool.shape} {self.count}"

    def chunks(self, preprocess: Preprocess, size: int, start: int = 0) -> Iterator[npt.NDArray[np.uint8]]:
        for first in range(start, self.count, size):
            yield np.stack([self.image(number) for number in range(first, min(first + size, self.count))])

    def image(self, number: int) -> npt.NDArray[np.uint8]:
        turn, place = divmod(number, len(self.pool))
        moved = np.roll(self.pool[place], (7 * turn, 3 * turn), (0, 1))
        return np.asarray(moved + np.uint8(turn % 32))


def _preprocess(px: int) -> Preprocess:
    return Preprocess(px, px, 3, "squash", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _ours(choose: bool) -> Callable[[Path, Generated, int], Seconds]:
    def way(path: Path, images: Generated, px: int) -> Seconds:
        """An eighth of the images chooses, the others are counted; without a choice, all are.

        As an export does it (kdedge_export.quantize): the tensors of every file, in the CPU's form, and a choice for
        U8, one for symmetric S8, and least squares for all.
        """
        from kdedge_export.calibration.calibrate import calibrate
        from kdedge_export.calibration.choose import choose_s8_spans, choose_spans_per_tensor
        from kdedge_export.calibration.ranges import choose_spans, measured
        from kdedge_export.cpu.cpu_form import cpu_form, trt_form
        from kdedge_export.cpu.plan import make_plan
        from kdedge_export.graph import Graph
        from kdedge_export.quantize import UNIFORM
        from kdedge_export.trt.plan import make_trt_plan

        model, preprocess = onnx.load(str(path)), _preprocess(px)
        begun_at_s = time.perf_counter()
        form = cpu_form(model)
        plan, symmetric = make_plan(form), make_trt_plan(trt_form(form))
        held = min(48, len(images) // 8) if choose else 0
        counted = Generated(images.pool, len(images) - held)
        names = sorted({*measured(plan), *symmetric.measured})
        histograms = calibrate(form, names, counted, preprocess, say=_say)
        collected_at_s = time.perf_counter()
        if choose:
            judges = np.stack([images.image(number) for number in range(len(counted), len(images))])
            choose_spans_per_tensor(form, plan, histograms, judges, preprocess)
            choose_s8_spans(trt_form(form), symmetric.measured, symmetric.same_scale, histograms, judges, preprocess)
            choose_spans(UNIFORM, plan, Graph(form), histograms)
        return {"collection": collected_at_s - begun_at_s, "choice": time.perf_counter() - collected_at_s}

    return way


def _onnxruntime(method: str) -> Callable[[Path, Generated, int], Seconds]:
    def way(path: Path, images: Generated, px: int) -> Seconds:
        """As quantize_static calls it with nothing else given: all tensors of the operators that it would quantize."""
        from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator
        from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

        preprocess, entry = _preprocess(px), onnx.load(str(path)).graph.input[0].name
        feeds = ({entry: preprocess.normalize(images.image(number)[None])} for number in range(len(images)))

        class Reader:
            def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
                return next(feeds, None)

        with tempfile.TemporaryDirectory() as folder:
            begun_at_s = time.perf_counter()
            calibrator = create_calibrator(
                path,
                sorted({*QLinearOpsRegistry, *QDQRegistry}),
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
                calibrate_method=CalibrationMethod[method],
            )
            calibrator.collect_data(Reader())
            collected_at_s = time.perf_counter()
            calibrator.compute_data()
        return {"collection": collected_at_s - begun_at_s, "choice": time.perf_counter() - collected_at_s}

    return way


WAYS: Mapping[str, Callable[[Path, Generated, int], Seconds]] = {
    "ours, collection": _ours(choose=False),
    "ours, whole choice": _ours(choose=True),
    "onnxruntime minmax": _onnxruntime("MinMax"),
    "onnxruntime entropy": _onnxruntime("Entropy"),
    "onnxruntime percentile": _onnxruntime("Percentile"),
}


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def measure(way: str, images: int, px: int, folder: Path) -> dict[str, Any]:
    """`way` over `images` images of those drawn in `folder` and the model there, in this process, on one processor."""
    from kdedge_export.sessions import open_session

    if hasattr(os, "sched_setaffinity"):  # ONNX Runtime's calibrators take all processors and cannot be told otherwise
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    generated = Generated(np.load(folder / DRAWN), images)
    session = open_session((folder / MODEL).read_bytes())
    session.run(None, {session.get_inputs()[0].name: _preprocess(px).normalize(generated.image(0)[None])})
    del session
    before_mib, cpu_at_s = peak_mib(reset=True), time.process_time()
    seconds = WAYS[way](folder / MODEL, generated, px)
    cpu_s = time.process_time() - cpu_at_s
    peak = peak_mib()
    return {
        "images": images,
        "seconds": {**{part: round(value, 3) for part, value in seconds.items()}, "total": sum(seconds.values())},
        "cpu_seconds": round(cpu_s, 3),
        "peak_mib": round(peak, 1),
        "peak_above_start_mib": round(peak - before_mib, 1),
    }


def _write_model(arch: str, px: int, folder: Path) -> None:
    """A network of the zoo with settled batch normalisation and random weights, as `kdedge export` writes it."""
    import torch

    from kdedge.models.zoo import ModelSpec, architecture, build
    from kdedge_bench.int8_families import settled, smooth_images
    from kdedge_export.float_form.onnx_export import export_float

    torch.manual_seed(0)
    torch.set_num_threads(1)
    fresh = build(ModelSpec(arch, CLASSES, halvings=architecture(arch).halvings))
    network = settled(fresh, _preprocess(px), smooth_images(32, px, seed=1))
    model = export_float(network, _preprocess(px), [str(k) for k in range(CLASSES)])
    (folder / MODEL).write_bytes(model.SerializeToString())


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.calibration_cost", description=__doc__)
    flags.add_argument("--arch", default="mobilenet-v2")
    flags.add_argument("--px", type=int, default=224)
    flags.add_argument("--images", type=int, default=64, help="of every way; ONNX Runtime holds what all of them make")
    flags.add_argument("--many", type=int, default=10_000, help="images of our collection alone; 0 leaves it out")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--scratch", type=Path, help="a folder for the model; the system's unless given")
    flags.add_argument("--out", type=Path, required=True, help="the record")
    flags.add_argument("--one", action="store_true", help="measure --way alone, in this process")
    flags.add_argument("--way", choices=sorted(WAYS), help="with --one")
    return flags


def _rounds(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for round_ in range(options.rounds):
        for way in WAYS:
            found[way].append(_apart(way, options.images, options.px, folder))
            _say(f"Round {round_ + 1} of {options.rounds}: {way} {found[way][-1]}")
    return {way: _summary(each) for way, each in found.items()}


def _apart(way: str, images: int, px: int, folder: Path) -> dict[str, Any]:
    return measured_apart("kdedge_bench.calibration_cost", images, ["--way", way, "--px", str(px)], folder)


def _summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds, and the single totals."""
    parts = ("collection", "choice", "total")
    return {
        "seconds": {part: round(statistics.median(each["seconds"][part] for each in found), 3) for part in parts},
        "cpu_seconds": statistics.median(each["cpu_seconds"] for each in found),
        "totals": [round(each["seconds"]["total"], 3) for each in found],
        "peak_mib": statistics.median(each["peak_mib"] for each in found),
        "peak_above_start_mib": statistics.median(each["peak_above_start_mib"] for each in found),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every way in turn and write the record; the machine should do nothing else meanwhile."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.one:
        write_json(options.out, measure(options.way, options.images, options.px, options.scratch))
        return
    from kdedge_bench.int8_families import smooth_images

    before = load_average()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        # Drawn here, so that what that takes is not the memory of the processes that are measured.
        np.save(Path(name) / DRAWN, smooth_images(POOL, options.px, seed=0))
        _write_model(options.arch, options.px, Path(name))
        ways = _rounds(options, Path(name))
        many = _apart("ours, collection", options.many, options.px, Path(name)) if options.many else None
    entropy = ways["onnxruntime entropy"]["seconds"]["total"]
    record = {
        "schema": 1,
        "command": " ".join(["python", "-m", "kdedge_bench.calibration_cost", *arguments]),
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "onnxruntime": metadata.version("onnxruntime"),
        "conditions": {
            "arch": options.arch,
            "px": options.px,
            "images": options.images,
            "rounds": options.rounds,
            "threads": 1,
            "load_average": {"before": before, "after": load_average()},
        },
        "ways": ways,
        "times_as_fast_as_entropy": {way: round(entropy / each["seconds"]["total"], 2) for way, each in ways.items()},
        "many": many,
    }
    write_json(options.out, record)


if __name__ == "__main__":
    main()
