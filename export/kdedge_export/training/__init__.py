"""The float graph in torch with the roundings of its INT8 file, and quantization-aware training on it."""

__all__: list[str] = []
