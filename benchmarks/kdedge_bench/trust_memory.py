"""Memory and time of choosing the trusted set, by the number of images, as a record.

python -m kdedge_bench.trust_memory --images 1000000 --features 512 --classes 10 --out FILE.json

Each size is measured in a process of its own: synthetic logits, features in a file, no labels, so that clusters start
from k-means. Memory is the peak of the resident set over the whole selection, less what it was before.
"""

import argparse
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdedge import __version__
from kdedge.runs import write_json
from kdedge.trust.select import TrustConfig, compare_with_confidence, select_trusted
from kdedge_bench.peak_memory import measured_apart, peak_mib
from kdedge_device.record import machine, now

__all__ = ["main", "measure", "parser"]

_NOISE = 0.05  # of each feature, around the unit vector of the class
_WRONG_FRACTION = 0.1  # of the outer network's labels, at any confidence


def measure(images: int, features: int, classes: int, folder: Path) -> dict[str, Any]:
    """Choose from `images` synthetic images whose features lie in a file under `folder`, in this process."""
    path = folder / f"features-{images}.npy"
    try:
        logits_NK, truth_N = _make(path, images, features, classes)
        features_NF = np.lib.format.open_memmap(path, mode="r")
        index_N, label_N = np.arange(images), torch.full((images,), -1)
        select_trusted(logits_NK[:200], features_NF[:200], index_N[:200], label_N[:200], TrustConfig(), seed=0)
        before_mib, started_at_s, started_cpu_s = peak_mib(reset=True), time.perf_counter(), time.process_time()
        trusted = select_trusted(logits_NK, features_NF, index_N, label_N, TrustConfig(), seed=0)
        elapsed_s, cpu_s = time.perf_counter() - started_at_s, time.process_time() - started_cpu_s
        most_mib = peak_mib()
    finally:
        path.unlink(missing_ok=True)
    summary = trusted.summary(truth_N, classes)
    return {
        "images": images,
        "features_mib": round(images * features * 2 / 2**20, 1),
        "peak_above_start_mib": round(most_mib - before_mib, 1),
        "elapsed_s": round(elapsed_s, 2),
        "cpu_s": round(cpu_s, 2),
        "size": summary["size"],
        "precision": summary["precision"],
        "precision_after_confidence": summary["precision_after_confidence"],
        **compare_with_confidence(trusted, truth_N, 0),
    }


def _make(path: Path, images: int, features: int, classes: int) -> tuple[torch.Tensor, np.ndarray[Any, np.dtype[Any]]]:
    """Write the features chunk by chunk; logits [N, K] and the true classes [N]."""
    draw = np.random.default_rng(0)
    truth_N = draw.integers(0, classes, images)
    said_N = np.where(draw.random(images) < _WRONG_FRACTION, draw.integers(0, classes, images), truth_N)
    logits_NK = np.zeros((images, classes), dtype=np.float32)
    logits_NK[np.arange(images), said_N] = draw.uniform(3, 12, images)
    with path.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (images, features)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, images, 4096):
            truth_C = truth_N[start : start + 4096]
            features_CF = _NOISE * draw.standard_normal((len(truth_C), features), dtype=np.float32)
            features_CF[np.arange(len(truth_C)), truth_C] += 1
            file.write(features_CF.astype("<f2").tobytes())
    return torch.from_numpy(logits_NK), truth_N


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.trust_memory", description=__doc__)
    flags.add_argument("--images", type=int, default=1_000_000, help="and a tenth, and a hundredth of it")
    flags.add_argument("--features", type=int, default=512)
    flags.add_argument("--classes", type=int, default=10)
    flags.add_argument("--scratch", type=Path, help="where the features go, 2 bytes each; the system's unless given")
    flags.add_argument("--out", type=Path, required=True, help="the record")
    flags.add_argument("--one", action="store_true", help="measure --images alone, in this process")
    return flags


def _in_a_process(images: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    flags = ["--features", str(options.features), "--classes", str(options.classes)]
    return measured_apart("kdedge_bench.trust_memory", images, flags, folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a hundredth, a tenth and all of `--images`, and write the record."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.one:
        write_json(options.out, measure(options.images, options.features, options.classes, options.scratch))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        found = [_in_a_process(options.images // part, options, Path(folder)) for part in (100, 10, 1)]
    small, large = found[-2], found[-1]
    slope = (large["peak_above_start_mib"] - small["peak_above_start_mib"]) / (large["images"] - small["images"])
    typed = [f"--{key} {getattr(options, key)}" for key in ("images", "features", "classes")]
    record = {
        "schema": 1,
        "command": " ".join(["python -m kdedge_bench.trust_memory", *typed, "--out", shlex.quote(options.out.name)]),
        "date": now(),
        "machine": machine(),
        "kdedge": __version__,
        "threads": 1,
        "features": options.features,
        "classes": options.classes,
        "sizes": found,
        "bytes_an_image": round(slope * 2**20, 1),  # of the two larger sizes; logits and features not among them
        "features_bytes_an_image": 2 * options.features,
    }
    write_json(options.out, record)
    print(f"{record['bytes_an_image']} bytes an image, of features of {record['features_bytes_an_image']}.")


if __name__ == "__main__":
    main()
