"""The files for TensorRT, their linter, their emulation on a CPU, and the engines built here."""

__all__: list[str] = []
