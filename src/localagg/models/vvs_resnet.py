"""ResNets of Zhuang et al., "Unsupervised neural network models of the ventral visual stream"
(PNAS 2021, 118 (3) e2014196118), as github.com/neuroailab/unsup_vvs builds them.

Blocks are post-activation (He et al. 2015, 1512.03385). Unlike torchvision's: every convolution has
a bias, the first one does not pad, and strided 3x3 convolutions and the max-pool pad as
TensorFlow's SAME, which on an even side pads bottom and right only.
"""

import math
from collections.abc import Iterator, Sequence

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import (
    Backbone,
    MaxPoolSame,
    check_sides,
    reference_batch_norm,
    truncated_normal_,
)
from .preact_resnet import block_convolutions

_SIDES = range(7, 1 << 31)  # the first convolution's kernel, and any more

torch.fx.wrap("check_sides")  # has conditions on sizes, which fx cannot trace


class VVSResNet(Backbone):
    """Layers "0" (the first convolution behind its ReLU), "1" (the max-pool) and "2".. (each block
    behind its last ReLU): the original's ``encode_1.conv``, ``encode_1``, ``encode_2``, ...

    Args:
        blocks: number of blocks of each stage.
        bottleneck: 1x1, 3x3, 1x1 with four times the channels, instead of 3x3, 3x3.
    """

    def __init__(self, blocks: Sequence[int], *, bottleneck: bool) -> None:
        super().__init__()
        self.stem, self.norm = _conv(3, 64, 7, 2), reference_batch_norm(64)
        self.relu, self.pool = nn.ReLU(), MaxPoolSame()
        self.blocks = nn.ModuleList()
        channels = 64
        for stage, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                block = PostActBlock(channels, 64 * 2**stage, stride, bottleneck)
                self.blocks.append(block)
                channels = block.channels
        self.channels = channels
        modules = ["relu", "pool", *(f"blocks.{n}" for n in range(len(self.blocks)))]
        self.layer_modules = {str(n): module for n, module in enumerate(modules)}

    def iterate_maps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, map [B, C, H, W]) from first to last."""
        x = check_sides(
            x, _SIDES, x, "This network", "at least 7", "its first convolution does not pad"
        )
        x = self.relu(self.norm(self.stem(x)))
        yield "0", x
        x = self.pool(x)
        yield "1", x
        for layer, block in enumerate(self.blocks, start=2):
            x = block(x)
            yield str(layer), x

    def initialize_head(self, head: nn.Linear) -> None:
        """Initialize as the original: by the fan-in, no bias."""
        _initialize(head)


class PostActBlock(nn.Module):
    """Residual block with batch-norm and ReLU behind each convolution."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.channels = 4 * width if bottleneck else width
        layers = block_convolutions(channels, width, stride, bottleneck)
        self.convs = nn.ModuleList([_conv(*sizes) for sizes in layers])
        self.norms = nn.ModuleList([reference_batch_norm(sizes[1]) for sizes in layers])
        self.relus = nn.ModuleList([nn.ReLU() for _ in layers])
        self.project: nn.Module | None = None
        self.project_norm: nn.Module | None = None
        if stride != 1 or channels != self.channels:
            self.project = _conv(channels, self.channels, 1, stride)
            self.project_norm = reference_batch_norm(self.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [B, C, H, W]."""
        y = x
        for n, conv in enumerate(self.convs):
            if n > 0:
                y = self.relus[n - 1](y)
            if conv.kernel_size == (3, 3) and conv.stride == (2, 2):
                y = _pad_same(y)
            y = self.norms[n](conv(y))
        if self.project is not None and self.project_norm is not None:
            x = self.project_norm(self.project(x))
        return self.relus[-1](y + x)


def _pad_same(x: Tensor) -> Tensor:
    """Pad for a 3x3 convolution with stride 2: after an even side, around an odd one."""
    return F.pad(x, (x.shape[3] % 2, 1, x.shape[2] % 2, 1))


def _conv(channels: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
    """Create a convolution; those with a stride do not pad by themselves."""
    conv = nn.Conv2d(channels, out, kernel, stride, (kernel - 1) // 2 if stride == 1 else 0)
    _initialize(conv)
    return conv


def _initialize(layer: nn.Linear | nn.Conv2d) -> None:
    # tf.contrib's variance_scaling_initializer(): variance 2 / fan_in, which it approximates by
    # the factor 1.3 for a normal cut at two deviations.
    truncated_normal_(layer.weight, math.sqrt(1.3 * 2 / layer.weight[0].numel()))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def resnet18_vvs() -> VVSResNet:
    """Create the ResNet-18 of the publication: 8 blocks, layers "0".."9"."""
    return VVSResNet((2, 2, 2, 2), bottleneck=False)


def resnet50_vvs() -> VVSResNet:
    """Create the ResNet-50 of its code: 16 bottlenecks, layers "0".."17"."""
    return VVSResNet((3, 4, 6, 3), bottleneck=True)
