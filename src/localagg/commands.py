"""The commands: the options of each, and what it calls and prints. Heavy imports wait until then.

A command returns what ``--json`` writes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .config import PretrainConfig, TransferConfig, UserError, known, option, override
from .recipes import READOUT_RECIPES, RECIPES, REFERENCE


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

    options: PretrainConfig
    data: str | None = None
    """Data URI: a folder of images, Parquet, TFRecords, a listing, a saved dataset, or digits."""
    out: str | None = None
    """The run folder to make. None: runs/ and the recipe's name."""
    start: str | None = None
    """A finished run of IR on the same images to begin LA from, instead of running IR first."""
    resume: str | None = None
    """A run folder to go on with instead; it keeps its recipe and its options."""
    config: str | None = None
    """A configuration of the reference, FILE.json:NAME, laid over the recipe."""
    dry_run: bool = False
    """Print the whole configuration, the steps and a forecast of memory; learn nothing."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Transfer:
    """Accuracy by linear read-outs: one head a layer, trained with labels on a frozen encoder."""

    options: TransferConfig
    data: str | None = None
    """Data URI with labels and a held-out split. None: the run's."""
    out: str | None = None
    """The folder to make. None: transfer/ inside the run, or beside the weights file."""
    resume: str | None = None
    """A folder of read-outs to go on with instead."""
    recipe: str | None = None
    """Read-outs of the reference by name, such as trans_res18_LA or plc_trans_res18_LA."""
    config: str | None = None
    """A configuration of the reference, FILE.json:NAME, laid over the recipe."""
    json: str | None = None
    """Also write the result here."""


@dataclass(frozen=True)
class Embed:
    """Write the embeddings of any images as a Parquet file: path, index, label, embedding."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, or weights file (.safetensors)."""
    data: str
    """Data URI."""
    out: str
    """The .parquet file to write."""
    split: Literal["train", "val", "test"] = "train"
    """Which split of the data."""
    workers: int = 2
    """Processes that decode."""
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
class Pack:
    """Pack any images into a folder that reads fast, or into the reference's TFRecords."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Data URI."""
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to make."""
    format: Literal["arrow", "tfrecord"] = "arrow"
    """What datasets reads, or what the reference reads."""
    verify: bool = False
    """Read everything back and compare."""
    json: str | None = None
    """Also write the report here."""


@dataclass(frozen=True)
class ImportTf:
    """Take weights from a checkpoint of the reference (or of its PyTorch port)."""

    prefix: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PREFIX")]
    """model.ckpt-N, its .index, a folder or .tar with one; or the port's checkpoint.pth.tar."""
    model: str
    """The network: preact_resnet18, preact_resnet50, alexnet_bn or vgg16_bn_last."""
    out: str
    """The .safetensors file to write."""
    bank: str | None = None
    """Also write the memory bank, its labels and its cluster labels to this .safetensors file."""
    json: str | None = None
    """Also write the report here."""


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
        result = resume(options.resume, options.options, data=options.data, typed=typed)
    else:
        if named is None:
            raise UserError(
                f"Name a recipe: localagg pretrain {'|'.join(RECIPES)} --data IMAGES --out RUN."
            )
        if options.data is None:
            raise UserError("Name the images to learn from with --data.")
        config = options.options
        if typed & {"neighbors", "clusters"}:  # set by hand: taken as they are
            config = override(config, sized_for=None)
        if options.dry_run:
            return _dry_run(config, options.data)
        result = pretrain(config, options.data, options.out or f"runs/{named}", start=options.start)
    shares = result["shares"].items()
    print_table(["part of the time", "share"], [[part, f"{share:.1%}"] for part, share in shares])
    measured = ", ".join(f"{name} {value:.1%}" for name, value in result["final"].items())
    print(f"{result['seconds']:.0f} s. {measured or 'Nothing was measured.'}")
    print(f"The run is in {result['run']}")
    return result


def _dry_run(config: PretrainConfig, data: str) -> dict[str, Any]:
    from .config import PretrainConfig, from_dict, option, option_names, option_value
    from .forecast import forecast
    from .logbook import print_table, say

    result = forecast(config, data)
    for note in result["notes"]:
        say(note)
    resolved = from_dict(PretrainConfig, result["config"])
    values = [
        [option(name), _words(option_value(resolved, name))] for name in option_names(resolved)
    ]
    print_table(["option", "value"], values)
    steps = [[name, _words(value)] for name, value in result["steps"].items()]
    print_table(["steps", ""], steps)
    memory = [[part, f"{size / 2**20:,.1f} MiB"] for part, size in result["memory"].items()]
    checkpoint = f"{result['checkpoint_bytes'] / 2**20:,.1f} MiB"
    print_table(["memory", ""], [*memory, ["a checkpoint on disk", checkpoint]])
    return result


