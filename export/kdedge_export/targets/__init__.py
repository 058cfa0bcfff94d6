"""What each device takes of a bundle, and why: one YAML file a target beside this, or one's own."""

from kdedge_export.targets.target import Target, Why, for_board, load, names

__all__ = ["Target", "Why", "for_board", "load", "names"]
