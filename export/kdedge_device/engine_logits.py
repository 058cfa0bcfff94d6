"""What an engine of a bundle says of images, for the export that built it: BUNDLE PRECISION IMAGES.npy LOGITS.npy.

It runs in a process of its own, which TensorRT may end. Prints one document, as the commands of run.pyz do. Python 3.8,
numpy. N images, H x W x C each, K classes.
"""

import json
import sys
from typing import Sequence

import numpy as np

from kdedge_device.evaluate import checked_logits
from kdedge_device.failures import Failure
from kdedge_device.manifest import Bundle
from kdedge_device.trt_bundle import open_precision

__all__ = ["main", "write_logits"]


def write_logits(bundle: str, precision: str, images: str, logits: str) -> None:
    """float32 [N, K] into `logits` for uint8 [N, H, W, C] in `images`, by the engine of `precision` in `bundle`.

    RuntimeFailure without TensorRT or such an engine; BudgetFailure where a logit is no finite number.
    """
    opened = Bundle(bundle)
    with open_precision(opened, precision) as runner:
        np.save(logits, checked_logits(opened, runner, np.load(images)))


def main(arguments: Sequence[str]) -> int:
    try:
        write_logits(*arguments)
    except Failure as error:
        print(json.dumps({"error": str(error), "class": type(error).__name__}))
        return error.exit_code
    print(json.dumps({"logits": arguments[-1]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
