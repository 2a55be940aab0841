"""Read, replace and serialize the fields of nested option dataclasses by name."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

from ..errors import UserError, suggest

T = TypeVar("T")

REMOVED = {"nvjpeg": False, "recluster_delay": 0}
"""Options of earlier versions and their defaults. Finished runs that used them can be measured."""


def flag(name: str) -> str:
    """Return the command-line spelling of a field: ``batch_size`` -> ``--batch-size``."""
    return "--" + name.replace("_", "-")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain JSON values, nested as its dataclasses are."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """Return the configuration that :func:`to_dict` wrote, now or in an earlier version.

    Raises:
        UserError: a name that ``kind`` does not have, and that is not :data:`REMOVED`.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name in REMOVED and name not in fields:
            continue
        if name not in fields:
            hint = suggest(name, fields)
            raise UserError("option-unknown", f"'{name}' is no option of this version.{hint}")
        nested = fields[name].type
        if dataclasses.is_dataclass(nested) and isinstance(value, dict):
            value = from_dict(nested, value)  # type: ignore[arg-type]
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def removed_options(values: dict[str, Any]) -> dict[str, Any]:
    """Return the :data:`REMOVED` options that a stored configuration changed, with their values."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= removed_options(value)
        elif name in REMOVED and value != REMOVED[name]:
            found[name] = value
    return found


def override(config: T, **options: Any) -> T:
    """Return a copy with options replaced by name at any level of the nesting.

    Example: ``override(config, epochs=3, flip=0.0)``.

    Raises:
        UserError: an unknown name (the nearest is suggested), or a value out of range.
    """
    flat = {name: path for path, name in _paths(config)}
    tree = to_dict(config)
    for name, value in options.items():
        if name not in flat:
            raise UserError("option-unknown", f"There is no option '{name}'.{suggest(name, flat)}")
        *outer, last = flat[name]
        branch = tree
        for step in outer:
            branch = branch[step]
        branch[last] = value
    return from_dict(type(config), tree)


def require_resolved(value: T | None) -> T:
    """Return an option that ``resolve_defaults`` has derived, with the type that it then has."""
    if value is None:
        raise ValueError("not resolved: pass the configuration to resolve_defaults first")
    return value


def option_names(config: Any) -> list[str]:
    """Return the names of all options of a configuration, nested ones included."""
    return [name for _, name in _paths(config)]


def check_names(config: Any, names: Iterable[str]) -> None:
    """Raise a UserError unless all are names of options of a configuration, which may be None."""
    known = [] if config is None else option_names(config)
    for name in names:
        if name not in known:
            raise UserError(
                "option-unknown",
                f"typed names '{name}', which is no option of the given configuration."
                f"{suggest(name, known)}",
            )


def option_value(config: Any, name: str) -> Any:
    """Return the value of an option at any level of the nesting."""
    path = next(path for path, leaf in _paths(config) if leaf == name)
    for step in path:
        config = getattr(config, step)
    return config


def _paths(config: Any, prefix: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], str]]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _paths(value, (*prefix, f.name))
        else:
            yield (*prefix, f.name), f.name
