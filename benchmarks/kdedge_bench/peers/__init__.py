"""Other quantizers behind one command line, a file each, run by the Python of an environment of their own.

python FILE MODEL.onnx CALIBRATION.npy OUT.onnx [--method NAME]

MODEL.onnx: float32 [batch, C, H, W] -> logits. CALIBRATION.npy: float32 [N, C, H, W], already normalised, read through
a memory map. OUT.onnx is written, or a file beside it under another name, and one JSON document is the last line of
standard output: {"seconds", "version"}, with "file" where the name is another. What else lies in OUT's folder in the
end belongs to the file and counts in its size.

A peer with a runtime of its own tells its name and version too, "runtime": then `--method float` writes FP32 in that
runtime's form, which its speed is set beside, and

python FILE --serve FILE

opens a file of its own and answers one JSON document a line, as `peer` says. A file imports nothing of kdedge, since
that is not installed where it runs; what they share is `peer`, which needs numpy alone and lies beside them.
benchmarks/int8/requirements pins what each was tried with.
"""

__all__: list[str] = []
