"""WebDataset shards: plain tar files whose images are read where they lie; nothing is unpacked.

Members that share a name up to its first dot belong together: 000012.jpg and, where the class is known, 000012.cls.
What a shard holds is listed once and kept in the cache folder, with the image headers: opening a million images again
then reads the lists alone.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path, PurePosixPath

from kdedge.data.entries import Entry, build_source
from kdedge.data.files import FileHeader, Member, image_suffixes, read_content_header
from kdedge.data.parallel import stream_threads
from kdedge.data.source import Source
from kdedge.data.words import counted, first_few
from kdedge.errors import DataError, RunError
from kdedge.runs import write_bytes
from kdedge_device.preprocess import ImageUnreadable

__all__ = ["SHARDS_EXAMPLE", "expand_braces", "is_shards", "open_shards", "shard_entries"]

SHARDS_EXAMPLE = "'shards-{000..099}.tar'"  # quoted: bash expands braces
_SCHEMA = 2
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_SHARDS = 100_000
_CLASS_BYTES = 1000  # of a .cls member, which holds a number or a name
_NOT_IN_A_LINE = frozenset({"Cc", "Zl", "Zp"})  # Unicode: controls (escapes, line ends), line and paragraph separators


@dataclass(frozen=True)
class _Listed:
    """One image of a shard. `reason` says why it cannot be read, and is empty where it can; `bad_class` names a .cls
    member of it that holds no class.
    """

    name: str
    offset: int
    size: int
    label: str | None
    height: int = 0
    width: int = 0
    mode: str = ""
    reason: str = ""
    bad_class: str = ""


def is_shards(spec: str) -> bool:
    return spec.lower().endswith(".tar")


def expand_braces(pattern: str) -> list[str]:
    """a-{08..10}.tar -> a-08.tar, a-09.tar, a-10.tar; {x,y} is both; several braces are all pairs. As bash does."""
    pieces = _BRACES.split(pattern)
    choices = [[piece] if number % 2 == 0 else _choices(piece, pattern) for number, piece in enumerate(pieces)]
    total = 1
    for options in choices:
        total *= len(options)
    if total > _MOST_SHARDS:
        raise DataError(f"{pattern} names {total:,} shards; at most {_MOST_SHARDS:,} were expected.")
    return ["".join(one) for one in product(*choices)]


def _choices(inside: str, pattern: str) -> list[str]:
    found = _RANGE.fullmatch(inside)
    if found is None:
        if "," not in inside:
            raise DataError(f"{{{inside}}} in {pattern} is no range. Expected numbers such as {SHARDS_EXAMPLE}.")
        return inside.split(",")
    first, last = found.groups()
    if int(last) < int(first):
        raise DataError(f"{{{inside}}} in {pattern} runs backwards. Expected numbers such as {SHARDS_EXAMPLE}.")
    digits = len(first) if first.startswith("0") else 0
    if int(last) - int(first) >= _MOST_SHARDS:
        raise DataError(f"{{{inside}}} in {pattern} is more than {_MOST_SHARDS:,} shards.")
    return [f"{number:0{digits}d}" for number in range(int(first), int(last) + 1)]


def open_shards(spec: str, max_unreadable_fraction: float) -> Source:
    """The images in the shards that `spec` names; those with a .cls member are labelled training images.

    DataError where a shard is missing, no plain tar, or cut, and where none holds an image.
    """
    paths = [Path(name).expanduser() for name in expand_braces(spec)]
    missing = [str(path) for path in paths if _is_missing(path)]
    if missing:
        raise DataError(
            f"{spec} names {counted(len(paths), 'shard')}, of which {len(missing)} cannot be found: "
            f"{first_few(missing)}. Expected all of them; correct the numbers in the braces."
        )
    twice = [str(path) for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(
            f"{spec} names {first_few(twice)} more than once. Expected each shard once; correct the braces."
        )
    folder = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    names = [path.absolute().relative_to(folder).as_posix() for path in paths]
    entries = shard_entries(list(zip(names, paths, strict=True)))
    if not entries:
        raise DataError(f"{spec} holds no image. Expected members such as 000012.jpg, with 000012.cls for its class.")
    note = (
        "No shard holds a class (a .cls member beside its image), so every image is unlabeled. To learn from them, lay "
        "the shards, or links to them, into unlabeled/ beside labeled/CLASS/."
    )
    known = any(entry.label is not None for entry in entries)
    return build_source(_name(spec), spec, entries, max_unreadable_fraction, warnings=[] if known else [note])


def _is_missing(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        return False  # it is there, and is told of when it is read
    return False


def _name(spec: str) -> str:
    """shards-{000..099}.tar is shards."""
    stem = _BRACES.sub("", Path(spec).name).removesuffix(".tar")
    return re.sub(r"[^\w.-]+", "-", stem).strip("-._") or "shards"


def shard_entries(shards: Sequence[tuple[str, Path]], *, labeled: bool = True) -> list[Entry]:
    """Every image of the shards (name, path), its id the shard's name and its own. Without `labeled` classes are not
    read: images lie in unlabeled/. DataError where a shard cannot be read, and where a class is read and is none.
    """
    listed = stream_threads(_list, [path for _, path in shards])
    entries, bad = [], []
    for (shard, path), images in zip(shards, listed, strict=True):
        for image in images:
            if labeled and image.bad_class:
                bad.append(f"{image.bad_class} in {path}")
            label = image.label if labeled else None
            part = "unlabeled" if label is None else "train"
            header = image.reason or FileHeader(image.height, image.width, image.mode, image.size)
            file = Member(path, image.offset, image.size)
            entries.append(Entry(f"{shard}/{image.name}", file, label, part, header))
    if bad:
        raise DataError(
            f"{counted(len(bad), 'image')} with a .cls member that holds no class: {first_few(bad)}. Expected one line "
            "of text: a number or a class name."
        )
    return entries


def _list(path: Path) -> list[_Listed]:
    """What the shard holds, from the cache where it was listed before."""
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Expected a WebDataset shard, a plain tar.") from None
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait forever
        raise DataError(f"{path} is not a regular file. Expected a WebDataset shard, a plain tar.")
    facts = {"schema": _SCHEMA, "shard": str(path.resolve()), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}
    kept = (
        _cache_folder() / f"{hashlib.sha256(str(path.resolve()).encode('utf-8', 'surrogateescape')).hexdigest()}.json"
    )
    try:
        document = json.loads(kept.read_text(encoding="utf-8"))
        if {name: document[name] for name in facts} == facts:
            return [_Listed(**image) for image in document["images"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not listed yet, or altered: listed again
    images = _read(path)
    with contextlib.suppress(RunError):  # a cache that cannot be written costs time alone
        write_bytes(kept, json.dumps(facts | {"images": [asdict(image) for image in images]}).encode())
    return images


def _cache_folder() -> Path:
    return Path(os.environ.get("KDEDGE_CACHE") or "~/.cache/kdedge").expanduser() / "shards"


def _read(path: Path) -> list[_Listed]:
    """Go through the tar once, reading the images for their headers."""
    images: dict[str, tarfile.TarInfo] = {}
    classes: dict[str, tarfile.TarInfo] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:  # a name that comes twice is what it is at last, as in tar
                if member.isreg():
                    suffix = PurePosixPath(member.name).suffix.lower()
                    if suffix == ".cls":
                        classes[_key(member.name)] = member
                    elif suffix in image_suffixes() and not PurePosixPath(member.name).name.startswith("."):
                        images[member.name] = member
            _require_end(path, tar.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as a tar: {error}. Expected a whole, uncompressed WebDataset shard; fetch or make "
            "it again."
        ) from None
    labels = {key: _class(path, member) for key, member in classes.items()}
    listed = []
    for member in images.values():
        key = _key(member.name)
        bad_class = classes[key].name if key in classes and labels[key] is None else ""
        listed.append(_look(path, member, labels.get(key), bad_class))
    return listed


def _require_end(path: Path, offset: int) -> None:
    """DataError where no end mark stands at `offset`, or anything behind it.

    `tarfile` takes a damaged header, and a file that ends where a header should stand, for the end of the tar.
    """
    with path.open("rb") as file:
        file.seek(offset)
        rest = file.read(tarfile.BLOCKSIZE)
        whole = len(rest) == tarfile.BLOCKSIZE
        while rest and not rest.strip(b"\0"):
            rest = file.read(2**20)
    if rest or not whole:
        raise DataError(
            f"{path} is damaged or cut at byte {offset}: neither a member nor the tar's end stands there. Expected a "
            "whole WebDataset shard; fetch or make it again."
        )


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _class(path: Path, member: tarfile.TarInfo) -> str | None:
    """The class in a .cls member: one line that can be printed; None where it holds something else."""
    if member.issparse() or member.size > _CLASS_BYTES:
        return None
    try:
        label = Member(path, member.offset_data, member.size).content().decode().strip()
    except (ValueError, ImageUnreadable):
        return None
    odd = any(unicodedata.category(letter) in _NOT_IN_A_LINE for letter in label)
    return None if odd or not label else label


def _look(path: Path, member: tarfile.TarInfo, label: str | None, bad_class: str) -> _Listed:
    place = PurePosixPath(member.name)
    listed = partial(_Listed, member.name, member.offset_data, member.size, label, bad_class=bad_class)
    if "\0" in member.name:
        return listed(reason="its name holds a zero byte")
    if member.issparse():
        return listed(reason="it is stored as a sparse file")
    if place.is_absolute() or ".." in place.parts:
        return listed(reason="its name points out of the shard")
    try:
        header = read_content_header(Member(path, member.offset_data, member.size).content())
    except ImageUnreadable as error:
        header = error.reason
    if isinstance(header, str):
        return listed(reason=header)
    return listed(height=header.height, width=header.width, mode=header.mode)
