"""A matplotlib figure as SVG for an HTML page.

Its text stays text, its ids are its own among other figures, and it has a title for those who cannot see it.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["HEIGHT_IN", "INK", "MUTED", "drawing", "to_svg"]

INK, MUTED, GRID = "#1f2933", "#5f6b76", "#e3e7eb"
# 4.6 in are 442 CSS px; on a 400 px telephone the figure is shown at 368 px, and 9 pt text at 10 px.
WIDTH_IN, HEIGHT_IN = 4.6, 3.0

# Colours as they are drawn -> the page's own for them, which differ in light, dark and print.
THEME = {
    INK: "--ink", MUTED: "--muted", GRID: "--hair", "#8a949e": "--grey", "#0072B2": "--c1", "#D55E00": "--c2",
    "#009E73": "--c3", "#CC79A7": "--c4", "#56B4E9": "--c5", "#E69F00": "--c6",
}  # fmt: skip

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud, and is drawn in the page's own font
    "svg.hashsalt": "kdedge",  # the same figure gets the same ids
    "text.parse_math": False,  # a class may be called $5 bill
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "savefig.transparent": True,
}


@contextmanager
def drawing(height_in: float = HEIGHT_IN) -> Iterator[tuple["Figure", "Axes"]]:
    """A figure and its axes in the house style, without pyplot and its global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        yield figure, figure.subplots()


def to_svg(figure: "Figure", key: str, title: str, description: str) -> str:
    """The figure as an <svg> element. `key` is unique in the page; it keeps the ids of figures apart.

    Call it inside `drawing`. `title` and `description` are plain text and are escaped here.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # A class name in a script that our measuring font lacks is drawn by the browser's fonts all the same.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from (current )?font")
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    return _inline(buffer.getvalue(), key, title, description)


def _inline(text: str, key: str, title: str, description: str) -> str:
    """Drop what belongs to a file of its own, and give every id the figure's key."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    # matplotlib's own sheet says `* {...}`, which inline would style the whole page; ours says it for figures.
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', body)
    body = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#{key}-\2"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{key}-\1)", body)
    for colour, name in THEME.items():
        body = re.sub(rf"(?<=: ){colour}\b", f"var({name})", body, flags=re.IGNORECASE)
    body = re.sub(r'\bd="([^"]+)"', lambda found: f'd="{_round(found[1])}"', body)
    view = re.search(r'viewBox="([^"]+)"', body)
    inside = body[body.index(">") + 1 :]
    label = f"<title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>"
    return (
        f'<svg viewBox="{view[1] if view else ""}" role="img" aria-label="{html.escape(title)}">{label}{inside.strip()}'
    )


def _round(path: str) -> str:
    """Two decimals of a point are more than a screen shows, and a third of the bytes."""
    return re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", path)
