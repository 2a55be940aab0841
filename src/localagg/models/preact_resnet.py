"""The reference's ResNet-18 and ResNet-50: pre-activation ("v2"), He et al. 2016 (1603.05027).

Unlike torchvision's: batch-norm and ReLU stand before each convolution, the first stage has a
projection too, bottlenecks stride in their 3x3 convolution, and the first max-pool is TensorFlow's
SAME, which on an even side pads bottom and right only.

Convolutions and batch-norms are registered in the order in which the reference creates them;
:mod:`localagg.interop.variable_names` relies on it.
"""

import math
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from .backbone import (
    Backbone,
    MaxPoolSame,
    initialize_glorot,
    reference_batch_norm,
    truncated_normal_,
)


class PreActResNet(Backbone):
    """Layers "0" (the max-pool's raw output), "1".. (batch-norm and ReLU at the entry of each
    block) and the last (the final batch-norm and ReLU), as the reference counts them.

    Args:
        blocks: number of blocks of each stage.
        bottleneck: 1x1, 3x3, 1x1 with four times the channels, instead of 3x3, 3x3.
    """

    def __init__(self, blocks: Sequence[int], *, bottleneck: bool) -> None:
        super().__init__()
        self.stem = _conv(3, 64, 7, 2)
        self.blocks = nn.ModuleList()
        channels = 64
        for stage, count in enumerate(blocks):
            for number in range(count):
                stride = 2 if stage > 0 and number == 0 else 1
                block = PreActBlock(
                    channels, 64 * 2**stage, stride, bottleneck, project=number == 0
                )
                self.blocks.append(block)
                channels = block.channels
        self.pool, self.relu = MaxPoolSame(), nn.ReLU()
        self.norm = reference_batch_norm(channels)
        self.channels = channels
        entries = [f"blocks.{n}.relus.0" for n in range(len(self.blocks))]
        self.layer_modules = {str(n): m for n, m in enumerate(["pool", *entries, "relu"])}

    def iterate_maps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, map [B, C, H, W]) from first to last."""
        x = self.pool(self.stem(x))
        yield "0", x
        for layer, block in enumerate(self.blocks, start=1):
            entry = block.relus[0](block.norms[0](x))  # type: ignore[operator,index]
            yield str(layer), entry
            x = block(x, entry)
        yield self.layers[-1], self.relu(self.norm(x))

    def initialize_head(self, head: nn.Linear) -> None:
        """Set Glorot's uniform weights and no bias, the default of ``tf.layers.dense``."""
        initialize_glorot(head)


class PreActBlock(nn.Module):
    """Residual block with batch-norm and ReLU before each convolution."""

    def __init__(
        self, channels: int, width: int, stride: int, bottleneck: bool, *, project: bool
    ) -> None:
        super().__init__()
        self.channels = 4 * width if bottleneck else width
        self.project = _conv(channels, self.channels, 1, stride) if project else None
        layers = block_convolutions(channels, width, stride, bottleneck)
        self.convs = nn.ModuleList([_conv(*sizes) for sizes in layers])
        self.norms = nn.ModuleList([reference_batch_norm(sizes[0]) for sizes in layers])
        self.relus = nn.ModuleList([nn.ReLU() for _ in layers])

    def forward(self, x: Tensor, entry: Tensor) -> Tensor:
        """Return the output of a block with input x; ``entry`` is its batch-norm and ReLU."""
        shortcut = x if self.project is None else self.project(entry)
        y = self.convs[0](entry)
        for n in range(1, len(self.convs)):
            y = self.convs[n](self.relus[n](self.norms[n](y)))
        return y + shortcut


def block_convolutions(
    channels: int, width: int, stride: int, bottleneck: bool
) -> list[tuple[int, int, int, int]]:
    """Return (channels, outputs, kernel, stride) of each convolution of a residual block."""
    if bottleneck:
        return [(channels, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
    return [(channels, width, 3, stride), (width, width, 3, 1)]


def _conv(channels: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
    """Create a convolution padded by (kernel - 1) / 2 on all sides whatever the stride."""
    # The reference's tf.variance_scaling_initializer(): a normal cut at two deviations, scaled so
    # that the remaining weights have variance 1 / fan_in.
    conv = nn.Conv2d(channels, out, kernel, stride, (kernel - 1) // 2, bias=False)
    truncated_normal_(conv.weight, 1 / math.sqrt(channels * kernel**2) / 0.87962566103423978)
    return conv


def preact_resnet18() -> PreActResNet:
    """Create the reference's ``resnet18``: 8 blocks, layers "0".."9"."""
    return PreActResNet((2, 2, 2, 2), bottleneck=False)


def preact_resnet50() -> PreActResNet:
    """Create the reference's ``resnet50``: 16 bottlenecks, layers "0".."17"."""
    return PreActResNet((3, 4, 6, 3), bottleneck=True)
