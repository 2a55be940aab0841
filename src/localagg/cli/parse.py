"""Parse the words of a command into its options dataclass, by argparse.

A field is an option, ``dry_run`` for ``--dry-run``; :func:`positional` makes it an argument without
a name. The fields of a nested configuration are options too, shown in groups of their own; those
that are typed override the ``base`` configuration of the command. A text below a field is its help.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import itertools
import os
import textwrap
import types
from collections.abc import Callable
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from ..config import (
    AdaptConfig,
    EncoderConfig,
    ObjectiveConfig,
    PretrainConfig,
    TransferConfig,
    ViewConfig,
    flag,
    override,
)
from ..errors import UserError, suggest

T = TypeVar("T")
_METAVARS = {
    **dict.fromkeys(("config", "bank", "heads", "html", "sheet"), "FILE"),
    **dict.fromkeys(("out", "weights"), "PATH"),
    **dict.fromkeys(("run", "start", "resume"), "RUN"),
    **{"cache": "FOLDER", "data": "URI", "push": "USER/NAME", "k": "N", "train": "PART"},
}
"""Words for the value of an option of text; others are NAME."""
_GROUPS = {
    PretrainConfig: "training",
    TransferConfig: "read-outs",
    EncoderConfig: "network",
    ViewConfig: "views",
    ObjectiveConfig: "neighbors and clusters",
    AdaptConfig: "pretrained networks",
}


def positional(name: str, **options: Any) -> Any:
    """Return a dataclass field that is given by its position; help shows it as ``name``."""
    return dataclasses.field(metadata={"positional": name}, **options)


def internal(default: Any) -> Any:
    """Return a dataclass field that is no option: ``words`` or ``typed``, set by :func:`parse`."""
    return dataclasses.field(default=default, metadata={"internal": True})


def check_unset(options: Any, names: tuple[str, ...], reason: str) -> None:
    """Raise a UserError if one of these fields differs from its default."""
    for f in dataclasses.fields(options):
        if f.name in names and getattr(options, f.name) != f.default:
            name = f.metadata.get("positional") or flag(f.name)
            raise UserError("option-conflict", f"{name} has no effect {reason}; omit it.")


def parse(kind: type[T], command: str, words: list[str]) -> tuple[T, str | None]:
    """Return the options of a command, and the file of ``--json``, which all commands have.

    Args:
        kind: options dataclass of the command. If it has a field ``options``, it has a static
            method ``base``, which returns that configuration for the typed values.
        command: its name, for messages.
        words: words after the command. Options may be spelled with underscores.

    The field ``typed`` of the options, if any, holds the names of the configuration options among
    the words; the field ``words`` holds the words.

    Raises:
        UserError: an unknown option, an invalid value, or a missing argument.
        SystemExit: after ``--help``, with status 0.
    """
    prog = f"localagg {command}"
    parser = _parser(kind, prog)
    spelled = [_with_hyphens(word) for word in words]
    found, rest = parser.parse_known_intermixed_args(spelled)
    values = vars(found)
    if rest:
        unknown = next((word for word in rest if word.startswith("-")), rest[0]).split("=")[0]
        hint = suggest(unknown, parser.flags)
        if os.path.exists(unknown):
            hint = f" For the file, write ./{unknown}."
        raise UserError("option-unknown", f"{prog} has no option or argument '{unknown}'.{hint}")
    wants_help, json = values.pop("help", False), values.pop("json", None)
    for name, value in [("json", json), *values.items()]:
        if value == "" or (isinstance(value, list) and "" in value):
            shown = parser.arguments.get(name, flag(name))
            raise UserError("option-invalid", f"{shown} is empty; give it a value, or omit it.")
    json = _with_home(json)
    for name, value in values.items():
        values[name] = value = _with_home(value)
        if isinstance(value, list):
            values[name] = None if value == [None] else tuple(value)
            if None in value and len(value) > 1:
                raise UserError("option-invalid", f"{flag(name)}: None stands alone.")
    own = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in own & values.keys():
        if values[name] == ():
            raise UserError("option-missing", f"{flag(name)} needs a value; see {prog} --help.")
    typed = {name: value for name, value in values.items() if name not in own}
    options = {name: value for name, value in values.items() if name in own}
    if hasattr(kind, "base"):
        options["options"] = kind.base(options)  # type: ignore[attr-defined]
        if not wants_help:
            options["options"] = override(options["options"], **typed)
        options |= {"typed": frozenset(typed), "words": tuple(words)}
    if wants_help:
        print(_parser(kind, prog, options.get("options")).format_help(), end="")
        raise SystemExit(0)
    if missing := [shown for name, shown in parser.required.items() if name not in options]:
        names = " and ".join(missing)
        raise UserError("option-missing", f"{prog} needs {names}; see {prog} --help.")
    return kind(**options), json


def _with_home(value: Any) -> Any:
    """Expand ``~`` and ``~/...``: no shell does in ``--out=~/runs/x``."""
    if isinstance(value, list):
        return [_with_home(each) for each in value]
    if isinstance(value, str) and (value == "~" or value.startswith("~/")):
        return os.path.expanduser(value)
    return value


class _Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, about: str) -> None:
        super().__init__(
            prog=prog,
            description=about,
            epilog="Values in brackets hold without the option. None restores the default.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
            add_help=False,
        )
        self.flags = ["--help", "--json"]
        self.arguments: dict[str, str] = {}  # name of the field: that of the argument
        self.required: dict[str, str] = {}  # name of the field: text for the message
        self.add_argument("-h", "--help", action="store_true", help="Show this help.")
        self.add_argument("--json", metavar="FILE", help="Also write the result to this file.")

    def error(self, message: str) -> NoReturn:
        text = message.removeprefix("argument ")
        raise UserError("option-invalid", f"{text.rstrip('.')}; see {self.prog} --help.")


def _parser(kind: type, prog: str, config: Any = None) -> _Parser:
    """The parser of a command; its help shows the values of ``config``."""
    parser = _Parser(prog, inspect.cleandoc(kind.__doc__ or ""))
    nested: list[tuple[type, Any]] = []
    _add_options(parser, parser, kind, None, nested)
    if nested:
        nested = [(nested[0][0], config)]
    positions = (f.metadata.get("positional") for f in dataclasses.fields(kind))
    parser.usage = " ".join([prog, "[OPTIONS]", *filter(None, positions)])
    while nested:
        inner, values = nested.pop(0)
        group = parser.add_argument_group(_GROUPS[inner], inner.__doc__)
        _add_options(parser, group, inner, values, nested)
    return parser


def _add_options(
    parser: _Parser, group: Any, kind: type, values: Any, nested: list[tuple[type, Any]]
) -> None:
    """Add the fields of a dataclass to a group, and collect its nested dataclasses."""
    helps = _field_helps(kind)
    for f in dataclasses.fields(kind):
        if f.metadata.get("internal"):
            continue
        if dataclasses.is_dataclass(f.type):
            nested.append((f.type, getattr(values, f.name, None)))  # type: ignore[arg-type]
            continue
        value = f.default if values is None else getattr(values, f.name)
        text = helps[f.name] + _shown(value)
        arguments = {**_argument_type(f.type), "help": text.replace("%", "%%")}
        name = f.metadata.get("positional")
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required:
            parser.required[f.name] = name or flag(f.name)
        if name:
            parser.arguments[f.name] = name
            arguments |= {"metavar": name, "nargs": arguments.get("nargs", "?")}
            group.add_argument(f.name, **arguments)
        else:
            if arguments.get("metavar") == "STR":
                arguments["metavar"] = _METAVARS.get(f.name, "NAME")
            parser.flags.append(flag(f.name))
            group.add_argument(flag(f.name), dest=f.name, **arguments)


def _argument_type(kind: Any) -> dict[str, Any]:
    """Keywords of ``add_argument`` for a type such as ``int | None`` or ``tuple[float, ...]``."""
    optional = get_origin(kind) in (types.UnionType, Union)  # Literal[...] | None is a Union
    words: set[str] = set()
    if optional:
        kind, *others = (arm for arm in get_args(kind) if arm is not types.NoneType)
        words = {word for arm in others for word in get_args(arm)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    arms = get_args(kind)
    if get_origin(kind) is Literal:
        values = {str(arm): arm for arm in arms}
        metavar = "{" + ",".join(values) + "}"
        values |= {"None": None} if optional else {}
        convert = values.get
        choices = [*values.values()]
        return {"type": lambda word: convert(word, word), "choices": choices, "metavar": metavar}
    if get_origin(kind) is tuple:
        nargs = "*" if arms[-1] is ... else len(arms)
        return {**_argument_type(arms[0] | None if optional else arms[0]), "nargs": nargs}
    convert = _or_none(kind, words) if optional else kind
    return {"type": convert, "metavar": kind.__name__.upper()}


def _or_none(kind: Callable[[str], Any], words: set[str]) -> Callable[[str], Any]:
    def convert(word: str) -> Any:
        return None if word == "None" else word if word in words else kind(word)

    convert.__name__ = getattr(kind, "__name__", "")  # argparse names it in messages
    return convert


def _with_hyphens(word: str) -> str:
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def _shown(value: Any) -> str:
    """The value of an option behind its help."""
    if value is None or value is False or value is dataclasses.MISSING or value == ():
        return ""
    parts = value if isinstance(value, tuple) else (value,)
    return f" [{' '.join(f'{p:.4g}' if isinstance(p, float) else str(p) for p in parts)}]"


@functools.cache
def _field_helps(kind: type) -> dict[str, str]:
    """{field: the text below it in the source}."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    helps: dict[str, str] = {}
    for field, text in itertools.pairwise(definition.body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(words))),
            ):
                helps[name] = " ".join(words.split())
    return helps
