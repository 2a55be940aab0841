"""Range checks that the option dataclasses share."""

import math
from collections.abc import Iterable

from ..errors import UserError
from .fields import flag


def join_words(values: Iterable[object]) -> str:
    return " ".join(str(value) for value in values)


def check_at_least(config: object, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= low:
            raise UserError("TODO", f"{flag(name)} is {value}; it must be at least {low}.")


def check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise UserError("TODO", f"{flag(name)} is {value}; it must be above 0.")


def check_probability(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise UserError("TODO", f"{flag(name)} is {value}; it must be in 0-1.")
