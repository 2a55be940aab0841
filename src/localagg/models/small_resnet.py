"""A ResNet for images of 8 to 64 pixels: 3x3 stem, no max-pool (He et al. 2016, 1512.03385).

The layout is usual for CIFAR: later stages halve the map and double the channels.
"""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..config import check_arguments
from .backbone import Backbone


class SmallResNet(Backbone):
    """The backbone ``resnet18_small``.

    Args:
        width: channels of the first stage.
        blocks: number of residual blocks of each stage; (2, 2, 2, 2) is ResNet-18.
        stem_stride: stride of the first convolution.
    """

    def __init__(
        self, width: int = 64, blocks: Sequence[int] = (2, 2, 2, 2), stem_stride: int = 1
    ) -> None:
        super().__init__()
        check_arguments(width=(width, 1), stem_stride=(stem_stride, 1), stages=(len(blocks), 1))
        for count in blocks:
            check_arguments(blocks=(count, 1))
        self.stem = _conv(3, width, 3, stem_stride)
        self.stem_norm, self.stem_relu = nn.BatchNorm2d(width), nn.ReLU()
        stages, channels = [], width
        for stage, count in enumerate(blocks):
            out = width * 2**stage
            first = BasicBlock(channels, out, stride=1 if stage == 0 else 2)
            stages.append(
                nn.Sequential(first, *(BasicBlock(out, out, 1) for _ in range(count - 1)))
            )
            channels = out
        self.stages = nn.ModuleList(stages)
        self.channels = channels
        modules = ["stem_relu", *(f"stages.{n}" for n in range(len(stages)))]
        self.layer_modules = {str(n): module for n, module in enumerate(modules)}

    def iterate_maps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield maps by name: "0" after the stem, "1".. after each stage, all behind their ReLU."""
        x = self.stem_relu(self.stem_norm(self.stem(x)))
        yield "0", x
        for layer, stage in enumerate(self.stages, start=1):
            x = stage(x)
            yield str(layer), x


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels, out, 3, stride), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = _conv(out, out, 3, 1), nn.BatchNorm2d(out)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(_conv(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output [B, C, H, W]."""
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


def _conv(channels: int, out: int, kernel: int, stride: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
