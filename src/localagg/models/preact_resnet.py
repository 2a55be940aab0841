"""The reference's ResNet-18 and ResNet-50: pre-activation ("v2"), He et al. 2016 (1603.05027).

Unlike torchvision's: batch-norm and ReLU stand before each convolution, the first stage has a
projection too, bottlenecks stride in their 3x3 convolution, and the first max-pool is TensorFlow's
SAME, which on an even side pads bottom and right only.

Convolutions and batch-norms are registered in the order in which the reference creates them;
:mod:`localagg.interop.tf_variables` relies on it.
"""

import math
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Backbone, reference_norm, truncated_normal_


class PreActResNet(Backbone):
    """Layers "0" (the max-pool's raw output), "1".. (batch-norm and ReLU at the entry of each
    block) and the last (the final batch-norm and ReLU), as the reference counts them.

    Args:
        blocks: of each stage.
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
                block = _Block(channels, 64 * 2**stage, stride, bottleneck, project=number == 0)
                self.blocks.append(block)
                channels = block.channels
        self.norm = reference_norm(channels)
        self.channels = channels
        self.layers = [str(layer) for layer in range(len(self.blocks) + 2)]

    def walk(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The named maps [B, C, H, W] from first to last."""
        x = _max_pool(self.stem(x))
        yield "0", x
        for layer, block in enumerate(self.blocks, start=1):
            entry = F.relu(block.norms[0](x))  # type: ignore[operator,index]
            yield str(layer), entry
            x = block(x, entry)
        yield self.layers[-1], F.relu(self.norm(x))

    def start_head(self, head: nn.Linear) -> None:
        """Glorot's uniform weights and no bias, the default of ``tf.layers.dense``."""
        nn.init.xavier_uniform_(head.weight)
        nn.init.zeros_(head.bias)


class _Block(nn.Module):
    def __init__(
        self, channels: int, width: int, stride: int, bottleneck: bool, *, project: bool
    ) -> None:
        super().__init__()
        self.channels = 4 * width if bottleneck else width
        self.project = _conv(channels, self.channels, 1, stride) if project else None
        if bottleneck:
            self.convs = nn.ModuleList(
                [
                    _conv(channels, width, 1, 1),
                    _conv(width, width, 3, stride),
                    _conv(width, self.channels, 1, 1),
                ]
            )
            inputs = (channels, width, width)
        else:
            self.convs = nn.ModuleList(
                [_conv(channels, width, 3, stride), _conv(width, width, 3, 1)]
            )
            inputs = (channels, width)
        self.norms = nn.ModuleList([reference_norm(size) for size in inputs])

    def forward(self, x: Tensor, entry: Tensor) -> Tensor:
        """Output of a block with input x, whose batch-norm and ReLU is ``entry``."""
        shortcut = x if self.project is None else self.project(entry)
        y = self.convs[0](entry)
        for norm, conv in zip(self.norms[1:], self.convs[1:], strict=True):  # type: ignore[arg-type]
            y = conv(F.relu(norm(y)))
        return y + shortcut


def _conv(channels: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
    """Pads (kernel - 1) / 2 on all sides whatever the stride; variance scaling as initial weights.

    The reference's ``tf.variance_scaling_initializer()``: a normal cut at two deviations, so scaled
    that the weights that are left have variance 1 / fan_in.
    """
    conv = nn.Conv2d(channels, out, kernel, stride, (kernel - 1) // 2, bias=False)
    truncated_normal_(conv.weight, 1 / math.sqrt(channels * kernel**2) / 0.87962566103423978)
    return conv


def _max_pool(x: Tensor) -> Tensor:
    """3x3 of stride 2 with SAME padding: one after an even side, one around an odd one."""
    odd = (x.shape[2] % 2, x.shape[3] % 2)
    return F.max_pool2d(x, 3, 2, padding=odd, ceil_mode=True)


def preact_resnet18() -> PreActResNet:
    """The reference's ``resnet18``: 8 blocks, layers "0".."9"."""
    return PreActResNet((2, 2, 2, 2), bottleneck=False)


def preact_resnet50() -> PreActResNet:
    """The reference's ``resnet50``: 16 bottlenecks, layers "0".."17"."""
    return PreActResNet((3, 4, 6, 3), bottleneck=True)
