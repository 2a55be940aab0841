"""The command line: words in, an exit status out. Nothing heavy loads before a command runs.

Results go to stdout and to ``--json FILE``, progress and messages to stderr. Exit status: 0 done,
1 a fault of ours, 2 wrong use or a machine that refuses (one sentence says what and the way out),
75 saved and stopped by SIGTERM or SIGUSR1, 130 by Ctrl-C. Of several processes one tells, and all
end with its status.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from ..config import PretrainConfig, TransferConfig, option_names
from ..errors import Interrupted, ReportedElsewhere, UserError, printable, suggest
from ..recipes.builtin import readout_recipe, recipe
from ..recipes.from_reference_json import convert_pretrain_json, convert_readout_json
from .actions import COMMANDS
from .commands import Pretrain, Transfer
from .parse import parse


def main(argv: list[str] | None = None) -> int:
    """Run a command line (without the program's name); returns the exit status."""
    try:
        with _converted_worker_death():
            _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"localagg: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"localagg: {stopped}", file=sys.stderr)
        return stopped.status
    except ReportedElsewhere as ended:
        return ended.status
    except KeyboardInterrupt:
        print("localagg: stopped.", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, a folder that may not be written
        if error.filename is None:
            raise
        print(f"localagg: {printable(str(error.filename))}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def _converted_worker_death() -> Iterator[None]:
    """Import torch only once it has raised; see :func:`convert_worker_death`."""
    try:
        yield
    except RuntimeError:
        from ..data.loading.workers import convert_worker_death

        with convert_worker_death():
            raise


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(f"localagg {__version__}")
        return
    if name not in COMMANDS:
        listed = ", ".join(COMMANDS)
        raise UserError(
            "TODO", f"There is no command '{name}'; there are {listed}.{suggest(name, COMMANDS)}"
        )
    kind, command = COMMANDS[name]
    if kind in (Pretrain, Transfer):
        named = rest.pop(0) if rest and not rest[0].startswith("-") else None
        config: Any = _base(kind, named, rest)
        options, typed = parse(kind, f"{name} {named or '...'}", rest, kind(options=config))
        target = _check_json(options.json)
        if isinstance(options, Pretrain):
            named = named or _section(options.config)
            if options.processes != 1 and not options.dry_run:
                return _launch(options, named, arguments[1:])
        result = command(options, named, typed & set(option_names(config)))
    else:
        options, _ = parse(kind, name, rest)
        target = _check_json(options.json)
        result = command(options)
    if target and result is not None:
        from ..checkpoint import write_json

        write_json(target, result)


def _launch(options: Pretrain, named: str | None, words: list[str]) -> None:
    """The same command by several processes."""
    if options.processes < 1:
        raise UserError("TODO", f"--processes is {options.processes}; it must be at least 1.")
    from ..distributed.launcher import launch

    launch(
        [*words, "--processes", "1"],
        options.processes,
        options.resume or options.out or f"runs/{named}",
    )


def _base(kind: type, named: str | None, words: list[str]) -> PretrainConfig | TransferConfig:
    """What the options on the command line are laid over: a recipe, and the reference's JSON."""
    spec = _peek(words, "--config")
    if kind is Pretrain:
        base = recipe(named).config if named else None
        translate, default = convert_pretrain_json, PretrainConfig()
    else:
        chosen = _peek(words, "--recipe")
        base = readout_recipe(chosen).config if chosen else None
        translate, default = convert_readout_json, TransferConfig()
    if spec is None:
        return base or default
    config, notes = translate(spec, base)  # type: ignore[arg-type]
    for note in notes:
        print(printable(f"--config {spec}: {note}"), file=sys.stderr)
    return config


def _peek(words: list[str], name: str) -> str | None:
    """The value of an option that decides what the others are laid over."""
    for position, word in enumerate(words):
        if word == name and position + 1 < len(words):
            return words[position + 1]
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return None


def _section(spec: str | None) -> str | None:
    """The name in ``FILE.json:NAME``; it stands for the recipe where none is named."""
    return None if spec is None else spec.partition(":")[2] or Path(spec).stem


def _check_json(file: str | None) -> Path | None:
    """The file to write the result to, looked at before any work."""
    if file is None:
        return None
    path = Path(file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError("TODO", f"--json {file} is not a file in an existing folder.")
    return path


def _help() -> str:
    width = max(map(len, COMMANDS))
    about = {name: (kind.__doc__ or "").splitlines()[0] for name, (kind, _) in COMMANDS.items()}
    lines = [f"  {name:{width}}  {text}" for name, text in about.items()]
    return "\n".join(
        [
            "localagg learns an embedding of images without labels.",
            "",
            "usage: localagg COMMAND ...",
            "",
            *lines,
            "",
            "localagg COMMAND --help explains each. Start with: localagg demo",
        ]
    )
