"""Expect errors by their code and the values they name, not by their wording."""

import contextlib
from collections.abc import Iterator

import pytest

from localagg.errors import CODES, UserError


@contextlib.contextmanager
def user_error(code: str, *values: object) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError with this code, whose message contains each of the values."""
    assert code in CODES
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, str(caught.value)
    for value in values:
        assert str(value) in str(caught.value), f"{value!r} is not in: {caught.value}"
