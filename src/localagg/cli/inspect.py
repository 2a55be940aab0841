"""``localagg inspect``."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..config import PretrainConfig, override
from ..data.sources.image_files import walk_images
from ..recipes.builtin import recipe
from .parse import check_unset, positional


@dataclass(frozen=True)
class Inspect:
    """Inspect a data set before training.

    Reports counts, classes, sizes and formats; duplicate, nearly empty, unusual and unreadable
    images; and the estimated time of an epoch of a recipe on this machine.
    """

    data: str = positional("URI")
    """Data URI."""
    split: str | None = None
    """Stored splits to read as train, separated by commas: train,unlabeled. Default: train."""
    pages: Literal["first", "all"] = "first"
    """Multi-page TIFF files and animations. all: each page is an image."""
    image_column: str | None = None
    """Column of images of a table. Default: by its type, name and first bytes."""
    decode: bool = False
    """Decode all images. Default: check headers and ends, and decode 512 and doubtful images."""
    recipe: str = "folder"
    """Recipe whose epoch is timed; none skips the estimate."""
    batch_size: int | None = None
    """Batch size of the timed steps, in images. Default: the batch size of the recipe."""
    augmented: int | None = None
    """Also draw the training views of this number of images, augmented by the recipe."""
    sheet: str = "views.png"
    """PNG file for the views of --augmented."""
    workers: int | None = None
    """Number of reading processes. Default: one a core, at most 16."""


def run(options: Inspect) -> dict[str, Any]:
    """Inspect the data, print tables, and time an epoch."""
    from ..io.console import notify, print_table, show_progress

    config = None if options.recipe == "none" else recipe(options.recipe).config
    if options.augmented is None:
        check_unset(options, ("sheet",), "without --augmented")
    if config is None:
        check_unset(options, ("batch_size",), "with --recipe none")
    notify(f"Inspecting {options.data}.")
    with show_progress(count_files(options.data)):  # importing torch takes seconds
        from ..data.inspect.inspect_dataset import inspect, summary_rows
        from ..data.sources.open import add_options, check_outside
        from ..io.machine import cores
        from ..report.contact_sheet import check_sheet
    data = add_options(
        options.data, split=options.split, pages=options.pages, image_column=options.image_column
    )
    options = replace(options, data=data)
    if options.augmented is not None:
        check_sheet(Path(options.sheet), options.augmented)
        check_outside(data, options.sheet, "--sheet")
    workers = min(cores(), 16) if options.workers is None else options.workers
    result = inspect(options.data, workers=workers, decode_all=options.decode)
    for split, facts in result["splits"].items():
        print_table([split, ""], summary_rows(facts))
    result["epoch"] = None
    if config is not None:
        batch = config.batch_size if options.batch_size is None else options.batch_size
        timed = override(config, workers=workers, batch_size=batch)
        result["epoch"] = _time_epoch(options, timed, result["splits"].get("train"))
    if options.augmented is not None:
        result["sheet"] = _draw_sheet(options, options.augmented, config or PretrainConfig())
    return result


def count_files(data: str) -> str:
    """Count image files for at most a second; return the text to show while torch is imported."""
    from ..io.console import show_progress

    folder, start, count = Path(data).expanduser(), time.monotonic(), 0
    if not folder.is_dir():
        return "starting"
    with show_progress("counting") as show:
        for count, _ in enumerate(walk_images(folder), 1):
            if count % 1000 == 0:
                show(count, 0)
                if time.monotonic() - start > 1:
                    return f"starting: more than {count:,} image files"
    return f"starting: {count:,} image files" if count else "starting"


def _time_epoch(
    options: Inspect, config: PretrainConfig, facts: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Print the estimated time of an epoch; report why there is none."""
    from ..data import open_images
    from ..errors import UserError
    from ..io.console import notify, print_table, show_progress
    from ..training.budget import fit_budget
    from ..training.epoch_time import epoch_time, epoch_time_rows

    name = options.recipe
    if facts is None:
        notify(f"The epoch of {name} is not timed: '{options.data}' has no split 'train'.")
        return None
    try:
        config = fit_budget(config, open_images(options.data))  # the network that pretrain takes
        with show_progress(f"timing {name}"):
            found = epoch_time(config, options.data, facts)
    except UserError as error:
        notify(f"The epoch of {name} is not timed: {error}")
        return None
    print_table([f"an epoch of {name}", ""], epoch_time_rows(found))
    return found


def _draw_sheet(options: Inspect, count: int, config: PretrainConfig) -> dict[str, Any]:
    from ..data import open_images
    from ..report.contact_sheet import contact_sheet

    found = contact_sheet(open_images(options.data), config, count, Path(options.sheet))
    print(f"{found['file']}: {', '.join(found['columns'])} of {len(found['images']):,} images.")
    return found
