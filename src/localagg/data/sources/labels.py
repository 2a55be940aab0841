"""Names of classes: beside data whose format stores their numbers only, and across splits.

Of ``classes-SPLIT.json`` the split comes last: the reference's program looks for ``train-*`` and
``validation-*``.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UserError
from .source import Source

_FILE = "classes-{}.json"
_LIMIT = 1 << 26  # bytes
_NAMED = 5  # classes in a message


def write_class_names(folder: Path, split: str, classes: list[str]) -> None:
    """Keep the names of a split's classes beside its data."""
    (folder / _FILE.format(split)).write_text(json.dumps(classes))


def class_names(folder: Path, split: str, labels: Tensor) -> list[str]:
    """The names of a split's classes; their numbers where none are kept.

    Args:
        folder: where the data are.
        split: as it is called in the names of the files.
        labels: int64 [N], not negative.

    Raises:
        UserError: the file of names is damaged, or has fewer than there are labels.
    """
    count = int(labels.max()) + 1
    names = _read(folder / _FILE.format(split))
    if names is None:
        return [str(label) for label in range(count)]
    if len(names) < count:
        raise UserError(
            "TODO",
            f"'{folder}' names {len(names):,} classes in its {_FILE.format('*')}, but has labels"
            f" up to {count - 1:,}; remove that file, or name all.",
        )
    return names


def _read(path: Path) -> list[str] | None:
    try:
        with open(path, "rb") as file:
            names = json.loads(file.read(_LIMIT))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("TODO", f"'{path}' cannot be read: {error}; remove or mend it.") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("TODO", f"'{path}' is not a JSON list of class names; remove or mend it.")
    return names


def held_out_to_training_labels(data: str, source: Source, held_out: Source) -> Tensor:
    """Held-out labels to training labels, by class name: int64 [held-out classes].

    A name that no held-out image has may be missing in training; it becomes -1.

    Raises:
        UserError: held-out images of classes that the training images do not have.
    """
    number = {name: label for label, name in enumerate(source.classes or ())}
    names = held_out.classes or []
    used = set() if held_out.labels is None else set(held_out.labels.unique().tolist())
    unknown = [name for label, name in enumerate(names) if name not in number and label in used]
    if unknown:
        more = f" and {len(unknown) - _NAMED:,} more" if len(unknown) > _NAMED else ""
        raise UserError(
            "TODO",
            f"The held-out images of '{data}' have classes that the training images lack:"
            f" {', '.join(unknown[:_NAMED])}{more}; rename them or take them out (pretraining can"
            " also do without: --eval-every 0).",
        )
    return torch.tensor([number.get(name, -1) for name in names])
