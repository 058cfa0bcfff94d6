"""A complete study as a record to commit: study.json with a title, without this machine's folders.

python -m kdedge_bench.study_record runs/study-simclr-NAME --out benchmarks/results/MACHINE/study-NAME.json --title NAME
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdedge.runs import write_json
from kdedge_bench.study_text import ANSWERS_HEAD, answer_rows
from kdedge_bench.verdict_record import complete, parser_of, without_folders
from kdedge_bench.work_folder import WorkFolder

__all__ = ["main", "make_record"]


def make_record(folder: Path, title: str | None) -> dict[str, Any]:
    """The record; RunError where the study is not complete, since a planned row that is missing is a failure."""
    document = complete(WorkFolder(folder, "study"))
    asked = document["asked"] | {"sets": [without_folders(shlex.quote(spec)) for spec in document["asked"]["sets"]]}
    return (
        {"title": title or document["plan"]}
        | document
        | {"asked": asked, "command": without_folders(document["command"])}
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the record, and show what benchmarks/README.md quotes of it."""
    options = parser_of("study_record", __doc__).parse_args(arguments)
    record = make_record(options.folder, options.title)
    write_json(options.out, record)
    print(ANSWERS_HEAD, *answer_rows(record), sep="\n")


if __name__ == "__main__":
    main()
