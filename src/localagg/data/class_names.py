"""Names of classes beside data whose format stores their numbers only: ``classes-SPLIT.json``.

The split comes last: the reference's program looks for ``train-*`` and ``validation-*``.
"""

import json
from pathlib import Path

from torch import Tensor

from ..config import UserError

_FILE = "classes-{}.json"
_LIMIT = 1 << 26  # bytes


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
            f"'{folder}' names {len(names):,} classes in its {_FILE.format('*')}, but has labels"
            f" up to {count - 1:,}; remove that file, or name all."
        )
    return names


def _read(path: Path) -> list[str] | None:
    try:
        with open(path, "rb") as file:
            names = json.loads(file.read(_LIMIT))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{path}' cannot be read: {error}; remove or mend it.") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"'{path}' is not a JSON list of class names; remove or mend it.")
    return names
