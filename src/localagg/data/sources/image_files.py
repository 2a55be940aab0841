"""Which files of a folder are images, by their names; known before torch has loaded."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

EXTENSIONS = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".png",
        ".bmp",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".tif",
        ".tiff",
        ".webp",
        ".avif",
        ".jp2",
    ]
)


def walk_images(
    root: Path, prefix: str = "", linked: set[str] | None = None
) -> Iterator[tuple[str, int]]:
    """(relative path with '/', size) of every image file.

    Hidden files and folders are left out, and what is neither file nor folder: to open a pipe would
    wait without end. Links that lead nowhere count as images of no size: to read one tells so.

    A link to a folder is followed unless it leads to one that holds it. Below such a link
    (``linked``: where it and those below it lead) a further one is followed only out of the root,
    and once: links to each other would else be followed until no path is long enough.
    """
    with os.scandir(root / prefix) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        path = prefix + entry.name
        if entry.name.startswith("."):
            continue
        if not is_folder(entry):
            known = os.path.splitext(entry.name)[1].lower() in EXTENSIONS
            if known and (size := _size(entry)) is not None:
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
    """Whether it is one, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size(entry: os.DirEntry[str]) -> int | None:
    """Of a file in bytes; 0 where a link leads to none, None where it is something else."""
    try:
        found = entry.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else None
