"""Index of WebDataset tars: positions and labels of their images, without unpacking them.

A tar is a sequence of members, each a header of 512 bytes and data padded to a multiple of 512,
and an end mark of zeros. Members that share a name up to its first dot are one sample:
``000012.jpg`` and ``000012.cls``. They lie side by side.

Names are only compared and shown. No file is written, and no link is followed.
"""

import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np

from ....errors import UserError
from ....io.console import notify
from ....io.files import read_at
from ..file_index import POSITIONS, Columns, cached_index, damaged, scan_files
from ..file_kinds import HEAD, describe, kind_of
from ..image_files import EXTENSIONS
from ..labels import number_labels

BLOCK = 512
LABEL_KINDS = ("cls", "json", "txt")  # the first one in a sample is its label
_JSON_KEYS = ("label", "cls", "class", "target")
_TEXT_LIMIT = 1 << 20  # bytes of a label file or of a header
_NAME_LIMIT = 1 << 16  # bytes
_VERSION = 2
_PROBED = 10_000  # members in which an image is looked for
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_INTEGER = re.compile(r"-?\d{1,18}")
_DTYPES = {
    **POSITIONS,
    "header": "uint32",  # CRC-32 of the header before the image
    "name_end": "int64",  # end of the member's name in "names", uint8: all names, concatenated
}


class _Member(NamedTuple):
    """A plain file in a tar."""

    name: str
    offset: int
    size: int
    header: int
    label: bytes
    """Content of files that may hold a label; empty for others."""


# --- Members --------------------------------------------------------------------------------------


class _HeaderReader(io.BufferedReader):
    """A tar file as tarfile reads it: only headers, so that a large read is damage."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _TEXT_LIMIT:
            raise ValueError("a header of over a megabyte")
        return super().read(size)


def _members(path: Path) -> Iterator[_Member]:
    """Yield the plain files of a tar in order; skip links, folders and devices.

    tarfile takes a damaged header for the end of the tar, so that the rest must be an end mark.

    Raises:
        UserError: a compressed or damaged tar, or one that is cut off.
    """
    with _HeaderReader(io.FileIO(path), 1 << 16) as file:
        _check_uncompressed(path, file.peek(HEAD))
        archive, at, size = None, 0, os.fstat(file.fileno()).st_size
        while True:
            try:
                if archive is None:
                    archive = tarfile.TarFile(
                        fileobj=file, encoding="utf-8", errors="surrogateescape"
                    )
                member = archive.next()
            except Exception as error:  # tarfile raises many types for damaged headers
                raise damaged(path, at, f"invalid tar header ({error})") from None
            if member is None:
                break
            archive.members.clear()  # type: ignore[attr-defined] - tarfile keeps them all
            if archive.offset > size:
                raise damaged(path, at, f"the file ends inside '{shown(member.name)}'")
            if archive.offset <= at or member.issparse():
                reason = "a sparse file" if member.issparse() else "a negative size"
                raise damaged(path, at, f"{reason}, '{shown(member.name)}'")
            at = archive.offset
            if member.isreg():
                start, length = member.offset_data, member.size
                header = read_at(file.fileno(), BLOCK, start - BLOCK)
                kind = split_name(member.name)[1].rpartition(".")[2]
                holds_label = kind in LABEL_KINDS and length <= _TEXT_LIMIT
                label = read_at(file.fileno(), length, start) if holds_label else b""
                yield _Member(member.name, start, length, crc32(header), label)
        _check_end_mark(path, file, at)


def holds_images(path: Path) -> bool:
    """Return whether one of the first members of a tar is named like an image.

    Raises:
        UserError: a compressed or damaged tar, without an image before the damage.
    """
    names = (member.name for member in itertools.islice(_members(path), _PROBED))
    return any(_is_image(name) for name in names)


def _is_image(name: str) -> bool:
    hidden = name.rpartition("/")[2].startswith(".")
    return not hidden and os.path.splitext(name)[1].lower() in EXTENSIONS


def _check_uncompressed(path: Path, start: bytes) -> None:
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            message = f"'{path}' is compressed by {kind}; unpack it to a plain .tar."
            raise UserError("unsupported", message)
    if kind_of(start[:HEAD]) not in ("", "text", "a tar archive", "a file of zeros"):
        raise damaged(path, 0, describe(start[:HEAD]))


def _check_end_mark(path: Path, file: _HeaderReader, at: int) -> None:
    file.seek(at)
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise damaged(path, at, "the file ends without a tar's end mark")
    if block.strip(b"\0"):
        raise damaged(path, at, "invalid tar header")
    while rest := file.read(1 << 16):
        if rest.strip(b"\0"):
            raise damaged(path, at, "data after the tar's end mark")


def split_name(name: str) -> tuple[str, str]:
    """Return the (key, extension in lower case) of a member, split at the first dot."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def shown(name: str) -> str:
    """Return a member's name with unprintable characters replaced, for messages."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


# --- Samples --------------------------------------------------------------------------------------


def _samples(path: Path) -> Iterator[tuple[_Member | None, str | None, str]]:
    """Yield (image, label, kind of label) of the samples of a tar in their order."""
    seen: set[str] = set()
    visible = (m for m in _members(path) if not m.name.rpartition("/")[2].startswith("."))
    for key, group in itertools.groupby(visible, key=lambda member: split_name(member.name)[0]):
        members = list(group)
        if key in seen:
            reason = f"the sample '{shown(key)}' a second time; its files must lie side by side"
            raise damaged(path, members[0].offset - BLOCK, reason)
        seen.add(key)
        kinds = {split_name(member.name)[1]: member for member in members}
        # KEY.cls before KEY.label.cls
        kinds = {kind.rpartition(".")[2]: kinds[kind] for kind in sorted(kinds, key=_dots)}
        kind = next((kind for kind in LABEL_KINDS if kind in kinds), "")
        image = _find_image(path, members)
        yield image, _read_label(path, kinds[kind], kind) if image and kind else None, kind


def _dots(kind: str) -> int:
    return -kind.count(".")


def _find_image(path: Path, members: list[_Member]) -> _Member | None:
    """Return the image among a sample's files: ``KEY.jpg`` before ``KEY.mask.png``."""
    found: list[list[_Member]] = [[], []]
    for member in members:
        extension = split_name(member.name)[1]
        if "." + extension.rpartition(".")[2] in EXTENSIONS:
            found["." in extension].append(member)
    best = found[0] or found[1]
    if len(best) > 1:
        names = f"'{shown(best[0].name)}' and '{shown(best[1].name)}'"
        raise damaged(path, best[1].offset - BLOCK, f"two images of one sample, {names}")
    return best[0] if best else None


