"""Draw a contact sheet of the views that training would use."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..config import PretrainConfig, ViewConfig
from ..data.images.augment import Augment
from ..data.loading.cropping import evaluation_crops, training_crops
from ..data.loading.scan import require_readable, typical_side
from ..data.sources.source import Source
from ..errors import UserError
from ..io.files import atomic_write, check_writable
from ..recipes.derived_settings import resolve_defaults

_COLUMNS = 8  # the evaluation view, and those of seven epochs
_SMALL = 96  # pixels; smaller views are enlarged by a whole number
_GAP = 4
_LINE = 14  # height of a line of text, in Pillow's built-in font


def contact_sheet(
    source: Source, config: PretrainConfig, count: int, path: Path, *, seed: int = 0
) -> dict[str, Any]:
    """Write a PNG with one row an image: the evaluation view, then the views of epochs 0 to 6.

    Args:
        source: the images.
        config: configuration of the views; missing options are derived from the images.
        count: number of images, evenly spread over the source.
        path: file to write.
        seed: random seed; a run with this seed has these views.

    Returns:
        {"file", "images": names, "columns", "image_size", "unreadable": {name: reason}}.

    Raises:
        UserError: none of the images can be read.
    """
    index = torch.linspace(0, len(source) - 1, min(count, len(source))).round().long()
    fitted = PretrainConfig(views=config.views)
    views = resolve_defaults(fitted, len(source), typical_side(source, fitted.views)).views
    index, columns, failed = _views(source, views, index, seed)
    if not len(index):
        require_readable(source, failed)
    names = [source.name(i) for i in index.tolist()]
    with atomic_write(path) as temporary:
        _draw(columns, names).save(temporary, format="PNG")
    return {
        "file": str(path),
        "images": names,
        "columns": ["measured", *(f"epoch {epoch}" for epoch in range(_COLUMNS - 1))],
        "image_size": views.image_size,
        "unreadable": {source.name(i): why for i, why in failed.items()},
    }


def _views(
    source: Source, views: ViewConfig, index: Tensor, seed: int
) -> tuple[Tensor, Tensor, dict[int, str]]:
    """(index of the readable images [n], their views [n, columns, 3, S, S] in 0-1, failed)."""
    (index, measured), failed = evaluation_crops(source, views, False, index)
    columns = [measured.float() / 255]
    if len(index):
        augment = Augment(views, seed, cropped=True)
        for epoch in range(_COLUMNS - 1):
            batch, _ = training_crops(source, views, seed, epoch, index)
            columns.append(augment(batch.images, epoch, batch.index, batch.uniforms))
    return index, torch.stack(columns, dim=1), failed


def _draw(columns: Tensor, names: list[str]) -> Image.Image:
    rows, across = columns.shape[:2]
    zoom = max(1, _SMALL // columns.shape[3])
    size = columns.shape[3] * zoom
    step, height = size + _GAP, _LINE + size + _GAP
    sheet = Image.new("RGB", (across * step + _GAP, rows * height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    levels = (columns * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
    for row, name in enumerate(names):
        shown = name.encode("ascii", "replace").decode()  # the built-in font has no others
        draw.text((_GAP, row * height + 1), shown, fill="black")
        for column in range(across):
            picture = Image.fromarray(np.ascontiguousarray(levels[row, column]))
            picture = picture.resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(picture, (_GAP + column * step, row * height + _LINE))
    return sheet


def check_sheet(path: Path, count: int) -> None:
    """Check before the work that a sheet can be written.

    Raises:
        UserError: fewer than one image, or not a .png file in an existing folder.
    """
    if count < 1:
        raise UserError("option-invalid", f"--augmented is {count}; it must be at least 1.")
    if path.suffix.lower() != ".png" or path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(
            "option-invalid", f"--sheet {path} is not a .png file in an existing folder."
        )
    check_writable(path)
