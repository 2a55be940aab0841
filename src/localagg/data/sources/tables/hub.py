"""Data sets of the Hugging Face Hub: ``hf:NAME`` or ``hf:NAME:CONFIG``.

``datasets`` loads them once into its own cache. After that they are memory-mapped Arrow files, and
need no network.
"""

from pathlib import Path

from ....errors import UserError
from ..splits import Splits
from .arrow_tables import from_datasets

PREFIX = "hf:"


def find_hub_dataset(uri: str, column: str | None = None) -> Splits | None:
    """Return the splits of a Hub data set, or None if the URI does not begin with ``hf:``.

    Raises:
        UserError: no such data set or configuration, no network, or a local folder of that name.
    """
    if not uri.startswith(PREFIX):
        return None
    name, _, config = uri.removeprefix(PREFIX).partition(":")
    if not name:
        raise UserError("option-invalid", f"'{uri}' has no name; write hf:NAME or hf:NAME:CONFIG.")
    if Path(name).exists():
        # datasets would read the folder, and may use one cache for two folders of the same name.
        message = f"'{name}' is a local path; write it without 'hf:', or work in another folder."
        raise UserError("option-invalid", message)
    import datasets

    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # the Hub's client, its transport and the readers raise many types
        message = f"Cannot load '{uri}': {_reason(error)}; check the name and the network."
        raise UserError("not-found", message) from None
    splits = {str(split): part for split, part in dict(loaded).items()}
    return Splits(list(splits), lambda split: from_datasets(uri, splits[split], column))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") or type(error).__name__
