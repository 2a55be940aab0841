"""``localagg transfer``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import (
    TransferConfig,
    check_effects,
    flag,
    from_dict,
    option_names,
    option_value,
)
from ..errors import UserError
from ..recipes.builtin import readout_recipe
from ..recipes.from_reference_json import convert_readout_json
from .parse import check_unset, internal, positional
from .pretrain import check_resume, convert_reference


@dataclass(frozen=True)
class Transfer:
    """Accuracy by linear read-outs: one head a layer, trained with labels on a frozen encoder."""

    run: str | None = positional("RUN", default=None)
    """Run folder or weights file (.safetensors)."""
    options: TransferConfig = field(default_factory=TransferConfig)
    data: str | None = None
    """Data URI with labels and a held-out split. Default: the data of the run."""
    out: str | None = None
    """Folder to create. Default: transfer/ inside the run, or beside the weights file."""
    resume: str | None = None
    """Folder of linear read-outs to continue."""
    quick: bool = False
    """Fit logistic regressions on the center crop instead of training on random views."""
    heads: str | None = None
    """Measure these trained heads, without training: heads.safetensors of a transfer, or a file of
    import-tf --heads."""
    few: tuple[float, ...] = ()
    """Learn from these shares of the labels, such as 0.01 0.1, over several seeds."""
    per_class: tuple[int, ...] = ()
    """Learn from this number of images of each class, over several seeds."""
    seeds: int = 5
    """Number of random subsets for --few and --per-class."""
    recipe: str | None = None
    """Read-out recipe of the reference program, such as trans_res18_LA or plc_trans_res18_LA."""
    config: str | None = None
    """Configuration of the reference program, FILE.json:NAME. It overrides the recipe."""
    dry_run: bool = False
    """Print the configuration, the steps and the size of the heads, without training."""
    processes: int = 1
    """Number of processes on this machine, each on its own GPU, or all on the CPU."""
    typed: frozenset[str] = internal(frozenset())
    words: tuple[str, ...] = internal(())

    @staticmethod
    def base(values: dict[str, Any]) -> TransferConfig:
        """Return the recipe's configuration, overridden by ``--config``."""
        name, reference = values.get("recipe"), values.get("config")
        config = readout_recipe(name).config if name else None
        if reference is None:
            return config or TransferConfig()
        return convert_reference(convert_readout_json, reference, config)


def run(options: Transfer) -> dict[str, Any] | None:
    """Train or fit read-outs, print their accuracies and add them to the run's results.json."""
    from ..evaluation.results.protocols import describe_protocol
    from ..evaluation.results.record_results import is_recorded, record_readouts
    from ..evaluation.results.results_file import check_appendable
    from ..io.console import console, print_table

    if options.heads is not None:
        unused = ("quick", "few", "per_class", "dry_run", "processes")
        check_unset(options, unused, f"with --heads {options.heads}")
    for name in ("quick", "few", "per_class"):
        if getattr(options, name):
            check_unset(options, ("dry_run", "processes"), f"with {flag(name)}")
    if options.dry_run:
        check_unset(options, ("processes",), "with --dry-run")
    if options.processes < 1:
        raise UserError(
            "option-invalid", f"--processes is {options.processes}; it must be at least 1."
        )
    if options.processes > 1:
        return _launch(options)
    if not (options.few or options.per_class):
        check_unset(options, ("seeds",), "without --few or --per-class")
    if options.run is not None and not options.dry_run:
        check_appendable(Path(options.run))
    if options.resume is not None:
        fixed = ("quick", "heads", "few", "per_class", "recipe", "config", "dry_run")
        check_unset(options, fixed, f"with --resume {options.resume}")
        result = _resume(options)
    else:
        folder, data = _weights_and_data(options)
        if options.dry_run:
            return _forecast(options, folder, data)
        if options.few or options.per_class:
            return _few_labels(options, folder, data)
        result = _read_out(options, folder, data)
    if console.quiet:  # another rank than the first
        return None
    columns = list(next(iter(result["layers"].values())))
    rows = [
        [name, *(f"{found[column]:.1%}" for column in columns)]
        for name, found in result["layers"].items()
    ]
    print_table(["layer", *columns], rows)
    print(f"{result['seconds']:.0f} s. {describe_protocol(result['protocol'])}")
    folder = options.run or result["run"]  # None for an encoder from Python
    # A resumed read-out may have been killed before its results were added.
    if folder is not None and not (options.resume and is_recorded(Path(folder), result)):
        record_readouts(Path(folder), result)
    return result


def _launch(options: Transfer) -> None:
    from ..distributed.launcher import launch

    folder = options.resume or options.out or "OUT"
    launch([*options.words, "--processes", "1"], options.processes, folder, "transfer")


