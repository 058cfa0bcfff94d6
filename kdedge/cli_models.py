"""The table behind `kdedge models`."""

from typing import Any

__all__ = ["describe"]

WIDE_RESNET = "wide-resnet-28-2"
"""One of the family stands for all: any depth 6 n + 4 and any width can be asked for."""


def describe() -> list[dict[str, Any]]:
    """One row for each architecture at width 1; nothing is initialised or downloaded.

    `widths` are those that can be asked for, null where any can; `int8_speedup`: FP32's
    latency over INT8's on the recording machine, null where not measured.
    Counted on torch's meta device: shapes without numbers.
    """
    import torch

    from kdedge.models.zoo import ARCHITECTURES, INT8_SPEEDUP, ModelSpec, architecture, build, count_macs, num_params

    rows = []
    for name in [*ARCHITECTURES, WIDE_RESNET]:
        known = architecture(name)
        ratio = INT8_SPEEDUP.get(name)
        spec = ModelSpec(name, classes=10 if name == WIDE_RESNET else 1000, halvings=known.halvings)
        with torch.device("meta"):
            network = build(spec).eval()
        rows.append(
            {
                "name": name,
                "params": num_params(network),
                "macs": count_macs(network, 3, known.standard_px, known.standard_px),
                "input_px": known.standard_px,
                "width_multiplier": known.scalable,
                "widths": None if known.any_width else list(known.builders) or [1.0],
                "int8": f"{ratio:.1f} times FP32's speed; {known.int8_note}" if ratio else known.int8_note,
                "int8_speedup": ratio,
            }
        )
    return rows
