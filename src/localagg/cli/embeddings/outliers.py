"""``localagg outliers``."""

from dataclasses import dataclass
from typing import Any

from ..parse import positional
from .pictures import check_page, write_pictures


@dataclass(frozen=True)
class Outliers:
    """List the oddest images, single ones and small groups, without labels."""

    source: str = positional("RUN|FILE.parquet")
    """Run folder, or table that embed wrote."""
    top: int = 20
    """Number of images to list."""
    neighbors: int = 20
    """Distance to this neighbor counts: groups of at most so many odd images are found."""
    out: str | None = None
    """Write a row an image (rank, score, density, isolation) to this .csv, .parquet or .json
    file."""
    html: str | None = None
    """Write a page with the listed images to this .html file."""


def run(options: Outliers) -> dict[str, Any]:
    """Print the oddest images."""
    from ...embeddings.open_table import open_table
    from ...embeddings.outliers import find_outliers
    from ...io.console import print_table
    from ...io.result_file import check_result_file

    check_result_file(options.out)
    check_page(options.html)
    table = open_table(options.source, workers=2)
    result = find_outliers(table, top=options.top, neighbors=options.neighbors, out=options.out)
    listed = result["outliers"]
    rows = [
        [
            each["path"],
            *(f"{each[name]:.2f}" for name in ("score", "density", "isolation")),
            str(len(each["group"]) or ""),
        ]
        for each in listed
    ]
    print_table(["oddest image", "score", "density", "isolation", "near it"], rows)
    summary = (
        f"{len(listed):,} of {result['images']:,} images. Density is the similarity to neighbor"
        f" {result['neighbors']}."
    )
    print(summary)
    if options.html is not None:
        pictures = [(each, [f"score {each['score']:.2f}"]) for each in listed]
        write_pictures(
            options.html, table, f"Oddest images of {options.source}", [("", pictures)], summary
        )
    return result
