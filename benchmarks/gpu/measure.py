"""All measurements of the project that want a GPU, in slices. README.md beside this says how it is used."""

import sys
from pathlib import Path

from kdedge_bench import gpu

if __name__ == "__main__":
    sys.exit(gpu.main(Path(__file__).with_name("cifar10.yaml")))
