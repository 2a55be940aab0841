"""Listings: a table with a line for each image, its path and perhaps its label and split.

Paths are relative to an image root: the folder of the table, or ROOT in ``FILE.csv:ROOT``. The
archive of Places205 unpacks into a long folder that its lists omit; as in the reference, that
folder below the root is found. The index is the order of the lines.
"""

import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...io.console import notify
from .image_files import EXTENSIONS, files_with_suffix, read_file, walk_images
from .labels import number_labels
from .listing_table import SUFFIXES, ListedImage, Listing, read_listing
from .source import Sample, Source, content_hash
from .splits import SPLIT_NAMES, Splits, split_folders

PLACES_FOLDER = "data/vision/torralba/deeplearning/images256"
_LISTED = 8  # line numbers in a message
_PROBED = 64  # paths looked up to check the root
_SEARCHED = 100_000  # files among which a path that is not below the root is looked for


class CsvListing(Source):
    """The images of a listing, in the order of its lines.

    ``malformed`` has the numbers (from 1) of the lines that were skipped.
    """

    def __init__(
        self,
        uri: str,
        root: Path,
        paths: list[str],
        labels: list[int | str | None],
        malformed: list[int],
    ) -> None:
        self.uri, self.root, self.paths, self.malformed = uri, root, paths, malformed
        self.labels: Tensor | None = None
        self.classes: list[str] | None = None
        distinct = [*dict.fromkeys(label for label in labels if label is not None)]
        if not all(isinstance(label, int) for label in distinct):
            distinct = [*dict.fromkeys(map(str, distinct))]
            labels = [None if label is None else str(label) for label in labels]
        position = {label: code for code, label in enumerate(distinct)}
        codes = np.array([-1 if label is None else position[label] for label in labels])
        if found := number_labels(distinct, codes, self.name):
            self.labels = torch.from_numpy(found[0])
            self.classes = found[1] or [str(n) for n in range(int(found[0].max()) + 1)]

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
        UserError: not a listing, two listings of one split, or the image root is not a folder.
    """
    for place in [len(uri), *(i for i, letter in enumerate(uri) if letter == ":")]:
        table, explicit = Path(uri[:place]).expanduser(), uri[place + 1 :]
        if table.suffix.lower() in SUFFIXES and table.is_file():
            return _file_splits(uri, table, _image_root(uri, table.parent, explicit))
        if explicit and uri[:place] and (files := _split_listings(table)):
            return _folder_splits(uri, files, _image_root(uri, table, explicit))
    return None


def _file_splits(uri: str, table: Path, root: Path) -> Splits:
    """Return the splits of a listing: those of its column ``split``, else "train"."""
    listing = read_listing(table)
    images: dict[str, list[ListedImage]] = {}
    for image in listing.images:
        images.setdefault(image.split, []).append(image)

    def open_split(split: str) -> CsvListing:
        return _open(uri, table, root, listing._replace(images=images.get(split, [])))

    return Splits([*images] or ["train"], open_split)


def find_listings_in_folder(uri: str, folder: Path) -> Splits | None:
    """Return the splits of a folder with train_*.csv and val_*.csv that list images below it.

    Raises:
        UserError: the first lines do not name images below the folder.
    """
    if not (files := _split_listings(folder)):
        return None
    root = _image_root(uri, folder, "")
    for table in files.values():
        _open(uri, table, root, read_listing(table, _PROBED))
    splits = _folder_splits(uri, files, root)

    def reads(path: str) -> bool:
        nonlocal listed
        if listed is None:
            listed = {table.relative_to(folder).as_posix() for table in files.values()}
            for source in map(splits.open, splits.names):
                listed |= {source.name(i) for i in range(len(source))}
        return path in listed

    listed: set[str] | None = None
    return splits._replace(root=root, reads=reads)


def _image_root(uri: str, default: Path, explicit: str) -> Path:
    root = Path(explicit).expanduser() if explicit else default
    if not root.is_dir():
        raise UserError("not-found", f"The image root '{root}' of '{uri}' is not a folder.")
    places = root / PLACES_FOLDER
    return places if places.is_dir() else root


def _folder_splits(uri: str, files: dict[str, Path], root: Path) -> Splits:
    return Splits(
        [*files], lambda split: _open(uri, files[split], root, read_listing(files[split]))
    )


def _split_listings(folder: Path) -> dict[str, Path]:
    """Return a folder's train_*.csv and val_*.csv by split; none beside split folders of images."""
    found: dict[str, Path] = {}
    if not folder.is_dir() or split_folders(folder):
        return found
    for path in files_with_suffix(folder, ".csv"):
        split, _, rest = path.stem.partition("_")
        if split not in SPLIT_NAMES or not rest:
            continue
        if split in found:
            names = f"{found[split].name} and {path.name}"
            message = f"'{folder}' has two {split} listings, {names}; name one of them."
            raise UserError("mismatch", message)
        found[split] = path
    return found


