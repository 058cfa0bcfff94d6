"""Olive's static quantization pass (OnnxStaticQuantization), which drives ONNX Runtime's quantizer.

`default` is what the pass does unless told otherwise: S8 activations, S8 weights per tensor, min-max. `u8s8` is what
ONNX Runtime's documentation has for x86 with VNNI: U8 activations, weights per channel.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from kdedge_bench.peers.peer import Array, Peer, main
else:  # run as a program, where it lies beside it and nothing of kdedge is installed
    from peer import Array, Peer, main

__all__ = ["quantize"]

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "u8s8": {"activation_type": "uint8", "precision": "int8", "per_channel": True},
}


class _Images:
    """A data set in Olive's form: (inputs by name, a label nobody reads)."""

    def __init__(self, name: str, images: Array) -> None:
        self.name, self.images = name, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> tuple[dict[str, Array], int]:
        return {self.name: np.array(self.images[place])}, 0


def quantize(model: str, images: Array, out: Path, method: str) -> Path:
    os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
    import onnxruntime
    from olive.data.registry import Registry
    from olive.workflows import run

    name = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).get_inputs()[0].name
    Registry.register_dataset("images_of_the_table")(lambda **_: _Images(name, images))
    data = {
        "name": "calibration",
        "load_dataset_config": {"type": "images_of_the_table"},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "dataloader_config": {"type": "default_dataloader", "params": {"batch_size": 1}},
    }
    with tempfile.TemporaryDirectory() as scratch:
        made = run(
            {
                "input_model": {"type": "OnnxModel", "model_path": model},
                "data_configs": [data],
                "passes": {"q": {"type": "OnnxStaticQuantization", "data_config": "calibration", **METHODS[method]}},
                "target": {
                    "type": "LocalSystem",
                    "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
                },
                "output_dir": f"{scratch}/out",
                "cache_dir": f"{scratch}/cache",
            }
        )
        shutil.copyfile(made.get_best_candidate().model_path, out)
    return out


def version() -> str:
    from importlib.metadata import version

    return f"olive-ai {version('olive-ai')}, onnxruntime {version('onnxruntime')}"


if __name__ == "__main__":
    main(Peer(quantize, version, tuple(METHODS)))
