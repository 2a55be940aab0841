"""Convert errors of reading a run's files to UserError."""

import contextlib
import errno
import pickle
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import UserError, first_line
from .files import disk_advice, reason_of

_OF_THE_SYSTEM = (
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO),
    *(errno.ESTALE, errno.ETIMEDOUT),
)
"""Errors after which the file may well be whole."""
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
        raise read_failure(Path(named), error, fix) from None


def read_failure(path: Path, error: BaseException, fix: str) -> UserError:
    """Return the UserError for a file that could not be read.

    The file is opened again for the cause: safetensors calls a file missing that may not be read,
    and a folder no device.

    Args:
        path: the file.
        error: what its reader raised.
        fix: the way out if the file is missing or damaged.
    """
    try:
        with open(path, "rb"):
            pass
    except FileNotFoundError:
        return UserError("damaged", f"'{path}' is missing; {fix}.")
    except IsADirectoryError:
        return UserError("damaged", f"'{path}' is a folder, not a file; {fix}.")
    except OSError as refused:
        error = refused
    reason = first_line(error)
    if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
        reason, advice = reason_of(error), disk_advice(error)
    elif "launch worker thread" in str(error):  # pyarrow
        advice = "raise the limit of processes (ulimit -u)"
    elif any(text in str(error) for text in ("allocate memory", "out of memory", "malloc")):
        advice = "free memory"
    else:
        return UserError("damaged", f"'{path}' is damaged ({reason}); {fix}.")
    return UserError("environment", f"'{path}' cannot be read ({reason}); {advice}.")


@contextlib.contextmanager
def convert_newer(path: Path) -> Iterator[None]:
    """Convert an unknown option to a UserError that names its file."""
    try:
        yield
    except UserError as error:
        text = f"'{path}' is from a newer version ({first_line(error)}); upgrade localagg."
        raise UserError("unsupported", text) from None
