"""Image files in folders: their extensions, walking a folder, and reading a file safely.

This module imports neither torch nor numpy, so that the command line starts quickly.
"""

import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from .file_kinds import IMAGE_KINDS, kind_of

_COMMON = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".avif")
_PHONE = (".heic", ".heif", ".hif")  # pillow-heif reads these
_MEDICAL = (".dcm", ".dicom")  # pydicom
EXTENSIONS = frozenset(
    [*_COMMON, ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm", *_PHONE, *_MEDICAL]
)

# Folders that operating systems and network storage keep beside people's files.
_SYSTEM = (
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@tmp", "$recycle.bin", "lost+found"),
    *("__macosx", "system volume information"),
)


def is_system_folder(name: str) -> bool:
    """Return whether a folder is hidden, or one of the operating system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an image by its extension; without one, by its first bytes.

    DICOM files are often named by numbers: ``IM0001`` or ``1.2.840.10008``.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix and not suffix[1:].isdigit():
        return suffix in EXTENSIONS
    try:
        with open_file(path) as file:
            kind = kind_of(file.read(132))
    except OSError:
        return False
    return kind == "DICOM" if suffix else kind in IMAGE_KINDS


def walk_images(
    root: Path, prefix: str = "", linked: set[str] | None = None
) -> Iterator[tuple[str, int]]:
    """Yield (path relative to the root with '/', size in bytes) of every image file.

    Hidden entries, system folders, folders without permission, pipes and devices are skipped;
    :func:`unread_files.count_unread` counts them. A link without a target counts as an image of
    size 0, so that reading it reports the broken link.

    A link to a folder is followed unless its target contains the link. Below such a link
    (``linked`` holds the targets followed so far), further links are followed only to folders
    outside of the root, and each target once: links to each other would otherwise never end.
    """
    try:
        with os.scandir(root / prefix) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
    except (PermissionError, FileNotFoundError):  # not readable, or removed meanwhile
        if not prefix:
            raise
        return
    for entry in ordered:
        path = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if not is_folder(entry):
            if is_image_file(entry.path) and (size := _size(entry)) is not None:
                yield path, size
        elif is_system_folder(entry.name):
            continue
        elif not entry.is_symlink():
            yield from walk_images(root, path + "/", linked)
        else:
            target = Path(entry.path).resolve()
            again = (root / prefix).resolve().is_relative_to(target)
            if linked is not None:
                again |= str(target) in linked or target.is_relative_to(root.resolve())
            if not again:
                followed = set() if linked is None else linked
                followed.add(str(target))
                yield from walk_images(root, path + "/", followed)


def files_with_suffix(folder: Path, suffix: str) -> list[Path]:
    """Return the visible files of a folder with an extension, in any case, sorted by name."""
    names = (name for name in os.listdir(folder) if name.lower().endswith(suffix))
    return [folder / name for name in sorted(names) if name[0] != "." and (folder / name).is_file()]


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size(entry: os.DirEntry[str]) -> int | None:
    """Return a file's size in bytes: 0 for a broken link, None for a pipe or device."""
    try:
        found = entry.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def open_file(path: str | os.PathLike[str]) -> io.FileIO:
    """Open a regular file for reading; its path may come from untrusted data.

    Raises:
        OSError: the file cannot be opened, or is a pipe (which would block), device or folder.
    """

    def without_blocking(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        file = open(path, "rb", buffering=0, opener=without_blocking)  # noqa: SIM115
    except ValueError:  # a NUL in the path
        raise OSError(errno.EINVAL, "Not a path", os.fspath(path)) from None
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Read a whole regular file; see :func:`open_file`."""
    with open_file(path) as file:
        return file.readall()
