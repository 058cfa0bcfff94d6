"""From a finished run to files that run elsewhere: ONNX, INT8, and a bundle that checks itself."""

from kdedge_export.export import export_run

__all__ = ["export_run"]
