"""Check that options, and arguments of public functions, are of their declared types.

The command line converts words; Python users pass lists, NumPy's numbers and paths, or mistakes.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from ..errors import UserError
from .checks import describe, is_integer
from .fields import flag

Function = TypeVar("Function", bound=Callable[..., Any])

_LONGEST_NAME = 255  # bytes of a file's name, on all usual file systems
_WORDS = {
    int: "an integer below 2**63",
    float: "a finite number",
    bool: "True or False",
    str: "text",
    Path: "a path",
    types.NoneType: "None",
}


def check_argument_types(function: Function) -> Function:
    """Let a public function raise a UserError if an argument is not of its declared type.

    Annotations that are strings, and ``Any``, are not checked.
    """
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in (*zip(parameters, args, strict=False), *kwargs.items()):
            if name in parameters:  # of others Python's own error tells
                _check_argument(name, value, parameters[name].annotation)
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def normalize_fields(config: object) -> None:
    """Turn lists into tuples, paths into text, and NumPy's numbers into Python's, in place.

    Raises:
        UserError: a value that is not of its field's type.
    """
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = _convert(flag(f.name), getattr(config, f.name), f.type)
        object.__setattr__(config, f.name, value)  # the dataclass is frozen


def _check_argument(name: str, value: Any, kind: Any) -> None:
    if kind is inspect.Parameter.empty:
        return
    _convert(name, value, kind)
    if not isinstance(value, str | os.PathLike) or Path not in (kind, *get_args(kind)):
        return
    path = os.fspath(value)
    if not path:
        raise UserError("option-invalid", f"{name} is empty; it must be {_rule(kind)}.")
    if "\0" in path:
        raise UserError("option-invalid", f"{name} is {path!r}; a path has no zero character.")
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in Path(path).parts):
        raise UserError(
            "option-invalid",
            f"{name} is '{path[:40]}...'; the name of a file has at most {_LONGEST_NAME} bytes.",
        )


def _convert(name: str, value: Any, kind: Any) -> Any:
    try:
        return _as_kind(value, kind)
    except TypeError:
        raise UserError(
            "option-invalid", f"{name} is {describe(value)}; it must be {_rule(kind)}."
        ) from None


def _as_kind(value: Any, kind: Any) -> Any:
    """Return the value as one of this kind; raise TypeError where it is none."""
    origin, arms = get_origin(kind), get_args(kind)
    if kind is Any or isinstance(kind, str):
        return value
    if origin in (types.UnionType, Union):
        return _as_one_of(value, arms)
    if origin is Literal:
        _require(value, isinstance(value, str) or is_integer(value))
        _require(value, value in arms)
        return value if isinstance(value, str) else int(value)
    if origin is tuple:
        _require(value, isinstance(value, list | tuple))
        _require(value, arms[-1] is ... or len(value) == len(arms))
        return tuple(_as_kind(each, arms[0]) for each in value)
    if origin in (Sequence, Iterable):
        _require(value, isinstance(value, origin) and not isinstance(value, str | bytes))
        if not isinstance(value, Collection):
            return value  # an iterator, which is read once
        return [_as_kind(each, arms[0]) for each in value]
    if origin is Callable:
        return _require(value, callable(value))
    if kind is int:
        return int(_require(value, is_integer(value) and abs(value) < 2**63))
    if kind is float:
        _require(value, isinstance(value, numbers.Real) and not isinstance(value, bool))
        _require(value, math.isfinite(value))
        return value if isinstance(value, int | float) else float(value)
    if kind in (str, Path) and isinstance(value, str | os.PathLike):
        return os.fspath(value) if kind is str else Path(value)
    return _require(value, isinstance(value, origin or kind))


def _as_one_of(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        try:
            return _as_kind(value, kind)
        except TypeError:
            continue
    raise TypeError


def _require(value: Any, valid: bool) -> Any:
    if not valid:
        raise TypeError
    return value


def _rule(kind: Any) -> str:
    """Return a type in words."""
    origin, arms = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        found = [_rule(arm) for arm in arms if not (arm is str and Path in arms)]
        return " or ".join(found)
    if origin is Literal:
        return f"{'one of ' if len(arms) > 1 else ''}{', '.join(map(str, arms))}"
    if origin in (tuple, Sequence, Iterable):
        count = "" if origin is not tuple or arms[-1] is ... else f" of {len(arms)}"
        return f"a list{count}, each {_rule(arms[0])}"
    if origin is Callable:
        return "a function"
    return _WORDS.get(kind) or f"of type {getattr(kind, '__name__', kind)}"
