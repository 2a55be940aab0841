"""What each command calls and prints. Heavy imports wait until a command runs.

An action returns what ``--json`` writes.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import PretrainConfig, TransferConfig, flag, override, require_resolved
from ..data.sources.image_files import walk_images
from ..errors import UserError, printable
from ..recipes.builtin import READOUT_RECIPES, RECIPES, REFERENCE, recipe
from .commands import (
    Demo,
    Embed,
    ImportTf,
    Inspect,
    Knn,
    Pack,
    Pretrain,
    Recipes,
    Results,
    Search,
    Transfer,
)


def _demo(options: Demo) -> dict[str, Any]:
    from ..io.console import print_table
    from ..report.digits_demo import demo

    result = demo(Path(options.out), seed=options.seed)
    columns = {"knn1": "1-NN", "nmi": "NMI", "cluster_accuracy": "cluster accuracy"}
    rows = [[row["name"], *(f"{row[column]:.3f}" for column in columns)] for row in result["rows"]]
    print_table(["", *columns.values()], rows)
    print(f"{result['seconds']['total']:.0f} s. Open {Path(options.out) / 'report.html'}")
    return result


def _pretrain(options: Pretrain, named: str | None, typed: set[str]) -> dict[str, Any] | None:
    from ..io.console import console, print_table
    from ..training.forecast import show_forecast
    from ..training.loop import pretrain, resume

    if options.resume is not None:
        if options.out not in (None, options.resume):
            raise UserError("TODO", f"--resume {options.resume} writes there; leave out --out.")
        result = resume(
            options.resume,
            options.options,
            data=options.data,
            typed=typed,
            rank_timeout=options.rank_timeout,
        )
    else:
        if named is None:
            raise UserError(
                "TODO",
                f"Name a recipe: localagg pretrain {'|'.join(RECIPES)} --data IMAGES --out RUN.",
            )
        if options.data is None:
            raise UserError("TODO", "Name the images to learn from with --data.")
        config = options.options
        if typed & {"neighbors", "clusters"}:  # set by hand: taken as they are
            config = override(config, sized_for=None)
        if options.dry_run:
            return show_forecast(config, options.data)
        result = pretrain(
            config,
            options.data,
            options.out or f"runs/{named}",
            start=options.start,
            rank_timeout=options.rank_timeout,
        )
    if console.quiet:  # a rank that is not the first
        return None
    shares = result["shares"].items()
    print_table(["part of the time", "share"], [[part, f"{share:.1%}"] for part, share in shares])
    if hint := result.get("hint"):
        print(hint)
    measured = ", ".join(f"{name} {value:.1%}" for name, value in result["final"].items())
    print(f"{result['seconds']:.0f} s. {measured or 'Nothing was measured.'}")
    print(f"The run is in {result['run']}")
    return result


def _transfer(options: Transfer, run: str | None, typed: set[str]) -> dict[str, Any]:
    from ..evaluation.record_results import is_recorded, record_readouts
    from ..io.console import print_table

    if options.resume is not None:
        result = _resume_transfer(options, run, typed)
    else:
        folder, data = _weights(run, options.data)
        if options.few or options.per_class:
            return _few_labels(options, folder, data, typed)
        result = _read_out(options, folder, data, typed)
    columns = list(next(iter(result["layers"].values())))
    rows = [
        [name, *(f"{found[column]:.1%}" for column in columns)]
        for name, found in result["layers"].items()
    ]
    print_table(["layer", *columns], rows)
    print(f"{result['seconds']:.0f} s. {result['protocol']}")
    where = run or result["run"]
    # Ended read-outs may have been killed before they were noted. (None: an encoder from Python.)
    if where is not None and not (options.resume and is_recorded(Path(where), result)):
        record_readouts(Path(where), result)
    return result


def _read_out(options: Transfer, run: Path, data: str, typed: set[str]) -> dict[str, Any]:
    config = options.options
    if options.quick:
        from ..evaluation.quick_readout import OPTIONS, quick_readout

        if unheeded := sorted(typed - OPTIONS):
            raise UserError(
                "TODO", f"{flag(unheeded[0])} means nothing with --quick; leave it out."
            )
        ten_crop = config.ten_crop and "ten_crop" in typed
        return quick_readout(config, run, data, options.out, ten_crop=ten_crop)
    from ..evaluation.linear import transfer

    beside = run if run.is_dir() else run.with_suffix("")
    named = f"transfer-{options.recipe}" if options.recipe else "transfer"
    return transfer(config, run, data, options.out or str(beside / named))


def _resume_transfer(options: Transfer, run: str | None, typed: set[str]) -> dict[str, Any]:
    from ..evaluation.linear import resume_transfer

    config = options.options
    if options.out not in (None, options.resume):
        raise UserError("TODO", f"--resume {options.resume} writes there; leave out --out.")
    if fixed := sorted(typed - {"workers", "device"}):
        raise UserError(
            "TODO",
            f"'{options.resume}' keeps its options; leave out {flag(fixed[0])}, or start"
            " again with another --out.",
        )
    return resume_transfer(
        options.resume or "",
        weights=run,
        data=options.data,
        workers=config.workers if "workers" in typed else None,
        device=config.device if "device" in typed else None,
    )


def _weights(run: str | None, data: str | None) -> tuple[Path, str]:
    """The run folder or weights file, and its images unless others are named."""
    from ..checkpoint import read_run

    if run is None:
        raise UserError("TODO", "Name a run folder or a weights file: localagg transfer RUN.")
    folder = Path(run)
    if data is None:
        if folder.is_file():
            raise UserError("TODO", f"'{run}' is a weights file; name the images with --data.")
        data = str(read_run(folder)[1]["data"])
    return folder, data


def _few_labels(options: Transfer, run: Path, data: str, typed: set[str]) -> dict[str, Any]:
    from ..evaluation.low_shot import NOT_TUNING, OPTIONS, low_shot_accuracy
    from ..evaluation.record_results import record_low_shot, subset_name
    from ..io.console import print_table

    config, asked = options.options, "--few" if options.few else "--per-class"
    if options.quick:
        raise UserError("TODO", f"{asked} fits quick heads as it is; leave out --quick.")
    if unheeded := sorted(typed & NOT_TUNING if config.finetune else typed - OPTIONS):
        tuning = "" if unheeded[0] in NOT_TUNING else " without --finetune"
        raise UserError(
            "TODO", f"{flag(unheeded[0])} means nothing with {asked}{tuning}; leave it out."
        )
    result = low_shot_accuracy(
        config,
        run,
        data,
        options.out,
        few=options.few,
        per_class=options.per_class,
        seeds=options.seeds,
        finetune=config.finetune,
        **({"finetune_epochs": config.epochs} if "epochs" in typed else {}),
    )
    rows = []
    for subset in result["subsets"]:
        for way in ("linear", "finetuned"):
            for layer, found in subset.get(way, {}).items():
                shown = [_interval(found[name]) for name in ("top1", "top5")]
                rows.append([subset_name(subset), f"{subset['images']:,}", way, layer, *shown])
    print_table(["labels", "images", "heads", "layer", "top1", "top5"], rows)
    print(f"{result['seconds']:.0f} s. Mean of {len(result['seeds'])} draws and 95 % interval.")
    record_low_shot(run, result)
    return result


def _interval(found: dict[str, Any]) -> str:
    half = found["interval"]
    return f"{found['mean']:.1%}" + ("" if half is None else f" ± {100 * half:.1f}")


def _embed(options: Embed) -> dict[str, Any]:
    from ..embeddings.embed import write_embeddings

    result = write_embeddings(
        Path(options.run),
        options.data,
        Path(options.out),
        split=options.split,
        layer=options.layer,
        dtype=options.dtype,
        workers=options.workers,
    )
    skipped = f", {result['unreadable']:,} unreadable left out" if result["unreadable"] else ""
    print(f"{result['rows']:,} rows of {result['dim']} in {result['out']}{skipped}.")
    return result


def _knn(options: Knn) -> dict[str, Any]:
    from ..evaluation.measure_run import measure_run
    from ..evaluation.record_results import record_knn
    from ..io.console import print_table

    run = Path(options.run)
    result = measure_run(
        run,
        data=options.data,
        against=options.against,
        k=options.k,
        workers=options.workers,
        retrieval=options.retrieval,
        clusters=options.clusters,
    )
    print_table(["", "accuracy"], [[k, f"{value:.1%}"] for k, value in result["accuracy"].items()])
    if "retrieval" in result:
        scores = result["retrieval"].items()
        print_table(["", "retrieval"], [[k, f"{v:.1%}"] for k, v in scores if isinstance(v, float)])
    if "clusters" in result:
        parts = ("mean", "std", "min", "max")
        spreads = {name: result["clusters"][name] for name in ("nmi", "ari", "accuracy")}
        rows = [[name, *(f"{v[part]:.3f}" for part in parts)] for name, v in spreads.items()]
        print_table([f"{result['clusters']['clusters']} clusters", *parts], rows)
    print(f"{result['asked']:,} images asked {result['known']:,} of {result['against']}.")
    record_knn(run, result)
    return result


def _search(options: Search) -> dict[str, Any]:
    from ..embeddings.search import search
    from ..io.console import print_table

    if not options.images:
        raise UserError("TODO", "Name images to search for: localagg search FILE.parquet IMAGE...")
    result = search(options.table, options.images, options.run, options.k)
    for query in result["queries"]:
        rows = [
            [near["path"], str(near.get("label", "")), f"{near['similarity']:.3f}"]
            for near in query["neighbors"]
        ]
        print_table([str(query["image"]), "label", "similarity"], rows)
    print(f"{result['rows']:,} rows, {result['engine']}.")
    return result


def _results(options: Results) -> dict[str, Any]:
    from ..evaluation.results_table import compare, tables
    from ..io.console import notify, print_table

    if not options.runs:
        raise UserError("TODO", "Name runs to compare: localagg results RUN...")
    result = compare([Path(run) for run in options.runs])
    for title, columns, rows in tables(result):
        print(printable(title))
        print_table(columns, rows)
    for note in result["notes"]:
        notify(note)
    return result


def _inspect(options: Inspect) -> dict[str, Any]:
    from ..io.console import notify, print_table, show_progress

    base = None if options.recipe == "none" else recipe(options.recipe).config
    notify(f"Looking at {options.data}.")
    with show_progress(_counted(options.data)):  # torch takes seconds to load
        from ..data.inspect.inspect_dataset import inspect, summary_rows
        from ..io.machine import cores
        from ..report.contact_sheet import check_sheet
        from ..training.epoch_time import tell_epoch_time
    if options.augmented is not None:
        check_sheet(Path(options.sheet), options.augmented)
    workers = min(cores(), 16) if options.workers is None else options.workers
    result = inspect(options.data, workers=workers, decode_all=options.decode)
    for split, facts in result["splits"].items():
        print_table([split, ""], summary_rows(facts))
    result["epoch"] = None
    if base is not None and "train" not in result["splits"]:
        notify(f"No epoch of {options.recipe} is timed: '{options.data}' has no split 'train'.")
    elif base is not None:
        batch = base.batch_size if options.batch_size is None else options.batch_size
        base = override(base, workers=workers, batch_size=batch)
        facts = result["splits"]["train"]
        result["epoch"] = tell_epoch_time(options.recipe, base, options.data, facts)
    if options.augmented is not None:
        result["sheet"] = _sheet(options, base or PretrainConfig())
    return result


def _counted(data: str) -> str:
    """How many files of images lie in a folder, or how many were found in a second, shown as they
    are counted: all that can be told while torch loads."""
    from ..io.console import show_progress

    folder, start, count = Path(data).expanduser(), time.monotonic(), 0
    if not folder.is_dir():
        return "starting"
    with show_progress("counting") as show:
        for count, _ in enumerate(walk_images(folder), 1):
            if count % 1000 == 0:
                show(count, 0)
                if time.monotonic() - start > 1:
                    return f"starting: more than {count:,} files of images"
    return f"starting: {count:,} files of images" if count else "starting"


def _sheet(options: Inspect, config: PretrainConfig) -> dict[str, Any]:
    from ..data import open_images
    from ..report.contact_sheet import contact_sheet

    count = options.augmented or 0
    found = contact_sheet(open_images(options.data), config, count, Path(options.sheet))
    print(f"{found['file']}: {', '.join(found['columns'])} of {len(found['images']):,} images.")
    return found


def _pack(options: Pack) -> dict[str, Any]:
    from ..data.pack.pack_dataset import pack, pack_rows
    from ..io.console import print_table

    if options.keep and options.size is not None:
        raise UserError(
            "TODO", "--keep keeps all bytes, --size makes images smaller; leave one of them out."
        )
    result = pack(
        options.source,
        options.destination,
        format=options.format,
        size=options.size,
        quality=options.quality,
        workers=options.workers,
        verify=options.verify,
    )
    print_table(["", ""], pack_rows(result))
    return result


def _import_tf(options: ImportTf) -> dict[str, Any]:
    from ..interop.import_weights import import_weights

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
            print(f"{what}: {len(result[what])} ({printable(named)})")
    return result


def _recipes(_: Recipes) -> dict[str, Any]:
    from ..config import to_dict
    from ..io.console import print_table

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
    clusters = require_resolved(config.objective.clusters)
    shown = f"{len(clusters)} x {clusters[0]:,}"
    return [str(config.encoder.model), f"{config.epochs}, {config.ir_epochs} IR", shown]


COMMANDS: dict[str, tuple[type, Callable[..., dict[str, Any] | None]]] = {
    "demo": (Demo, _demo),
    "pretrain": (Pretrain, _pretrain),
    "knn": (Knn, _knn),
    "transfer": (Transfer, _transfer),
    "embed": (Embed, _embed),
    "search": (Search, _search),
    "results": (Results, _results),
    "inspect": (Inspect, _inspect),
    "pack": (Pack, _pack),
    "import-tf": (ImportTf, _import_tf),
    "recipes": (Recipes, _recipes),
}
