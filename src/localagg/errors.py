"""Errors for users: one sentence with a stable code."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Code = Literal[
    "option-invalid",  # a value out of range or of the wrong kind
    "option-unknown",  # no option, command, recipe, model or layer of this name
    "option-conflict",  # options that exclude each other, or have no effect together
    "option-missing",  # an option or argument that this command needs
    "not-found",  # no file, folder, run or split of this name
    "exists",  # the output already exists, or belongs to something else
    "busy",  # another process holds the folder
    "no-images",  # a source without images
    "no-labels",  # a measurement needs labels that the data lack
    "unreadable-images",  # images that no decoder reads
    "damaged",  # a file whose contents are inconsistent, cut or corrupt
    "unsupported",  # a format, version or variant that this version does not read
    "mismatch",  # data, weights or options that do not belong together
    "too-large",  # beyond a limit of memory, disk or a format
    "missing-extra",  # an optional dependency is not installed
    "not-finite",  # NaN or infinity in a loss, weight or embedding
    "worker-died",  # a data-loading process ended early
    "rank-failed",  # another process of the job ended or hangs
    "environment",  # disk full, no permission, no such device
    "unsafe",  # a name that would reach outside of its folder
]
CODES: tuple[str, ...] = get_args(Code)

# Control characters, marks that change the writing direction, line ends of Unicode, and surrogates
# (Python's stand-ins for bytes that are no text), which cannot be printed.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UserError(Exception):
    """Invalid use or input, in one sentence: what failed, the file, option or value, and the fix.

    The command line prints the sentence without a traceback and exits with status 2.

    Args:
        code: kind of the error, stable across versions; the sentence is not.
        message: the sentence. Unprintable characters are escaped.
    """

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(printable(message))
        self.code: Code = code

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.code, str(self))


class Interrupted(Exception):
    """Ctrl-C or a scheduler's signal stopped the work, which is saved. Exit with ``status``."""

    def __init__(self, message: str, *, status: int = 130) -> None:
        super().__init__(printable(message))
        self.status = status


@dataclass(eq=False)
class ReportedElsewhere(Exception):
    """Another process of the job already reported the failure; exit with ``status``."""

    status: int


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, at most 200 characters, or its type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(".")


def counted(number: int, noun: str) -> str:
    """Return ``1 image``, ``2,000 images``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def suggest(word: str, words: Iterable[str]) -> str:
    """Return ``" Did you mean 'X'?"`` for the closest of ``words``, or an empty string."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def printable(text: str) -> str:
    r"""Return the text on one line without terminal control.

    Control characters and bytes that are no text become escapes such as ``\n``, ``\x1b`` or
    ``\xff``. All other characters stay, including backslashes.
    """
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte in the name of a file
        return f"\\x{code - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode()
