"""Small pieces of the sentences in this room."""

from collections.abc import Sequence

__all__ = ["counted", "first_few"]


def counted(count: int, noun: str, plural: str = "") -> str:
    """1 image, 1,234 images."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {plural or noun + 's'}"


def first_few(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f", and {rest:,} more" if rest > 0 else "")
