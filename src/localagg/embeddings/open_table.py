"""Open the embeddings of a run or table, and the images that they came from."""

from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor

from ..checkpoint import load_encoder, read_run, weights_digest
from ..config import check_argument_types
from ..data.images.image_list import ImageList
from ..data.images.pictures import at_levels
from ..data.sources.open import Source, check_outside, open_images
from ..errors import UserError, counted
from ..io.console import notify
from ..io.files import noted_place
from .all_splits import open_splits
from .table import UNREAD, EmbeddingTable, describe_root
from .tables.write_table import write_embeddings, write_rows

RUN_TABLE = "embeddings.parquet"


@check_argument_types
def open_table(path: str | Path | EmbeddingTable, *, workers: int = 0) -> EmbeddingTable:
    """Open a table of embeddings.

    A run's table holds the embeddings of the central views of its training images. They are
    computed at the first call, and again after the weights or the images changed.

    Args:
        path: table written by ``localagg embed``, or run folder.
        workers: processes that decode.

    Raises:
        UserError: no such table or run, a damaged one, or images of a run that are missing.
        Interrupted: Ctrl-C; finished batches are kept.
    """
    if isinstance(path, EmbeddingTable):
        return path
    run = Path(path)
    if not run.exists():
        raise UserError(
            "not-found",
            f"There is no run folder or table '{run}'; name the --out of pretrain or embed.",
        )
    if not run.is_dir() or run.suffix.lower() in UNREAD:
        return EmbeddingTable(run)
    facts, file = read_run(run)[1], run / RUN_TABLE
    data = facts["data"]
    digest = weights_digest(load_encoder(run))
    known = _open_unless_stale(file, digest)
    try:
        source = open_images(data)
    except UserError as error:
        if known is not None:  # the table needs no images
            return known
        raise _moved_images(file, error) from None
    if known is None or known.facts["fingerprint"] != source.fingerprint():
        if source.fingerprint() != facts["fingerprint"]:
            notify(
                f"The images of '{data}' changed since '{run}' learned from them: {len(source):,}"
                f" now, {facts['size']:,} then."
            )
        notify(f"Embedding the {len(source):,} images of '{run}' once, into '{file}'.")
        try:
            written = write_embeddings(run, data, file, split="train", workers=workers)
        except OSError as error:
            raise UserError(
                "environment",
                f"'{file}' cannot be written ({error.strerror}); write it elsewhere with localagg"
                f" embed {run} --data {data} --out FILE.parquet, and name that file instead of the"
                " run.",
            ) from None
        if left_out := written["unreadable"]:
            notify(f"Left out: {counted(left_out, 'unreadable image')} of '{data}'.")
        known = EmbeddingTable(file)
    if known.facts["data"] != data:  # the images moved since
        root = open_splits(data, "train").root
        known.facts |= {"data": data, **describe_root(root, file)}
    return known


def write_run_table(run: Path, index: Tensor, rows: Tensor, fabric: Fabric) -> None:
    """Write the table of a run from embeddings of its training images, where these are at hand.

    Args:
        run: finished run folder, whose data is a URI.
        index: int64 [n], increasing: the readable images.
        rows: float32 unit rows [n, D], of their central views.
        fabric: its device and precision computed the rows.

    Raises:
        UserError: the images moved, or the table cannot be written.
    """
    write_rows(run, read_run(run)[1]["data"], run / RUN_TABLE, index, rows, fabric)


def _open_unless_stale(file: Path, digest: str) -> EmbeddingTable | None:
    try:
        table = EmbeddingTable(file)
    except UserError:  # missing, damaged or of another version
        return None
    if not table.facts:
        raise UserError(
            "mismatch",
            f"'{file}' was written anew by another program; move it elsewhere and name it instead"
            " of the run, or delete it, and it is embedded again.",
        )
    return table if table.facts["weights_digest"] == digest else None


def check_outside_images(place: str | Path, output: str | Path, option: str) -> None:
    """Check that an output does not lie in the folder of a run's or table's images.

    Raises:
        UserError: it does, or the run or table cannot be read.
    """
    path = Path(place)
    data: str | None
    if path.is_dir() and path.suffix.lower() not in UNREAD:
        data = read_run(path)[1]["data"]
    else:
        data = EmbeddingTable(path).facts.get("root")
    if data is not None:
        check_outside(data, output, option)


def open_table_images(table: EmbeddingTable) -> Source:
    """Open the images of a table; its column ``index`` counts them.

    Raises:
        UserError: they moved, or changed since they were embedded.
    """
    facts = table.facts
    if facts.get("data") is None:
        return _open_files(table)
    data = noted_place(facts["data"], facts.get("data_absolute"))
    try:
        source = open_splits(data, facts.get("split", "train"))
    except UserError as error:
        raise _moved_images(table.path, error) from None
    if source.fingerprint() != facts.get("fingerprint"):
        raise UserError(
            "mismatch", f"'{data}' changed since '{table.path}' was written; embed it again."
        )
    return source


def _moved_images(table: Path, error: UserError) -> UserError:
    """Return the error that says how to go on without the images' earlier place."""
    run, way = table.parent, f"embed them again: localagg embed RUN --data URI --out {table}"
    if table.name == RUN_TABLE and (run / "config.json").exists():
        way = f"note their place: localagg pretrain --resume {run} --data URI"
    return UserError(
        error.code,
        f"The images of '{table}' cannot be opened: {error} If they moved, {way}",
    )


def open_table_pictures(table: EmbeddingTable) -> Source:
    """Open the images of a table as :func:`open_table_images` does, to be looked at."""
    return at_levels(open_table_images(table), table.levels)


def _open_files(table: EmbeddingTable) -> Source:
    """Open the files that the paths of a table name, of several places or merged by pandas."""
    files = [table.image_file(row) for row in range(len(table))]
    if None in files:
        name = table.images["path"][files.index(None)].as_py()
        raise UserError(
            "not-found",
            f"'{table.path}' does not name the folder of its images ('{name}' is not there); run"
            " this command in that folder, or embed the images to one table by localagg embed"
            " --append.",
        )
    source: Any = ImageList(files)
    return source
