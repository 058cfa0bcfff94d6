"""Students of six families for the INT8 tables, trained on labels alone by `kdedge train-recipe`.

python -m kdedge_bench.int8_students --data SPEC --out DIR
python -m kdedge_bench.int8_students --data SPEC --out DIR --px 96 --init DIR
python -m kdedge_bench.int8_students --data SPEC --out DIR --px 224 --init DIR --probe

A network that is quantized need not be a good one, only a trained one of its family. The baseline stage of a run is
plain supervised training; it becomes the run's student here, in place of the one step of FixMatch that follows it.

At 224 px training costs minutes a hundred steps on a laptop, so the networks are trained at 96 px, from the students of
the first line, and taken to 224 px by --probe: the head is fitted again on features of that size, and the rest stays.
With --init FILE.npz a network with ImageNet weights needs the last step alone.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from kdedge import recipe_io
from kdedge.pipeline import train

__all__ = ["PHOTOS", "RECIPE", "STEPS", "main", "settings"]

RECIPES = Path(__file__).resolve().parent.parent / "int8"
RECIPE = RECIPES / "student.yaml"
PHOTOS = RECIPES / "photos.yaml"
STEPS = {
    "mobilenet-v2": 700,
    "mobilenet-v3-small": 2000,
    "shufflenet-v2": 1500,
    "resnet18": 500,
    "mobilenet-v3-large": 900,
    "efficientnet-b0": 600,
}
PHOTO_STEPS = 200


def settings(arch: str, options: argparse.Namespace) -> list[str]:
    """What of the recipe is one family's and one size's."""
    chosen = [f"student.arch={arch}"]
    if options.px:
        chosen.append(f"data.image_px={options.px}")
    if options.init is not None:
        init = options.init if options.init.is_file() else options.init / arch / "student.safetensors"
        chosen.append(f"student.init={init}")
    if options.probe:
        return [*chosen, "student.head=probe", "baseline.enabled=false"]
    if options.init is not None:
        chosen.append("student.head=fresh")
    return [*chosen, f"baseline.optim.total_steps={options.steps or (PHOTO_STEPS if options.px else STEPS[arch])}"]


def make(arch: str, options: argparse.Namespace) -> Path:
    """One student's finished run folder; it is left as it is where it is there already."""
    out = options.out / arch
    recipe = PHOTOS if options.px else RECIPE
    run, _ = train(recipe_io.load(str(recipe), settings(arch, options), data=options.data), out, resume=out.exists())
    if not options.probe:
        shutil.copyfile(run.baseline_path, run.student_path)
    return run.path


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m kdedge_bench.int8_students", description=__doc__)
    flags.add_argument("--data", required=True, metavar="SPEC")
    flags.add_argument("--out", type=Path, required=True, metavar="DIR")
    flags.add_argument("--families", nargs="+", choices=STEPS, default=list(STEPS))
    flags.add_argument("--steps", type=int, help="of every family, instead of its own")
    flags.add_argument("--px", type=int, help="photographs of this size, by int8/photos.yaml")
    flags.add_argument("--init", type=Path, metavar="DIR|FILE", help="students made before, or one file of weights")
    flags.add_argument("--probe", action="store_true", help="fit the head alone")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.init is not None and not options.px:
        raise SystemExit("--init is for photographs; give --px too.")
    if options.probe and options.init is None:
        raise SystemExit("--probe fits a head on the features of a network that is there; name it with --init.")
    for arch in options.families:
        print(make(arch, options), flush=True)


if __name__ == "__main__":
    main()
