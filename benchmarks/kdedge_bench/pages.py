"""Templates of self-contained HTML pages."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jinja2

__all__ = ["environment"]


def environment() -> "jinja2.Environment":
    """What names and data hold is text in a page; a name that a template does not get is an error."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("kdedge_bench", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
