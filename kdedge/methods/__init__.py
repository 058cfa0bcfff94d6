"""One file per algorithm: its config, and a final module whose forward(batch) gives a Step."""

from kdedge.methods.step import Method, Step

__all__ = ["Method", "Step"]
