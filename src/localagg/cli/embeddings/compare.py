"""``localagg compare``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..parse import positional
from .pictures import check_page, write_pictures


@dataclass(frozen=True)
class Compare:
    """Compare two runs or tables of the same images: neighborhoods, changed images, floors."""

    first: str = positional("RUN|FILE.parquet")
    """Run folder, or table that embed wrote."""
    second: str = positional("RUN|FILE.parquet")
    """Another one."""
    k: int = 10
    """Number of neighbors of each image."""
    top: int = 10
    """Number of most changed images to list."""
    out: str | None = None
    """Write a row an image (overlap, change) to this .csv, .parquet or .json file."""
    html: str | None = None
    """Write a page with the most changed images and their neighbors to this .html file."""


def run(options: Compare) -> dict[str, Any]:
    """Print the overlap, the most changed images and the floors."""
    from ...embeddings.compare import compare_tables
    from ...embeddings.open_table import open_table
    from ...io.console import print_table
    from ...io.result_file import check_result_file

    check_result_file(options.out)
    check_page(options.html)
    tables = [open_table(each, workers=2) for each in (options.first, options.second)]
    result = compare_tables(*tables, k=options.k, top=options.top, out=options.out)
    first, second = _floors(Path(options.first)), _floors(Path(options.second))
    result["floors"] = [first, second]
    rows = [[each["path"], f"{each['overlap']:.0%}"] for each in result["changed"]]
    print_table(["most changed image", "common neighbors"], rows)
    summary = (
        f"{result['images']:,} images share {result['overlap']:.0%} of their {result['k']}"
        f" neighbors in the mean (chance: {result['chance']:.1%})."
    )
    print(summary)
    if first and second:
        _print_floors(first, second)
    if options.html is not None:
        pictures = [
            (f"{each['path']}: {each['overlap']:.0%} common neighbors", _pictures(each))
            for each in result["changed"]
        ]
        title = f"{options.first} and {options.second}"
        write_pictures(options.html, tables[0], title, pictures, summary)
    return result


def _floors(run: Path) -> dict[str, dict[str, float]] | None:
    """The floors that a run measured at its end, or None."""
    from ...checkpoint import has_checkpoint, latest, read_progress

    if not has_checkpoint(run):
        return None
    summary = read_progress(latest(run)).get("summary") or {}
    return (summary.get("floors") or {}).get("values")


def _print_floors(first: dict[str, dict[str, float]], second: dict[str, dict[str, float]]) -> None:
    """Print the trained networks of two runs side by side, beside raw pixels."""
    from ...evaluation.floors import RAW_PIXELS, TRAINED, floor_rows
    from ...io.console import print_table

    columns = {RAW_PIXELS: first[RAW_PIXELS], TRAINED: first[TRAINED], "second": second[TRAINED]}
    print_table(["", RAW_PIXELS, "first run", "second run"], floor_rows(columns)[1])


def _pictures(changed: dict[str, Any]) -> list[tuple[dict[str, Any], list[str]]]:
    before = [(each, ["first"]) for each in changed["before"]]
    return [(changed, ["image"]), *before, *((each, ["second"]) for each in changed["after"])]
