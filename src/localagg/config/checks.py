"""Range checks that the option dataclasses share. None passes: the option is derived later."""

import math
import numbers
from collections.abc import Iterable
from typing import TypeGuard

from ..errors import UserError
from .fields import flag


def join_words(values: Iterable[object]) -> str:
    """Return the values as on a command line."""
    return " ".join(str(value) for value in values)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_at_least(config: object, low: int, *names: str) -> None:
    """Raise a UserError if one of these fields, or one of its numbers, is below ``low``."""
    for name in names:
        value = getattr(config, name)
        found = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(_is_number(number) and number >= low for number in found):
            raise _invalid(name, value, f"it must be at least {low}")


def check_positive(config: object, *names: str) -> None:
    """Raise a UserError if one of these fields is not finite and above 0."""
    for name in names:
        value = getattr(config, name)
        if not (_is_number(value) and 0 < value < math.inf):
            raise _invalid(name, value, "it must be above 0")


def check_share(config: object, *names: str) -> None:
    """Raise a UserError if one of these fields is outside of [0, 1]."""
    for name in names:
        value = getattr(config, name)
        if not (_is_number(value) and 0 <= value <= 1):
            raise _invalid(name, value, "it must be from 0 to 1")


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether this is an integer of Python or NumPy; booleans are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_options(**least: tuple[object, int]) -> None:
    """Raise a UserError if an option ``name=(value, least)`` is no integer or too small."""
    for name, (value, low) in least.items():
        if not (is_integer(value) and value >= low):
            raise _invalid(name, value, f"it must be an integer of at least {low}")


def check_arguments(**least: tuple[object, int]) -> None:
    """Raise a UserError if an argument ``name=(value, least)`` is no integer or too small."""
    for name, (value, low) in least.items():
        if not (is_integer(value) and value >= low):
            raise _wrong_argument(name, value, f"an integer of at least {low}")


def check_numbers(low: float, high: float = math.inf, **given: object) -> None:
    """Raise a UserError if an argument is no finite number from ``low`` to ``high``."""
    for name, value in given.items():
        if not (_is_number(value) and math.isfinite(value) and low <= value <= high):
            rule = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            raise _wrong_argument(name, value, f"a number {rule}")


def check_temperature(temperature: object) -> None:
    """Raise a UserError if this is no finite number above 0."""
    if not (_is_number(temperature) and 0 < temperature < math.inf):
        raise _wrong_argument("temperature", temperature, "a number above 0")


def check_one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a UserError if an argument is none of these words."""
    if value not in choices:
        raise _wrong_argument(name, value, f"one of {', '.join(choices)}")


def check(valid: bool, config: object, name: str, rule: str) -> None:
    """Raise a UserError that states the rule, unless ``valid``."""
    if not valid:
        raise _invalid(name, getattr(config, name), rule)


def describe(value: object) -> str:
    """Return a value as Python shows it, or its type where that would be long."""
    shown = repr(value)
    return shown if len(shown) <= 80 and "\n" not in shown else f"of type {type(value).__name__}"


def _wrong_argument(name: str, value: object, rule: str) -> UserError:
    return UserError("option-invalid", f"{name} is {describe(value)}; it must be {rule}.")


def _invalid(name: str, value: object, rule: str) -> UserError:
    shown = join_words(value) if isinstance(value, tuple) else value
    return UserError("option-invalid", f"{flag(name)} is {shown}; {rule}.")
