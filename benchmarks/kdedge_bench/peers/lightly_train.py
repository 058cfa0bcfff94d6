"""lightly-train's label-free distillation of a student from a teacher of ours, on a folder of images, on a CPU.

python lightly_train.py FOLDER OUT.pt --teacher resnet18 --weights RUN/student.safetensors --student shufflenet_v2_x1_0

OUT.pt is the student's state_dict under torchvision's names, which `student.init=OUT.pt` of a recipe reads. Its default
teachers (DINOv2, DINOv3) are downloaded; a teacher of torchvision's with weights of ours is not. Of torchvision's
families it knows ConvNeXt, ResNet and ShuffleNetV2, and no MobileNet. The last line printed is a JSON document:
{"seconds", "version", "steps"}.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

__all__ = ["main"]

IMAGES = (".jpg", ".jpeg", ".png")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", default="resnet18")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--student", default="shufflenet_v2_x1_0")
    parser.add_argument("--px", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"  # it would tell its makers of every run
    # Not before: this file has the package's name, and is first on the path where it is run.
    import sys

    sys.path = [each for each in sys.path if Path(each or ".").resolve() != Path(__file__).resolve().parent]
    import lightly_train
    import torch

    torch.set_num_threads(1)
    count = sum(each.suffix.lower() in IMAGES for each in options.images.rglob("*"))
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "teacher.pt"
        torch.save(_backbone(options.teacher, options.weights), weights)
        lightly_train.pretrain(
            out=f"{scratch}/out",
            data=str(options.images),
            model=f"torchvision/{options.student}",
            method="distillation",
            method_args={"teacher": f"torchvision/{options.teacher}", "teacher_weights": str(weights)},
            epochs=options.epochs,
            batch_size=options.batch,
            num_workers=0,
            accelerator="cpu",
            precision="32-true",
            seed=options.seed,
            transform_args={"image_size": (options.px, options.px)},
        )
        shutil.copyfile(f"{scratch}/out/exported_models/exported_last.pt", options.out)
    told = {
        "seconds": time.perf_counter() - begun,
        "version": f"lightly-train {lightly_train.__version__}",
        "steps": options.epochs * (count // options.batch),
    }
    print(json.dumps(told))


def _backbone(teacher: str, file: Path) -> "dict[str, object]":
    """Of a file of kdedge's: torchvision's names. The head, which distillation does not read, is a fresh one."""
    from safetensors.torch import load_file
    from torchvision.models import get_model

    ours = {name.removeprefix("backbone."): tensor for name, tensor in load_file(str(file)).items()}
    fresh = get_model(teacher).state_dict()
    return {name: ours.get(name, tensor) for name, tensor in fresh.items()}


if __name__ == "__main__":
    main()
