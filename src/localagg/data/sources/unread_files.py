"""Count the files of a folder that are not read by their kind, so that none is lost in silence.

This module imports neither torch nor numpy, so that the command line starts quickly.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .file_kinds import HEAD, SUFFIX_FIXES, kind_of
from .image_files import EXTENSIONS, is_folder, is_system_folder, open_file

_NAMED = 1_000  # files of a kind that are named in JSON
_SHOWN = 8  # kinds in one line
_OWN = ".localagg-index-"  # our own index files


class UnreadFiles(NamedTuple):
    """Files of one kind that are not read."""

    kind: str
    """``.zip``, ``hidden``, ``in @eaDir/`` ..."""
    fix: str
    """The remedy; may be empty."""
    files: int
    names: list[str]
    """Paths relative to the data's folder, at most 1,000."""

    @property
    def text(self) -> str:
        """``2 .zip (unpack)``."""
        return f"{self.files:,} {self.kind}" + (f" ({self.fix})" if self.fix else "")

    def to_json(self) -> dict[str, Any]:
        """Return {"kind", "fix", "files", "names"}."""
        return self._asdict()


def count_unread(root: Path, reads: Callable[[str], bool]) -> list[UnreadFiles]:
    """Return the plain files below a folder that are not read, most frequent kinds first.

    Links are skipped, as ``find -type f`` does. A folder without permission counts as one file.

    Args:
        root: the folder.
        reads: whether a file, by its path relative to the root, is read.
    """
    found: dict[str, tuple[int, list[str]]] = {}

    def add(kind: str, path: str) -> None:
        files, names = found.get(kind, (0, []))
        if files < _NAMED:
            names.append(path)
        found[kind] = files + 1, names

    def walk(prefix: str, folder_kind: str) -> None:
        try:
            with os.scandir(root / prefix) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            add(f"folder not opened: {error.strerror}", prefix)
            return
        for entry in entries:
            path = prefix + entry.name
            if entry.is_symlink():
                continue
            if is_folder(entry):
                system = is_system_folder(entry.name)
                walk(path + "/", folder_kind or (f"in {entry.name}/" if system else ""))
            elif entry.is_file():
                if folder_kind:
                    add(folder_kind, path)
                elif entry.name.startswith("."):
                    add("index of localagg" if entry.name.startswith(_OWN) else "hidden", path)
                elif not reads(path):
                    add(_suffix(entry.name), path)

    walk("", "")
    kinds = [
        UnreadFiles(kind, _fix(root, kind, names[0]), files, names)
        for kind, (files, names) in found.items()
    ]
    return sorted(kinds, key=lambda unread: -unread.files)


def _suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name.lower())
    if suffix[1:].isdigit() or not suffix:
        return "without extension"
    return ".tar" + suffix if stem.endswith(".tar") else suffix


def _fix(root: Path, kind: str, first: str) -> str:
    """Return the remedy for a kind of files, by its extension or by the first file's bytes."""
    if kind in SUFFIX_FIXES:
        return SUFFIX_FIXES[kind]
    if kind.startswith(".tar."):
        return SUFFIX_FIXES[".tar.gz"]
    if kind in EXTENSIONS:
        return "outside of the data that are read"
    if not kind.startswith((".", "without")):
        return ""
    try:
        with open_file(root / first) as file:
            named = kind_of(file.read(HEAD))
    except OSError:
        return ""
    return "" if named in ("", "text") else f"such as {first}: {named}"


def describe_unread(unread: list[UnreadFiles]) -> str:
    """Return the kinds in one line: ``20 .npy (convert to images), 2 hidden``."""
    kinds = ", ".join(kind.text for kind in unread[:_SHOWN])
    rest = sum(kind.files for kind in unread[_SHOWN:])
    return kinds + (f" and {rest:,} of other kinds" if rest else "")
