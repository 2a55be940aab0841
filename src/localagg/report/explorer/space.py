"""Places, pictures, neighbors and typed labels of the N images in the explorer."""

import csv
import functools
import io
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...embeddings.map import kept_map
from ...embeddings.model import load
from ...embeddings.open_table import open_table
from ...embeddings.search import embed_files
from ...engine.search import nearest, sort_by_similarity
from ...engine.searchable_bank import SearchableBank
from ...errors import UserError
from ...io.files import atomic_write
from ..embedding_page import NEIGHBORS, Pictured, color_column, quantize
from ..run_report import MAP_FILE, read_pictured
from ..thumbnails import Images, thumbnail

LABEL = "typed label"
MOST_LABELS = 60_000
"""Distinct labels; the page counts them in 16 bits."""


class Space:
    """N images with their places on the map, for several threads.

    Args:
        shown: images and their embedding.
        xy: float32 places [N, 2].
        labels: CSV file of the typed labels: row, path, label.
        embed: returns the embedding of an encoded image as float32 [1, D].

    Raises:
        UserError: the labels are those of other images, or damaged.
    """

    def __init__(
        self, shown: Pictured, xy: Tensor, labels: Path, embed: Callable[[bytes], Tensor]
    ) -> None:
        self.shown, self.labels, self.embed = shown, labels, embed
        self.arrays = {"xy": quantize(xy)}
        self.columns: list[dict[str, Any]] = []
        for number, (name, values) in enumerate(shown.columns.items()):
            if (column := color_column(name, values)) is not None:
                self.arrays[f"column-{number}"] = column.pop("values")
                self.columns.append({**column, "array": f"column-{number}"})
        self._bank = SearchableBank(shown.rows, few_queries=True)
        self._lock = threading.Lock()
        self._images = None if shown.images is None else _OneAtATime(shown.images)
        self.label_column()  # damaged labels raise their error now
        first = {"target": self.nearest, "args": (shown.rows[:1],), "daemon": True}
        threading.Thread(**first).start()  # the first search takes seconds: it rounds all rows

    def __len__(self) -> int:
        return len(self.shown.rows)

    def nearest(self, query: Tensor, own: int = -1) -> list[tuple[int, float]]:
        """Return (image, cosine) of the images nearest to an embedding [1, D], without ``own``."""
        with self._lock:
            found, cosine = sort_by_similarity(*nearest(query, self._bank, NEIGHBORS + 1))
        near = zip(found[0].tolist(), cosine[0].clamp(-1, 1).tolist(), strict=True)
        return [pair for pair in near if pair[0] != own][:NEIGHBORS]

    def find(self, text: str, most: int) -> list[int]:
        """Return the images whose path contains a text, in any case, or the one of this number."""
        if text.isdecimal() and int(text) < len(self):
            return [int(text)]
        paths, text = enumerate(self.shown.paths), text.casefold()
        return [i for i, path in paths if text in path.casefold()][:most]

    def picture(self, number: int, side: int) -> bytes | None:
        """Return an image as WebP within a square of ``side`` pixels, or None if unreadable."""
        drawn = None if self._images is None else thumbnail(self._images, number, side)
        if drawn is None:
            return None
        file = io.BytesIO()
        drawn.save(file, "WEBP", quality=80, method=2)
        return file.getvalue()

    def label(self, numbers: Sequence[int], label: str) -> None:
        """Save a label of images, atomically; an empty one removes theirs."""
        with self._lock:
            known = self._read_labels()  # another explorer may have written some
            known.update(dict.fromkeys(numbers, label))
            rows = [(i, self.shown.paths[i], known[i]) for i in sorted(known) if known[i]]
            with (
                atomic_write(self.labels) as beside,
                open(beside, "w", newline="", encoding="utf-8") as file,
            ):
                csv.writer(file).writerows([("row", "path", "label"), *rows])

    def label_column(self) -> tuple[list[str], np.ndarray]:
        """Return the names of the typed labels, the first for none, and uint16 codes [N]."""
        known = self._read_labels()
        names = sorted(set(known.values()))[:MOST_LABELS]
        code = {name: number + 1 for number, name in enumerate(names)}
        codes = np.zeros(len(self), "<u2")
        for number, label in known.items():
            codes[number] = code.get(label, 0)
        return [f"no {LABEL}", *names], codes

    def _read_labels(self) -> dict[int, str]:
        if not self.labels.exists():
            return {}
        try:
            with open(self.labels, newline="", encoding="utf-8") as file:
                rows = [(int(r["row"]), r["path"], r["label"]) for r in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise UserError(
                "damaged", f"'{self.labels}' is no table of labels ({error}); rename or remove it."
            ) from None
        for number, path, _ in rows:
            if not 0 <= number < len(self) or self.shown.paths[number] != path:
                raise UserError(
                    "mismatch",
                    f"'{self.labels}' labels row {number} '{path}', which is another image now;"
                    " rename it to begin anew.",
                )
        return {number: label for number, _, label in rows}


class _OneAtATime:
    """Images of a source that only one thread reads at a time; they decode side by side."""

    def __init__(self, images: Images) -> None:
        self.images, self.lock = images, threading.Lock()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> bytes | Tensor:
        with self.lock:
            return self.images[number]


def open_space(place: Path, workers: int) -> Space:
    """Open a run or table with all its images; place them on the map unless a file keeps it.

    Raises:
        UserError: no such run or table, one without images, or damaged labels.
    """
    shown = read_pictured(place, workers, most=None)
    if not len(shown.rows):
        raise UserError("no-images", f"'{place}' has no images; embed some.")
    is_run = place.is_dir()
    kept = place / MAP_FILE if is_run else place.with_suffix(".map.safetensors")
    labels = place / "labels.csv" if is_run else place.with_suffix(".labels.csv")
    return Space(shown, kept_map(kept, shown.rows), labels, functools.partial(_embed, place))


def _embed(place: Path, data: bytes) -> Tensor:
    """Return the embedding of an encoded image as the run or table has it: float32 [1, D]."""
    if place.is_dir():
        return torch.from_numpy(_load(place).embed([data]))
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder, "image")).write_bytes(data)
        return torch.nn.functional.normalize(embed_files(open_table(place), [file], None), dim=1)


@functools.lru_cache(1)
def _load(run: Path) -> Any:
    return load(run)
