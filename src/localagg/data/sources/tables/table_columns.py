"""Choose the columns of a table: its images by type, name and first bytes, and its labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa

from ....errors import UserError
from ..file_kinds import IMAGE_KINDS, kind_of

LABELS = ("label", "labels", "fine_label", "class", "target", "category")
_IMAGES = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "tif")


class NoImageColumn(UserError):
    """A table without a column of images."""


class ImageColumn(NamedTuple):
    """The column that holds the images."""

    name: str
    note: str
    """Says which column was taken, if others could be meant; else empty."""


def choose_image_column(
    uri: str,
    schema: pa.Schema,
    features: dict[str, Any],
    first: Callable[[str], bytes],
    wanted: str | None = None,
) -> ImageColumn:
    """Return the column of images.

    Columns marked as Image, structs with ``bytes`` and binary columns can hold images. Those that
    are named like images come first, then those whose first value is an image.

    Args:
        uri: the table's name for messages.
        schema: the table's columns.
        features: the columns as ``datasets.Features.to_dict`` describes them; may be empty.
        first: returns the first bytes of the first value of a column; empty for none.
        wanted: the column that the user chose.

    Raises:
        NoImageColumn: there is none, or ``wanted`` is none.
    """
    marked = [f.name for f in schema if _type_of(features, f.name) == "Image" and _fits(f.type)]
    possible = [f.name for f in schema if _holds_bytes(f.type)]
    possible = [name for name in possible if _type_of(features, name) in ("Image", "Value", "")]
    if wanted is not None:
        if wanted in marked + possible:
            return ImageColumn(wanted, "")
        names = ", ".join(schema.names)
        message = f"'{uri}' has no images in a column '{wanted}'; its columns are {names}."
        raise NoImageColumn("not-found", message)
    if len(marked) == 1 and possible == marked:  # without reading a value
        return ImageColumn(marked[0], "")
    named = [name for name in possible if name.lower() in _IMAGES]
    kinds = {name: kind_of(first(name)) for name in possible}
    images = [name for name in possible if kinds[name] in IMAGE_KINDS]
    groups = (marked, [n for n in named if n in images], images, named)
    found = next((group for group in groups if group), [])
    if not found:
        names = ", ".join(schema.names)
        raise NoImageColumn(
            "no-images", f"'{uri}' has no column of images; its columns are {names}."
        )
    chosen = min(found, key=lambda name: _rank(name, found))
    others = [name for name in dict.fromkeys(marked + images) if name != chosen]
    note = f"'{uri}': the images are those of the column '{chosen}', not of {', '.join(others)};"
    return ImageColumn(chosen, f"{note} --image-column chooses another." if others else "")


def _rank(name: str, order: list[str]) -> tuple[int, int]:
    """Names like ``image`` first, then the order of the table."""
    known = _IMAGES.index(name.lower()) if name.lower() in _IMAGES else len(_IMAGES)
    return known, order.index(name)


def label_column(names: list[str]) -> str | None:
    """Return the column of labels by its name, in any case; None without one."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[label] for label in LABELS if label in lower), None)


def _type_of(features: dict[str, Any], name: str) -> str:
    feature = features.get(name)
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def is_binary(kind: pa.DataType) -> bool:
    """Return whether values are bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def is_text(kind: pa.DataType) -> bool:
    """Return whether values are words."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return is_binary(kind)


def _fits(kind: pa.DataType) -> bool:
    return _holds_bytes(kind) or pa.types.is_string(kind)
