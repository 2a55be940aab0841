"""``localagg pack``."""

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError
from .parse import positional


@dataclass(frozen=True)
class Pack:
    """Pack any images into a folder that reads fast; a stopped pack continues.

    All bytes are kept unless --size makes the images smaller. pack-report.json in the folder lists
    duplicates and unreadable images.
    """

    source: str = positional("SRC")
    """Data URI."""
    destination: str = positional("DST")
    """Folder to create."""
    split: str | None = None
    """Stored splits to read as train, separated by commas: train,unlabeled. Default: train."""
    pages: Literal["first", "all"] = "first"
    """Multi-page TIFF files and animations. all: each page is an image."""
    image_column: str | None = None
    """Column of images of a table. Default: by its type, name and first bytes."""
    format: Literal["arrow", "tfrecord", "webdataset"] | None = None
    """File format: Arrow of the datasets library, TFRecords of the reference program, or tars.
    Default: arrow, or tfrecord with --like."""
    like: Literal["reference"] | None = None
    """reference: the records of the reference's scripts in their order, to
    which the memory banks of its checkpoints belong. SRC is a folder of classes or a listing."""
    seed: int = 0
    """Random seed of the reference's shuffle, for --like reference."""
    files: tuple[int, int] | None = None
    """Number of files of train and val, for --like reference. Default: 1024 128."""
    size: int | None = None
    """Shrink larger images to this shorter side in pixels, as JPEG. Default: keep all bytes."""
    quality: int | None = None
    """JPEG quality of shrunk images, 1 to 100. Default: 95."""
    keep: bool = False
    """Keep all bytes, the default without --size."""
    workers: int = 2
    """Number of processes that read, check and shrink."""
    verify: bool = False
    """Read the folder back and compare hashes."""


def run(options: Pack) -> dict[str, Any]:
    """Pack the images and print a summary."""
    from ..data.pack.pack_dataset import pack, pack_rows
    from ..data.sources.open import add_options
    from ..io.console import print_table

    if options.keep and options.size is not None:
        raise UserError(
            "option-conflict", f"--keep and --size {options.size} exclude each other; omit one."
        )
    data = add_options(
        options.source, split=options.split, pages=options.pages, image_column=options.image_column
    )
    result = pack(
        data,
        options.destination,
        format=options.format,
        size=options.size,
        quality=options.quality,
        workers=options.workers,
        verify=options.verify,
        like=options.like,
        seed=options.seed,
        files=options.files,
    )
    print_table(["", ""], pack_rows(result))
    return result
