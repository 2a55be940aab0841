"""The command line: one table of commands. Nothing heavy is imported before a command runs.

Results go to stdout and to ``--json FILE``, progress and messages to stderr. Exit status: 0 done,
1 a fault of ours, 2 wrong use (one sentence says what and the way out), 130 stopped by Ctrl-C.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from . import __version__
from .config import Interrupted, PretrainConfig, UserError, nearest, option_names
from .parse import parse
from .recipes import RECIPES, recipe


@dataclass(frozen=True)
class Demo:
    """Learn the built-in digits by IR and then LA, and compare with honest floors.

    Prints a table and writes results.json and report.html.
    """

    out: str = "runs/demo"
    """The folder to write; an earlier demo in it is replaced."""
    seed: int = 0
    """Of both runs."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Pretrain:
    """Learn an embedding of images without labels: IR first, then LA."""

    config: PretrainConfig
    data: str | None = None
    """Data URI: a folder of images, Parquet, a saved dataset, or digits."""
    out: str | None = None
    """The run folder to make. None: runs/ and the recipe's name."""
    resume: str | None = None
    """A run folder to go on with instead; it keeps its recipe and its options."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Knn:
    """Accuracy of the weighted vote of nearest neighbors.

    Images of the held-out split ask those of the training split; where nothing is held out,
    training images ask each other.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, or weights file (.safetensors)."""
    data: str | None = None
    """Data URI. None: the run's."""
    against: Literal["bank", "embeddings"] = "bank"
    """Ask the run's memory bank, or fresh embeddings of the training split."""
    k: tuple[int, ...] = (1, 200)
    """Numbers of neighbors."""
    workers: int = 2
    """Processes that decode, where the images do not fit in memory."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Inspect:
    """Count images, classes, sizes and formats, and name the unreadable, before any training."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URI")]
    """Data URI."""
    workers: int = 2
    """Processes that decode."""
    json: str | None = None
    """Also write the result here, with every unreadable image."""


@dataclass(frozen=True)
class Recipes:
    """List the named configurations and what they cost."""

    json: str | None = None
    """Also write them here, with all their options."""


def _demo(options: Demo) -> dict[str, Any]:
    from .demo import demo
    from .logbook import print_table

    result = demo(Path(options.out), seed=options.seed)
    columns = {"knn1": "1-NN", "nmi": "NMI", "cluster_accuracy": "cluster accuracy"}
    rows = [[row["name"], *(f"{row[column]:.3f}" for column in columns)] for row in result["rows"]]
    print_table(["", *columns.values()], rows)
    print(f"{result['seconds']['total']:.0f} s. Open {Path(options.out) / 'report.html'}")
    return result


def _pretrain(options: Pretrain, named: str | None, typed: set[str]) -> dict[str, Any]:
    from .logbook import print_table
    from .pretrain import pretrain, resume

    if options.resume is not None:
        if options.out not in (None, options.resume):
            raise UserError(f"--resume {options.resume} writes there; leave out --out.")
        result = resume(options.resume, options.config, data=options.data, typed=typed)
    else:
        if named is None:
            raise UserError(
                f"Name a recipe: localagg pretrain {'|'.join(RECIPES)} --data IMAGES --out RUN."
            )
        if options.data is None:
            raise UserError("Name the images to learn from with --data.")
        result = pretrain(options.config, options.data, options.out or f"runs/{named}")
    shares = result["shares"].items()
    print_table(["part of the time", "share"], [[part, f"{share:.1%}"] for part, share in shares])
    measured = ", ".join(f"{name} {value:.1%}" for name, value in result["final"].items())
    print(f"{result['seconds']:.0f} s. {measured or 'Nothing was measured.'}")
    print(f"The run is in {result['run']}")
    return result


def _knn(options: Knn) -> dict[str, Any]:
    from .evaluate import measure_run
    from .logbook import print_table

    result = measure_run(
        Path(options.run),
        data=options.data,
        against=options.against,
        k=options.k,
        workers=options.workers,
    )
    print_table(["", "accuracy"], [[k, f"{value:.1%}"] for k, value in result["accuracy"].items()])
    print(f"{result['asked']:,} images asked {result['known']:,} of {result['against']}.")
    return result


def _inspect(options: Inspect) -> dict[str, Any]:
    from .data.inspect import inspect, summary_rows
    from .logbook import print_table

    result = inspect(options.data, workers=options.workers)
    for split, facts in result["splits"].items():
        print_table([split, ""], summary_rows(facts))
    return result


def _recipes(_: Recipes) -> dict[str, Any]:
    from .config import to_dict
    from .logbook import print_table

    print_table(["recipe", "for", "cost"], [[name, r.about, r.cost] for name, r in RECIPES.items()])
    print("localagg pretrain RECIPE --help shows every option with the recipe's values.")
    return {
        name: {"about": r.about, "cost": r.cost, "config": to_dict(r.config)}
        for name, r in RECIPES.items()
    }


_COMMANDS: dict[str, tuple[type, Callable[..., dict[str, Any]]]] = {
    "demo": (Demo, _demo),
    "pretrain": (Pretrain, _pretrain),
    "knn": (Knn, _knn),
    "inspect": (Inspect, _inspect),
    "recipes": (Recipes, _recipes),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line (without the program's name); returns the exit status."""
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)  # it announces its precision
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(f"localagg: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"localagg: {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("localagg: stopped.", file=sys.stderr)
        return 130
    except OSError as error:  # a full disk, a folder that may not be written
        if error.filename is None:
            raise
        print(f"localagg: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return
    name, *rest = arguments
    if name in ("-V", "--version"):
        print(f"localagg {__version__}")
        return
    if name not in _COMMANDS:
        listed = ", ".join(_COMMANDS)
        raise UserError(
            f"There is no command '{name}'; there are {listed}.{nearest(name, _COMMANDS)}"
        )
    kind, command = _COMMANDS[name]
    if name == "pretrain":
        named = rest.pop(0) if rest and not rest[0].startswith("-") else None
        config = recipe(named).config if named else PretrainConfig()
        options, typed = parse(kind, f"{name} {named or 'RECIPE'}", rest, Pretrain(config))
        target = _check_json(options.json)
        result = command(options, named, typed & set(option_names(config)))
    else:
        options, _ = parse(kind, name, rest)
        target = _check_json(options.json)
        result = command(options)
    if target:
        from .checkpoint import write_json

        write_json(target, result)


def _check_json(file: str | None) -> Path | None:
    """The file to write the result to, looked at before any work."""
    if file is None:
        return None
    path = Path(file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--json {file} is not a file in an existing folder.")
    return path


def _help() -> str:
    width = max(map(len, _COMMANDS))
    about = {name: (kind.__doc__ or "").splitlines()[0] for name, (kind, _) in _COMMANDS.items()}
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
