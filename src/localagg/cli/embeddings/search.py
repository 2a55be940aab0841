"""``localagg search``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..parse import positional
from .pictures import check_page, write_pictures


@dataclass(frozen=True)
class Search:
    """Find the most similar images in a run or table."""

    table: str = positional("RUN|FILE.parquet")
    """Run folder, or table that embed wrote."""
    images: tuple[str, ...] = positional("IMAGE")
    """Image files, folders of them, or paths in the table. An image is never its own neighbor."""
    run: str | None = None
    """Run folder or weights file that made the table. Default: the path noted in the table."""
    k: int = 10
    """Number of neighbors of each image."""
    html: str | None = None
    """Write a page with each image and its neighbors to this .html file."""


def run(options: Search) -> dict[str, Any]:
    """Print the nearest rows of each image."""
    from ...embeddings.open_table import open_table
    from ...embeddings.search import search
    from ...io.console import print_table

    check_page(options.html)
    table = open_table(options.table, workers=2)
    result = search(table, options.images, options.run, options.k)
    for query in result["queries"]:
        rows = [
            [near["path"], str(near.get("label", "")), f"{near['similarity']:.3f}"]
            for near in query["neighbors"]
        ]
        print_table([str(query["image"]), "label", "similarity"], rows)
    summary = f"Compared all {result['rows']:,} rows."
    print(summary)
    if options.html is not None:
        pictures = [(query["image"], _pictures(table, query)) for query in result["queries"]]
        write_pictures(options.html, table, f"Neighbors in {options.table}", pictures, summary)
    return result


def _pictures(table: Any, query: dict[str, Any]) -> list[tuple[Any, list[str]]]:
    """The image and its neighbors."""
    image: Any = Path(query["image"])
    if query["index"] is not None:
        (image,) = table.rows([table.find("index", query["index"])])
    near = [(each, [f"{each['similarity']:.3f}"]) for each in query["neighbors"]]
    return [(image, ["query"]), *near]
