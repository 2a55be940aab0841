"""Write a page of pictures: sections of rows, each picture with lines of text below."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..data.sources.source import Source
from ..embeddings.table import path_text
from .page import escape, write_page
from .thumbnails import draw_thumbnails

_BYTES, _BYTES_EACH = 5_000_000, 800


class Picture(NamedTuple):
    """An image and the text below it."""

    image: Path | tuple[Source, int]
    """An image file, or a source and an index."""
    lines: Sequence[str] = ()
    """Lines of text, such as a similarity."""
    path: str | None = None
    """Name shown when the picture is opened. Default: the file's, or the source's name of it."""


class Row(NamedTuple):
    """Pictures that belong together, such as a cluster, or a query and its neighbors."""

    title: str
    pictures: Sequence[Picture]


class Section(NamedTuple):
    """Rows under a heading."""

    title: str
    rows: Sequence[Row]
    note: str = ""
    """A sentence below the heading."""


def write_gallery(
    path: str | Path, title: str, sections: Sequence[Section], *, lead: str = ""
) -> None:
    """Write a self-contained page of pictures, atomically.

    An image that occurs repeatedly is stored once; one that cannot be read is shown as a gray
    field. Pictures are as large as fits 5 MB (40 MB for 50,000 pictures).

    Args:
        path: the HTML file.
        title: heading of the page.
        sections: its contents.
        lead: a sentence or two below the heading.
    """
    images = _Images()
    shown = sections_data(sections, images.number)
    thumbnails = draw_thumbnails(images, sprite_budget(len(images)))
    data = {"paths": images.names, "sections": shown}
    head = f"<p class=lead>{escape(lead)}</p>"
    write_page(Path(path), title=title, head=head, data=data, thumbnails=thumbnails)


def sprite_budget(count: int, other_bytes: int = 0) -> int:
    """Return the bytes that thumbnails may take, such that the page keeps to 5 MB for 5,000 images
    and 40 MB for 50,000. Base64 adds a third."""
    return int((max(_BYTES, _BYTES_EACH * count) - other_bytes - 100_000) * 0.72)


def sections_data(
    sections: Sequence[Section], number: Callable[[Any, str | None], int]
) -> list[dict[str, Any]]:
    """Return sections as JSON values, images as numbers of items."""
    return [
        {
            "title": section.title,
            "note": section.note,
            "rows": [
                {
                    "title": row.title,
                    "items": [number(picture.image, picture.path) for picture in row.pictures],
                    "lines": [list(picture.lines) for picture in row.pictures],
                }
                for row in section.rows
            ],
        }
        for section in sections
    ]


class _Images:
    """Distinct images in order of their first occurrence."""

    def __init__(self) -> None:
        self.images: list[Path | tuple[Source, int]] = []
        self.names: list[str] = []
        self._numbers: dict[Any, int] = {}

    def number(self, image: Path | tuple[Source, int], path: str | None) -> int:
        key = image if isinstance(image, Path) else (id(image[0]), image[1])
        if key not in self._numbers:
            self._numbers[key] = len(self.images)
            self.images.append(image)
            found = str(image) if isinstance(image, Path) else image[0].name(image[1])
            self.names.append(path_text(found if path is None else path))
        return self._numbers[key]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> bytes | Tensor:
        image = self.images[number]
        return image.read_bytes() if isinstance(image, Path) else image[0][image[1]].image
