"""WebDataset tars as a source with random access, and written.

A sample is an image and perhaps its label, ``KEY.jpg`` and ``KEY.cls``, side by side in a tar; see
``tar_index``. A label is the number or the word in ``.cls``, else the field ``label``, ``cls``,
``class`` or ``target`` of ``.json``, else the ``.txt`` (unless more than half of these differ,
which makes them captions).
"""

import glob
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from ...errors import UserError
from .image_folder import EXTENSIONS
from .labels import class_names
from .source import ImageRecord, Sample, Source, Splits, fingerprint, split_folders, split_in_name
from .tar_index import BLOCK, TarIndex, cached_index, damaged, member_name

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_FILES = 1_000_000
# Others are their format's name.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}


class WebDataset(Source):
    """The images of tars, in the order of the files' names and of their members.

    Holds no open file, so worker processes can share it.
    """

    def __init__(self, uri: str, folder: Path, split: str, index: TarIndex) -> None:
        self.uri, self.folder, self._index = uri, folder, index
        self.labels: Tensor | None = None
        self.classes: list[str] | None = None
        if index.label is not None:
            self.labels = torch.from_numpy(index.label.copy())
            self.classes = index.classes or class_names(folder, split, self.labels)

    def __len__(self) -> int:
        return len(self._index.file)

    def __getitem__(self, index: int) -> Sample:
        """See :class:`~localagg.data.sources.source.Source`.

        Raises:
            UserError: the file was damaged or replaced since the index was built.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        columns = self._index
        path = os.path.join(self.folder, columns.files[columns.file[index]])
        start, length = int(columns.offset[index]), int(columns.length[index])
        file = os.open(path, os.O_RDONLY)
        try:
            header = _read(file, BLOCK, start - BLOCK)
            image = _read(file, length, start)
        finally:
            os.close(file)
        if crc32(header) != columns.header[index] or len(image) < length:
            raise damaged(Path(path), start - BLOCK, "it has changed since it was opened")
        label = None if self.labels is None else int(self.labels[index])
        return Sample(index, image, label)

    def name(self, index: int) -> str:
        """See :class:`~localagg.data.sources.source.Source`."""
        file = self._index.files[self._index.file[index]]
        return f"{member_name(self._index, index)} of {Path(file).name}"

    def fingerprint(self) -> str:
        """Over the sizes, labels and names of all images, and the bytes of 64."""
        names = [self._index.name_end, self._index.names]
        labels = [] if self.labels is None else [self.labels.numpy()]
        return fingerprint(self, [self._index.length, *names, *labels])

    def stored_bytes(self) -> int:
        """See :class:`~localagg.data.sources.source.Source`."""
        return int(self._index.length.sum())


def _read(file: int, size: int, offset: int) -> bytes:
    """As many bytes as there are: one read may return fewer than were asked for."""
    data = os.pread(file, size, offset)
    while len(data) < size and (more := os.pread(file, size - len(data), offset + len(data))):
        data += more
    return data


# --- Finding --------------------------------------------------------------------------------------


def find_tars(uri: str, root: Path) -> Splits | None:
    """A tar, or those in a folder or its split folders, by the split of their name.

    A folder that holds images or other folders too is not meant: archives are often left beside
    what was unpacked from them.
    """
    if root.is_file():
        return _stored(uri, {"train": [root]}) if root.suffix == ".tar" else None
    tars: dict[str, list[Path]] = {}
    for name, folder in split_folders(root).items():
        if files := _tars_alone(folder):
            tars[name] = files
    for path in () if tars else _tars_alone(root):
        tars.setdefault(split_in_name(path.stem), []).append(path)
    return _stored(uri, tars) if tars else None


def _tars_alone(folder: Path) -> list[Path]:
    """The tars of a folder, in order; none if images or folders lie beside them."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            suffix = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir() or suffix in EXTENSIONS:
                return []
            if suffix == ".tar":
                found.append(folder / entry.name)
    return sorted(found)


def find_tar_pattern(uri: str) -> Splits | None:
    """Tars by a pattern: ``*``, ``?``, ``[...]``, or WebDataset's ``{000..012}``.

    Where all of them are of one split they are "train", as a single named file is.

    Raises:
        UserError: no such tar, or one of a range is missing.
    """
    if not uri.endswith(".tar") or not (glob.has_magic(uri) or _BRACES.search(uri)):
        return None
    if Path(uri).expanduser().exists():
        return None
    paths: list[Path] = []
    for pattern in _expanded(str(Path(uri).expanduser())):
        found = [Path(path) for path in sorted(glob.glob(pattern))] or [Path(pattern)]
        if not found[0].is_file():
            raise UserError("TODO", f"There is no tar '{pattern}' ('{uri}').")
        paths += found
    tars: dict[str, list[Path]] = {}
    for path in paths:
        tars.setdefault(split_in_name(path.stem), []).append(path)
    return _stored(uri, tars if len(tars) > 1 else {"train": paths})


def _expanded(pattern: str) -> list[str]:
    """A pattern with its ranges written out."""
    if (match := _BRACES.search(pattern)) is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MOST_FILES:
        raise UserError(
            "TODO", f"The range {match[0]} of '{pattern}' names no tars; write {{000..012}}."
        )
    width = len(match[1])
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [
        whole
        for number in range(first, last + 1)
        for whole in _expanded(f"{before}{number:0{width}d}{after}")
    ]


def _stored(uri: str, tars: dict[str, list[Path]]) -> Splits:
    return Splits(list(tars), lambda split: _open(uri, split, tars[split]))


def _open(uri: str, split: str, paths: list[Path]) -> WebDataset:
    folder = paths[0].parent
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
    files = [path.relative_to(folder).as_posix() for path in paths]
    digest = hashlib.sha256("\0".join(files).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return WebDataset(uri, folder, split, cached_index(folder, f"tar-{split}-{digest}", files))


# --- Writing --------------------------------------------------------------------------------------


def write_tar(path: Path, records: Iterable[ImageRecord]) -> None:
    """Write one tar: of each record ``INDEX.jpg`` (or .png, ...) and, where labeled, ``INDEX.cls``.

    Its bytes depend on the records alone.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            key = f"{record.index:09d}"
            _add(tar, f"{key}.{_extension(record)}", record.image)
            if record.label is not None:
                _add(tar, f"{key}.cls", str(record.label).encode())
            tar.members.clear()  # type: ignore[attr-defined] - tarfile would keep them all


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    tar.addfile(info, io.BytesIO(content))


def _extension(record: ImageRecord) -> str:
    """By the image's format; of what is no image, its file's own."""
    found = _EXTENSIONS.get(record.format, record.format.lower())
    if "." + found in EXTENSIONS:
        return found
    own = Path(record.path or "").suffix.lower()
    return own[1:] if own in EXTENSIONS else "jpg"
