"""Numbers as a reader wants them. A value that was not measured is None and becomes a dash, never a guess."""

from collections.abc import Sequence

__all__ = [
    "DASH",
    "confidence",
    "count",
    "interval",
    "milliseconds",
    "percent",
    "shorten",
    "size",
    "span",
    "unique_short",
]

DASH = "–"
NBSP = "\N{NO-BREAK SPACE}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """0.9556 -> "95.6 %"."""
    return DASH if fraction is None else f"{100 * fraction:.{digits}f}{NBSP}%"


def confidence(fraction: float) -> str:
    """Whole percent; nothing short of certainty is called 100 %."""
    return f">{NBSP}99{NBSP}%" if 0.995 <= fraction < 1 else percent(fraction, 0)


def interval(low: float | None, high: float | None) -> str:
    """(0.935, 0.970) -> "93.5–97.0", in percent; the unit stands in the heading."""
    return DASH if low is None or high is None else f"{100 * low:.1f}–{100 * high:.1f}"


def size(number_of_bytes: int | None) -> str:
    """327680 -> "320 KiB"."""
    if number_of_bytes is None:
        return DASH
    if number_of_bytes < 1024:
        return f"{number_of_bytes}{NBSP}B"
    kib = number_of_bytes / 1024
    if kib < 1023.5:
        return f"{kib:.0f}{NBSP}KiB" if kib >= 10 else f"{kib:.1f}{NBSP}KiB"
    mib = kib / 1024
    return f"{mib:.0f}{NBSP}MiB" if mib >= 100 else f"{mib:.1f}{NBSP}MiB"


def milliseconds(value_ms: float | None) -> str:
    """Three significant digits without an exponent: 0.0712 -> "0.0712", 12.34 -> "12.3", 1234.5 -> "1,234"."""
    if value_ms is None:
        return DASH
    if value_ms == 0:
        return "0"
    for limit, digits in ((0.01, 5), (0.1, 4), (1, 3), (10, 2), (100, 1)):
        if abs(value_ms) < limit:
            return f"{value_ms:.{digits}f}"
    return f"{value_ms:,.0f}"


def count(number: float | None) -> str:
    """1234567 -> "1,234,567"."""
    return DASH if number is None else f"{number:,.0f}"


def span(elapsed_s: float | None) -> str:
    """A duration: 8.2 -> "8.2 s", 252 -> "4 min 12 s", 7384 -> "2 h 3 min"."""
    if elapsed_s is None:
        return DASH
    if elapsed_s < 60:
        return f"{elapsed_s:.1f}{NBSP}s"
    minutes, seconds = divmod(round(elapsed_s), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {seconds}{NBSP}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{NBSP}h {minutes}{NBSP}min"


def shorten(name: str, limit: int) -> str:
    """`name` in at most `limit` characters: the middle is left out, because long class names differ at either end."""
    if len(name) <= limit:
        return name
    head = limit // 2
    tail = limit - 1 - head
    return f"{name[:head]}…{name[len(name) - tail :] if tail else ''}"


def unique_short(names: Sequence[str], limit: int) -> list[str]:
    """Shortened names that still differ from one another; a clash gets its number in front."""
    short = [shorten(name, limit) for name in names]
    return [
        text if short.count(text) == 1 else shorten(f"{index} {names[index]}", limit)
        for index, text in enumerate(short)
    ]
