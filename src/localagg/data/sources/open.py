"""Open a data URI: find the data there, then choose the split and the form of its images."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError
from ...io.console import notify
from ...io.files import is_inside
from .combined import CombinedSplits
from .find_data import find_splits, notify_once
from .pages import Pages
from .source import Sample, Source
from .splits import ALIASES, STORED, MissingSplit, find_stored_name
from .unread_files import UnreadFiles, count_unread, describe_unread

__all__ = [
    "Sample",
    "Source",
    "add_options",
    "check_outside",
    "open_evaluation",
    "open_images",
    "report_unread",
    "stored_splits",
]

_OPTION = re.compile(r"(split|pages|image-column)=(.+)")


class DataOptions(NamedTuple):
    """Options of a data URI: ``PLACE#split=train,extra&pages=all&image-column=left``."""

    split: tuple[str, ...] = ()
    """Stored splits to learn from, in place of train."""
    pages: bool = False
    """Each page of a file is an image."""
    column: str | None = None
    """Column of images of a table."""


def add_options(
    uri: str, *, split: str | None = None, pages: str | None = None, image_column: str | None = None
) -> str:
    """Return a data URI with options at its end.

    Raises:
        UserError: ``pages`` is not "first" or "all".
    """
    place, (chosen, all_pages, column) = parse_uri(uri)
    if pages not in (None, "first", "all"):
        raise UserError("option-invalid", f"--pages is '{pages}'; use first or all.")
    options = {
        "split": split or ",".join(chosen),
        "pages": "all" if pages == "all" or (all_pages and pages is None) else "",
        "image-column": image_column or column,
    }
    texts = [f"{name}={value}" for name, value in options.items() if value]
    return place + ("#" + "&".join(texts) if texts else "")


def parse_uri(uri: str | os.PathLike[str]) -> tuple[str, DataOptions]:
    """Return the place in a data URI, and its options.

    Raises:
        UserError: an invalid value.
    """
    if not (isinstance(uri, str | os.PathLike) and isinstance(os.fspath(uri), str)):
        raise UserError("option-invalid", f"The data URI is {uri!r}; pass text or a Path.")
    if not os.fspath(uri).strip():
        raise UserError("option-invalid", "The data URI is empty; name the images' place.")
    place, mark, text = os.fspath(uri).rpartition("#")
    found = [_OPTION.fullmatch(part) for part in text.split("&")]
    if not mark or os.path.exists(os.fspath(uri)) or not all(found):
        return os.fspath(uri), DataOptions()
    options = {match[1]: match[2] for match in found if match}
    if options.get("pages", "all") not in ("first", "all"):
        raise UserError("option-invalid", f"--pages is '{options['pages']}'; use first or all.")
    split = tuple(filter(None, options.get("split", "").split(",")))
    return place, DataOptions(split, options.get("pages") == "all", options.get("image-column"))


GIVEN = "the given images"
"""Stands in a run folder for images that were given in Python."""


def open_images(uri: str | os.PathLike[str], split: str = "train") -> Source:
    """Open a data URI.

    Args:
        uri: ``digits``; a folder of images with or without class folders, with or without
            ``train/`` and ``val/``; a Parquet file or a folder of them; a folder written by
            ``datasets.save_to_disk`` or by ``pack``; WebDataset tars: one, a folder, or a pattern
            such as ``train-*.tar`` or ``train-{000..012}.tar``; ``hf:NAME`` or ``hf:NAME:CONFIG``
            from the Hugging Face Hub; a folder of the reference's TFRecords; a listing
            ``FILE.csv`` or ``FILE.csv:ROOT`` with lines ``path label``, or a folder with
            ``train_*.csv`` and ``val_*.csv`` (also with ``:ROOT``). Options may follow, see
            :class:`DataOptions`.
        split: "train", "val" or "test"; or stored names, separated by commas. Data without splits
            are "train".

    Raises:
        UserError: no such path, no images in it, no such split, or damaged data.
    """
    if uri == GIVEN:
        raise UserError(
            "option-missing", f"The run learned from {GIVEN} in Python; pass data= or --data."
        )
    place, options = parse_uri(uri)
    if not isinstance(split, str):
        raise UserError("option-invalid", f"split is {split!r}; pass names such as 'train,test'.")
    splits = find_splits(place, options.column)
    names = [name for name in splits.names if name not in options.split]
    if split == "train" and options.split:
        chosen = options.split
    elif split in ALIASES:
        chosen = (find_stored_name(place, names, split),)
    else:
        chosen = tuple(split.split(","))
    if unknown := [name for name in chosen if name not in splits.names]:
        known = ", ".join(splits.names)
        raise MissingSplit("not-found", f"'{place}' has no split '{unknown[0]}'; it has {known}.")
    parts = {name: splits.open(name) for name in chosen}
    source = parts[chosen[0]] if len(parts) == 1 else CombinedSplits(place, parts)
    if note := splits.note or getattr(source, "note", ""):
        notify_once(note)
    return Pages(source) if options.pages else source