def _words(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(_words, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _transfer(options: Transfer, run: str | None, typed: set[str]) -> dict[str, Any]:
    from .checkpoint import read_run
    from .logbook import print_table
    from .transfer import resume_transfer, transfer

    config = options.options
    if options.resume is not None:
        if options.out not in (None, options.resume):
            raise UserError(f"--resume {options.resume} writes there; leave out --out.")
        if fixed := sorted(typed - {"workers", "device"}):
            raise UserError(
                f"'{options.resume}' keeps its options; leave out {option(fixed[0])}, or start"
                " again with another --out."
            )
        result = resume_transfer(
            options.resume,
            weights=run,
            data=options.data,
            workers=config.workers if "workers" in typed else None,
            device=config.device if "device" in typed else None,
        )
    else:
        if run is None:
            raise UserError("Name a run folder or a weights file: localagg transfer RUN.")
        folder = Path(run)
        data = options.data
        if data is None:
            if not folder.is_dir():
                raise UserError(f"'{run}' is a weights file; name the images with --data.")
            data = str(read_run(folder)[1]["data"])
        beside = folder if folder.is_dir() else folder.with_suffix("")
        named = f"transfer-{options.recipe}" if options.recipe else "transfer"
        result = transfer(config, folder, data, options.out or str(beside / named))
    columns = list(next(iter(result["layers"].values())))
    rows = [
        [name, *(f"{found[c]:.1%}" for c in columns)] for name, found in result["layers"].items()
    ]
    print_table(["layer", *columns], rows)
    print(f"{result['seconds']:.0f} s. {result['protocol']}")
    return result


def _embed(options: Embed) -> dict[str, Any]:
    from .embed import write_embeddings

    result = write_embeddings(
        Path(options.run),
        options.data,
        Path(options.out),
        split=options.split,
        workers=options.workers,
    )
    skipped = f", {result['unreadable']:,} unreadable left out" if result["unreadable"] else ""
    print(f"{result['rows']:,} rows of {result['dim']} in {result['out']}{skipped}.")
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


def _pack(options: Pack) -> dict[str, Any]:
    from .data.pack import pack
    from .logbook import print_table

    result = pack(options.source, options.destination, format=options.format, verify=options.verify)
    print_table(["", ""], [[name, _words(value)] for name, value in result.items()])
    return result


def _import_tf(options: ImportTf) -> dict[str, Any]:
    from .interop.weights_file import import_weights

    result = import_weights(
        options.prefix,
        options.model,
        Path(options.out),
        bank=None if options.bank is None else Path(options.bank),
    )
    print(f"{len(result['matched'])} variables went into {options.out} ({options.model}).")
    for what in ("left", "missing"):
        if result[what]:
            named = ", ".join(result[what][:5]) + (" ..." if len(result[what]) > 5 else "")
            print(f"{what}: {len(result[what])} ({named})")
    return result


def _recipes(_: Recipes) -> dict[str, Any]:
    from .config import to_dict
    from .logbook import print_table

    listed = {**RECIPES, **READOUT_RECIPES}
    ours = [[name, r.about, r.cost] for name, r in listed.items() if name not in REFERENCE]
    print_table(["recipe", "for", "cost"], ours)
    theirs = [[name, *_facts(listed[name].config), listed[name].cost] for name in REFERENCE]
    print_table(["of the reference", "network", "epochs", "clusters", "images"], theirs)
    print("localagg pretrain RECIPE --help shows every option with the recipe's values.")
    return {
        name: {"about": r.about, "cost": r.cost, "config": to_dict(r.config)}
        for name, r in listed.items()
    }


def _facts(config: PretrainConfig | TransferConfig) -> list[str]:
    """Network, epochs and clusters of a recipe of the reference."""
    if isinstance(config, TransferConfig):
        return ["RUN's", str(config.epochs), ""]
    if config.ir_epochs == config.epochs:
        return [str(config.encoder.model), f"{config.epochs} IR", ""]
    clusters = known(config.objective.clusters)
    shown = f"{len(clusters)} x {clusters[0]:,}"
    return [str(config.encoder.model), f"{config.epochs}, {config.ir_epochs} IR", shown]


COMMANDS: dict[str, tuple[type, Callable[..., dict[str, Any]]]] = {
    "demo": (Demo, _demo),
    "pretrain": (Pretrain, _pretrain),
    "knn": (Knn, _knn),
    "transfer": (Transfer, _transfer),
    "embed": (Embed, _embed),
    "inspect": (Inspect, _inspect),
    "pack": (Pack, _pack),
    "import-tf": (ImportTf, _import_tf),
    "recipes": (Recipes, _recipes),
}
