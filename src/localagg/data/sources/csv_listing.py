"""Listings: a CSV with a line ``path label`` for each image, as Places205 is distributed.

Paths are relative to an image root: the folder of the CSV, or ROOT in ``FILE.csv:ROOT``. The
archive of Places205 unpacks into a long folder that its lists leave out; the reference appends it
to the root, so it is looked for here. The index is the order of the lines.
"""

import csv
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal, TextIO

import torch
from torch import Tensor

from ...errors import UserError
from ...io.console import notify
from .source import (
    MOST_CLASSES,
    SPLIT_NAMES,
    Sample,
    Source,
    Splits,
    fingerprint,
    read_file,
    split_folders,
)

PLACES_FOLDER = "data/vision/torralba/deeplearning/images256"
_LINE_LIMIT = 8192  # characters; a longer line is no path
_DIGITS = "0123456789"
_SEPARATORS = " \t,"
_QUOTE = '"'
_NAMED = 8  # line numbers in a message
_PROBED = 64  # paths looked for before a root is said to be the wrong one

Malformed = Literal["skip", "error"]


class CsvListing(Source):
    """The images of a listing, in the order of its lines.

    ``malformed`` has the numbers (from 1) of the lines that were left out.
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
        assert self.labels is not None
        image = read_file(self.root / self.paths[index])
        return Sample(index, image, int(self.labels[index]))

    def name(self, index: int) -> str:
        """See :class:`~localagg.data.sources.source.Source`."""
        return self.paths[index]

    def file(self, index: int) -> Path:
        """Return the path of the image's file."""
        return self.root / self.paths[index]

    def fingerprint(self) -> str:
        """Over all paths and labels, and the bytes of 64 files."""
        assert self.labels is not None
        lines = zip(self.paths, self.labels.tolist(), strict=True)
        return fingerprint(self, (f"{path}\0{label}" for path, label in lines))

    def stored_bytes(self) -> int:
        """See :class:`~localagg.data.sources.source.Source`.

        Raises:
            UserError: images of the listing that are not there.
        """
        total, missing = 0, []
        for path in self.paths:
            try:
                total += (self.root / path).stat().st_size
            except OSError:
                missing.append(path)
        if missing:
            raise UserError(
                "TODO",
                f"{len(missing):,} of {len(self):,} images of '{self.uri}' are not below"
                f" '{self.root}' ({missing[0]} for example); copy them there, or list them no more.",
            )
        return total


def find_listing(uri: str, malformed: Malformed) -> Splits | None:
    """``FILE.csv``, ``FILE.csv:ROOT``, ``FOLDER`` or ``FOLDER:ROOT`` (with train_*.csv inside)."""
    for place in [len(uri), *(i for i, letter in enumerate(uri) if letter == ":")]:
        table = Path(uri[:place]).expanduser()
        explicit = uri[place + 1 :]
        if table.suffix.lower() == ".csv" and table.is_file():
            files = {"train": table}
        elif table.is_dir() and uri[:place]:
            files = _listings_of(table)
        else:
            continue
        if files:
            beside = table if table.is_dir() else table.parent
            root = Path(explicit).expanduser() if explicit else beside
            return _stored(uri, files, root, malformed)
    return None


def _listings_of(folder: Path) -> dict[str, Path]:
    """train_*.csv, val_*.csv of a folder by split; none if image folders of these names are there.

    Raises:
        UserError: two of one split.
    """
    found: dict[str, Path] = {}
    if split_folders(folder):
        return found
    for path in sorted(folder.glob("*.csv")):
        split, _, rest = path.stem.partition("_")
        if split not in SPLIT_NAMES or not rest:
            continue
        if split in found:
            raise UserError(
                "TODO",
                f"'{folder}' holds two {split} listings, {found[split].name} and {path.name}; name"
                " one of them.",
            )
        found[split] = path
    return found


def _stored(uri: str, files: dict[str, Path], root: Path, malformed: Malformed) -> Splits:
    if not root.is_dir():
        raise UserError(
            "TODO", f"The image root '{root}' of '{uri}' is not a folder; write FILE.csv:ROOT."
        )
    if (root / PLACES_FOLDER).is_dir():
        root = root / PLACES_FOLDER
    return Splits(list(files), lambda split: read_listing(uri, files[split], root, malformed))


