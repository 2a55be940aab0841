"""Command-line words to options, by tyro, with each mistake told in one sentence."""

import contextlib
import dataclasses
import io
import itertools
import re
from typing import TypeVar

import tyro

from ..config import flag, option_names
from ..errors import UserError, suggest

T = TypeVar("T")


def parse(
    kind: type[T], command: str, words: list[str], default: T | None = None
) -> tuple[T, set[str]]:
    """The options of a command, and the names of those that stood on the command line.

    Raises:
        UserError: an unknown option (the nearest is suggested), or a value that does not fit.
        SystemExit: after ``--help``, with status 0.
    """
    names = option_names(default) if default is not None else _fields(kind)
    known = {flag(name): name for name in names}
    typed = set()
    for word in words:
        spelled = word.split("=")[0].replace("_", "-")
        if not spelled.startswith("--") or spelled == "--help":
            continue
        name = known.get(spelled) or known.get(spelled.replace("--no-", "--", 1))
        if name is None:
            raise UserError(
                "TODO", f"localagg {command} has no option '{spelled}'.{suggest(spelled, known)}"
            )
        typed.add(name)
    asked_help = "-h" in words or "--help" in words
    said = io.StringIO()
    try:
        with contextlib.nullcontext() if asked_help else contextlib.redirect_stderr(said):
            options = tyro.cli(
                kind,
                prog=f"localagg {command}",
                args=words,
                default=default if default is not None else tyro.MISSING_NONPROP,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit:
        if asked_help:
            raise
        raise UserError(
            "TODO", f"{_sentence(said.getvalue())} See localagg {command} --help."
        ) from None
    return options, typed


def _fields(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]


_FRAME = re.compile("[│╭╮╰╯─]|-{3,}")  # what tyro draws around and between


def _sentence(box: str) -> str:
    """The first paragraph under the title of tyro's error box."""
    _, *lines = box.strip().splitlines()
    plain = [_FRAME.sub(" ", line).strip() for line in lines]
    while plain and not plain[0]:
        plain.pop(0)
    paragraph = itertools.takewhile(bool, plain)
    sentence = " ".join(" ".join(paragraph).split())
    return sentence if sentence.endswith(".") else sentence + "."
