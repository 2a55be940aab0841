"""Listings: a CSV with a line ``path label`` for each image, as Places205 is distributed.

Paths are relative to an image root: the folder of the CSV, or ROOT in ``FILE.csv:ROOT``. The
archive of Places205 unpacks into a long folder that its lists omit; as in the reference, that
folder below the root is found. The index is the order of the lines.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TextIO

import torch
from torch import Tensor

from ...errors import UserError
from ...io.console import notify
from .image_files import read_file
from .labels import MAX_CLASSES
from .source import Sample, Source, content_hash
from .splits import SPLIT_NAMES, Splits, split_folders

PLACES_FOLDER = "data/vision/torralba/deeplearning/images256"
_LINE_LIMIT = 8192  # characters; a longer line is no path
_LABEL = re.compile(r'[ \t,]"?([0-9]{1,7})"?$')
_LISTED = 8  # line numbers in a message
_PROBED = 64  # paths looked up to check the root


class CsvListing(Source):
    """The images of a listing, in the order of its lines.

    ``malformed`` has the numbers (from 1) of the lines that were skipped.
    """

    def __init__(
        self, uri: str, root: Path, paths: list[str], labels: list[int], malformed: list[int]
    ) -> None:
        self.uri, self.root, self.paths, self.malformed = uri, root, paths, malformed
        self.labels: Tensor | None = torch.tensor(labels, dtype=torch.int64)
        self.classes: list[str] | None = [str(label) for label in range(max(labels) + 1)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        return Sample(index, read_file(self.file(index)), self.label(index))

    def name(self, index: int) -> str:
        """Return the path relative to the root."""
        return self.paths[index]

    def file(self, index: int) -> Path:
        """Return the image's file."""
        return self.root / self.paths[index]

    def fingerprint(self) -> str:
        """Hash all paths and labels, and the bytes of 64 files."""
        lines = enumerate(self.paths)
        return content_hash(self, (f"{path}\0{self.label(index)}" for index, path in lines))

    def stored_bytes(self) -> int:
        """Return the size of all files in bytes.

        Raises:
            UserError: files of the listing are missing.
        """
        total, missing = 0, []
        for index, path in enumerate(self.paths):
            try:
                total += self.file(index).stat().st_size
            except OSError:
                missing.append(path)
        if missing:
            found = f"{len(missing):,} of {len(self):,} images of '{self.uri}' are not below"
            path = f"'{self.root}', such as {missing[0]}; copy them there, or remove their lines."
            raise UserError("not-found", f"{found} {path}")
        return total


def find_csv_listing(uri: str) -> Splits | None:
    """Return the splits of ``FILE.csv`` or of a ``FOLDER`` with train_*.csv; both take ``:ROOT``.

    Raises:
        UserError: two listings of one split, or the image root is not a folder.
    """
    for place in [len(uri), *(i for i, letter in enumerate(uri) if letter == ":")]:
        table, explicit = Path(uri[:place]).expanduser(), uri[place + 1 :]
        if table.suffix.lower() == ".csv" and table.is_file():
            files, root = {"train": table}, table.parent
        elif table.is_dir() and uri[:place]:
            files, root = _split_listings(table), table
        else:
            continue
        if files:
            root = Path(explicit).expanduser() if explicit else root
            if not root.is_dir():
                raise UserError("not-found", f"The image root '{root}' of '{uri}' is not a folder.")
            places = root / PLACES_FOLDER
            return _splits(uri, files, places if places.is_dir() else root)
    return None


def _splits(uri: str, files: dict[str, Path], root: Path) -> Splits:
    return Splits(list(files), lambda split: _open(uri, files[split], root))


def _split_listings(folder: Path) -> dict[str, Path]:
    """Return a folder's train_*.csv and val_*.csv by split; none beside split folders of images."""
    found: dict[str, Path] = {}
    if split_folders(folder):
        return found
    for path in sorted(folder.glob("*.csv")):
        split, _, rest = path.stem.partition("_")
        if split not in SPLIT_NAMES or not rest:
            continue
        if split in found:
            names = f"{found[split].name} and {path.name}"
            message = f"'{folder}' has two {split} listings, {names}; name one of them."
            raise UserError("mismatch", message)
        found[split] = path
    return found


