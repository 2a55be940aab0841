"""Open a data URI: choose the kind of source, then its split."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import UserError, suggest
from ...io.console import notify
from .arrow_tables import find_parquet, find_saved_dataset
from .csv_listing import find_csv_listing
from .digits import find_digits
from .hub import find_hub_dataset
from .image_folder import find_image_folder
from .source import Sample, Source
from .splits import ALIASES, MissingSplit, Splits, find_stored_name
from .tfrecords.tfrecord import find_tfrecords
from .webdataset import find_tars

__all__ = [
    "Sample",
    "Source",
    "open_evaluation",
    "open_images",
    "report_other_splits",
    "stored_splits",
]

# Each returns the splits at a URI, or None if the URI is not of its kind. The first match counts.
# To add a source, write its module and add its function here.
SOURCES: tuple[Callable[[str], Splits | None], ...] = (
    find_digits,
    find_hub_dataset,
    find_csv_listing,
    find_saved_dataset,
    find_tfrecords,
    find_parquet,
    find_tars,
    find_image_folder,
)


def open_images(uri: str | os.PathLike[str], split: str = "train") -> Source:
    """Open a data URI.

    Args:
        uri: ``digits``; a folder of images with or without class folders, with or without
            ``train/`` and ``val/``; a Parquet file or a folder of them; a folder written by
            ``datasets.save_to_disk`` or by ``pack``; WebDataset tars: one, a folder, or a pattern
            such as ``train-*.tar`` or ``train-{000..012}.tar``; ``hf:NAME`` or ``hf:NAME:CONFIG``
            from the Hugging Face Hub; a folder of the reference's TFRecords; a listing
            ``FILE.csv`` or ``FILE.csv:ROOT`` with lines ``path label``, or a folder with
            ``train_*.csv`` and ``val_*.csv`` (also with ``:ROOT``).
        split: "train", "val" or "test". Data without splits are "train".

    Raises:
        UserError: no such path, no images in it, no such split, or damaged data.
    """
    uri = os.fspath(uri)
    if split not in ALIASES:
        raise UserError("option-invalid", f"Unknown split '{split}'; use train, val or test.")
    splits = _find_splits(uri)
    return splits.open(find_stored_name(uri, splits.names, split))


def open_evaluation(uri: str | os.PathLike[str]) -> Source | None:
    """Open the split to measure on ("val", under any of its names), or return None without one."""
    try:
        return open_images(uri, "val")
    except MissingSplit:
        return None


def stored_splits(uri: str | os.PathLike[str]) -> list[str]:
    """Return which of "train", "val" and "test" exist (here, test does not stand in for val).

    Raises:
        UserError: no such path, no readable data, or only splits of other names.
    """
    names = _find_splits(os.fspath(uri)).names
    if not (known := _known(names)):
        raise UserError(
            "not-found",
            f"'{uri}' has no split train, val or test; it has {', '.join(names)}: rename one.",
        )
    return list(known)


def report_other_splits(uri: str | os.PathLike[str]) -> list[str]:
    """Return the stored splits that nothing reads, such as ``extra``, and print a notice."""
    names = _find_splits(os.fspath(uri)).names
    known = _known(names).values()
    others = [name for name in names if name not in known]
    if others:
        notify(
            f"'{uri}' also has the splits {', '.join(others)}, which are not read: only train, val"
            " and test are, each under one name."
        )
    return others


def _known(names: Sequence[str]) -> dict[str, str]:
    """Return the stored name of each of train, val and test that exists."""
    own = {"train": ALIASES["train"], "val": ("val", "validation", "valid"), "test": ("test",)}
    found = {split: [n for n in candidates if n in names] for split, candidates in own.items()}
    return {split: stored[0] for split, stored in found.items() if stored}


def _find_splits(uri: str) -> Splits:
    for find in SOURCES:
        if (splits := find(uri)) is not None:
            return splits
    if Path(uri).expanduser().exists():
        raise UserError(
            "unsupported",
            f"'{uri}' is a file; --data takes a folder, a .parquet, .tar or .csv file.",
        )
    raise UserError(
        "not-found",
        f"No file or folder '{uri}'; --data takes a path, FILE.csv:ROOT, hf:NAME, or 'digits'."
        f"{suggest(uri, ['digits'])}",
    )
