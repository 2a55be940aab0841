"""WebDataset tars: a source with random access, and the writer of ``pack``.

A sample is an image and perhaps its label, ``KEY.jpg`` and ``KEY.cls``; see ``tar_index``. The
label is the number or word in ``.cls``, else the field ``label``, ``cls``, ``class`` or ``target``
of ``.json``, else the ``.txt``, unless more than half of these differ: then they are captions.
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

from ...errors import UserError
from .file_index import IndexedFiles, damaged
from .image_files import EXTENSIONS
from .source import ImageRecord, Sample, content_hash
from .splits import Splits, split_folders, split_in_name
from .tar_index import BLOCK, member_name, open_index

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_FILES = 1_000_000
# Extensions that differ from the format's name.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}


class WebDataset(IndexedFiles):
    """The images of tars, in the order of the files' names and of their members."""

    def __getitem__(self, index: int) -> Sample:
        """Read an image.

        Raises:
            UserError: the file was damaged or replaced since the index was built.
        """
        path, start, length = self.position(index)
        with open(path, "rb") as file:
            file.seek(start - BLOCK)
            header, image = file.read(BLOCK), file.read(length)
        if crc32(header) != self.index["header"][index] or len(image) < length:
            raise damaged(path, start - BLOCK, "it has changed since it was opened")
        return Sample(index, image, self.label(index))

    def name(self, index: int) -> str:
        """Return the names of the member and of its tar."""
        return f"{member_name(self.index, index)} of {os.path.basename(self.position(index)[0])}"

    def fingerprint(self) -> str:
        """Hash the sizes, labels and names of all images, and the bytes of 64."""
        facts = [self.index[name] for name in ("length", "name_end", "names")]
        return content_hash(self, facts if self.labels is None else [*facts, self.labels.numpy()])


# --- Finding --------------------------------------------------------------------------------------


def find_tars(uri: str) -> Splits | None:
    """Return the splits of a tar, a pattern, or the tars in a folder or its split folders.

    Patterns contain ``*``, ``?``, ``[...]`` or WebDataset's ``{000..012}``. A pattern of a single
    split is "train", like a single file. A folder that has images or other folders too is no folder
    of tars: archives are often kept beside the files unpacked from them.

    Raises:
        UserError: a pattern without a tar, or a missing tar of a range.
    """
    root = Path(uri).expanduser()
    if root.is_file():
        return _splits(uri, {"train": [root]}) if root.suffix == ".tar" else None
    tars: dict[str, list[Path]] = {}
    if root.is_dir():
        for name, folder in split_folders(root).items():
            if files := _tars_alone(folder):
                tars[name] = files
        return _splits(uri, tars or _by_split(_tars_alone(root)))
    if uri.endswith(".tar") and (glob.has_magic(uri) or _BRACES.search(uri)):
        paths: list[Path] = []
        for pattern in _expand(str(root)):
            found = [Path(path) for path in sorted(glob.glob(pattern))] or [Path(pattern)]
            if not found[0].is_file():
                raise UserError("not-found", f"No tar '{pattern}' ('{uri}').")
            paths += found
        tars = _by_split(paths)
        return _splits(uri, tars if len(tars) > 1 else {"train": paths})
    return None


def _by_split(paths: list[Path]) -> dict[str, list[Path]]:
    tars: dict[str, list[Path]] = {}
    for path in paths:
        tars.setdefault(split_in_name(path.stem), []).append(path)
    return tars


def _tars_alone(folder: Path) -> list[Path]:
    """Return the sorted tars of a folder; none if images or folders lie beside them."""
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


def _expand(pattern: str) -> list[str]:
    """Return the patterns of a pattern with ranges."""
    if (match := _BRACES.search(pattern)) is None:
        return [pattern]
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MAX_FILES:
        message = f"The range {match[0]} of '{pattern}' is empty; write {{000..012}}."
        raise UserError("option-invalid", message)
    numbers = (f"{number:0{len(match[1])}d}" for number in range(first, last + 1))
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [whole for number in numbers for whole in _expand(before + number + after)]


def _splits(uri: str, tars: dict[str, list[Path]]) -> Splits | None:
    return Splits(list(tars), lambda split: _open(uri, split, tars[split])) if tars else None


def _open(uri: str, split: str, paths: list[Path]) -> WebDataset:
    folder = paths[0].parent
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
    files = [path.relative_to(folder).as_posix() for path in paths]
    digest = hashlib.sha256("\0".join(files).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    index = open_index(folder, f"tar-{split}-{digest}", files)
    return WebDataset(uri, folder, split, files, index)


# --- Writing --------------------------------------------------------------------------------------


def write_tar(path: Path, records: Iterable[ImageRecord]) -> None:
    """Write one tar: ``INDEX.jpg`` (or .png, ...) of each record and, with a label, ``INDEX.cls``.

    The bytes depend on the records alone.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for record in records:
            key = f"{record.index:09d}"
            _add(tar, f"{key}.{_extension(record)}", record.image)
            if record.label is not None:
                _add(tar, f"{key}.cls", str(record.label).encode())
            tar.members.clear()  # type: ignore[attr-defined] - tarfile keeps them all


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    tar.addfile(info, io.BytesIO(content))


def _extension(record: ImageRecord) -> str:
    """Return the extension of the image's format, else that of its file, else jpg."""
    found = _EXTENSIONS.get(record.format, record.format.lower())
    if "." + found in EXTENSIONS:
        return found
    own = Path(record.path or "").suffix.lower()
    return own[1:] if own in EXTENSIONS else "jpg"