def _read_label(path: Path, member: _Member, kind: str) -> str | None:
    """Return the number or word in a label's file, None if it has none."""
    try:
        text = member.label.decode()
        if kind == "json":
            fields = json.loads(text)
            values = [fields[key] for key in _JSON_KEYS if key in fields] if fields else []
            text = str(values[0]) if values and isinstance(values[0], (str, int)) else ""
    except (ValueError, TypeError, RecursionError):
        reason = f"'{shown(member.name)}' is no label"
        raise damaged(path, member.offset - BLOCK, reason) from None
    return text.strip() or None


# --- Index ----------------------------------------------------------------------------------------


def open_index(folder: Path, name: str, files: list[str]) -> Columns:
    """Return the index of tars in the order of files and members: cached, or built if they changed.

    Raises:
        UserError: damage, with file and offset; labels that only some images have, or that are no
            class numbers; no images.
    """
    dtypes = {**_DTYPES, "names": "uint8"}
    return cached_index(folder, name, files, _VERSION, dtypes, lambda: build_index(folder, files))


def build_index(folder: Path, files: list[str]) -> Columns:
    """Read the headers and labels of tars; return the columns of the index."""
    names, words, skipped, texts = bytearray(), dict[str, int](), 0, False

    def scan(path: Path) -> Iterator[tuple[int, ...]]:
        nonlocal names, skipped, texts
        for image, label, kind in _samples(path):
            if image is None:
                skipped += 1
                continue
            code = -1 if label is None else words.setdefault(label, len(words))
            texts |= label is not None and kind == "txt"
            names += image.name.encode("utf-8", "surrogateescape")[:_NAME_LIMIT]
            yield image.offset, image.size, image.header, len(names), code

    columns = scan_files(folder, files, scan, ("offset", "length", "header", "name_end", "code"))
    first, codes = folder / files[0], columns["code"]
    if not len(codes):
        raise UserError("no-images", f"'{first}' has no images (.jpg, .png, .webp, ...).")
    if skipped:
        notify(f"'{first}': skipped {skipped:,} samples without an image.")
    found = {name: columns[name].astype(dtype) for name, dtype in _DTYPES.items()}
    found["names"] = np.frombuffer(names, np.uint8)

    def where(row: int) -> str:
        path, at = folder / files[columns["file"][row]], columns["offset"][row] - BLOCK
        return f"'{member_name(found, row)}' in '{path}' at byte {at:,}"

    integers = all(map(_INTEGER.fullmatch, words))
    if texts and not integers and len(words) * 2 > len(codes):
        notify(f"'{first}': the .txt files are captions, not classes; they are ignored.")
        return found
    values = [int(word) for word in words] if integers else [*words]
    if labels := number_labels(values, codes, where):
        found["label"] = labels[0]
        if labels[1] is not None:
            found["classes"] = np.frombuffer(json.dumps(labels[1]).encode(), np.uint8)
    return found


def member_name(index: Columns, row: int) -> str:
    """Return the name of an image in its tar, for messages."""
    start = int(index["name_end"][row - 1]) if row else 0
    name = index["names"][start : int(index["name_end"][row])].tobytes()
    return shown(name.decode("utf-8", "surrogateescape"))
