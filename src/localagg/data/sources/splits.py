"""Names of splits in files and folders, and the choice of the split that a caller requests."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError
from .source import Source

# Names under which a split may be stored, in order of preference.
ALIASES = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test"),
    "test": ("test", "val", "validation", "valid"),
}
SPLIT_NAMES = ("train", "training", "val", "validation", "valid", "test")


class MissingSplit(UserError):
    """The data exist but have no such split."""


class Splits(NamedTuple):
    """The splits found at a URI, not opened yet."""

    names: Sequence[str]
    """Names as they are stored."""
    open: Callable[[str], Source]
    """Opens one of them by that name."""


def find_stored_name(uri: str, names: Sequence[str], split: str) -> str:
    """Return the stored name of a split that is requested as train, val or test.

    Raises:
        MissingSplit: none of the names means this split.
    """
    for name in ALIASES[split]:
        if name in names:
            return name
    raise MissingSplit("not-found", f"'{uri}' has no split '{split}'; it has {', '.join(names)}.")


def split_in_name(stem: str) -> str:
    """Return the split that a file's name (without extension) contains, else "train".

    The name is cut at digits, blanks and ``-_.``; the first part that is a split's name counts, in
    any case, with or without ``set``. ``datasets`` has the same rule. Examples: ``val_0``,
    ``imagenet-validation-00003``, ``TestSet``; ``values`` contains none.
    """
    parts = (part.removesuffix("set") for part in re.split(r"[-_. 0-9]+", stem.lower()))
    return next((part for part in parts if part in SPLIT_NAMES), "train")


def split_folders(root: Path) -> dict[str, Path]:
    """Return the sub-folders that are named like splits, in any case, by the split's name.

    Raises:
        UserError: two names differ by case alone.
    """
    found: dict[str, Path] = {}
    for name in sorted(os.listdir(root)) if root.is_dir() else ():
        split = name.lower()
        if split not in SPLIT_NAMES or not (root / name).is_dir():
            continue
        if split in found:
            raise UserError(
                "mismatch",
                f"'{root}' has two folders of the split {split}, {found[split].name} and {name};"
                " merge them or rename one.",
            )
        found[split] = root / name
    return {split: found[split] for split in SPLIT_NAMES if split in found}
