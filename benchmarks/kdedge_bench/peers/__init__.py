"""Other quantizers behind one command line, a file each, run by the Python of an environment of their own.

python FILE MODEL.onnx CALIBRATION.npy OUT.onnx [--method NAME]

MODEL.onnx: float32 [batch, C, H, W] -> logits. CALIBRATION.npy: float32 [N, C, H, W], already normalised, read through
a memory map. OUT.onnx is written, and one JSON document printed: {"seconds", "peak_mib", "version"}. A file imports
nothing of kdedge, since that is not installed where it runs.
"""

__all__: list[str] = []
