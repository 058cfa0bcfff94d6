"""How many layers of an engine are INT8, FP16 and FP32: the engine inspector's JSON, of TensorRT up to 10 and of 11.

Only an engine built with detailed profiling verbosity tells; of others the layers are names. A layer counts by the
type of its first input, which is what its kernel computes on. Layers that only convert (Reformat) are counted apart:
many of them are why an INT8 engine can be slower than an FP16 one.
"""

import json
from typing import Any, Dict, Optional

__all__ = ["count_layers"]

_TYPES = ("int8", "fp16", "fp32", "other")


def count_layers(text: str) -> Dict[str, Any]:
    """{layers, reformats, int8, fp16, fp32, other, convolutions: {int8, fp16, fp32, other}} of the inspector's JSON.

    What the text does not tell is None: TensorRT writes names only without detailed verbosity, and before 10 no valid
    JSON where a layer's name has quotes.
    """
    counts: Dict[str, Any] = dict.fromkeys(("layers", "reformats", "convolutions") + _TYPES)
    layers = _layers(text)
    if layers is None:
        return counts
    counts["layers"] = len(layers)
    if not all(isinstance(layer, dict) for layer in layers):
        return counts
    computing = [layer for layer in layers if str(layer.get("LayerType")).lower() != "reformat"]
    counts["reformats"] = len(layers) - len(computing)
    counts.update(_by_type(computing))
    counts["convolutions"] = _by_type([layer for layer in computing if _is_convolution(layer)])
    return counts


def _layers(text: str) -> Optional[Any]:
    try:
        document = json.loads(text)
    except ValueError:
        return None
    layers = document.get("Layers") if isinstance(document, dict) else None
    return layers if isinstance(layers, list) else None


def _by_type(layers: Any) -> Dict[str, int]:
    found = dict.fromkeys(_TYPES, 0)
    for layer in layers:
        found[_type(layer)] += 1
    return found


def _is_convolution(layer: Dict[str, Any]) -> bool:
    """Before 10 a LayerType says so (CaskConvolution); fused by another compiler, the names of the ONNX nodes do."""
    kinds = (layer.get("LayerType"), layer.get("ParameterType"))
    return any("conv" in str(kind).lower() for kind in kinds) or "[ONNX Layer: Conv" in str(layer.get("Metadata"))


def _type(layer: Dict[str, Any]) -> str:
    """TensorRT 11 gives a type of its own; before, it is the end of the memory format's description, or all of it."""
    inputs = layer.get("Inputs")
    if not isinstance(inputs, list) or not inputs or not isinstance(inputs[0], dict):
        return "other"
    tensor = inputs[0]
    for key in ("DataType", "Datatype", "Format/Datatype", "Format/DataType", "Format"):
        if key in tensor:
            return _named(str(tensor[key]).lower())
    return "other"


def _named(text: str) -> str:
    if "uint8" in text or "bf16" in text or "bfloat" in text:
        return "other"
    for kind, words in (("int8", ("int8",)), ("fp16", ("fp16", "half")), ("fp32", ("fp32", "float"))):
        if any(word in text for word in words):
            return kind
    return "other"