def _open(uri: str, table: Path, root: Path) -> CsvListing:
    """Read a CSV of ``path label`` lines, separated by blanks, tabs or a comma.

    Either field may stand in double quotes, as Python's ``csv`` writes a path with a comma. A path
    without quotes may contain blanks and commas too.

    Raises:
        UserError: a path that leaves the root, at least as many malformed lines as good ones, or
            none of the first 64 images exists.
    """
    paths, labels, malformed = [], [], []
    try:
        with open(table, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(_short_lines(lines), 1):
                if not line.strip():
                    continue
                if (entry := _parse_line(line)) is None:
                    malformed.append(number)
                    continue
                paths.append(_relative_path(entry[0], root, table, number))
                labels.append(entry[1])
    except OSError as error:
        raise UserError("environment", f"'{table}' cannot be read: {error}.") from None
    _report_malformed(table, malformed, len(paths))
    if not any((root / path).is_file() for path in paths[:_PROBED]):
        raise UserError(
            "not-found",
            f"The first {min(_PROBED, len(paths))} images of '{table}' are not below '{root}', such"
            f" as '{paths[0]}'; name their folder as {table}:ROOT.",
        )
    return CsvListing(uri, root, paths, labels, malformed)


def _short_lines(file: TextIO) -> Iterator[str]:
    """Yield lines; an overlong line is cut and marked as malformed by a NUL."""
    while line := file.readline(_LINE_LIMIT):
        whole = line
        while not whole.endswith("\n") and (whole := file.readline(_LINE_LIMIT)):
            line = line[:_LINE_LIMIT] + "\0"
        yield line


def _parse_line(line: str) -> tuple[str, int] | None:
    """Return (path, label), or None for a malformed line."""
    if (match := _LABEL.search(line.strip())) is None or int(match[1]) >= MAX_CLASSES:
        return None
    path = line.strip()[: match.start()].rstrip(" \t,")
    if path.startswith('"'):
        inner = path[1:-1].replace('""', "\0")  # a quote inside quotes is doubled
        if len(path) < 2 or path[-1] != '"' or '"' in inner or "\0" in path:
            return None
        path = inner.replace("\0", '"')
    return None if not path or "\0" in path else (path, int(match[1]))


def _relative_path(path: str, root: Path, table: Path, number: int) -> str:
    """Return the path relative to the root.

    A leading slash is dropped if the root has the path's first folder: Places205's own lists write
    ``/a/abbey/...``.

    Raises:
        UserError: the path leads out of the root.
    """
    pure = PurePosixPath(path)
    if path.startswith("/"):
        pure = PurePosixPath("/" + path.lstrip("/"))
        if pure.is_relative_to(root.absolute()):
            pure = pure.relative_to(root.absolute())
        elif len(pure.parts) > 1 and (root / pure.parts[1]).is_dir():
            pure = pure.relative_to("/")
    if pure.is_absolute() or ".." in path.replace("\\", "/").split("/"):
        message = f"Line {number:,} of '{table}' leads out of the image root '{root}': {path!r}"
        raise UserError("unsafe", f"{message}; correct it, or name the root as {table}:ROOT.")
    return str(pure)


def _report_malformed(table: Path, malformed: list[int], good: int) -> None:
    """Print the numbers of skipped lines; raise UserError if half of all lines are malformed."""
    numbers = ", ".join(f"{number:,}" for number in malformed[:_LISTED])
    more = f" and {len(malformed) - _LISTED:,} more" if len(malformed) > _LISTED else ""
    if good <= len(malformed):
        counts = f"{good:,} lines are 'path label', {len(malformed):,} are not"
        message = f"'{table}' is not a listing of images: {counts} ({numbers}{more})."
        raise UserError("unsupported", message)
    if malformed:
        notify(f"{table}: skipped malformed lines {numbers}{more} ({good:,} images remain).")
