"""From a SPEC, as typed after --data, to a source."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdedge.data.folders import LAYOUTS, open_folder
from kdedge.data.listing import open_csv
from kdedge.data.named import NAMES, open_named
from kdedge.data.pack import open_packed
from kdedge.data.packfile import is_packed
from kdedge.data.shards import SHARDS_EXAMPLE, is_shards, open_shards
from kdedge.data.source import Source
from kdedge.errors import DataError, did_you_mean

__all__ = ["NAMES", "data_root", "open_source"]

_ARCHIVES = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tar.zst", ".zip", ".7z", ".rar")


def data_root(root: Path | None = None) -> Path:
    """Where named sets lie: `root`, else KDEDGE_DATA, else ~/.cache/kdedge/data."""
    if root is not None:
        return root.expanduser()
    return Path(os.environ.get("KDEDGE_DATA") or "~/.cache/kdedge/data").expanduser()


def open_source(
    spec: str,
    *,
    root: Path | None = None,
    max_unreadable_fraction: float = 0.05,
    classes: Sequence[str] | None = None,
) -> Source:
    """The images that `spec` names: a known name, a folder, a CSV, a packed file, or WebDataset shards.

    Headers are read and nothing is decoded; `Source.load` does that. With `classes` it is as if there were no others
    (`Source.only`). DataError says what was found instead, what was expected and what to do.
    """
    source = _open(spec, root, max_unreadable_fraction)
    return source if classes is None else source.only(classes)


def _open(spec: str, root: Path | None, max_unreadable_fraction: float) -> Source:
    if spec in NAMES:
        source = open_named(spec, data_root(root), max_unreadable_fraction)
        if not Path(spec).is_dir():
            return source
        note = f"The folder {spec}/ here is not read: {spec} is the name of a known set. Write ./{spec} for the folder."
        return replace(source, warnings=(*source.warnings, note))
    if not spec.strip():
        raise DataError(f"The data SPEC is empty. Expected one of {', '.join(NAMES)}, a folder, or a CSV file.")
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            return open_folder(path, spec, max_unreadable_fraction)
        exists = path.exists()
    except OSError as error:  # a name too long, no permission on the way
        raise DataError(f"{spec} cannot be opened: {error.strerror}. Expected a folder or a CSV file.") from None
    if path.is_file() and is_packed(path):  # whatever its name ends in
        return open_packed(path, spec, max_unreadable_fraction)
    if is_shards(spec):
        return open_shards(spec, max_unreadable_fraction)
    if not exists:
        raise _missing(spec, path)
    if path.suffix.lower() == ".csv":
        return open_csv(path, spec, max_unreadable_fraction)
    raise _other_file(path)


def _missing(spec: str, path: Path) -> DataError:
    if "{" in spec and path.name.lower().endswith(_ARCHIVES):
        return DataError(
            f"{spec} names compressed archives, which are not read as they are. Expected plain tars, such as "
            f"{SHARDS_EXAMPLE}; decompress them (gunzip, unxz, unzstd) and name the .tar files."
        )
    if path.suffix.lower() == ".csv" or len(path.parts) > 1 or path.is_absolute():
        kind = "The CSV file" if path.suffix.lower() == ".csv" else "The folder"
        return DataError(
            f"{kind} {path} does not exist. Expected an existing folder or CSV, or one of {', '.join(NAMES)}."
        )
    return DataError(
        f"There is no data set named '{spec}'.{did_you_mean(spec, NAMES)} Known names: {', '.join(NAMES)}; or a "
        f"folder: {path.absolute()} does not exist."
    )


def _other_file(path: Path) -> DataError:
    if path.name.lower().endswith(_ARCHIVES):
        return DataError(
            f"{path} is an archive; a folder was expected. Unpack it (tar xf, unzip) and name the folder: {LAYOUTS}. "
            f"WebDataset shards ({SHARDS_EXAMPLE}) are read as they are, where they are not compressed."
        )
    return DataError(
        f"{path} is a file; a folder of images, a CSV (columns path,label[,split]), a file made by kdedge data pack, "
        f"or WebDataset shards ({SHARDS_EXAMPLE}) was expected."
    )
