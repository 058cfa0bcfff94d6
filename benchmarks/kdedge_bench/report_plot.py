"""Drawing by hand: the few pieces of a chart whose marks can be pointed at, in CSS pixels of a 440 px wide drawing.

Colours are classes of report.css, so that a drawing follows light, dark and print.
"""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["LETTER_PX", "WIDTH_PX", "Scale", "element", "label", "svg", "ticks", "x_axis"]

WIDTH_PX = 440
LETTER_PX = 6.6  # an average one of 12 px


@dataclass(frozen=True)
class Scale:
    """From values to pixels: low..high to start..end, linearly or in logarithms."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(each) for each in (self.low, self.high, value)) if self.log else (
            self.low, self.high, value)  # fmt: skip
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 1)


def ticks(scale: Scale, most: int = 6) -> list[float]:
    """Round numbers in the scale's range: steps of 1, 2 or 5 times a power of ten; in logarithms 1, 2, 5 of each."""
    if scale.log:
        decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        found = [lead * 10.0**power for power in decades for lead in (1, 2, 5)]
        inside = [value for value in found if scale.low <= value <= scale.high]
        return inside if len(inside) <= most + 2 else [value for value in inside if math.log10(value) % 1 < 1e-9]
    raw = (scale.high - scale.low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(lead * power for lead in (1, 2, 5, 10) if lead * power >= raw * (1 - 1e-9))
    first = math.ceil(scale.low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def element(name: str, text: str | None = None, /, **attributes: object) -> str:
    """An SVG element; `class_` is class, underscores are dashes, and text is escaped."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{said}/>" if text is None else f"<{name}{said}>{html.escape(text)}</{name}>"


def label(x: float, y: float, text: str, anchor: str = "start", class_: str = "") -> str:
    return element(
        "text", text, x=round(x, 1), y=round(y, 1), text_anchor=anchor, **({"class_": class_} if class_ else {})
    )


def x_axis(scale: Scale, top: float, bottom: float, title: str, show: Callable[[float], str]) -> list[str]:
    """Hair lines from `top` to `bottom` at round numbers, the numbers below them, and below these the title."""
    drawn = []
    for value in ticks(scale, 5):
        x = scale(value)
        drawn += [
            element("line", class_="hair", x1=x, x2=x, y1=top, y2=bottom),
            label(x, bottom + 16, show(value), "middle", "quiet"),
        ]
    drawn.append(element("line", class_="axis", x1=scale.start, x2=scale.end, y1=bottom, y2=bottom))
    drawn.append(label((scale.start + scale.end) / 2, bottom + 33, title, "middle"))
    return drawn


def svg(height: float, title: str, description: str, drawn: Sequence[str]) -> str:
    """The element. `title` names it and `description` tells what is in it, for those who cannot see it."""
    head = element("title", title) + element("desc", description)
    said = f'class="hand" viewBox="0 0 {WIDTH_PX} {height:g}" role="img" aria-label="{html.escape(title)}"'
    return f"<svg {said}>{head}{''.join(drawn)}</svg>"
