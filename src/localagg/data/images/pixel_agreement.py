"""Compare two images pixel by pixel, whether one is flipped, cropped or otherwise altered.

Either image is compared with windows of the other: whole or cropped to 90, 80 or 70 %, at three
positions across and down, plain and flipped. The edges of the best window are then moved as long as
the correlation of gray levels rises. The agreement is the correlation of details there, that is of
24 x 24 gray levels minus the mean of 3 x 3 around each. A caption counts little: the contrast of
tiles is limited, and the ninth of them that differs most is dropped.

Legend of shape suffixes: P pairs, W windows, S pixels a side.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 48  # pixels a side
_SIDE, _COARSE = 24, 12
_TILE, _DROPPED = 4, 4  # pixels a side; tiles of 36
_LIMIT = 8  # the contrast of tiles is limited to that of the eighth
_FLAT = 0.25  # gray levels: the standard deviation of a picture that shows nothing
_PROMISING = 0.6  # lower correlations are not refined
_BATCH = 256  # pairs


def gray_thumbnail(image: Tensor) -> Tensor:
    """Return float16 [48, 48], the gray levels of an image, 0-255.

    Args:
        image: uint8 [3, H, W], RGB.
    """
    luminance = torch.tensor([0.299, 0.587, 0.114])
    gray = torch.einsum("chw,c->hw", image.float(), luminance)[None, None]
    small = min(gray.shape[2:]) < THUMBNAIL
    mode = {"mode": "bilinear", "antialias": True} if small else {"mode": "area"}
    gray = F.interpolate(gray, (THUMBNAIL, THUMBNAIL), **mode)  # type: ignore[arg-type]
    return gray[0, 0].half()


def details(thumbnails: Tensor) -> Tensor:
    """Return unit rows [n, 576] whose dot product is the correlation of details, without search.

    Args:
        thumbnails: float16 [n, 48, 48].
    """
    pooled = F.avg_pool2d(thumbnails.float(), THUMBNAIL // _SIDE).flatten(1)
    return _detail_tiles(pooled).flatten(1)


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """Return the agreement of pairs of images, float32 [P], -1 to 1; 1 for the same picture.

    Args:
        first: float16 [P, 48, 48] of :func:`gray_thumbnail`.
        second: float16 [P, 48, 48].
    """
    parts = [
        _agreement(one.float(), other.float())
        for one, other in zip(first.split(_BATCH), second.split(_BATCH), strict=True)
    ]
    return torch.cat(parts) if parts else torch.empty(0)


def _agreement(one: Tensor, other: Tensor) -> Tensor:
    coarse = (_best_window(one, other), _best_window(other, one))
    swap_P = coarse[1][0] > coarse[0][0]
    best_P, box_P4 = torch.maximum(coarse[0][0], coarse[1][0]), coarse[0][1].clone()
    box_P4[swap_P] = coarse[1][1][swap_P]
    whole = torch.where(swap_P[:, None, None], other, one)
    cropped = torch.where(swap_P[:, None, None], one, other)
    pooled = (F.avg_pool2d(each, THUMBNAIL // _SIDE).flatten(1) for each in (one, other))
    found_P = _compare(*pooled)  # a caption may mislead the search
    rows = (best_P > _PROMISING).nonzero().flatten()
    if len(rows):
        refined = _refine(whole[rows], cropped[rows], box_P4[rows])
        found_P[rows] = torch.maximum(found_P[rows], refined)
    flat_P = (one.flatten(1).std(dim=1) < _FLAT) & (other.flatten(1).std(dim=1) < _FLAT)
    near_P = (one - other).abs().amax(dim=(1, 2)) < _FLAT
    return torch.where(flat_P, near_P.float(), found_P)


def _best_window(whole: Tensor, cropped: Tensor) -> tuple[Tensor, Tensor]:
    """The best correlation [P] with a window of the other image, and the window's box [P, 4]."""
    target_PS = _standard(F.avg_pool2d(whole, THUMBNAIL // _COARSE).flatten(1))
    boxes_W4 = _windows()
    cut_PWS = _cut(F.avg_pool2d(cropped, 2), boxes_W4.expand(len(whole), -1, 4), _COARSE)
    best_P, window_P = _correlate(target_PS, cut_PWS).max(dim=1)
    return best_P, boxes_W4[window_P]


def _refine(whole: Tensor, cropped: Tensor, box: Tensor) -> Tensor:
    """Move the edges of boxes [P, 4] to the best correlation; return the agreement [P]."""
    target_PS = _standard(F.avg_pool2d(whole, THUMBNAIL // _SIDE).flatten(1))
    moves_W4 = torch.cat([torch.eye(4), -torch.eye(4), torch.zeros(1, 4)])
    for step in (0.04, 0.02, 0.02, 0.01, 0.01):
        boxes_PW4 = box.unsqueeze(1) + step * moves_W4
        best_P = _correlate(target_PS, _cut(cropped, boxes_PW4, _SIDE)).argmax(dim=1)
        box = boxes_PW4[torch.arange(len(box)), best_P]
    return _compare(target_PS, _cut(cropped, box.unsqueeze(1), _SIDE).squeeze(1))


def _windows() -> Tensor:
    """Boxes [W, 4] (left, top, right, bottom in 0-1); left > right is flipped."""
    boxes = [(0.0, 0.0, 1.0, 1.0)]
    for size, x, y in itertools.product((0.9, 0.8, 0.7), (0, 0.5, 1), (0, 0.5, 1)):
        left, top = (1 - size) * x, (1 - size) * y
        boxes.append((left, top, left + size, top + size))
    return torch.tensor(boxes + [(right, top, left, bottom) for left, top, right, bottom in boxes])


def _cut(image: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Cut windows [P, W, 4] out of images [P, S, S]: standardized pixels [P, W, side * side].

    Samples lie between the pixels of an image of twice the side, which averages four of them.
    """
    pairs, windows = boxes.shape[:2]
    centers = (torch.arange(side) + 0.5) / side
    left, top, right, bottom = (edge.unsqueeze(-1) for edge in boxes.unbind(dim=-1))
    x, y = left + (right - left) * centers, top + (bottom - top) * centers  # [P, W, side]
    shape = (pairs, windows, side, side)
    grid = torch.stack([x.unsqueeze(2).expand(shape), y.unsqueeze(3).expand(shape)], dim=-1)
    grid = grid.view(pairs, windows * side, side, 2) * 2 - 1
    cut = F.grid_sample(image.unsqueeze(1), grid, align_corners=False, padding_mode="border")
    return _standard(cut.view(pairs, windows, -1))


def _standard(values: Tensor) -> Tensor:
    """Center values along the last dimension, and divide by their norm."""
    centered = values - values.mean(dim=-1, keepdim=True)
    least = _FLAT * values.shape[-1] ** 0.5
    return centered / centered.norm(dim=-1, keepdim=True).clamp(min=least)


def _correlate(target: Tensor, windows: Tensor) -> Tensor:
    return (windows @ target.unsqueeze(-1)).squeeze(-1)


def _compare(one: Tensor, other: Tensor) -> Tensor:
    """The correlation [P] of the details of images [P, 24 * 24], without the worst tiles."""
    one_PTE, other_PTE = _detail_tiles(one), _detail_tiles(other)
    apart_PT = (one_PTE - other_PTE).square().sum(dim=2)
    tiles = apart_PT.shape[1] - _DROPPED
    kept_PTE = apart_PT.argsort(dim=1)[:, :tiles, None].expand(-1, -1, one_PTE.shape[2])
    one_PS, other_PS = (each.gather(1, kept_PTE).flatten(1) for each in (one_PTE, other_PTE))
    return F.cosine_similarity(one_PS, other_PS)


def _detail_tiles(image: Tensor) -> Tensor:
    """Details of images [P, 24 * 24] as tiles [P, T, 4 * 4], of norm 1 together."""
    image = image.view(-1, 1, _SIDE, _SIDE)
    around = F.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    tiles_PTE = F.unfold(image - around, _TILE, stride=_TILE).transpose(1, 2)
    norm_PT1 = tiles_PTE.norm(dim=2, keepdim=True).clamp(min=1e-6)
    most_P11 = norm_PT1.topk(_LIMIT, dim=1).values[:, -1:]
    tiles_PTE = tiles_PTE * (most_P11 / norm_PT1).clamp(max=1)
    return F.normalize(tiles_PTE.flatten(1), dim=1).view_as(tiles_PTE)
