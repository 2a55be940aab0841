"""The reference program's formulas from pixels to views, where they differ from torchvision's.

Its operations work on uint8 and truncate after each of them. Here pixels are *levels*: whole
numbers 0-255 in float32 [B, 3, H, W], one factor a sample [B]. Sums and products keep the
reference's order and precision, so that the truncated results are equal.
"""

import torch
from torch import Tensor

from .crops import Boxes

_EPS = 1e-6  # added before each truncation
_GRAY = (0.299, 0.587, 0.114)


# --- Area resize ----------------------------------------------------------------------------------


def resample(images: Tensor, boxes: Boxes, size: int) -> Tensor:
    """Crop and resize a batch by area, truncated to levels; see :func:`area_means`."""
    return area_means(images, boxes, size).floor_()


def area_means(images: Tensor, boxes: Boxes, size: int) -> Tensor:
    """Crop and resize a batch by area: tf.image.resize_area.

    An output pixel is the mean of the source pixels under it, weighted by the shares it covers.
    Images are uint8 or float [B, 3, H, W], with one whole-pixel box each. The result is float32
    [B, 3, size, size], on the images' scale.
    """
    B, C, H, W = images.shape
    across = _taps(boxes.left, boxes.width, size)
    down = _taps(boxes.top, boxes.height, size)
    scale = (boxes.height.float() / size) * (boxes.width.float() / size)
    if all(bool((side == side[0]).all()) for side in boxes):
        # One box for all: with the summed dimension first in memory whole rows are copied, which is
        # several times as fast as to gather single pixels.
        columns = _sum_rows(images.reshape(-1, W).float().t().contiguous(), across)
        sums = _sum_rows(columns.view(-1, H).t().contiguous(), down)
        sums = sums.view(size, size, B, C).permute(2, 3, 0, 1)
    else:
        sums = _sum_along(_sum_along(images, 3, across), 2, down)
    return sums * (1 / scale).view(-1, 1, 1, 1).to(sums.device)


def _taps(start: Tensor, length: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """(index int64 [B, size], weight float32 [B, size]) of the first, second, ... source pixel
    under each output pixel along one side of the boxes; weight 0 beyond the last."""
    start, length = start.view(-1, 1), length.view(-1, 1).float()
    scale = length / size
    first = torch.arange(size, dtype=torch.float32) * scale
    last = torch.arange(1, size + 1, dtype=torch.float32) * scale
    begin, end = first.floor(), last.ceil()
    taps = []
    for tap in range(int((end - begin).max())):
        pixel = begin + tap
        inside = torch.where(pixel + 1 > last, last - pixel, 1.0)
        cut = torch.where(pixel + 1 > last, scale, pixel + 1 - first)
        weight = torch.where(pixel < first, cut, inside) * (pixel < end)
        taps.append(((start + pixel.minimum(length - 1)).long(), weight))
    return taps


# Sums run from the first tap to the last: a matrix product would add in another order, and after
# the truncation the difference is a whole level, most often in flat regions.


def _sum_rows(rows: Tensor, taps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sums of float32 rows [L, R] with the taps of the first box: [size, R]."""
    sums = None
    for index, weight in taps:
        taken = rows.index_select(0, index[0].to(rows.device))
        taken.mul_(weight[0].unsqueeze(1).to(rows.device))
        sums = taken if sums is None else sums.add_(taken)
    assert sums is not None
    return sums


def _sum_along(images: Tensor, dim: int, taps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Sums of [B, C, H, W] along a dimension, each image with its own taps."""
    shape = (len(images), 1, 1, -1) if dim == 3 else (len(images), 1, -1, 1)
    wanted = [-1, *images.shape[1:]]
    wanted[dim] = -1
    sums = None
    for index, weight in taps:
        taken = images.gather(dim, index.view(shape).to(images.device).expand(wanted))
        taken = taken.float().mul_(weight.view(shape).to(images.device))
        sums = taken if sums is None else sums.add_(taken)
    assert sums is not None
    return sums


# --- Color ----------------------------------------------------------------------------------------


def grayscale(images: Tensor) -> Tensor:
    """Return the luma [B, 1, H, W], truncated to levels."""
    red, green, blue = images.unbind(dim=1)
    luma = _GRAY[0] * red + _GRAY[1] * green + _GRAY[2] * blue + _EPS
    return luma.floor_().unsqueeze(1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale levels."""
    return _clipped(images * factor.view(-1, 1, 1, 1))


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with each pixel's truncated luma."""
    return _blend(images, grayscale(images), factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean of the truncated luma, itself truncated."""
    gray = grayscale(images)
    mean = gray.sum(dim=(1, 2, 3), keepdim=True) / gray[0].numel()  # sums of levels are exact
    return _blend(images, (mean + _EPS).floor_(), factor)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor.view(-1, 1, 1, 1)
    return _clipped(images * factor + other * (1 - factor))


def _clipped(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).add_(_EPS).floor_()


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue by ``turns``, as tf.image.adjust_hue, by its sextant and the position in it."""
    red, green, blue = (images * (1 / 255)).unbind(dim=1)
    more, less = torch.maximum(red, green), torch.minimum(red, green)
    high, low = torch.maximum(more, blue), torch.minimum(less, blue)
    middle = torch.maximum(less, torch.minimum(more, blue))
    chroma = high - low
    sextant = torch.where(
        red < green,
        torch.where(blue < red, 1.0, torch.where(blue > green, 3.0, 2.0)),
        torch.where(blue < green, 0.0, torch.where(blue > red, 4.0, 5.0)),
    )
    position = (middle - low) / torch.where(chroma > 0, chroma, 1)
    hues = sextant + torch.where(sextant % 2 == 0, position, 1 - position)
    hues = torch.where(chroma > 0, hues, 0) + turns.view(-1, 1, 1) * 6
    hues = torch.where(hues < 0, hues + 6, hues)
    hues = torch.where(hues >= 6, hues - 6, hues)

    sextant = hues.floor()
    position = hues - sextant
    position = torch.where(sextant % 2 == 0, position, 1 - position)
    middle = low + position * chroma
    channels = []
    for offset in (1, 5, 3):  # red is the largest in sextants 5 and 0, green in 1 and 2, blue 3, 4
        turned = (sextant + offset) % 6
        other = torch.where((turned == 2) | (turned == 5), middle, low)
        channels.append(torch.where(turned < 2, high, other))
    # 255.5: the conversion of floats to uint8 that tf.image uses
    return (torch.stack(channels, dim=1) * 255.5).floor_()


JITTER = (brightness, contrast, saturation, hue)  # in the order of ViewConfig.jitter
