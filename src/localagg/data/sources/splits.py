"""Names of splits in files and folders, and the choice of the split that a caller requests."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...errors import UserError
from .image_files import is_system_folder
from .source import Source

# Names under which a split may be stored, in order of preference. datasets has the same.
STORED = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ALIASES = {
    "train": STORED["train"],
    "val": STORED["val"] + STORED["test"],
    "test": STORED["test"] + STORED["val"],
}
SPLIT_NAMES = STORED["train"] + STORED["val"] + STORED["test"]
EXTRA_NAMES = ("unlabeled", "unlabelled", "extra")  # read only if they are chosen
_ROLES = {name: role for role, names in STORED.items() for name in names}
# Words beside a split's name that do not change its meaning: train_images, TestSet, val-jpg.
_NEUTRAL = {"", "set", "split", "data", "dataset", "image", "images", "img", "imgs", "jpg", "png"}
_SHARD = re.compile(r"(\w[\w.]*)-\d{5}-of-\d{5}")


class MissingSplit(UserError):
    """The data exist but have no such split."""


class Splits(NamedTuple):
    """The splits found at a URI, not opened yet."""

    names: Sequence[str]
    """Names as they are stored."""
    open: Callable[[str], Source]
    """Opens one of them by that name."""
    root: Path | None = None
    """Folder whose other files are counted as not read; None without such a folder."""
    reads: Callable[[str], bool] = lambda path: True
    """Whether a file, by its path relative to ``root``, is read for one of the splits."""
    note: str = ""
    """A choice that the user did not make, such as that of a column; printed once."""


def find_stored_name(uri: str, names: Sequence[str], split: str) -> str:
    """Return the stored name of a split that is requested as train, val or test.

    Raises:
        MissingSplit: none of the names means this split.
    """
    for name in ALIASES[split]:
        if name in names:
            return name
    others = ", ".join(names)
    way = f"; choose one with --split {names[0]}" if split == "train" else ""
    raise MissingSplit("not-found", f"'{uri}' has no split '{split}'; it has {others}{way}.")


def parse_split(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the split that a name contains, and the other words of the name.

    The name is cut at digits, blanks and ``-_.``; the first part that is a split's name counts, in
    any case, with or without ``set``. ``datasets`` has the same rule. Examples: ``val_0``,
    ``train2017`` and ``TestSet`` name a split alone; ``test_tube`` has the other word ``tube``;
    ``values`` contains none.
    """
    parts = [part.removesuffix("set") for part in re.split(r"[-_. 0-9]+", name.lower())]
    split = next((part for part in parts if part in SPLIT_NAMES + EXTRA_NAMES), None)
    return split, tuple(part for part in parts if part != split and part not in _NEUTRAL)


def split_in_name(stem: str) -> str:
    """Return the split that a file's name (without extension) contains, else "train"."""
    return parse_split(stem)[0] or "train"


def files_by_split(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Group data files by the split that their names contain.

    Files of no known split are "train"; but beside known splits, ``NAME-00000-of-00001`` is a file
    of the split NAME.
    """
    ordered = sorted(paths)
    known = any(parse_split(path.stem)[0] for path in ordered)
    found: dict[str, list[Path]] = {}
    for path in ordered:
        shard = _SHARD.fullmatch(path.stem)
        split = parse_split(path.stem)[0] or (shard[1] if known and shard else "train")
        found.setdefault(split, []).append(path)
    return found


def split_folders(root: Path) -> dict[str, Path]:
    """Return the sub-folders that are named like splits, in any case, by the split's name.

    ``train2017`` and ``training_set`` are splits too. ``food-train`` and ``food-test`` are, if
    the other words are the same.

    Raises:
        UserError: two folders of one split, or names of training and held-out images with
            different other words, such as ``cats_train`` and ``dogs_test``.
    """
    named: dict[str, tuple[str, tuple[str, ...]]] = {}
    for name in sorted(os.listdir(root)) if root.is_dir() else ():
        split, others = parse_split(name)
        if split and not is_system_folder(name) and (root / name).is_dir():
            named[name] = (split, others)
    exact = {name: split for name, (split, others) in named.items() if not others}
    if not exact and has_held_out(split for split, _ in named.values()):
        if len({others for _, others in named.values()}) > 1:
            raise UserError(
                "mismatch",
                f"'{root}' has folders that look like splits, {', '.join([*named][:5])}; name them"
                " train, val and test, or move classes of such names into a folder 'train'.",
            )
        exact = {name: split for name, (split, _) in named.items()}
    if not any(split in SPLIT_NAMES for split in exact.values()):
        return {}  # 'extra' alone is a class
    found: dict[str, Path] = {}
    for name, split in exact.items():
        if split in found:
            raise UserError(
                "mismatch",
                f"'{root}' has two folders of the split {split}, {found[split].name} and {name};"
                " merge them or rename one.",
            )
        found[split] = root / name
    return {split: found[split] for split in SPLIT_NAMES + EXTRA_NAMES if split in found}


def has_held_out(splits: Iterable[str]) -> bool:
    """Return whether names of splits mean both training and held-out images."""
    roles = {_ROLES.get(split) for split in splits}
    return "train" in roles and not roles.isdisjoint(("val", "test"))


def check_mixed_splits(uri: str, folders: Iterable[str]) -> None:
    """Check that no folder of a split lies beside one of held-out images, deeper in a tree.

    Args:
        uri: the data's name for messages.
        folders: relative paths of all folders that hold images.

    Raises:
        UserError: training and held-out images would be learned together.
    """
    children: dict[str, set[str]] = {}
    for folder in folders:
        while folder:
            parent, _, name = folder.rpartition("/")
            children.setdefault(parent, set()).add(name)
            folder = parent
    for parent, names in sorted(children.items()):
        splits = {name: parse_split(name) for name in sorted(names)}
        exact = {name: split for name, (split, others) in splits.items() if split and not others}
        if has_held_out(exact.values()):
            place = f"{uri}/{parent}".rstrip("/")
            raise UserError(
                "mismatch",
                f"'{place}' has the splits {', '.join(exact)} inside a class or data set; name"
                f" --data '{place}', or arrange the images as train/CLASS and val/CLASS.",
            )
