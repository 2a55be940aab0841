"""Convert errors of reading a run's files to UserError."""

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError, first_line

RESTORE = "restore it from a copy, or train again"


@contextlib.contextmanager
def convert_damage(path: Path, fix: str = RESTORE) -> Iterator[None]:
    """Convert errors of reading a file or checkpoint to UserError with a way out."""
    try:
        yield
    except (
        *(OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError),
        *(EOFError, pickle.UnpicklingError),
    ) as error:
        named = error.filename if isinstance(error, OSError) and error.filename else path
        problem = f"is damaged ({first_line(error)})"
        if isinstance(error, FileNotFoundError):  # safetensors gives no filename
            problem = "is missing"
        raise UserError("damaged", f"'{named}' {problem}; {fix}.") from None


@contextlib.contextmanager
def convert_newer(path: Path) -> Iterator[None]:
    """Convert an unknown option to a UserError that names its file."""
    try:
        yield
    except UserError as error:
        text = f"'{path}' is from a newer version ({first_line(error)}); upgrade localagg."
        raise UserError("unsupported", text) from None
