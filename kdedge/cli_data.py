"""`kdedge data check` and `kdedge data pack`."""

import shlex
import time
from pathlib import Path
from typing import Any

import click

from kdedge.cli_common import Interrupted, Reply, columns, command_output, note

__all__ = ["data"]

SHOWN = 10
"""Entries of a list a person sees; --json has up to 200."""
_EVERY_S = 5.0  # between two lines of progress


@click.group()
def data() -> None:
    """Check a data set, or pack it into one file."""


def _one(context: click.Context, parameter: click.Parameter, specs: tuple[str, ...]) -> str:
    """The one SPEC; a shell that expanded the braces of shards gives many."""
    if len(specs) > 1:
        hint = " Quote the braces: 'shards-{000..099}.tar'." if all(spec.endswith(".tar") for spec in specs) else ""
        raise click.UsageError(f"{len(specs)} SPECs were given, {specs[0]} to {specs[-1]}; one was expected.{hint}")
    return specs[0]


_SPEC = click.argument("spec", metavar="SPEC", nargs=-1, required=True, callback=_one)


@data.command("check")
@_SPEC
@command_output
def check(spec: str) -> Reply:
    """Counts, unreadable files, duplicates, leaks.

    SPEC is a name (digits, mnist, cifar10, ...), a folder, a .csv file, a packed file, or WebDataset shards
    ('shards-{000..099}.tar', quoted). Exits with 1 where something is wrong.
    """
    from kdedge.data import check as check_source

    document = check_source(spec)
    return Reply(document, _text(document), exit_code=0 if document["ok"] else 1)


@data.command("pack")
@_SPEC
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The file to write; one there is kept.")
@click.option("--px", type=click.IntRange(4), help="Height and width; what a run would choose unless given.")
@click.option("--channels", type=click.Choice(["1", "3"]), help="1 grey, 3 colour; as the images are unless given.")
@click.option("--workers", type=click.IntRange(1), help="Threads that decode; one a core unless given.")
@click.option(
    "--max-unreadable",
    type=click.FloatRange(0, 1),
    default=0.05,
    show_default=True,
    metavar="FRACTION",
    help="Of the images; with more that cannot be read nothing is packed.",
)
@command_output
def pack(
    spec: str, out: Path, px: int | None, channels: str | None, workers: int | None, max_unreadable: float
) -> Reply:
    """Decode every image once, into one file.

    The file is a SPEC like any other, with the same splits, and is read as training needs it: for images that fit no
    memory, or take long to decode. A pack that was stopped goes on with the same command.
    """
    from kdedge.data import open_source
    from kdedge.data.pack import pack as pack_source
    from kdedge.data.pack import require_new
    from kdedge.train.stop import terminable

    require_new(out)  # opening a large set takes minutes
    source = open_source(spec, max_unreadable_fraction=max_unreadable)
    shown, planes_asked = _Shown(), int(channels) if channels else None
    try:
        with terminable():
            done = pack_source(source, out, px=px, channels=planes_asked, workers=workers, progress=shown.count)
    except KeyboardInterrupt:
        raise Interrupted(f"Stopped. What is packed is kept in {out}.part; the same command goes on there.") from None
    for sentence in done.warnings:
        note(sentence)
    count, planes, height, width = done.shape
    document = {
        "schema": 1,
        "data": spec,
        "name": source.name,
        "out": str(done.path),
        "bytes": done.bytes,
        "images": count,
        "channels": planes,
        "px": [height, width],
        "kept_images": done.kept,
        "counts": done.counts,
        "unreadable": [{"file": identity, "reason": reason} for identity, reason in done.unreadable],
        "fingerprint": done.fingerprint,
        "warnings": list(done.warnings),
    }
    kept = f" ({done.kept} were there already)" if done.kept else ""
    colour = "grey" if planes == 1 else "colour"
    text = (
        f"{count} images of {source.name}, {colour}, {width} x {height} px{kept}: {out}, {done.bytes / 1e6:.1f} MB\n"
        f"Next: kdedge train-recipe mobilenet --data {shlex.quote(str(out))}"
    )
    return Reply(document, text)


class _Shown:
    """Images done, on standard error, every few seconds."""

    def __init__(self) -> None:
        self._next_s = time.monotonic() + _EVERY_S

    def count(self, done: int, total: int) -> None:
        if time.monotonic() >= self._next_s:
            note(f"{done:,} of {total:,} images ({done / total:.0%})")
            self._next_s = time.monotonic() + _EVERY_S


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
