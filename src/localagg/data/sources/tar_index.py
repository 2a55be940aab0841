"""Where the samples of WebDataset tars lie: read once, never unpacked.

A tar is a row of members, each a header of 512 bytes and its data, filled up to a multiple of 512,
with blocks of zeros as its end mark. Members that share a name up to its first dot are one sample:
``000012.jpg`` and ``000012.cls``. They lie together.

Names are only ever compared and shown. Nothing is written to where they point, and links are not
followed.
"""

import itertools
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import numpy as np

from ...errors import UserError
from ...io.console import notify, show_progress
from .image_folder import EXTENSIONS
from .index_cache import Columns, cached_columns
from .source import MOST_CLASSES

BLOCK = 512
LABEL_KINDS = ("cls", "json", "txt")  # the first one that a sample has says its label
_JSON_KEYS = ("label", "cls", "class", "target")
_TEXT_LIMIT = 1 << 20  # bytes of a label's file, and of a header's extension
_NAME_LIMIT = 1 << 16
_VERSION = 1
_SHOW_EVERY = 256
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_KINDS = {  # of the columns
    "file": "int32",
    "offset": "int64",
    "length": "int64",
    "header": "uint32",
    "name_end": "int64",
}
_INTEGER = re.compile(r"-?\d{1,18}")


class Member(NamedTuple):
    """A plain file in a tar."""

    name: str
    offset: int
    """Of its data."""
    size: int
    content: bytes
    """Of files that may hold a label; empty else."""
    header: int
    """CRC-32 of the header before the data."""


class TarIndex(NamedTuple):
    """Where the images of a split are, in the order of files and members."""

    files: list[str]
    file: np.ndarray
    """int32 [N], which of them."""
    offset: np.ndarray
    """int64 [N], bytes to the image."""
    length: np.ndarray
    """int64 [N], bytes of the image."""
    header: np.ndarray
    """uint32 [N], the CRC-32 of the header before the image."""
    name_end: np.ndarray
    """int64 [N], where each member's name ends in ``names``."""
    names: np.ndarray
    """uint8, the names of all members, one behind the other."""
    label: np.ndarray | None
    """int64 [N], or None where the files store no labels."""
    classes: list[str] | None
    """Names of the classes where labels are words; None where they are numbers."""


# --- Members --------------------------------------------------------------------------------------


