"""What is quantized: a run's student or an ONNX file from elsewhere, in one canonical float form."""

__all__: list[str] = []
