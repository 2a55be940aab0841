"""``localagg embed``."""

from dataclasses import dataclass
from typing import Any, Literal

from ..config.options import Precision
from .parse import positional


@dataclass(frozen=True, kw_only=True)
class Embed:
    """Write the embeddings of any images to a table, one row an image.

    Columns: path, split, index, label (where there are labels), content (a digest) and embedding.
    Paths are relative to the folder that the table's metadata name as root.
    """

    run: str = positional("RUN")
    """Run folder or weights file (.safetensors)."""
    data: str
    """Data URI."""
    out: str
    """Table to write, in the format of its suffix: .parquet, .csv, .npy (and .images.csv), .arrow,
    .h5 or .zarr. Commands read Parquet."""
    append: bool = False
    """Embed only images whose content the table lacks, and keep the rows of the others."""
    map: bool = False
    """Also write the columns x, y (a map) and neighbors, which embedding-atlas reads."""
    images: bool = False
    """Also write the column image: a JPEG thumbnail of at most 128 pixels."""
    split: str = "all"
    """Splits of the data: train, val, test or stored names, separated by commas; or all."""
    pages: Literal["first", "all"] = "first"
    """Multi-page TIFF files and animations. all: each page is an image."""
    image_column: str | None = None
    """Column of images of a table. Default: by its type, name and first bytes."""
    layer: tuple[str, ...] | None = None
    """Write the read-out features of these layers, in one pass. Default: the embedding."""
    raw_maps: bool = False
    """Write the maps of --layer, not pooled: arrays [n, C, H, W] in .npy, .h5 and .zarr, else rows
    whose shapes the metadata state. Default: pooled and flattened as the reference does."""
    image_size: int | None = None
    """Side of the network's input, in pixels. Default: the run's, else derived from the images."""
    eval_crop: float | None = None
    """Share of the shorter side that the central crop keeps, 0-1; 1 keeps whole square stimuli.
    Default: the run's, else derived from the images."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the written rows."""
    batch_size: int = 256
    """Number of images the network embeds at a time; affects memory and speed only."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device of the computation. auto: the GPU if there is one."""
    precision: Precision = "32-true"
    """Arithmetic of the network: float32, mixed with bfloat16 or float16, or auto, bfloat16 if the
    device has units for it."""
    workers: int = 2
    """Number of decoding processes."""


def run(options: Embed) -> dict[str, Any]:
    """Write the embeddings and print their count."""
    from ..data.sources.open import add_options
    from ..embeddings.tables.viewer_columns import add_viewer_columns, check_viewer_columns
    from ..embeddings.tables.write_table import write_embeddings

    if options.map or options.images:
        check_viewer_columns(options.out, layers=len(options.layer or ()), map=options.map)
    data = add_options(options.data, pages=options.pages, image_column=options.image_column)
    result = write_embeddings(
        options.run,
        data,
        options.out,
        append=options.append,
        split=options.split,
        layer=options.layer,
        raw_maps=options.raw_maps,
        image_size=options.image_size,
        eval_crop=options.eval_crop,
        dtype=options.dtype,
        workers=options.workers,
        batch=options.batch_size,
        device=options.device,
        precision=options.precision,
    )
    if options.map or options.images:
        add_viewer_columns(options.out, map=options.map, images=options.images)
    skipped = (
        f", {result['unreadable']:,} unreadable images skipped" if result["unreadable"] else ""
    )
    splits = ", ".join(f"{name} {count:,}" for name, count in result["splits"].items())
    print(f"{result['rows']:,} rows of {result['dim']} in {result['out']} ({splits}){skipped}.")
    return result
