"""``localagg pretrain``."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..config import (
    PretrainConfig,
    check_effects,
    flag,
    from_dict,
    option_names,
    option_value,
    override,
)
from ..errors import Interrupted, UserError, printable
from ..recipes.builtin import RECIPES, recipe
from ..recipes.from_reference_json import ConvertedConfig, convert_pretrain_json
from .parse import check_unset, internal, positional


@dataclass(frozen=True)
class Pretrain:
    """Learn an embedding of images without labels: IR first, then LA."""

    recipe: str | None = positional("RECIPE", default=None)
    """Named configuration, such as folder or res18_LA; localagg recipes lists them."""
    options: PretrainConfig = field(default_factory=PretrainConfig)
    data: str | None = None
    """Data URI: folder of images, Parquet, TFRecords, listing, saved dataset, or digits."""
    split: str | None = None
    """Stored splits to read as train, separated by commas: train,unlabeled. Default: train."""
    pages: Literal["first", "all"] = "first"
    """Multi-page TIFF files and animations. all: each page is an image."""
    image_column: str | None = None
    """Column of images of a table. Default: by its type, name and first bytes."""
    out: str | None = None
    """Run folder to create. Default: runs/RECIPE."""
    start: str | None = None
    """Finished run to continue, on the same images or on others: known images keep their bank rows.
    After LA it keeps its options, and continues for a fifth of its epochs by default. Or a
    checkpoint imported by import-tf --bank, which continues from its step on the same images."""
    resume: str | None = None
    """Run folder to continue. It keeps its recipe and its options; --epochs prolongs it."""
    config: str | None = None
    """Configuration of the reference program, FILE.json:NAME. It overrides the recipe."""
    dry_run: bool = False
    """Print the configuration, the steps and the expected memory, without training."""
    logger: Literal["tensorboard", "csv", "wandb", "mlflow"] = "tensorboard"
    """Also send metrics there; csv: RUN/csv. TensorBoard's file is always written."""
    processes: int = 1
    """Number of processes on this machine, each on its own GPU, or all on the CPU. Leave it at 1
    under torchrun or srun."""
    rank_timeout: float = 600.0
    """Seconds without a heartbeat of a process after which all processes end."""
    typed: frozenset[str] = internal(frozenset())
    words: tuple[str, ...] = internal(())

    @staticmethod
    def base(values: dict[str, Any]) -> PretrainConfig:
        """Return the recipe's configuration, overridden by ``--config``."""
        name, reference = values.get("recipe"), values.get("config")
        config = recipe(name).config if name else None
        if reference is None:
            return config or PretrainConfig()
        return convert_reference(convert_pretrain_json, reference, config)

    @property
    def name(self) -> str | None:
        """The recipe, or NAME in ``--config FILE.json:NAME``."""
        if self.recipe is not None or self.config is None:
            return self.recipe
        return self.config.partition(":")[2] or Path(self.config).stem


def convert_reference(convert: Callable[..., ConvertedConfig], file: str, config: Any) -> Any:
    """Override a configuration by ``--config FILE.json:NAME``; report keys without effect."""
    converted, notes = convert(file, config)
    for note in notes:
        print(printable(f"--config {file}: {note}"), file=sys.stderr)
    return converted


def run(options: Pretrain) -> dict[str, Any] | None:
    """Start or resume a run, in this process or several, and print its result."""
    if options.processes < 1:
        raise UserError(
            "option-invalid", f"--processes is {options.processes}; it must be at least 1."
        )
    if options.resume is not None:
        fixed = ("recipe", "start", "config", "dry_run", "split", "pages", "image_column")
        check_unset(options, fixed, f"with --resume {options.resume}")
    if options.dry_run:
        check_unset(options, ("processes", "rank_timeout", "logger"), "with --dry-run")
    if options.processes > 1:
        from ..distributed.launcher import launch

        folder = options.resume or options.out or f"runs/{options.name}"
        launch([*options.words, "--processes", "1"], options.processes, folder)
        return None
    result = _start(options) if options.resume is None else _resume(options)
    from ..io.console import console

    if not console.quiet and not options.dry_run:  # only the first rank prints
        _print(result)
        _write_page(result["run"])
        _print_next(result["run"])
    return None if console.quiet else result


def _resume(options: Pretrain) -> dict[str, Any]:
    from ..training.runs import resume

    folder = check_resume(options.resume, options.out)
    return resume(
        folder,
        options.options,
        data=options.data,
        typed=options.typed,
        logger=options.logger,
        rank_timeout=options.rank_timeout,
    )


