"""What a network is to its encoder, and how the reference pools and flattens its maps."""

from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Compat = Literal["reference"]

# The reference pools a map by 2 above so many values an image, and by 4 above so many.
_POOL_BY_2, _POOL_BY_4 = 200_000, 800_000


class Backbone(nn.Module):
    """A network without its embedding head.

    A subclass sets ``channels`` and ``layers`` and either walks, or overrides :meth:`vector` and
    :meth:`maps` together.
    """

    channels: int
    """Size of the vector that the head reads."""
    layers: Sequence[str]
    """Names of the maps, from first to last."""

    def walk(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The named maps [B, C, H, W] from first to last, each computed when it is asked for.

        Args:
            x: normalized images [B, 3, H, W].
        """
        raise NotImplementedError

    def vector(self, x: Tensor) -> Tensor:
        """[B, channels]: the last map's mean over space, which the head reads."""
        for _, map_BCHW in self.walk(x):
            x = map_BCHW  # so that maps in between are freed on the way
        return x.mean(dim=(2, 3))

    def maps(self, x: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """Named maps [B, C, H, W], from first to last; stops behind the last one that is wanted."""
        wanted = set(self.layers if layers is None else layers)
        found: dict[str, Tensor] = {}
        for name, map_BCHW in self.walk(x):
            if name in wanted:
                found[name] = map_BCHW
            if len(found) == len(wanted):
                break
        return found

    def readout(self, map_BCHW: Tensor, compat: Compat | None) -> Tensor:
        """A map as read-out feature [B, values], by the reference's rule for its ResNets.

        More than 200,000 values an image are averaged over windows of 2 (800,000: of 4) and
        flattened in NHWC order, fewer are flattened in NCHW order.
        """
        window = pool_window(map_BCHW)
        if window == 1:
            return map_BCHW.flatten(1)
        return flatten_nhwc(average_pool(map_BCHW, window))

    def start_head(self, head: nn.Linear) -> None:
        """Give the head this network's initial weights; the default leaves torch's."""


def pool_window(map_BCHW: Tensor) -> int:
    """Window by which the reference averages a map of this size: 1, 2 or 4."""
    values = map_BCHW[0].numel()
    return 4 if values > _POOL_BY_4 else 2 if values > _POOL_BY_2 else 1


def average_pool(map_BCHW: Tensor, window: int) -> Tensor:
    """TensorFlow's average pooling with SAME padding, stride = window.

    Of the padding that makes a side divisible, the smaller half goes before; windows at the edge
    average over what is inside.
    """
    before = [(-side % window) // 2 for side in map_BCHW.shape[2:]]
    return F.avg_pool2d(map_BCHW, window, padding=before, ceil_mode=True, count_include_pad=False)


def flatten_nhwc(map_BCHW: Tensor) -> Tensor:
    """[B, H*W*C], channels fastest, as TensorFlow flattens."""
    return map_BCHW.permute(0, 2, 3, 1).flatten(1)


def reference_norm(channels: int) -> nn.BatchNorm2d:
    """Batch-norm as in the reference: decay 0.997 and eps 1e-5; variance is tracked unbiased."""
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=1 - 0.997)


@torch.no_grad()
def truncated_normal_(weight: Tensor, std: float) -> None:
    """Fill with normal draws of deviation std, those beyond two deviations drawn again.

    TensorFlow's ``truncated_normal``; ``nn.init.trunc_normal_`` takes several times as long.
    """
    weight.normal_(0, std)
    if weight.is_meta:  # has no values to draw again
        return
    while len(again := weight.abs().flatten().gt(2 * std).nonzero()):
        weight.view(-1)[again] = torch.randn(again.shape, device=weight.device) * std
