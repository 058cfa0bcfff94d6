"""Learn: teacher and student by KD-FixMatch, from a handful of labels."""

__version__ = "0.1.0"
__all__ = ["__version__"]