def members(path: Path) -> Iterator[Member]:
    """The plain files of a tar, in their order; links, folders and devices are passed over.

    Raises:
        UserError: a damaged header, sparse files, or the tar is cut off or goes on behind its end.
    """
    with open(path, "rb", buffering=1 << 16) as file:
        end, at = os.fstat(file.fileno()).st_size, 0
        name: str | None = None  # from an extension before the header it belongs to
        size: int | None = None
        while (block := _header(file, path, at, end)) is not None:
            info, checksum = block
            start = at + BLOCK
            long = info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
            plain = info.isreg() and not long
            length = size if plain and size is not None else info.size
            # As in tarfile: these have no data, whatever their header says.
            if not info.isreg() and info.type in tarfile.SUPPORTED_TYPES and not long:
                length = 0 if info.type != tarfile.GNUTYPE_LONGLINK else length
            if not 0 <= length <= end - start:
                raise damaged(path, at, f"the file ends inside '{shown(name or info.name)}'")
            if long:
                name, size = _extension(file, path, at, info, name, size)
            elif info.type == tarfile.GNUTYPE_SPARSE:
                raise damaged(path, at, "it holds a sparse file")
            elif info.type != tarfile.GNUTYPE_LONGLINK:
                if plain:
                    yield _member(file, name or info.name, start, length, checksum)
                name = size = None
            at = start + -(-length // BLOCK) * BLOCK
        if name is not None or size is not None:
            raise damaged(path, at, "the file ends behind a header that belongs to another")


def _header(file: BinaryIO, path: Path, at: int, end: int) -> tuple[tarfile.TarInfo, int] | None:
    """The header at an offset, and its CRC-32; None at the end mark."""
    file.seek(at)
    block = file.read(BLOCK)
    kind = next((kind for magic, kind in _COMPRESSED.items() if block.startswith(magic)), None)
    if at == 0 and kind is not None:
        raise UserError(
            "TODO",
            f"'{path}' is compressed by {kind}, which forbids reading in any order; unpack it to a"
            " plain .tar.",
        )
    if len(block) < BLOCK:
        inside = "inside a header" if at < end else "without a tar's end mark"
        raise damaged(path, min(at, end), f"the file ends {inside}")
    if not block.strip(b"\0"):
        while rest := file.read(1 << 16):
            if rest.strip(b"\0"):
                raise damaged(path, at, "there is more behind the tar's end mark")
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape"), crc32(block)
    except (tarfile.HeaderError, ValueError):
        raise damaged(path, at, "no tar header, or a damaged one") from None


def _extension(
    file: BinaryIO, path: Path, at: int, info: tarfile.TarInfo, name: str | None, size: int | None
) -> tuple[str | None, int | None]:
    """(name, size) of the next member, from a header that goes before its own."""
    if info.size > _TEXT_LIMIT:
        raise damaged(path, at, f"a header of {info.size:,} bytes is none")
    content = file.read(info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return content.split(b"\0")[0].decode("utf-8", "surrogateescape"), size
    place = 0
    while info.type == tarfile.XHDTYPE and place < len(content):
        head = re.compile(rb"(\d{1,7}) ([^=\n]+)=").match(content, place)
        stop = place + int(head[1]) if head else 0
        if head is None or not head.end() < stop <= len(content) or content[stop - 1] != ord("\n"):
            raise damaged(path, at, "a damaged pax header")
        value = content[head.end() : stop - 1]
        if head[2] == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif head[2] == b"size" and value.isdigit() and len(value) < 19:
            size = int(value)
        elif head[2] == b"size" or head[2].startswith(b"GNU.sparse"):
            raise damaged(path, at, f"a pax header with {head[2].decode(errors='replace')!r}")
        place = stop
    return name, size


def _member(file: BinaryIO, name: str, start: int, length: int, checksum: int) -> Member:
    wanted = 0 < length <= _TEXT_LIMIT and split_name(name)[1] in LABEL_KINDS
    return Member(name, start, length, file.read(length) if wanted else b"", checksum)


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member, as WebDataset has it: up to the first dot."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def shown(name: str) -> str:
    """A name from a file, fit for a message."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def damaged(path: Path, offset: int, what: str) -> UserError:
    """What is wrong with a tar, and where."""
    return UserError(
        "TODO", f"'{path}' is damaged at byte {offset:,}: {what}; copy or pack this file again."
    )


# --- Samples --------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    image: Member
    label: Member | None


def _samples(path: Path) -> Iterator[_Sample | None]:
    """The samples of a tar in their order; None for one without an image."""
    seen: set[str] = set()
    visible = (
        member for member in members(path) if not member.name.rpartition("/")[2].startswith(".")
    )
    for key, group in itertools.groupby(visible, key=lambda member: split_name(member.name)[0]):
        parts = list(group)
        if key in seen:
            raise UserError(
                "TODO",
                f"'{path}' holds the sample '{shown(key)}' a second time at byte"
                f" {parts[0].offset - BLOCK:,}; the files of a sample lie together, under a key of"
                " their own.",
            )
        seen.add(key)
        image = _image(path, parts)
        kinds = {split_name(member.name)[1]: member for member in parts}
        label = next((kinds[kind] for kind in LABEL_KINDS if kind in kinds), None)
        yield None if image is None else _Sample(image, label)


def _image(path: Path, parts: list[Member]) -> Member | None:
    """The image among a sample's files: ``KEY.jpg`` before ``KEY.mask.png``."""
    found: list[list[Member]] = [[], []]
    for member in parts:
        extension = split_name(member.name)[1]
        if "." + extension.rpartition(".")[2] in EXTENSIONS:
            found["." in extension].append(member)
    best = found[0] or found[1]
    if len(best) > 1:
        raise UserError(
            "TODO",
            f"'{path}' holds two images of one sample, '{shown(best[0].name)}' and"
            f" '{shown(best[1].name)}' at byte {best[1].offset - BLOCK:,}; give them keys of their"
            " own.",
        )
    return best[0] if best else None


def _word(path: Path, member: Member) -> str | None:
    """What a label's file says: a number or a word; None if it says nothing."""
    try:
        text = member.content.decode()
        if split_name(member.name)[1] == "json":
            fields = json.loads(text)
            values = [fields[key] for key in _JSON_KEYS if key in fields] if fields else []
            text = str(values[0]) if values and isinstance(values[0], (str, int)) else ""
    except (ValueError, TypeError, RecursionError):
        at = member.offset - BLOCK
        raise damaged(path, at, f"'{shown(member.name)}' is no label") from None
    return text.strip() or None


# --- Building -------------------------------------------------------------------------------------


def build_index(folder: Path, files: list[str]) -> TarIndex:
    """Read the headers and labels of tars, in order.

    Raises:
        UserError: damage, with file and offset; labels that only some images have, or that are no
            class numbers; no images.
    """
    columns = {name: array("q") for name in (*_KINDS, "code")}
    names, codes, lacking, texts, bare = bytearray(), {}, [], False, 0
    of = sum((folder / name).stat().st_size for name in files)
    done = 0
    with show_progress(f"indexing {files[0]}") as show:
        for number, name in enumerate(files):
            for sample in _samples(folder / name):
                if sample is None:
                    bare += 1
                    continue
                word = None if sample.label is None else _word(folder / name, sample.label)
                if word is None:
                    lacking.append(len(columns["file"]))
                elif sample.label is not None:
                    texts |= sample.label.name.lower().endswith(".txt")
                names += sample.image.name.encode("utf-8", "surrogateescape")[:_NAME_LIMIT]
                code = codes.setdefault(word, len(codes)) if word is not None else -1
                image = sample.image
                row = (number, image.offset, image.size, image.header, len(names), code)
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
                if len(columns["file"]) % _SHOW_EVERY == 0:
                    show(done + sample.image.offset, of)
            done += (folder / name).stat().st_size
    count = len(columns["file"])
    if not count:
        raise UserError("TODO", f"'{folder / files[0]}' holds no images (.jpg, .png, .webp, ...).")
    if bare:
        notify(f"'{folder / files[0]}': {bare:,} samples without an image are left out.")
    arrays: Any = {name: np.frombuffer(column, np.int64) for name, column in columns.items()}
    code = arrays.pop("code")
    arrays = {name: arrays[name].astype(kind) for name, kind in _KINDS.items()}
    index = TarIndex(
        files, **arrays, names=np.frombuffer(names, np.uint8), label=None, classes=None
    )
    return _labeled(folder, index, code, list(codes), lacking, texts)


def _labeled(
    folder: Path, index: TarIndex, code: np.ndarray, words: list[str], lacking: list[int], txt: bool
) -> TarIndex:
    """The index with its labels: numbers as they are, words numbered in sorted order."""
    count = len(code)
    if not words:
        return index
    numbers = all(map(_INTEGER.fullmatch, words))
    if txt and not numbers and len(words) * 2 > count:
        notify(f"'{folder / index.files[0]}': the .txt files are captions, not classes; left out.")
        return index
    if numbers and set(map(int, words)) == {-1} and not lacking:
        return index
    if lacking:
        where = _where(folder, index, lacking[0])
        raise UserError(
            "TODO", f"{where} has no label, but other images do; give it one, or remove all."
        )
    if not numbers:
        if len(words) > MOST_CLASSES:
            raise UserError(
                "TODO", f"'{folder}' has {len(words):,} classes, too many; its labels are none."
            )
        classes = sorted(words)
        number = {word: label for label, word in enumerate(classes)}
        values = np.array([number[word] for word in words])
        return index._replace(label=values[code], classes=classes)
    values = np.array([int(word) for word in words])
    wrong = np.flatnonzero((values < 0) | (values >= MOST_CLASSES))
    if len(wrong):
        row = int(np.flatnonzero(code == wrong[0])[0])
        raise UserError(
            "TODO",
            f"{_where(folder, index, row)} has the label {words[wrong[0]]}; labels are class"
            f" numbers from 0 to {MOST_CLASSES - 1:,}, or words.",
        )
    return index._replace(label=values[code])


def member_name(index: TarIndex, row: int) -> str:
    """The name of an image in its tar, fit for a message."""
    start = int(index.name_end[row - 1]) if row else 0
    name = index.names[start : int(index.name_end[row])].tobytes()
    return shown(name.decode("utf-8", "surrogateescape"))


def _where(folder: Path, index: TarIndex, row: int) -> str:
    path = folder / index.files[index.file[row]]
    at = int(index.offset[row]) - BLOCK
    return f"'{member_name(index, row)}' in '{path}' at byte {at:,}"


# --- Cache ----------------------------------------------------------------------------------------


def cached_index(folder: Path, name: str, files: list[str]) -> TarIndex:
    """The index of a split: from its cache if the files did not change, else built and cached.

    Raises:
        UserError: as :func:`build_index`.
    """

    def build() -> Columns:
        index = build_index(folder, files)
        columns = {part: getattr(index, part) for part in (*_KINDS, "names")}
        if index.label is not None:
            columns["label"] = index.label
        if index.classes is not None:
            text = json.dumps(index.classes).encode()
            columns["classes"] = np.frombuffer(text, np.uint8)
        return columns

    try:
        columns = cached_columns(
            folder, name, files, _VERSION, build, lambda c: _fit(c, len(files))
        )
    except OSError as error:
        raise UserError("TODO", f"The tars in '{folder}' cannot be read: {error}.") from None
    classes = columns.pop("classes", None)
    arrays: Any = {"label": None, **columns}
    return TarIndex(
        files, **arrays, classes=None if classes is None else json.loads(classes.tobytes())
    )


def _fit(columns: Columns, files: int) -> bool:
    """Whether arrays from a cache can be an index."""
    kinds = {**_KINDS, **({"label": "int64"} if "label" in columns else {})}
    blobs = {"names", "classes"} & set(columns)
    if {n: str(c.dtype) for n, c in columns.items() if n not in blobs} != kinds:
        return False
    if "names" not in blobs or any(columns[name].dtype != np.uint8 for name in blobs):
        return False
    shapes = {columns[name].shape for name in kinds}
    file, ends = columns["file"], columns["name_end"]
    return (
        len(shapes) == 1
        and len(file) > 0
        and bool(0 <= file.min() <= file.max() < files and columns["offset"].min() >= BLOCK)
        and bool(columns["length"].min() >= 0 and ends[-1] == len(columns["names"]))
    )
