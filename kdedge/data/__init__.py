"""Images and labels: what a SPEC names, who learns from what, and what is wrong with a set.

open_source(spec) -> Source -> make_splits(source, labels, seed) -> Splits
                          -> source.load(indices, preprocess) -> uint8 [n, C, H, W]
check(spec) -> what `kdedge data check` says
"""

from kdedge.data.audit import check
from kdedge.data.source import Source
from kdedge.data.sources import NAMES, data_root, open_source
from kdedge.data.splits import Splits, make_splits

__all__ = ["NAMES", "Source", "Splits", "check", "data_root", "make_splits", "open_source"]