def read_listing(uri: str, table: Path, root: Path, malformed: Malformed = "skip") -> CsvListing:
    """Read a CSV of ``path label`` lines, separated by blanks, tabs or a comma. Either may stand in
    double quotes, as Python's ``csv`` writes a path with a comma; a path without holds any blanks
    and commas.

    A path that begins with a slash is taken within the root if it lies there or if the root has its
    first folder (Places205's own lists write ``/a/abbey/...``).

    Args:
        uri: what the listing is called.
        table: the CSV.
        root: folder of the images.
        malformed: leave malformed lines out and report their numbers, or refuse them.

    Raises:
        UserError: a path that leaves the root; no listing; malformed lines, unless they are to be
            skipped and are fewer than the others; none of the first 64 images is there.
    """
    paths, labels, wrong = [], [], []
    try:
        with open(table, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(_short_lines(lines), 1):
                if not line.strip():
                    continue
                if (entry := _entry(line)) is None:
                    wrong.append(number)
                    continue
                paths.append(_inside(entry[0], root, table, number))
                labels.append(entry[1])
    except OSError as error:
        raise UserError("TODO", f"'{table}' cannot be read: {error}.") from None
    _report(table, wrong, len(paths), malformed)
    if not any((root / path).is_file() for path in paths[:_PROBED]):
        raise UserError(
            "TODO",
            f"None of the first {min(_PROBED, len(paths))} images of '{table}' is below '{root}'"
            f" ('{paths[0]}' for example); name their folder as {table}:ROOT.",
        )
    return CsvListing(uri, root, paths, labels, wrong)


def _short_lines(file: TextIO) -> Iterator[str]:
    """Lines, of which an overlong one is cut: it is malformed however it goes on."""
    while line := file.readline(_LINE_LIMIT):
        whole = line
        while not whole.endswith("\n") and (whole := file.readline(_LINE_LIMIT)):
            line = line[:_LINE_LIMIT] + "\0"
        yield line


def _entry(line: str) -> tuple[str, int] | None:
    """(path, label) of a line, or None where it is malformed."""
    line = line.strip()
    if _QUOTE in (line[:1], line[-1:]):
        path, label = _quoted(line) or ("", "")
    else:
        before = line.rstrip(_DIGITS)
        label, path = line[len(before) :], before.rstrip(_SEPARATORS)
        if path == before:
            return None
    if not path or "\0" in path or not label or label.strip(_DIGITS):
        return None
    if len(label) > len(str(MOST_CLASSES)) or int(label) >= MOST_CLASSES:
        return None
    return path, int(label)


def _quoted(line: str) -> list[str] | None:
    """The two fields of a line in which one is in double quotes, by the rules of Python's ``csv``;
    None where it has others than a path and a number."""
    for separator in _SEPARATORS:
        try:
            (fields,) = csv.reader([line], delimiter=separator, skipinitialspace=True, strict=True)
        except csv.Error:  # a quote that does not end, or goes on behind its end
            continue
        if len(fields) == 2 and not fields[1].strip(_DIGITS):
            return fields
    return None


def _inside(path: str, root: Path, table: Path, number: int) -> str:
    """The path relative to the root.

    Raises:
        UserError: it leads out of it.
    """
    if path.startswith("/"):
        pure = PurePosixPath("/" + path.lstrip("/"))
        if pure.is_relative_to(root.absolute()):
            pure = pure.relative_to(root.absolute())
        elif len(pure.parts) > 1 and (root / pure.parts[1]).is_dir():
            pure = pure.relative_to("/")
    else:
        pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in path.replace("\\", "/").split("/"):
        raise UserError(
            "TODO",
            f"Line {number:,} of '{table}' leads out of the image root '{root}': {path!r}; mend the"
            f" line, or name the folder of the images as {table}:ROOT.",
        )
    return str(pure)


def _report(table: Path, wrong: list[int], good: int, malformed: Malformed) -> None:
    """Say which lines were left out, or refuse them."""
    if not wrong and good:
        return
    named = ", ".join(f"{number:,}" for number in wrong[:_NAMED])
    more = f" and {len(wrong) - _NAMED:,} more" if len(wrong) > _NAMED else ""
    which = f"line{'s' * (len(wrong) > 1)} {named}{more}"
    if good <= len(wrong):
        raise UserError(
            "TODO",
            f"'{table}' is not a listing of images: {good:,} lines are 'path label', {len(wrong):,}"
            f" are not{f' ({which})' if wrong else ''}.",
        )
    if malformed == "error":
        raise UserError(
            "TODO",
            f"'{table}' has malformed lines, not 'path label': {which}; mend or remove them.",
        )
    notify(f"{table}: left out {which}, not 'path label' ({good:,} images remain).")
