"""Write the page of a run, of a table of embeddings, or of several runs."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import latest, load_bank, read_progress, read_run
from ..config import PretrainConfig, check_argument_types
from ..data.images.decode import UnreadableImage
from ..data.images.levels import Levels, levels_of
from ..data.images.pictures import at_levels, picture_at_levels
from ..data.sources.open import open_unchanged
from ..embeddings.map import MOST
from ..embeddings.open_table import check_outside_images, open_table, open_table_pictures
from ..embeddings.table import UNREAD, EmbeddingTable, path_text
from ..errors import UserError
from ..evaluation.floors import floor_rows, floor_title
from ..io.console import notify
from ..io.files import check_writable
from ..io.metrics_log import read_metrics
from .charts import learning_curves
from .embedding_page import Pictured, write_embedding_page
from .page import escape, table
from .thumbnails import SourceImages

REPORT = "report.html"
MAP_FILE = "map.safetensors"


@check_argument_types
def write_report(
    places: str | Path | Sequence[str | Path], out: str | Path | None = None, *, workers: int = 2
) -> dict[str, Any]:
    """Write one HTML file with everything in it: results, map, clusters, curves.

    For several runs, results and curves are compared; map and pictures are of the first. Of more
    than 50,000 images an evenly spread sample is shown.

    Args:
        places: run folder or folders, or tables written by ``localagg embed``.
        out: file to write. Default: ``report.html`` in the run, or FILE.html beside a table; for
            several, report.html in the current folder.
        workers: processes that decode, if the images must be embedded first.

    Returns:
        {"out", "images", "clusters", "pictures": images that could be drawn, "bytes", "seconds"}.

    Raises:
        UserError: no such run or table, it cannot be read, ``out`` lies among its images or cannot
            be written.
    """
    if isinstance(places, str | Path):
        places = [places]
    if not places:
        raise UserError("option-missing", "Name a run folder or a table of embeddings.")
    start = time.perf_counter()
    paths = [Path(place) for place in places]
    file = _out_file(paths) if out is None else Path(out)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise UserError("not-found", f"--out {file} is not a file in an existing folder.")
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError("option-invalid", f"--out {file} must end in .html.")
    check_writable(file, "name another --out")
    for path in paths:
        check_outside_images(path, file, "--out")
    runs = {str(p): p for p in paths if p.is_dir() and p.suffix.lower() not in UNREAD}
    head, foot = _results(runs), _curves(runs)
    shown = read_pictured(paths[0], workers, MOST)
    kept = paths[0] / MAP_FILE if paths[0].is_dir() else None
    title = ", ".join(path.resolve().name for path in paths)
    found = write_embedding_page(file, shown, title=title, head=head, foot=foot, kept=kept)
    return {"out": str(file), **found, "seconds": round(time.perf_counter() - start, 2)}


def _out_file(paths: list[Path]) -> Path:
    if len(paths) > 1:
        return Path(REPORT)
    return paths[0] / REPORT if paths[0].is_dir() else paths[0].with_suffix(".html")


def read_pictured(path: Path, workers: int, most: int | None) -> Pictured:
    """Return embedding and images of a run or table, an even sample if there are over ``most``.

    A run of more than 50,000 images is shown by its memory bank.
    """
    is_run = path.is_dir() and path.suffix.lower() not in UNREAD
    if is_run and (stored := read_run(path))[1]["size"] > MOST:
        return _from_bank(path, *stored, most)
    opened = open_table(path, workers=workers)
    kept = _sample(len(opened), most)
    images = opened.images.take(kept)
    index = torch.tensor(images["index"].to_pylist(), dtype=torch.int64)
    shown = Pictured(
        opened.unit_embeddings()[kept],
        [path or "" for path in images["path"].to_pylist()],
        _columns(opened, kept),
        levels=opened.levels,
        notes=_sample_note(len(kept), len(opened)),
    )
    try:
        shown.images = SourceImages(open_table_pictures(opened), index)
    except UserError as error:
        files = [opened.image_file(position) for position in kept]
        if any(files):
            shown.images = _Files(files, opened.levels)
        else:
            shown.notes.append(f"Without pictures: {error}")
            notify(shown.notes[-1])
    return shown


class _Files:
    """Image files, some of which may be missing."""

    def __init__(self, files: Sequence[Path | None], levels: Levels) -> None:
        self.files, self.levels = files, levels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> bytes | torch.Tensor:
        file = self.files[number]
        if file is None:
            raise UnreadableImage("missing")
        return picture_at_levels(file.read_bytes(), self.levels)


def _columns(opened: EmbeddingTable, kept: list[int]) -> dict[str, list[Any]]:
    """Return columns of strings and numbers other than path, index and embedding."""
    names = [n for n in opened.file.schema_arrow.names if n not in ("path", "index", "embedding")]
    found = {}
    for name in names:
        values = opened.file.read(columns=[name])[name].take(kept).to_pylist()
        if all(isinstance(value, (str, int, float, type(None))) for value in values):
            found[name] = values
    return found


def _from_bank(
    run: Path, config: PretrainConfig, facts: dict[str, Any], most: int | None
) -> Pictured:
    """Return a sample of a large run by its memory bank: embedding all images could take hours."""
    levels = levels_of(config.views)
    stored = open_unchanged(facts["data"], facts["fingerprint"], run, "embed them again")
    source = at_levels(stored, levels)
    unreadable = set(read_progress(latest(run)).get("unreadable", ()))
    readable = [i for i in range(len(source)) if i not in unreadable]
    index = [readable[i] for i in _sample(len(readable), most)]
    rows = torch.nn.functional.normalize(load_bank(run)[index].float(), dim=1)
    columns = {}
    if source.labels is not None and source.classes is not None:
        codes = source.labels[index].tolist()
        columns["label"] = [path_text(source.classes[n]) if n >= 0 else None for n in codes]
    notes = [*_sample_note(len(index), len(source)), "Embeddings are rows of the memory bank."]
    names = [path_text(source.name(i)) for i in index]
    return Pictured(rows, names, columns, SourceImages(source, index), levels, notes)


def _sample(count: int, most: int | None) -> list[int]:
    shown = count if most is None else min(count, most)
    return torch.linspace(0, count - 1, shown, dtype=torch.float64).long().tolist()


def _sample_note(shown: int, count: int) -> list[str]:
    if shown == count:
        return []
    note = f"A sample of {shown:,} of {count:,} images, evenly spread."
    notify(note)
    return [note]


def _results(runs: dict[str, Path]) -> str:
    """Return a paragraph and a table of floors for each run."""
    parts = ""
    for name, run in runs.items():
        config, facts = read_run(run)
        summary = read_progress(latest(run)).get("summary") or {}
        parts += "" if len(runs) == 1 else f"<h2><bdi>{escape(name)}</bdi></h2>"
        floors = summary.get("floors")
        if floors:
            parts += f"<p class=verdict>{escape(floors['verdict'])}</p>"
        lead = f"{config.encoder.model}, {facts['size']:,} images of {facts['data']}"
        if summary:
            lead += f", {summary['epochs']} epochs in {summary['seconds'] / 60:,.1f} minutes"
        parts += f"<p class=lead>{escape(lead)}.</p>"
        if floors:
            parts += f"<p class=note>{escape(floor_title(floors, facts['size']))}</p>"
            parts += table(*floor_rows(floors["values"]))
        elif final := summary.get("final"):
            rows = [[measure, f"{value:.1%}"] for measure, value in final.items()]
            parts += table(["at the end", ""], rows)
    return parts


def _curves(runs: dict[str, Path]) -> str:
    """Return curves of all runs that logged their training."""
    logged = {name: run for name, run in runs.items() if (run / "metrics.jsonl").exists()}
    lines = {name: read_metrics(run) for name, run in logged.items()}
    if not any(lines.values()):
        return ""
    switches = {name: read_run(run)[0].ir_epochs or 0 for name, run in logged.items()}
    return f"<h2>How it learned</h2>{learning_curves(lines, switches)}"
