"""Measure and compare: latency on this machine, the summary of a run, the report, budgets.

Importing this is cheap: matplotlib, jinja2 and rich are imported by the functions that draw.
"""

from kdedge_bench.comparison import CompareFailed, compare
from kdedge_bench.latency import bench
from kdedge_bench.page import report
from kdedge_bench.table import Summary, as_rich, as_text, summary

__all__ = ["CompareFailed", "Summary", "as_rich", "as_text", "bench", "compare", "report", "summary"]