def open_unchanged(uri: str, fingerprint: str, run: str | os.PathLike[str], fix: str) -> Source:
    """Open the training images that a run noted.

    Args:
        uri: data URI.
        fingerprint: of the images then.
        run: named in the error.
        fix: advice in the error.

    Raises:
        UserError: they differ now, or as :func:`open_images`.
    """
    source = open_images(uri)
    if source.fingerprint() != fingerprint:
        raise UserError("mismatch", f"'{uri}' no longer holds the images of '{run}'; {fix}.")
    return source


def check_outside(uri: str | os.PathLike[str], output: str | os.PathLike[str], option: str) -> None:
    """Check that an output does not lie in the folder of the images, where it would become data.

    Raises:
        UserError: it does.
    """
    place = Path(parse_uri(uri)[0]).expanduser()
    if is_inside(output, place):
        raise UserError(
            "option-conflict",
            f"{option} {output} lies inside the images' folder '{place}'; write it elsewhere.",
        )


def open_evaluation(uri: str | os.PathLike[str]) -> Source | None:
    """Open the split to measure on ("val", under any of its names), or return None without one."""
    try:
        return None if uri == GIVEN else open_images(uri, "val")
    except MissingSplit:
        return None


def stored_splits(uri: str | os.PathLike[str]) -> list[str]:
    """Return which of "train", "val" and "test" exist (here, test does not stand in for val).

    Raises:
        UserError: no such path, no readable data, or only splits of other names.
    """
    place, options = parse_uri(uri)
    splits = find_splits(place, options.column)
    known = _known([name for name in splits.names if name not in options.split])
    if options.split:
        known = {"train": options.split[0], **known}
    if not known:
        names = ", ".join(splits.names)
        raise UserError(
            "not-found",
            f"'{place}' has no split train, val or test; it has {names}: choose one with --split"
            f" {splits.names[0]}.",
        )
    return list(known)


class Unread(NamedTuple):
    """Stored splits and files that nothing reads."""

    splits: list[str]
    files: list[UnreadFiles]


def report_unread(uri: str | os.PathLike[str]) -> Unread:
    """Return the stored splits and the files that are not read, and print a line on each."""
    if uri == GIVEN:
        return Unread([], [])
    place, options = parse_uri(uri)
    splits = find_splits(place, options.column)
    known = {*_known(splits.names).values(), *options.split}
    others = [name for name in splits.names if name not in known]
    if others:
        notify(
            f"'{place}' also has the splits {', '.join(others)}, which are not read;"
            f" --split {','.join(['train', *others] if 'train' in known else others)} reads them."
        )
    files = [] if splits.root is None else count_unread(splits.root, splits.reads)
    told = [kind for kind in files if kind.kind != "index of localagg"]
    if told:
        total = sum(kind.files for kind in told)
        notify(f"{total:,} other files of '{place}' are not read: {describe_unread(told)}.")
    return Unread(others, files)


def _known(names: Sequence[str]) -> dict[str, str]:
    """Return the stored name of each of train, val and test that exists."""
    found = {split: [n for n in candidates if n in names] for split, candidates in STORED.items()}
    return {split: stored[0] for split, stored in found.items() if stored}
