"""Several splits of a data URI as one source, with names that lead to the files."""

import os
from pathlib import Path

from ..data.sources.combined import CombinedSplits, locate
from ..data.sources.open import Source, open_images, parse_uri, report_unread, stored_splits


class JoinedSplits(CombinedSplits):
    """The images of splits in order; classes are matched by name.

    Args:
        uri: the data URI.
        parts: {name of the split: images}, at least one.

    Attributes:
        root: absolute folder that :meth:`name` is relative to; None if the images have no files of
            their own (Parquet, tars, TFRecords).
    """

    def __init__(self, uri: str, parts: dict[str, Source]) -> None:
        super().__init__(uri, parts)
        self.root = _common_root(uri, self._sources)

    def split(self, index: int) -> str:
        """Return the name of an image's split."""
        return [*self.parts][locate(index, self._starts)[0]]

    def name(self, index: int) -> str:
        """Return the path relative to ``root``, or the name of the record."""
        part, row = locate(index, self._starts)
        file = self._sources[part].file(row)
        if file is None or self.root is None:
            return self._sources[part].name(row)
        return os.path.relpath(file.absolute(), self.root).replace(os.sep, "/")

    def fingerprint(self) -> str:
        """Hash the fingerprints of the splits; that of a single one is its own."""
        return self._sources[0].fingerprint() if len(self.parts) == 1 else super().fingerprint()


def open_splits(data: str, split: str) -> JoinedSplits:
    """Open splits of a data URI by their names, separated by commas, or "all".

    All are train, val and test, as far as they exist, in this order; others are reported.

    Raises:
        UserError: as :func:`.open_images`.
    """
    names = stored_splits(data) if split == "all" else split.split(",")
    if split == "all":
        report_unread(data)
    return JoinedSplits(data, {name: open_images(data, name) for name in names})


def _common_root(uri: str, sources: list[Source]) -> Path | None:
    """Return the folder of the URI if it holds the files, else the deepest that holds them."""
    folders = []
    for source in sources:
        if (file := source.file(0)) is None:
            return None
        folders.append(file.absolute().parents[len(Path(source.name(0)).parts) - 1])
    top = Path(parse_uri(uri)[0]).expanduser().absolute()
    if all(folder.is_relative_to(top) for folder in folders):
        return top
    return Path(os.path.commonpath(folders))
