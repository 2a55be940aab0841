"""torchvision's ResNets (also ResNeXt and wide ones) as backbones, with named maps."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torchvision
from torch import Tensor, nn

from .backbone import Backbone, download_error


class TorchvisionResNet(Backbone):
    """torchvision's ResNet without its classifier; layers "0" (after the max-pool) and "1".."4".

    Args:
        name: one of :func:`torchvision_resnets`; weights are random.
        options: arguments of torchvision's ``ResNet``.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.name = name
        self.layer_modules = {"0": "stem", **{str(n): f"stages.{n - 1}" for n in range(1, 5)}}
        resnet: Any = torchvision.models.get_model(name, weights=None, **options)
        self.channels = resnet.fc.in_features
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.stages = nn.ModuleList([resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4])

    def iterate_maps(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, map [B, C, H, W]) from first to last."""
        x = self.stem(x)
        yield "0", x
        for layer, stage in enumerate(self.stages, start=1):
            x = stage(x)
            yield str(layer), x

    def published_names(self, keys: Iterable[str]) -> list[dict[str, str]]:
        """Return torchvision's naming, and that of ``nn.Sequential(*resnet.children())``."""
        torchvisions = {key: library_name(key) for key in keys}
        numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
        children = {
            key: re.sub(r"^\w+", lambda child: str(numbers[child[0]]), name)
            for key, name in torchvisions.items()
        }
        return [torchvisions, children]

    def pretrained_weights(self) -> dict[str, Tensor]:
        """Return torchvision's default weights: supervised by ImageNet's labels."""
        weights: Any = torchvision.models.get_model_weights(self.name)
        try:
            return weights.DEFAULT.get_state_dict(
                progress=True, check_hash=True, map_location="cpu", weights_only=True
            )
        # No network, a proxy, a damaged file: URLError, OSError, RuntimeError, ...
        except Exception as error:
            raise download_error(self.name, error) from None


def library_name(key: str) -> str:
    """Return torchvision's name of a parameter of :class:`TorchvisionResNet`."""
    key = key.replace("stem.0.", "conv1.").replace("stem.1.", "bn1.")
    return re.sub(r"^stages\.(\d)\.", lambda stage: f"layer{int(stage[1]) + 1}.", key)


def torchvision_resnets() -> list[str]:
    """Return the names that :class:`TorchvisionResNet` takes."""
    return torchvision.models.list_models(include=("resnet*", "resnext*", "wide_resnet*"))
