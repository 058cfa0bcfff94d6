"""`kdedge data check`."""

from typing import Any

import click

from kdedge.cli_common import Reply, command_output

__all__ = ["data"]


@click.group()
def data() -> None:
    """Look at a data set before training on it."""


@data.command("check")
@click.argument("spec")
@command_output
def check(spec: str) -> Reply:
    """Counts, classes, unreadable files, duplicates and leaks between the splits of SPEC.

    SPEC is a name (digits, mnist, cifar10, ...), a folder, or a .csv file.
    """
    from kdedge.data import check as check_source

    document = check_source(spec)
    return Reply(document, outline(document))


def outline(document: Any, indent: int = 0) -> str:
    """A nested document as indented `key: value` lines; long lists show their first ten entries."""
    pad = "  " * indent
    if isinstance(document, dict):
        lines = []
        for key, value in document.items():
            if isinstance(value, dict | list) and value:
                lines += [f"{pad}{key}:", outline(value, indent + 1)]
            else:
                lines.append(f"{pad}{key}: {_leaf(value)}")
        return "\n".join(lines)
    if isinstance(document, list):
        shown = [
            pad + ", ".join(map(str, item)) if isinstance(item, list) else outline(item, indent)
            for item in document[:10]
        ]
        return "\n".join(shown + ([f"{pad}... and {len(document) - 10} more"] if len(document) > 10 else []))
    return pad + _leaf(document)


def _leaf(value: Any) -> str:
    if value is None or value in ([], {}):
        return "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
