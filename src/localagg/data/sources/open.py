"""Where images come from: one small protocol over folders, tables, tars, listings and digits.

A source is random access over encoded (or, for the built-in digits, decoded) images with a dense,
stable index: the sorted relative path of a folder's files, the order of records, members or lines,
or the index that a TFRecord stores. It does not decode. ``open_images`` chooses the kind from the
URI.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError, suggest
from ...io.console import notify
from .arrow_tables import find_parquet, find_saved_dataset
from .csv_listing import find_listing
from .hub import find_hub
from .image_folder import EXTENSIONS, find_folder
from .source import ALIASES, MissingSplit, Sample, Source, Splits, choose
from .tfrecord import find_tfrecords
from .webdataset import find_tar_pattern, find_tars

__all__ = [
    "EXTENSIONS",
    "Digits",
    "MissingSplit",
    "Sample",
    "Source",
    "open_evaluation",
    "open_images",
    "report_other_splits",
    "stored_splits",
]


def open_images(
    uri: str | os.PathLike[str],
    split: str = "train",
    *,
    malformed: Literal["skip", "error"] = "skip",
) -> Source:
    """Open a data URI.

    Args:
        uri: ``digits``; a folder of images with or without class folders, with or without
            ``train/`` and ``val/``; a Parquet file or a folder of them; a folder written by
            ``datasets.save_to_disk`` or by ``pack``; WebDataset tars: one, a folder, or a pattern
            such as ``train-*.tar`` or ``train-{000..012}.tar``; ``hf:NAME`` or ``hf:NAME:CONFIG``,
            a data set of the Hub; a folder of the reference's TFRecords; a listing ``FILE.csv`` or
            ``FILE.csv:ROOT``, or a folder with ``train_*.csv`` and ``val_*.csv`` likewise (lines
            ``path label``, paths relative to ROOT).
        split: "train", "val" or "test". Without splits everything is "train".
        malformed: lines of a listing that are not ``path label``: left out and reported by number
            (as in the reference), or an error.

    Raises:
        UserError: no such path, no images in it, no such split, or damaged data.
    """
    uri = os.fspath(uri)
    if split not in ALIASES:
        raise UserError("TODO", f"There is no split '{split}'; there are train, val and test.")
    stored = _find(uri, malformed)
    return stored.open(choose(uri, stored.splits, split))


def open_evaluation(uri: str | os.PathLike[str]) -> Source | None:
    """The split to measure on ("val", under any of its names), or None where there is none."""
    try:
        return open_images(uri, "val")
    except MissingSplit:
        return None


def stored_splits(uri: str | os.PathLike[str]) -> list[str]:
    """Which of "train", "val" and "test" the data really hold (val is not taken for test here).

    Raises:
        UserError: no such path, nothing that can be read in it, or splits of other names alone.
    """
    stored = _find(os.fspath(uri), "skip").splits
    if not (named := _named(stored)):
        raise UserError(
            "TODO",
            f"'{uri}' has no split train, val or test; it has {', '.join(stored)}: rename one.",
        )
    return list(named)


def report_other_splits(uri: str | os.PathLike[str]) -> list[str]:
    """Splits that the data hold under other names (``extra``), which nothing reads; says so."""
    stored = _find(os.fspath(uri), "skip").splits
    others = [name for name in stored if name not in _named(stored).values()]
    if others:
        notify(
            f"'{uri}' also holds {', '.join(others)}, left out: train, val and test are read, each"
            " under one name."
        )
    return others


def _named(stored: Sequence[str]) -> dict[str, str]:
    """The stored name of each of train, val and test that is there."""
    own = {"train": ALIASES["train"], "val": ("val", "validation", "valid"), "test": ("test",)}
    found = {split: [name for name in names if name in stored] for split, names in own.items()}
    return {split: names[0] for split, names in found.items() if names}


def _find(uri: str, malformed: Literal["skip", "error"]) -> Splits:
    """What is stored at a URI, by looking at names only."""
    if uri == "digits":
        return Splits(["train", "val"], Digits)
    if (hub := find_hub(uri)) is not None:
        return hub
    if (listing := find_listing(uri, malformed)) is not None:
        return listing
    if (tars := find_tar_pattern(uri)) is not None:
        return tars
    root = Path(uri).expanduser()
    if not root.exists():
        raise UserError(
            "TODO",
            f"There is no file or folder '{uri}'; --data takes a path, FILE.csv:ROOT, hf:NAME, or"
            f" 'digits'.{suggest(uri, ['digits'])}",
        )
    if root.is_file() and root.suffix not in (".parquet", ".tar"):
        raise UserError(
            "TODO", f"'{uri}' is a file; --data takes a folder, a .parquet, .tar or .csv file."
        )
    return (
        find_saved_dataset(uri, root)
        or find_tfrecords(uri, root)
        or find_parquet(uri, root)
        or find_tars(uri, root)
        or find_folder(uri, root)
    )


class Digits(Source):
    """scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, built in: 1,400 and 397 of them.

    The split is by a fixed shuffle, so that both parts hold all 43 writers.
    """

    _TRAIN = 1400

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        raw: Any = load_digits()
        order = np.random.RandomState(0).permutation(len(raw.target))
        order = order[: self._TRAIN] if split == "train" else order[self._TRAIN :]
        pixels = np.rint(raw.images[order] * (255 / 16)).astype(np.uint8)
        self.uri = "digits"
        self.pixels = torch.from_numpy(pixels).unsqueeze(1).expand(-1, 3, -1, -1)
        self.labels: Tensor | None = torch.from_numpy(raw.target[order].astype(np.int64))
        self.classes: list[str] | None = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Sample:
        assert self.labels is not None
        return Sample(index, self.pixels[index], int(self.labels[index]))

    def name(self, index: int) -> str:
        """See :class:`~localagg.data.sources.source.Source`."""
        return f"digit {index}"

    def fingerprint(self) -> str:
        """See :class:`~localagg.data.sources.source.Source`."""
        return hashlib.sha256(self.pixels.numpy().tobytes()).hexdigest()

    def stored_bytes(self) -> int:
        """See :class:`~localagg.data.sources.source.Source`."""
        return self.pixels.numel()
