"""``localagg embed``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .parse import positional


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Write the embeddings of any images to a Parquet file: path, index, label, embedding."""

    run: str = positional("RUN")
    """Run folder or weights file (.safetensors)."""
    data: str
    """Data URI."""
    out: str
    """Parquet file to write."""
    split: str = "train"
    """Split of the data: train, val, test or stored names, separated by commas."""
    pages: Literal["first", "all"] = "first"
    """Multi-page TIFF files and animations. all: each page is an image."""
    image_column: str | None = None
    """Column of images of a table. Default: by its type, name and first bytes."""
    layer: str | None = None
    """Write the read-out features of this layer. Default: the embedding."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the written rows."""
    workers: int = 2
    """Number of decoding processes."""


def run(options: Embed) -> dict[str, Any]:
    """Write the embeddings and print their count."""
    from ..data.sources.open import add_options
    from ..embeddings.embed import write_embeddings

    data = add_options(options.data, pages=options.pages, image_column=options.image_column)
    result = write_embeddings(
        Path(options.run),
        data,
        Path(options.out),
        split=options.split,
        layer=options.layer,
        dtype=options.dtype,
        workers=options.workers,
    )
    skipped = (
        f", {result['unreadable']:,} unreadable images skipped" if result["unreadable"] else ""
    )
    print(f"{result['rows']:,} rows of {result['dim']} in {result['out']}{skipped}.")
    return result