def check_resume(folder: str | None, out: str | None) -> str:
    """Return the folder to resume, unless ``--out`` names another."""
    if folder is None or out not in (None, folder):
        raise UserError("option-conflict", f"--resume {folder} writes to it; omit --out {out}.")
    return folder


def _start(options: Pretrain) -> dict[str, Any]:
    if options.name is None:
        raise UserError(
            "option-missing",
            f"Name a recipe: localagg pretrain {'|'.join(RECIPES)} --data IMAGES --out RUN.",
        )
    if options.data is None:
        raise UserError("option-missing", "Name the images to learn from with --data.")
    from ..data.sources.open import add_options

    data = add_options(
        options.data, split=options.split, pages=options.pages, image_column=options.image_column
    )
    config = options.options
    check_effects(config, options.typed)
    if options.typed & {"neighbors", "clusters"}:  # explicit values are not scaled
        config = override(config, sized_for=None)
    if options.name == "folder" and options.start is None and not config.adapt.feature_views:
        _suggest_adapt(config)
    if options.dry_run:
        from ..training.forecast import forecast

        if options.out is not None:
            from ..checkpoint import check_new

            check_new(Path(options.out))
        found = forecast(config, data, options.typed, start=options.start)
        _print_forecast(found)
        return found
    from ..training.runs import pretrain

    return pretrain(
        config,
        data,
        options.out or f"runs/{options.name}",
        start=options.start,
        typed=options.typed,
        logger=options.logger,
        rank_timeout=options.rank_timeout,
    )


def _suggest_adapt(config: PretrainConfig) -> None:
    """Name the recipe for pretrained networks where one is given, or can be had from timm."""
    from ..io.console import notify
    from ..models import offers_weights

    model, weights = config.encoder.model, config.encoder.weights
    if weights is None and find_spec("timm") is None:
        return
    if weights is None and (model is None or not offers_weights(model)):
        model = "timm:NAME"
    words = ["--model", model] if model else []
    words += ["--weights", weights or "pretrained"]
    notify(
        "A head on a pretrained network's frozen features is usually better, and takes minutes:"
        f" localagg pretrain adapt {shlex.join(words)}."
    )


def _print(result: dict[str, Any]) -> None:
    from ..io.console import print_table

    shares = result["shares"].items()
    print_table(["part", "share of the time"], [[part, f"{share:.1%}"] for part, share in shares])
    if hint := result.get("hint"):
        print(hint)
    if floors := result.get("floors"):
        from ..evaluation.floors import floor_rows, floor_title

        print(floor_title(floors, result["images"]))
        print_table(*floor_rows(floors["values"]))
        print(floors["verdict"])
    measured = ", ".join(f"{name} {value:.1%}" for name, value in result["final"].items())
    print(f"{result['seconds']:.0f} s{measured and f'. At the end: {measured}'}.")
    print(f"The run is in {result['run']}.", flush=True)


def _print_next(run: str) -> None:
    """Say what can be done with a run; last, as the commands need its page's embeddings."""
    name = printable(shlex.quote(run))
    print(f"Next: localagg clusters {name} --html clusters.html")
    print(f"      localagg search {name} IMAGE")


def _write_page(run: str) -> None:
    """Write RUN/report.html; a failure prints how to write it later, as the run is complete."""
    from ..checkpoint import latest
    from ..io.console import notify
    from ..report.run_report import REPORT, write_report

    page = Path(run) / REPORT
    if (
        page.exists()
        and page.stat().st_mtime > (latest(Path(run)) / "progress.json").stat().st_mtime
    ):
        return  # the run had already finished
    later = f"write it with localagg report {shlex.quote(run)}"
    try:
        print(f"Open {write_report([run])['out']}")
    except UserError as error:
        notify(f"The page of the run is missing: {error} When that is fixed, {later}")
    except KeyboardInterrupt:
        raise Interrupted(f"The run is complete, without its page; {later}") from None


def _print_forecast(result: dict[str, Any]) -> None:
    from ..io.console import notify, print_table

    for note in result["notes"]:
        notify(note)
    resolved = from_dict(PretrainConfig, result["config"])
    values = [[flag(name), shown(option_value(resolved, name))] for name in option_names(resolved)]
    print_table(["option", "value"], values)
    steps = [[name, shown(value)] for name, value in result["steps"].items()]
    print_table(["steps", ""], steps)
    memory = [[part, f"{size / 2**20:,.1f} MiB"] for part, size in result["memory"].items()]
    checkpoint = f"{result['checkpoint_bytes'] / 2**20:,.1f} MiB"
    print_table(["memory", ""], [*memory, ["a checkpoint on disk", checkpoint]])


def shown(value: Any) -> str:
    """Return the value of an option as a table shows it."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(shown, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
