"""``localagg duplicates``."""

from dataclasses import dataclass
from typing import Any

from ...errors import counted
from ..parse import positional
from .pictures import check_page, write_pictures

_SHOWN = 10  # groups in the printed table


@dataclass(frozen=True)
class Duplicates:
    """Find near-duplicates (resaved, cropped, flipped, ...) and the files to keep."""

    source: str = positional("RUN|FILE.parquet")
    """Run folder, or table that embed wrote. The images must still be in place."""
    above: float | None = None
    """Least agreement of the pixels of two near-duplicates, 0-1. Default: between the agreement
    of different images and that of altered views of one image."""
    out: str | None = None
    """Write a row an image of a group to this .csv, .parquet or .json file."""
    html: str | None = None
    """Write a page with the groups side by side to this .html file."""


def run(options: Duplicates) -> dict[str, Any]:
    """Print the groups, the image to keep first."""
    from ...embeddings.duplicates import find_duplicates
    from ...embeddings.open_table import open_table
    from ...io.console import print_table
    from ...io.result_file import check_result_file

    check_result_file(options.out)
    check_page(options.html)
    table = open_table(options.source, workers=2)
    result = find_duplicates(table, above=options.above, out=options.out, workers=2)
    groups = result["groups"]
    rows = [
        [
            each["path"],
            "keep" if each["keep"] else "",
            f"{each['agreement']:.3f}",
            f"{each['width']} x {each['height']}",
            f"{each['sharpness']:.2f}",
        ]
        for group in groups[:_SHOWN]
        for each in group
    ]
    if rows:
        print_table(["group", "", "agreement", "pixels", "sharpness"], rows)
    if len(groups) > _SHOWN:
        print(f"{counted(len(groups) - _SHOWN, 'more group')}; --out or --json FILE writes all.")
    summary = (
        f"{counted(len(groups), 'group')} of near-duplicates among {result['images']:,} images;"
        f" redundant: {result['redundant']:,}."
    )
    rule = f"Near-duplicates agree by at least {result['above']:.3f}."
    print(summary)
    print(rule)
    if options.html is not None:
        pictures = [
            (f"Group {number}: {len(group)} images", [(each, _lines(each)) for each in group])
            for number, group in enumerate(groups)
        ]
        write_pictures(
            options.html,
            table,
            f"Near-duplicates of {options.source}",
            pictures,
            f"{summary} {rule}",
        )
    return result


def _lines(image: dict[str, Any]) -> list[str]:
    kept = "keep" if image["keep"] else f"agreement {image['agreement']:.3f}"
    return [kept, f"{image['width']} x {image['height']}, {image['bytes'] / 1000:,.0f} kB"]
