"""``localagg search``."""

from dataclasses import dataclass
from typing import Any

from ..parse import positional


@dataclass(frozen=True)
class Search:
    """Find the most similar images in a table that embed wrote."""

    table: str = positional("FILE.parquet")
    """Table of embeddings."""
    images: tuple[str, ...] = positional("IMAGE")
    """Image files, or paths in the table."""
    run: str | None = None
    """Run folder or weights file that made the table. Default: the path noted in the table."""
    k: int = 10
    """Number of neighbors of each image."""


def run(options: Search) -> dict[str, Any]:
    """Print the nearest rows of each image."""
    from ...embeddings.search import search
    from ...io.console import print_table

    result = search(options.table, options.images, options.run, options.k)
    for query in result["queries"]:
        rows = [
            [near["path"], str(near.get("label", "")), f"{near['similarity']:.3f}"]
            for near in query["neighbors"]
        ]
        print_table([str(query["image"]), "label", "similarity"], rows)
    print(f"Compared all {result['rows']:,} rows.")
    return result
