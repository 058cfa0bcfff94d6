"""The INT8 file for ONNX Runtime on a CPU: what becomes 8-bit, in the shapes that its kernels like."""

__all__: list[str] = []
