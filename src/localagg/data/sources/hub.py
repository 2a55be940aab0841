"""Data sets of the Hugging Face Hub: ``hf:NAME`` or ``hf:NAME:CONFIG``.

``datasets`` loads them once into its own cache; from then on they are memory-mapped Arrow, and need
no network.
"""

from pathlib import Path

from ...errors import UserError
from .arrow_tables import from_datasets
from .source import Splits

PREFIX = "hf:"


def find_hub(uri: str) -> Splits | None:
    """None where the URI does not begin with ``hf:``.

    Raises:
        UserError: there is no such data set or configuration, it cannot be had from here, or there
            is a folder of that name.
    """
    if not uri.startswith(PREFIX):
        return None
    name, _, config = uri.removeprefix(PREFIX).partition(":")
    if not name:
        raise UserError("TODO", f"'{uri}' names no data set; write hf:NAME or hf:NAME:CONFIG.")
    if Path(name).exists():
        # It would take the folder, and has been seen to cache two folders of one name as one.
        raise UserError(
            "TODO",
            f"'{name}' is a file or folder here, which datasets would read instead; give its"
            " path without 'hf:', or work in another folder.",
        )
    import datasets

    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # whatever the Hub's client, its transport and the readers raise
        raise UserError(
            "TODO",
            f"'{uri}' cannot be loaded: {_reason(error)}; check the name (hf:NAME or"
            " hf:NAME:CONFIG) and the network, or load it once where there is one.",
        ) from None
    splits = {str(split): part for split, part in dict(loaded).items()}
    return Splits(list(splits), lambda split: from_datasets(uri, splits[split]))


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(".") or type(error).__name__
