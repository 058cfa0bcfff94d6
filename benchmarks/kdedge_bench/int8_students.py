"""Students of six families for the INT8 table, trained on labels alone by `kdedge train-recipe`.

python -m kdedge_bench.int8_students --data SPEC --out DIR

A network that is quantized need not be a good one, only a trained one of its family. The baseline stage of a run is
plain supervised training; it becomes the run's student here, in place of the one step of FixMatch that follows it.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kdedge import recipe_io
from kdedge.pipeline import train

__all__ = ["STEPS", "main"]

RECIPE = Path(__file__).resolve().parent.parent / "int8" / "student.yaml"
STEPS = {
    "mobilenet-v2": 700,
    "mobilenet-v3-small": 2000,
    "shufflenet-v2": 1500,
    "resnet18": 500,
    "mobilenet-v3-large": 900,
    "efficientnet-b0": 600,
}


def make(arch: str, data: str, folder: Path, steps: int) -> Path:
    """One student's finished run folder; it is left as it is where it is there already."""
    out = folder / arch
    settings = [f"student.arch={arch}", f"baseline.optim.total_steps={steps}"]
    run, _ = train(recipe_io.load(str(RECIPE), settings, data=data), out, resume=out.exists())
    shutil.copyfile(run.baseline_path, run.student_path)
    return run.path


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.int8_students", description=__doc__)
    flags.add_argument("--data", required=True, metavar="SPEC")
    flags.add_argument("--out", type=Path, required=True, metavar="DIR")
    flags.add_argument("--families", nargs="+", choices=STEPS, default=list(STEPS))
    flags.add_argument("--steps", type=int, help="of every family, instead of its own")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    for arch in options.families:
        path = make(arch, options.data, options.out, options.steps or STEPS[arch])
        print(path, flush=True)


if __name__ == "__main__":
    main()
