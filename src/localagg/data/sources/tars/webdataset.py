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
from typing import Any
from zlib import crc32

from ....errors import UserError
from ....io.files import read_at
from ..file_index import IndexedFiles, damaged
from ..image_files import EXTENSIONS, files_with_suffix
from ..source import ImageRecord, Sample, content_hash
from ..splits import Splits, files_by_split, split_folders
from .tar_index import BLOCK, holds_images, member_name, open_index

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
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            member = read_at(file, BLOCK + length, start - BLOCK)
        finally:
            os.close(file)
        header, image = member[:BLOCK], member[BLOCK:]
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


def find_tars(uri: str, root: Path) -> Splits | None:
    """Return the splits of a tar, or of the tars in a folder or its split folders.

    Tars without images do not count.

    Raises:
        UserError: no tar holds images, but one was named, is damaged, or is compressed.
    """
    if root.is_file():
        return _splits(uri, {"train": [root]}) if root.suffix.lower() == ".tar" else None
    tars = {name: files_with_suffix(folder, ".tar") for name, folder in split_folders(root).items()}
    tars = {name: files for name, files in tars.items() if files} or files_by_split(
        files_with_suffix(root, ".tar")
    )
    kinds = {path: _holds(path) for files in tars.values() for path in files}
    if True not in kinds.values():
        for path in kinds:
            holds_images(path)  # raises what is wrong
        return None
    # Damaged tars beside good ones are part of the data: opening raises what is wrong.
    held = {
        name: [path for path in files if kinds[path] is not False] for name, files in tars.items()
    }
    held = {name: files for name, files in held.items() if files}
    used = {path.relative_to(root).as_posix() for files in held.values() for path in files}
    used |= {f"classes-{split}.json" for split in held}
    return _splits(uri, held, root, used.__contains__)


def find_tar_pattern(uri: str) -> Splits | None:
    """Return the splits of a pattern with ``*``, ``?``, ``[...]`` or WebDataset's ``{000..012}``.

    A pattern of a single split is "train", like a single file.

    Raises:
        UserError: a pattern without a tar, or a missing tar of a range.
    """
    if not uri.lower().endswith(".tar") or not (glob.has_magic(uri) or _BRACES.search(uri)):
        return None
    paths: list[Path] = []
    for pattern in _expand(os.path.expanduser(uri)):
        found = [Path(path) for path in sorted(glob.glob(pattern))] or [Path(pattern)]
        if not found[0].is_file():
            raise UserError("not-found", f"No tar '{pattern}' ('{uri}').")
        paths += found
    tars = files_by_split(paths)
    return _splits(uri, tars if len(tars) > 1 else {"train": paths})


def _holds(path: Path) -> bool | None:
    """Return whether a tar holds images; None if it is damaged before its first one."""
    try:
        return holds_images(path)
    except UserError:
        return None


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


def _splits(uri: str, tars: dict[str, list[Path]], *where: Any) -> Splits:
    return Splits([*tars], lambda split: _open(uri, split, tars[split]), *where)


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
