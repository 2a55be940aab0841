"""Class numbers and class names: from the labels of any source, from files, and across splits."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .source import Source

MAX_CLASSES = 1_000_000  # a larger label is damage; bounds the lists made from labels
# The split comes last: the reference's program reads every file named train-* or validation-*.
_NAMES_FILE = "classes-{}.json"
_NAMES_LIMIT = 1 << 26  # bytes
_LISTED = 5  # classes in a message


def number_labels(
    values: Sequence[str | int],
    codes: np.ndarray,
    where: Callable[[int], str],
    *,
    names: list[str] | None = None,
    renumber: bool = False,
    partial: bool = False,
) -> tuple[np.ndarray, list[str] | None] | None:
    """Convert labels to class numbers 0..C-1.

    Words are numbered in sorted order. Integers are class numbers already, and all -1 means that
    the data have no labels: so data sets hide the labels of their test split.

    Args:
        values: the distinct labels, integers or words.
        codes: int [N], each image's position in ``values``; -1 without a label.
        where: names an image in an error by its index.
        names: class names that belong to integers. An image may then have the label -1.
        renumber: number integers in sorted order too, unless they have names.
        partial: images may have no label; theirs is -1.

    Returns:
        int64 [N] and the class names, None for numbers without names; or None without labels.

    Raises:
        UserError: images without a label among others that have one, a label out of range, or
            over a million classes.
    """
    integers = all(isinstance(value, int) for value in values)
    missing = np.flatnonzero(codes < 0)
    if len(missing) == len(codes) or (not len(missing) and integers and set(values) == {-1}):
        return None
    if len(missing) and not partial:
        first = where(int(missing[0]))
        message = f"{first} has no label, but other images have one; label every image or none."
        raise UserError("no-labels", message)
    if len(values) > MAX_CLASSES:
        count = f"{len(values):,} different labels; at most {MAX_CLASSES:,} are supported."
        raise UserError("too-large", f"{where(0)} and the images after it have {count}")
    if not integers or (renumber and names is None):
        ordered = sorted(values)
        numbers = {value: number for number, value in enumerate(ordered)}
        found = np.array([*(numbers[value] for value in values), -1])  # code -1 is the last item
        return found[codes], [str(value) for value in ordered]
    labels = np.array(values, np.int64)[codes]
    lowest, count = (0, MAX_CLASSES) if names is None else (-1, len(names))
    wrong = np.flatnonzero((labels < lowest) | (labels >= count))
    if len(wrong):
        label = f"the label {labels[wrong[0]]}; labels are numbers from 0 to {count - 1:,}"
        raise UserError("damaged", f"{where(int(wrong[0]))} has {label}, or words.")
    return labels, names


def write_class_names(folder: Path, split: str, classes: list[str]) -> None:
    """Write the names of a split's classes beside its data."""
    (folder / _NAMES_FILE.format(split)).write_text(json.dumps(classes))


def read_class_names(folder: Path, split: str, labels: Tensor) -> list[str]:
    """Read the names of a split's classes; without a file, return their numbers.

    Args:
        folder: the data's folder.
        split: name of the split as in the names of its files.
        labels: int64 [N], not negative.

    Raises:
        UserError: the file is damaged, or names fewer classes than there are labels.
    """
    path, count = folder / _NAMES_FILE.format(split), int(labels.max()) + 1
    try:
        with open(path, "rb") as file:
            names = json.loads(file.read(_NAMES_LIMIT))
    except FileNotFoundError:
        return [str(label) for label in range(count)]
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("damaged", f"Cannot read '{path}': {error}; remove it.") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("damaged", f"'{path}' is not a JSON list of class names; remove it.")
    if len(names) < count:
        reason = f"names {len(names):,} classes, but labels reach {count - 1:,}"
        raise UserError("mismatch", f"'{path}' {reason}; remove the file, or name all classes.")
    return names


def held_out_to_training_labels(data: str, source: Source, held_out: Source) -> Tensor:
    """Return the training label of each held-out class by its name: int64 [held-out classes].

    A class without held-out images may be missing in training; its entry is -1.

    Raises:
        UserError: held-out images of classes that the training images lack.
    """
    number = {name: label for label, name in enumerate(source.classes or ())}
    names = held_out.classes or []
    used = set() if held_out.labels is None else set(held_out.labels.unique().tolist())
    unknown = [name for label, name in enumerate(names) if name not in number and label in used]
    if unknown:
        more = f" and {len(unknown) - _LISTED:,} more" if len(unknown) > _LISTED else ""
        raise UserError(
            "mismatch",
            f"The held-out images of '{data}' have classes that training lacks:"
            f" {', '.join(unknown[:_LISTED])}{more}; rename or remove them.",
        )
    return torch.tensor([number.get(name, -1) for name in names])
