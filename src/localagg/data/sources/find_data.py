"""Find the data at a place: the kinds of sources that hold images there, or a level or two below.

A kind counts only if it holds images, by its schema, its first record or its first member. Two that
do are an error: either choice would lose images in silence.
"""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from ...errors import UserError, suggest
from ...io.console import notify
from .csv_listing import find_csv_listing, find_listings_in_folder
from .digits import find_digits
from .file_kinds import HEAD, IMAGE_KINDS, describe, kind_of
from .image_files import EXTENSIONS, is_image_file, is_system_folder, open_file, walk_images
from .image_folder import find_image_folder
from .splits import Splits
from .tables.arrow_tables import find_saved_dataset
from .tables.hub import find_hub_dataset
from .tables.parquet import find_parquet
from .tars.webdataset import find_tar_pattern, find_tars
from .tfrecords.tfrecord import find_tfrecords
from .unread_files import count_unread, describe_unread

_LEVELS = 2  # of folders in which data are looked for
_LISTED = 5  # folders in a message

_TABLES = ("a saved dataset", "Parquet")  # kinds with columns

# Each returns the splits of a file or folder, None if it is not of this kind, or an error. To add a
# kind, write its module and add its function here; find_splits has those of URIs that are no paths.
_PLACES: dict[str, Callable[[str, Path, str | None], Splits | None]] = {
    "a saved dataset": find_saved_dataset,
    "TFRecords": lambda uri, root, _: find_tfrecords(uri, root),
    "Parquet": find_parquet,
    "tars": lambda uri, root, _: find_tars(uri, root),
    "a listing": lambda uri, root, _: find_listings_in_folder(uri, root),
    "image files": lambda uri, root, _: find_image_folder(uri, root),
}


def find_splits(uri: str, column: str | None = None) -> Splits:
    """Return the splits of a data URI without options.

    Args:
        uri: see :func:`localagg.data.open_images`.
        column: the column of images, if the data are a table.

    Raises:
        UserError: no such place, no images there, images of two kinds, or a column of no table.
    """
    try:
        root = Path(uri).expanduser()
    except RuntimeError:
        raise UserError("not-found", f"'{uri}' names no user's home; correct --data.") from None
    if (hub := find_hub_dataset(uri, column)) is not None:
        return hub
    for find in (find_digits, find_csv_listing, find_tar_pattern):
        if (splits := find(uri)) is not None:
            _refuse_column(uri, column, "")
            return splits
    if not os.path.lexists(root):
        raise UserError(
            "not-found",
            f"No file or folder '{uri}'; the images' place is a path, FILE.csv:ROOT, hf:NAME, or"
            f" 'digits'.{suggest(uri, ['digits'])}",
        )
    try:
        if root.is_dir():
            os.listdir(root)
    except OSError as error:
        raise UserError("environment", f"'{root}' cannot be read: {error.strerror}.") from None
    found, errors = _kinds_at(uri, root, column)
    if not found and root.is_dir():
        found = _kinds_below(uri, root, column, errors)
    if len(found) > 1:
        names = " and ".join(f"{kind} ({_example(splits)})" for kind, splits in found.items())
        raise UserError(
            "mismatch",
            f"'{uri}' holds images as {names}; name one of them as --data, or move one elsewhere.",
        )
    if found:
        ((kind, splits),) = found.items()
        _refuse_column(uri, column, kind)
        return splits
    raise errors[0] if errors else _no_images(uri, root)


def _kinds_at(
    uri: str, root: Path, column: str | None
) -> tuple[dict[str, Splits], list[UserError]]:
    """Return the kinds of sources that hold images at a place, and what others found wrong."""
    found, errors = dict[str, Splits](), list[UserError]()
    for kind, find in _PLACES.items():
        try:
            if (root.is_dir() or kind in ("Parquet", "tars")) and (
                splits := find(uri, root, column)
            ):
                found[kind] = splits
        except UserError as error:
            if error.code == "mismatch" and kind == "image files":
                raise
            errors.append(error)
    if "a listing" in found and "image files" in found and _lists_all(found["a listing"], root):
        del found["image files"]
    return found, errors


def _refuse_column(uri: str, column: str | None, kind: str) -> None:
    if column is not None and kind not in _TABLES:
        raise UserError(
            "option-conflict",
            f"--image-column {column} has no effect: the images of '{uri}' are in no table; omit"
            " it.",
        )


def _lists_all(listing: Splits, root: Path) -> bool:
    """Return whether a listing names all images of a folder, or those of Places205's own folder."""
    return listing.root != root or all(listing.reads(path) for path, _ in walk_images(root))


def _kinds_below(
    uri: str, root: Path, column: str | None, errors: list[UserError]
) -> dict[str, Splits]:
    """Return the kinds in the only sub-folder that holds data, up to two levels down.

    Raises:
        UserError: several folders hold data.
    """
    found: list[tuple[Path, dict[str, Splits]]] = []
    folders = [root]
    for _ in range(_LEVELS):
        folders = [inner for folder in folders for inner in _sub_folders(folder)]
        for folder in folders:
            kinds, wrong = _kinds_at(uri, folder, column)
            errors += wrong
            if kinds:
                found.append((folder, kinds))
        if len(found) > 1:
            places = ", ".join(f"'{folder}'" for folder, _ in found[:_LISTED])
            raise UserError(
                "mismatch", f"'{uri}' holds several data sets; name one of {places} as --data."
            )
        if found:
            notify_once(f"The data of '{uri}' are in '{found[0][0]}'.")
            return found[0][1]
    return {}


def _sub_folders(folder: Path) -> Iterator[Path]:
    for name in sorted(os.listdir(folder)):
        if not is_system_folder(name) and (folder / name).is_dir() and os.access(folder / name, 5):
            yield folder / name


def _example(splits: Splits) -> str:
    """Return the first file that a kind reads, tables and archives before images."""
    assert splits.root is not None
    first = ""
    for folder, _, files in os.walk(splits.root):
        for name in sorted(files):
            path = Path(folder, name).relative_to(splits.root).as_posix()
            if name.startswith(".") or not splits.reads(path):
                continue
            if not is_image_file(name):
                return path
            first = first or path
    return first or "its files"


def _no_images(uri: str, root: Path) -> UserError:
    """Return the error that names what lies at a place without images."""
    if root.is_dir():
        unread = count_unread(root, lambda path: False)
        there = f"; it holds {describe_unread(unread)}" if unread else ", nor any file"
        known = " ".join(sorted(EXTENSIONS))
        return UserError("no-images", f"'{uri}' holds no images ({known}){there}.")
    try:
        with open_file(root) as file:
            head = file.read(HEAD)
    except OSError as error:
        return UserError("environment", f"'{uri}' cannot be read: {error.strerror}.")
    takes = "--data takes a folder, a .parquet, .tar or .csv file"
    if root.suffix.lower() in EXTENSIONS or kind_of(head) in IMAGE_KINDS:
        return UserError("unsupported", f"'{uri}' is one image; {takes}: name its folder.")
    return UserError("unsupported", f"--data does not take '{uri}' ({describe(head)}); {takes}.")


@functools.cache
def notify_once(note: str) -> None:
    """Print a line about data that are opened several times, once."""
    notify(note)
