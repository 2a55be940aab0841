"""Show the result of a command as a page of pictures (``--html FILE``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError

_MOST_ROWS = 500  # of pictures on a page


def check_page(html: str | None) -> None:
    """Check before the work that a page can be written.

    Raises:
        UserError: a suffix other than .html, a folder, or a missing folder.
    """
    if html is None:
        return
    path = Path(html)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError("option-invalid", f"--html {html} must end in .html.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError("not-found", f"--html {html} is not a file in an existing folder.")


def write_pictures(
    html: str,
    table: Any,
    title: str,
    rows: Sequence[tuple[str, Sequence[tuple[dict[str, Any] | Path, Sequence[str]]]]],
    lead: str,
) -> None:
    """Write a page of pictures, and print its path.

    Args:
        html: the file.
        table: the EmbeddingTable that the images are rows of.
        title: heading of the page.
        rows: (title, pictures), each picture a row of the table or an image file, with lines of
            text below. At most 500 are shown, and the page states how many more there are.
        lead: a sentence below the heading.

    Raises:
        UserError: the images moved or changed.
    """
    from ...embeddings.open_table import open_table_pictures
    from ...report.gallery import Picture, Row, Section, write_gallery

    source = open_table_pictures(table)

    def picture(image: dict[str, Any] | Path, lines: Sequence[str]) -> Picture:
        if isinstance(image, Path):
            return Picture(image, lines)
        return Picture((source, image["index"]), lines, image["path"])

    shown = [
        Row(name, [picture(image, lines) for image, lines in pictures])
        for name, pictures in rows[:_MOST_ROWS]
    ]
    more = f" The first {len(shown):,} of {len(rows):,} rows." if len(rows) > len(shown) else ""
    write_gallery(html, title, [Section("", shown)], lead=lead + more)
    print(f"Open {html}")