def _open(uri: str, table: Path, root: Path, listing: Listing) -> CsvListing:
    """Return the images of a listing.

    Raises:
        UserError: a path that leaves the root, at least as many malformed lines as good ones, or
            none of the first 64 images exists.
    """
    _report_malformed(table, listing.malformed, len(listing.images))
    paths = [
        _relative_path(image.path, root, table, image.line, listing) for image in listing.images
    ]
    spell = _find_spelling(paths[:_PROBED], root)
    if spell is None and listing.others:
        with contextlib.suppress(UserError):
            return _open(uri, table, root, listing.others[0]._replace(others=listing.others[1:]))
    if spell is None:
        first = listing.images[0].path
        raise UserError(
            "not-found",
            f"The first {min(_PROBED, len(paths))} images of '{table}' are not below '{root}', such"
            f" as '{first}'; {_where_else(paths[:_PROBED], first, root, table)}.",
        )
    labels = [image.label for image in listing.images]
    return CsvListing(uri, root, [*map(spell, paths)], labels, listing.malformed)


def _find_spelling(paths: list[str], root: Path) -> Callable[[str], str] | None:
    """Return how paths become files: as they are, with "/" for a backslash, or with an extension.

    Returns None if no path becomes a file.
    """
    spellings: list[Callable[[str], str]] = [lambda path: path, lambda p: p.replace("\\", "/")]
    spellings += [lambda path, end=end: path + end for end in sorted(EXTENSIONS)]
    return next((s for s in spellings if any((root / s(path)).is_file() for path in paths)), None)


def _where_else(paths: list[str], first: str, root: Path, table: Path) -> str:
    """Return the way out if no listed image exists: the folder that holds most of them, if any."""
    if "://" in first:
        return "download the images first; a listing names local files"
    parts = PurePosixPath(first.replace("\\", "/")).parts
    folders, last = [], ""
    for found, _ in itertools.islice(walk_images(root), _SEARCHED):
        own = PurePosixPath(found).parts
        if own[-len(parts) :] == parts or PurePosixPath(found).stem == first:
            folders.append(root.joinpath(*own[: -len(parts)]))
        last = found if own[-1] == parts[-1] else last
    if folders:

        def rank(folder: Path) -> tuple[int, bool]:
            held = sum(_find_spelling([path], folder) is not None for path in paths)
            return held, folder.name in table.stem

        return f"name their folder as {table}:{max(folders, key=rank)}"
    if last:
        return f"the first one lies at '{root / last}'; correct the paths"
    return f"name the folder that holds them as {table}:ROOT"


def _relative_path(path: str, root: Path, table: Path, number: int, listing: Listing) -> str:
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
        absolute = [image.path for image in listing.images if image.path.startswith("/")]
        common = os.path.commonpath([os.path.dirname(path) for path in absolute] or ["ROOT"])
        raise UserError("unsafe", f"{message}; correct it, or name the root as {table}:{common}.")
    return str(pure)


def _report_malformed(table: Path, malformed: list[int], good: int) -> None:
    """Print the numbers of skipped lines; raise UserError if half of all lines are malformed."""
    numbers = ", ".join(f"{number:,}" for number in malformed[:_LISTED])
    more = f" and {len(malformed) - _LISTED:,} more" if len(malformed) > _LISTED else ""
    if good <= len(malformed):
        counts = f"{good:,} lines name an image, {len(malformed):,} do not ({numbers}{more})"
        fix = "write lines 'path label', or a header such as path,label"
        raise UserError("unsupported", f"'{table}' is not a listing of images: {counts}; {fix}.")
    if malformed:
        notify(f"{table}: skipped malformed lines {numbers}{more} ({good:,} images remain).")
