"""A complete verdict as a record to commit: verdict.json with a title, without this machine's folders.

python -m kdedge_bench.verdict_record runs/verdict-NAME --out benchmarks/results/MACHINE/verdict-SET.json --title digits
"""

import argparse
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdedge.errors import RunError
from kdedge.runs import SCHEMA, read_json, write_json
from kdedge_bench.verdict_text import ROWS_HEAD, SUMMARY_HEAD, markdown_rows, summary_row
from kdedge_bench.work_folder import WorkFolder

__all__ = ["complete", "main", "make_record", "parser", "parser_of", "without_folders"]


def make_record(folder: Path, title: str | None) -> dict[str, Any]:
    """The record; RunError where the verdict is not complete, since a planned row that is missing is a failure."""
    document = complete(WorkFolder(folder, "verdict"))
    typed = {name: without_folders(command) for name, command in document["commands"].items()}
    named = {"title": title or document["data"], "kind": "verdict"}
    return named | document | {"command": without_folders(document["command"]), "commands": typed}


def complete(folder: WorkFolder) -> dict[str, Any]:
    """What the folder's JSON file says; RunError where its runs are not all finished."""
    document: dict[str, Any] = read_json(folder.json_path)
    if document["schema"] > SCHEMA:
        raise RunError(
            f"{folder.path} has schema {document['schema']}; this kdedge reads up to {SCHEMA}. Update kdedge."
        )
    if document["status"] != "complete":
        raise RunError(
            f"The {folder.kind} in {folder.path} is {document['status']}: {document['runs_finished']} of "
            f"{document['runs_planned']} runs are finished. Go on with it: {document['command']}"
        )
    return document


def without_folders(command: str) -> str:
    """The command, without the folders of absolute paths: a record is committed, and says what, not where.

    Of a path into a run folder the last two parts stay: kd-fixmatch-s0/teacher.safetensors.
    """
    run_file = r"(^|=)/(?:[^/ ]+/)*([^/ ]+-s\d+/[^/ ]+)$"
    words = [re.sub(run_file, r"\1\2", word) for word in shlex.split(command)]
    return shlex.join(re.sub(r"(^|=)/(?:[^/ ]+/)*([^/ ]+)$", r"\1\2", word) for word in words)


def parser() -> argparse.ArgumentParser:
    return parser_of("verdict_record", __doc__)


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """The flags of a program that makes a record of a folder."""
    flags = argparse.ArgumentParser(prog=f"python -m kdedge_bench.{name}", description=description)
    flags.add_argument("folder", type=Path)
    flags.add_argument("--out", type=Path, required=True, help="the record")
    flags.add_argument("--title", help="what the README calls the set; the name of the data unless given")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the record, and show what README.md and benchmarks/README.md quote of it."""
    options = parser().parse_args(arguments)
    record = make_record(options.folder, options.title)
    write_json(options.out, record)
    print(SUMMARY_HEAD, summary_row(record), ROWS_HEAD, *markdown_rows(record), sep="\n")


if __name__ == "__main__":
    main()
