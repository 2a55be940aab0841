"""Write one HTML file that opens offline: text, arrays, thumbnails, our script and stylesheet.

The page may run only the script in it and load nothing: its policy (CSP) names the script's and the
stylesheet's hash. Data are never parsed as HTML; ``<`` is escaped in them.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..io.files import atomic_write
from .thumbnails import Thumbnails

SCRIPTS = ("map.js", "page.js")
"""Modules of the page, each of which may import from those before it."""


def write_page(
    path: Path,
    *,
    title: str,
    head: str,
    data: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray] | None = None,
    thumbnails: Thumbnails | None = None,
    foot: str = "",
) -> None:
    """Write a page atomically.

    Args:
        path: the file.
        title: title of the page and its heading.
        head, foot: HTML before and behind the parts that the script draws.
        data: JSON values for the script; see ``start`` in page.js.
        arrays: arrays for the script, little-endian.
        thumbnails: pictures of the items 0, 1, ...
    """
    arrays = dict(arrays or {})
    data = dict(data)
    if thumbnails is not None:
        data["side"] = thumbnails.side
        arrays["sizes"] = thumbnails.sizes
    style, script = package_file("page.css"), page_script()
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src {content_hash(style)};"
        f" script-src {content_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    blocks = [_block("data", json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))]
    blocks += [_block(f"array-{name}", _base64(a.tobytes())) for name, a in arrays.items()]
    # The script runs before the browser has read the pictures, which may be 20 MB.
    blocks.append(f"<script type=module async>{script}</script>\n".encode())
    sheets = [] if thumbnails is None else thumbnails.sheets
    blocks += [_block(f"sheet-{i}", _base64(sheet)) for i, sheet in enumerate(sheets)]
    with atomic_write(path) as beside, open(beside, "wb") as file:
        file.write(
            f"<!doctype html>\n<html lang=en><head><meta charset=utf-8>\n"
            f'<meta http-equiv=Content-Security-Policy content="{policy}">\n'
            f"<meta name=viewport content='width=device-width, initial-scale=1'>\n"
            f"<title>{escape(title)}</title>\n<style>{style}</style></head>\n"
            f"<body><header><h1>{escape(title)}</h1>{head}<nav></nav></header>\n<main id=parts>"
            "<noscript>The map and the pictures need JavaScript.</noscript></main>\n"
            f"<div id=foot>{foot}</div>\n".encode()
        )
        file.writelines(blocks)
        file.write(b"</body></html>\n")


def escape(text: str) -> str:
    """Escape text for HTML; bytes that are not UTF-8 become question marks."""
    return html.escape(text.encode("utf-8", "replace").decode())


def page_script() -> str:
    """Return the modules as one: each defines what the next would import."""
    return re.sub(r"^import .*\n", "", "".join(map(package_file, SCRIPTS)), flags=re.M)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; the first column is a heading of its row."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<div class=wide><table><tr>{head}</tr>{lines}</table></div>"


def package_file(name: str) -> str:
    """Return the text of a file of the package."""
    return files("localagg.report").joinpath(name).read_text("utf-8")


def content_hash(text: str) -> str:
    """Return the SHA-256 of a script or stylesheet, as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _base64(data: bytes) -> bytes:
    return base64.b64encode(data)


def _block(name: str, content: bytes) -> bytes:
    """Return an inert script element. ``<`` occurs in JSON only within strings."""
    return b"<script type=text/plain id=%s>%s</script>\n" % (
        name.encode(),
        content.replace(b"<", b"\\u003c"),
    )
