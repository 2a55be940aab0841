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
) -> tuple[np.ndarray, list[str] | None] | None:
    """Convert labels to class numbers 0..C-1, and missing labels to -1.

    Words are numbered in sorted order; an empty word is a missing label. Integers are class numbers
    already, and -1 is a missing label: so data sets hide the labels of their test split.

    Args:
        values: the distinct labels, integers or words.
        codes: int [N], each image's position in ``values``; -1 without a label.
        where: names an image in an error by its index.
        names: class names that belong to integers.
        renumber: number integers in sorted order too, unless they have names. Then -1 beside 1
            alone is a class.

    Returns:
        int64 [N] and the class names, None for numbers without names; or None without any label.

    Raises:
        UserError: a label out of range, or over a million classes.
    """
    integers = all(isinstance(value, int) for value in values)
    renumber = renumber and names is None
    classes = {-1, 1} if renumber else set()
    missing = {"", -1} if set(values) != classes else {""}
    used = [value for value in values if value not in missing]
    if not used or (codes < 0).all():
        return None
    if len(used) > MAX_CLASSES:
        count = f"{len(used):,} different labels; at most {MAX_CLASSES:,} are supported."
        raise UserError("too-large", f"{where(0)} and the images after it have {count}")
    if not integers or renumber:
        used, names = sorted(used), [str(value) for value in sorted(used)]
        numbers = {value: number for number, value in enumerate(used)}
    else:
        numbers = {value: int(value) for value in used}
    # The last item stands for the code -1.
    labels = np.array([*(numbers.get(value, -1) for value in values), -1], np.int64)[codes]
    count = MAX_CLASSES if names is None else len(names)
    wrong = np.flatnonzero((labels < -1) | (labels >= count))
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
        labels: int64 [N]; -1 without a label.

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
