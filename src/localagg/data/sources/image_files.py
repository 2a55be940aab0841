"""Image files in folders: their extensions, walking a folder, and reading a file safely.

This module imports neither torch nor numpy, so that the command line starts quickly.
"""

import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

_COMMON = (".jpg", ".jpeg", ".jpe", ".png", ".gif", ".bmp", ".webp", ".avif")
EXTENSIONS = frozenset([*_COMMON, ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".pbm"])


def walk_images(
    root: Path, prefix: str = "", linked: set[str] | None = None
) -> Iterator[tuple[str, int]]:
    """Yield (path relative to the root with '/', size in bytes) of every image file.

    Hidden entries, pipes and devices are skipped. A link without a target counts as an image of
    size 0, so that reading it reports the broken link.

    A link to a folder is followed unless its target contains the link. Below such a link
    (``linked`` holds the targets followed so far), further links are followed only to folders
    outside of the root, and each target once: links to each other would otherwise never end.
    """
    with os.scandir(root / prefix) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        path = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if not is_folder(entry):
            is_image = os.path.splitext(entry.name)[1].lower() in EXTENSIONS
            if is_image and (size := _size(entry)) is not None:
                yield path, size
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
