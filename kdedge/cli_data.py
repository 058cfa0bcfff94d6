"""`kdedge data check`."""

from typing import Any

import click

from kdedge.cli_common import Reply, columns, command_output

__all__ = ["data"]

SHOWN = 10
"""Entries of a list a person sees; --json has up to 200."""


@click.group()
def data() -> None:
    """Look at a data set before training on it."""


@data.command("check")
@click.argument("spec")
@command_output
def check(spec: str) -> Reply:
    """Counts, unreadable files, duplicates, leaks.

    SPEC is a name (digits, mnist, cifar10, ...), a folder, or a .csv file. Exits with 1 where something is wrong.
    """
    from kdedge.data import check as check_source

    document = check_source(spec)
    return Reply(document, _text(document), exit_code=0 if document["ok"] else 1)


def _text(document: dict[str, Any]) -> str:
    height, width = document["native_px"]
    colour = "grey" if document["channels"] == 1 else "colour"
    parts = [part for part, count in document["counts"].items() if count]
    rows = [["class", *parts]]
    rows += [[name, *(str(counts[part]) for part in parts)] for name, counts in document["classes"].items()]
    rows.append(["all images", *(str(document["counts"][part]) for part in parts)])
    blocks = [
        f"{document['name']}: {document['images']} images, {colour}, median {width} x {height} px (width x height)",
        columns(rows),
        *_lists(document),
        "\n".join(document["warnings"]),
        "\n".join(document["problems"]) or "Nothing wrong was found.",
    ]
    return "\n\n".join(block for block in blocks if block)


def _lists(document: dict[str, Any]) -> list[str]:
    """Each list that is not empty, under its count."""
    pairs = {
        "exact_duplicates": "exact duplicates",
        "near_duplicates": "near duplicates",
        "leaks": "leaks between parts",
        "label_conflicts": "duplicates with different labels",
    }
    blocks = [_list("unreadable", document, [f"{e['file']}: {e['reason']}" for e in document["unreadable"]])]
    for key, title in pairs.items():
        entries = [
            " = ".join(f"{one} ({part})" for one, part in zip(entry["ids"], entry["parts"], strict=True))
            for entry in document[key] or []
        ]
        blocks.append(_list(title, document, entries, key))
    blocks.append(_list("ignored files", document, document["ignored"], "ignored"))
    return [block for block in blocks if block]


def _list(title: str, document: dict[str, Any], entries: list[str], key: str = "") -> str:
    if not entries:
        return ""
    count = document["found"][key or title]
    more = [f"  ... and {count - SHOWN} more (--json has up to 200)"] if count > SHOWN else []
    return "\n".join([f"{title}: {count}", *(f"  {entry}" for entry in entries[:SHOWN]), *more])