def _forecast(options: Transfer, weights: Path, data: str) -> dict[str, Any]:
    from ..checkpoint import check_new
    from ..evaluation.readouts.readout_inputs import forecast_transfer
    from ..io.console import print_table
    from .pretrain import shown

    check_effects(options.options, options.typed)
    if options.out is not None:
        check_new(Path(options.out))
    found = forecast_transfer(options.options, weights, data)
    config = from_dict(TransferConfig, found["config"])
    values = [[flag(name), shown(option_value(config, name))] for name in option_names(config)]
    print_table(["option", "value"], values)
    print_table(["steps", ""], [[name, shown(value)] for name, value in found["steps"].items()])
    sizes = [[layer, f"{size:,}"] for layer, size in found["heads"].items()]
    print_table(["layer", "parameters of its head"], sizes)
    counts = (found["images"], found["held_out"], found["classes"])
    print("{:,} training images, {:,} held-out images, {:,} classes.".format(*counts))
    return found


def _read_out(options: Transfer, weights: Path, data: str) -> dict[str, Any]:
    config = options.options
    check_effects(config, options.typed)
    if options.quick:
        from ..evaluation.readouts.quick_readout import OPTIONS, quick_readout

        _check_used(options.typed - OPTIONS, "with --quick")
        ten_crop = config.ten_crop and "ten_crop" in options.typed
        return quick_readout(config, weights, data, options.out, ten_crop=ten_crop)
    from ..evaluation.readouts.linear import transfer

    if options.heads is not None:
        from ..evaluation.readouts.quick_readout import OPTIONS

        _check_used(options.typed - OPTIONS, "with --heads")
    parent = weights if weights.is_dir() else weights.with_suffix("")
    name = f"transfer-{options.recipe}" if options.recipe else "transfer"
    name = "transfer-heads" if options.heads else name
    return transfer(config, weights, data, options.out or str(parent / name), options.heads)


def _resume(options: Transfer) -> dict[str, Any]:
    from ..evaluation.readouts.linear import resume_transfer

    folder, config = check_resume(options.resume, options.out), options.options
    if fixed := sorted(options.typed - {"workers", "device"}):
        raise UserError(
            "option-conflict",
            f"'{folder}' keeps its options; omit {flag(fixed[0])}, or start again with another"
            " --out.",
        )
    return resume_transfer(
        folder,
        weights=options.run,
        data=options.data,
        workers=config.workers if "workers" in options.typed else None,
        device=config.device if "device" in options.typed else None,
    )


def _weights_and_data(options: Transfer) -> tuple[Path, str]:
    from ..checkpoint import read_run

    if options.run is None:
        raise UserError(
            "option-missing", "Name a run folder or a weights file: localagg transfer RUN."
        )
    weights = Path(options.run)
    if options.data is not None:
        return weights, options.data
    if weights.is_file():
        raise UserError(
            "option-missing", f"'{weights}' is a weights file; name the images with --data."
        )
    return weights, str(read_run(weights)[1]["data"])


def _few_labels(options: Transfer, weights: Path, data: str) -> dict[str, Any]:
    from ..evaluation.readouts.low_shot import NOT_TUNING, OPTIONS, low_shot_accuracy
    from ..evaluation.results.record_results import record_low_shot, subset_name
    from ..io.console import print_table

    config, typed = options.options, options.typed
    given = "--few" if options.few else "--per-class"
    if options.quick:
        raise UserError("option-conflict", f"{given} already fits quick heads; omit --quick.")
    _check_used(typed & NOT_TUNING, f"with {given}")
    check_effects(config, typed - {"cache", "cache_gb"})  # linear heads are cached
    if not config.finetune:
        _check_used(typed - OPTIONS, f"with {given} without --finetune")
    result = low_shot_accuracy(
        config,
        weights,
        data,
        options.out,
        few=options.few,
        per_class=options.per_class,
        seeds=options.seeds,
        finetune=config.finetune,
        finetune_epochs=config.epochs if "epochs" in typed else 10,
    )
    rows = [
        [subset_name(subset), f"{subset['images']:,}", way, layer]
        + [_mean_and_interval(found[name]) for name in ("top1", "top5")]
        for subset in result["subsets"]
        for way in ("linear", "finetuned")
        for layer, found in subset.get(way, {}).items()
    ]
    print_table(["labels", "images", "heads", "layer", "top1", "top5"], rows)
    print(f"{result['seconds']:.0f} s. Mean of {len(result['seeds'])} draws and 95 % interval.")
    record_low_shot(weights, result)
    return result


def _check_used(unused: frozenset[str], why: str) -> None:
    if unused:
        name = flag(min(unused))
        raise UserError("option-conflict", f"{name} has no effect {why}; omit it.")


def _mean_and_interval(found: dict[str, Any]) -> str:
    half = found["interval"]
    return f"{found['mean']:.1%}" + ("" if half is None else f" ± {100 * half:.1f}")
