"""The folder layouts: labeled/ + unlabeled/, train/ val/ test/, and plain class folders."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from kdedge.data.entries import Entry, build_source
from kdedge.data.files import image_suffixes
from kdedge.data.shards import shard_entries
from kdedge.data.source import Source
from kdedge.data.words import counted, first_few
from kdedge.errors import DataError

__all__ = ["LAYOUTS", "open_folder"]

LAYOUTS = (
    "labeled/CLASS/image.jpg with unlabeled/image.jpg or unlabeled/shard.tar (and val/CLASS/, test/CLASS/), or "
    "train/CLASS/image.jpg (and val/CLASS/, test/CLASS/), or CLASS/image.jpg"
)
# Folder name -> part. Both spellings of labelled; "labeled" and "train" are one thing: images that keep a label.
_PART_FOLDERS = {
    "labeled": "train",
    "labelled": "train",
    "train": "train",
    "unlabeled": "unlabeled",
    "unlabelled": "unlabeled",
    "val": "val",
    "test": "test",
}
_LIKELY_MEANT = {
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "eval": "val",
    "training": "train",
    "testing": "test",
    "unlabel": "unlabeled",
}
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "__pycache__"})


@dataclass
class _Scan:
    """What a walk has found so far. Paths in `stray` and `links` are relative to the root."""

    root: Path
    entries: list[Entry] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    shards: list[tuple[str, Path]] = field(default_factory=list)
    hidden: int = 0

    def listing(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """(folders, files) below `folder`, hidden ones counted and left out, sorted by name."""
        folders, files = [], []
        try:
            names = sorted(os.listdir(folder), key=os.fsencode)  # noqa: PTH208 -- names, before a path for each
        except OSError as error:
            raise DataError(
                f"The folder {folder} cannot be read: {error.strerror}. Expected a readable folder."
            ) from None
        for name in names:
            if name.startswith(".") or name in _SYSTEM_FOLDERS:
                self.hidden += 1
            elif _is_folder(folder / name):
                folders.append(folder / name)
            else:
                files.append(folder / name)
        return folders, files

    def relative(self, path: Path) -> str:
        return PurePosixPath(path.relative_to(self.root)).as_posix()

    def _above(self) -> set[tuple[int, int]]:
        """The root and the folders it lies in: a link to one of them leads back here."""
        return {_identity(parent) for parent in (self.root.resolve(), *self.root.resolve().parents)}

    def declare(self, folder: Path) -> None:
        if _identity(folder) not in self._above():
            self.declared.append(folder.name)

    def add_class_folders(self, folder: Path, part: str) -> None:
        """Every folder in `folder` is a class; files beside them are stray."""
        classes, files = self.listing(folder)
        self.stray += [self.relative(path) for path in files]
        for path in classes:
            if part == "train":
                self.declare(path)
            self.add_images(path, path.name, part)

    def add_images(self, folder: Path, label: str | None, part: str) -> None:
        """All images in and below `folder`. Each real folder is read once, so links in a circle come to an end."""
        seen = self._above()
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            identity = _identity(current)
            if identity in seen:
                self.links.append(self.relative(current))
                continue
            seen.add(identity)
            folders, files = self.listing(current)
            waiting += folders[::-1]
            for path in files:
                if path.suffix.lower() in image_suffixes():
                    self.entries.append(Entry(self.relative(path), path, label, part))
                elif part == "unlabeled" and path.suffix.lower() == ".tar":
                    self.shards.append((self.relative(path), path))
                else:
                    self.stray.append(self.relative(path))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Expected a readable folder.") from None


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def open_folder(path: Path, spec: str, max_unreadable_fraction: float) -> Source:
    """The source in the folder `path`; DataError where it holds no image in one of the known layouts."""
    scan = _Scan(path)
    folders, files = scan.listing(path)
    scan.stray += [scan.relative(file) for file in files]
    parts = [folder for folder in folders if folder.name in _PART_FOLDERS]
    if len(parts) == 1 and len(folders) > 1 and parts[0].name == "train" and not scan.listing(parts[0])[0]:
        parts = []  # cars, ships and trains: "train" is a class here
    others = [folder for folder in folders if folder not in parts]
    notes = []
    if parts:
        for folder in parts:
            _add_part(scan, folder)
        notes = _other_folders(others)
    else:
        for folder in others:
            scan.declare(folder)
            scan.add_images(folder, folder.name, "train")
    scan.entries += shard_entries(scan.shards, labeled=False)
    if not scan.entries:
        raise _nothing_found(path, scan, folders)
    name = path.resolve().name.replace(" ", "-") or "data"
    return build_source(
        name,
        spec,
        scan.entries,
        max_unreadable_fraction,
        warnings=[*notes, *_ignored_notes(scan)],
        ignored=[*scan.stray, *scan.links],
        declared=scan.declared,
    )


def _add_part(scan: _Scan, folder: Path) -> None:
    part = _PART_FOLDERS[folder.name]
    if part == "unlabeled":
        scan.add_images(folder, None, part)
        return
    before = len(scan.entries)
    scan.add_class_folders(folder, part)
    loose = [path for path in scan.listing(folder)[1] if path.suffix.lower() in image_suffixes()]
    if loose and len(scan.entries) == before:
        raise DataError(
            f"{folder} holds {counted(len(loose), 'image')} but no class folders. Expected "
            f"{folder.name}/CLASS/{loose[0].name}. Images without a label go into unlabeled/."
        )


def _other_folders(others: Sequence[Path]) -> list[str]:
    """Sentences about folders beside train/, val/ ... that are not read."""
    notes = []
    for folder in others:
        meant = _LIKELY_MEANT.get(folder.name.lower()) or _PART_FOLDERS.get(folder.name.lower())
        hint = f"; call it {meant}/ if it is that part" if meant else ""
        notes.append(
            f"The folder {folder.name}/ is none of train/ labeled/ unlabeled/ val/ test/ and is not read{hint}."
        )
    return notes


def _ignored_notes(scan: _Scan) -> list[str]:
    notes = []
    if scan.stray:
        suffixes = Counter(PurePosixPath(name).suffix.lower() or "no suffix" for name in scan.stray)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items())[:5])
        notes.append(
            f"Ignored {counted(len(scan.stray), 'stray file')} ({kinds}), in no class folder or without an image "
            f"suffix: {first_few(scan.stray)}."
        )
    if scan.hidden:
        notes.append(f"Ignored {counted(scan.hidden, 'hidden file or folder', 'hidden files or folders')}.")
    if scan.links:
        notes.append(f"Skipped {counted(len(scan.links), 'linked folder')} seen before: {first_few(scan.links)}.")
    return notes


def _nothing_found(path: Path, scan: _Scan, folders: Sequence[Path]) -> DataError:
    loose = [name for name in scan.stray if PurePosixPath(name).suffix.lower() in image_suffixes()]
    if loose:
        what = f"{path} holds {counted(len(loose), 'image')} but no class folders ({first_few(loose)})"
        return DataError(
            f"{what}. Expected {LAYOUTS}. Sort them into class folders, or move them to {path / 'unlabeled'}."
        )
    archives = [name for name in scan.stray if name.endswith((".tar", ".zip", ".gz", ".xz", ".tgz", ".7z"))]
    if archives:
        return DataError(
            f"{path} holds no image, but archives ({first_few(archives)}). Unpack them there first. Expected {LAYOUTS}."
        )
    what = f"holds {counted(len(folders), 'folder')}, but no image" if folders else "is empty"
    return DataError(f"The folder {path} {what}. Expected {LAYOUTS}.")
