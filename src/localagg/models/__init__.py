"""Encoders: images in, unit rows out. ``create_encoder`` is the one way to make one."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import UserError, nearest
from . import small_resnet, torchvision_resnet

# Each maps options to a backbone: a module with `channels: int` (of its last map) and
# `maps(x) -> dict[str, Tensor]`, the named [B, C, H, W] maps from first to last.
_BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": torchvision_resnet.resnet18,
    "resnet50": torchvision_resnet.resnet50,
    "resnet18_small": small_resnet.SmallResNet,
}

# Read-out features above these sizes are average-pooled (design of the reference's
# build_transfer_targets: windows of 4 and 2).
_POOL_BY_4, _POOL_BY_2 = 800_000, 200_000


class Encoder(nn.Module):
    """A backbone, a linear embedding head with bias, and normalization at both ends.

    Pixels are normalized in here (ImageNet's mean and deviation, as in the reference), so that a
    user hands over images as they are and weights files are complete.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, dim: int, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.head = nn.Linear(int(backbone.channels), dim)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images.

        Args:
            images: [B, 3, H, W], uint8 in 0-255 or floating in 0-1, RGB.

        Returns:
            float32 unit rows [B, dim].
        """
        maps = self.backbone.maps(self._normalized(images))  # type: ignore[operator]
        pooled_BC = maps.popitem()[1].mean(dim=(2, 3))
        return F.normalize(self.head(pooled_BC).float(), dim=1)

    @property
    def layers(self) -> list[str]:
        """Names of the layers that :meth:`features` knows, from first to last."""
        return list(self.backbone.layers)  # type: ignore[arg-type]

    def features(self, images: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        """Read-out features of named layers, pooled and flattened as the reference does.

        A map of more than 200,000 values an image is average-pooled by 2 (800,000: by 4) and
        flattened in NHWC order; smaller ones are flattened in NCHW order.

        Args:
            images: as in :meth:`forward`.
            layers: names out of :attr:`layers`.

        Returns:
            {name: [B, values]}.

        Raises:
            UserError: a layer that this network does not have.
        """
        wanted = [str(layer) for layer in layers]
        for layer in wanted:
            if layer not in self.layers:
                raise UserError(
                    f"{self.spec['model']} has no layer '{layer}'; it has {', '.join(self.layers)}."
                )
        maps = self.backbone.maps(self._normalized(images))  # type: ignore[operator]
        return {layer: _readout(maps[layer]) for layer in wanted}

    def _normalized(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, 3, H, W]")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        return (images - self.mean) / self.std


def _readout(map_BCHW: Tensor) -> Tensor:
    values = map_BCHW[0].numel()
    if values <= _POOL_BY_2:
        return map_BCHW.flatten(1)
    window = 4 if values > _POOL_BY_4 else 2
    return F.avg_pool2d(map_BCHW, window).permute(0, 2, 3, 1).flatten(1)


def create_encoder(
    model: str, dim: int = 128, *, seed: int | None = None, **options: Any
) -> Encoder:
    """A new encoder with random weights.

    Args:
        model: one of :func:`available_models`.
        dim: size of the embedding.
        seed: of the weights; None takes torch's global generator as it stands.
        options: of the architecture (``resnet18_small``: width, blocks, stem_stride).

    Returns:
        ``encoder(images [B, 3, H, W]) -> float32 unit rows [B, dim]``.

    Raises:
        UserError: no such model (the nearest is suggested) or option.
    """
    if model not in _BACKBONES:
        known = ", ".join(available_models())
        raise UserError(f"There is no model '{model}'; there are {known}.{nearest(model, known)}")
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            backbone = _BACKBONES[model](**options)
        except TypeError as error:
            raise UserError(f"Model {model} does not take these options: {error}.") from None
        return Encoder(backbone, dim, {"model": model, "dim": dim, **options})


def available_models() -> list[str]:
    """Names that :func:`create_encoder` knows."""
    return sorted(_BACKBONES)


def spec_to_json(encoder: Encoder) -> str:
    """What :func:`encoder_from_json` needs to make an encoder of the same shape."""
    return json.dumps(encoder.spec)


def encoder_from_json(text: str) -> Encoder:
    """An encoder of the architecture that :func:`spec_to_json` described, with random weights."""
    spec = json.loads(text)
    return create_encoder(spec.pop("model"), spec.pop("dim"), **spec)
