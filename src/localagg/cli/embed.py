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
    split: Literal["train", "val", "test"] = "train"
    """Split of the data."""
    layer: str | None = None
    """Write the read-out features of this layer. Default: the embedding."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the written rows."""
    workers: int = 2
    """Number of decoding processes."""


def run(options: Embed) -> dict[str, Any]:
    """Write the embeddings and print their count."""
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
    skipped = (
        f", {result['unreadable']:,} unreadable images skipped" if result["unreadable"] else ""
    )
    print(f"{result['rows']:,} rows of {result['dim']} in {result['out']}{skipped}.")
    return result
