"""Encoders: images in, unit rows out. ``create_encoder`` is the one way to make one."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError, suggest
from .alexnet import AlexNet
from .backbone import Backbone, Compat
from .preact_resnet import preact_resnet18, preact_resnet50
from .small_resnet import SmallResNet
from .timm_backbone import TimmBackbone
from .torchvision_resnet import TorchvisionResNet, torchvision_resnets
from .vgg import VGG16

_OURS: dict[str, Callable[..., Backbone]] = {
    "preact_resnet18": preact_resnet18,
    "preact_resnet50": preact_resnet50,
    "alexnet_bn": AlexNet,
    "vgg16_bn_last": VGG16,
    "resnet18_small": SmallResNet,
}


class Encoder(nn.Module):
    """A backbone, an embedding head with bias (linear, as in the paper, unless its spec has two
    ``head_layers``), and normalization at both ends.

    Pixels are normalized in here (ImageNet's mean and deviation, as in the reference), so that a
    user hands over images as they are and weights files are complete.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, backbone: Backbone, dim: int, spec: dict[str, Any], compat: Compat | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.compat: Compat | None = _checked(compat)
        self.backbone = backbone
        self.hidden: nn.Module = nn.Identity()
        if spec.get("head_layers", 1) == 2:
            self.hidden = nn.Sequential(nn.Linear(backbone.channels, backbone.channels), nn.ReLU())
        self.head = nn.Linear(backbone.channels, dim)
        backbone.start_head(self.head)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images.

        Args:
            images: [B, 3, H, W], uint8 in 0-255 or floating in 0-1, RGB.

        Returns:
            float32 unit rows [B, dim] (float64 from float64 weights).

        Raises:
            UserError: images of a size that this network cannot take (AlexNet, VGG).
        """
        return F.normalize(self.unnormalized(images), dim=1)

    def unnormalized(self, images: Tensor) -> Tensor:
        """float32 [B, dim]: what the head computes, before it is brought to unit length."""
        found = self.head(self.hidden(self.backbone.vector(self._normalized(images))))
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @property
    def layers(self) -> list[str]:
        """Names of the layers that :meth:`features` knows, from first to last."""
        return list(self.backbone.layers)

    def features(
        self, images: Tensor, layers: Iterable[str | int], *, compat: Compat | None = None
    ) -> dict[str, Tensor]:
        """Read-out features of named layers, pooled and flattened as the reference does.

        ResNets (and all networks that the reference does not have): a map of more than 200,000
        values an image is average-pooled by 2 (800,000: by 4) and flattened in NHWC order; smaller
        ones are flattened in NCHW order. AlexNet: never pooled, NHWC order. VGG: pooled as ResNets,
        NHWC order.

        Args:
            images: as in :meth:`forward`; only the network up to the last of the layers is
                computed, and only that must be able to take their size.
            layers: names out of :attr:`layers`; 3 means "3".
            compat: "reference" also copies the reference's slip of pooling VGG's maps over width
                and channels; None: what the encoder was created with.

        Returns:
            {name: [B, values]}.

        Raises:
            UserError: a layer that this network does not have, or a wrong ``compat``.
        """
        compat = _checked(compat) or self.compat
        wanted = [str(layer) for layer in layers]
        for layer in wanted:
            if layer not in self.layers:
                raise UserError(
                    "TODO",
                    f"{self.spec['model']} has no layer '{layer}'; it has {', '.join(self.layers)}.",
                )
        maps = self.backbone.maps(self._normalized(images), wanted)
        return {layer: self.backbone.readout(maps[layer], compat) for layer in wanted}

    def _normalized(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [B, 3, H, W]")
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        return (images - self.mean) / self.std


def _checked(compat: str | None) -> Compat | None:
    if compat is None or compat == "reference":
        return compat
    raise UserError("TODO", f"compat is '{compat}'; it can be 'reference' or be left out.")


def create_encoder(
    model: str,
    dim: int = 128,
    *,
    head_layers: int = 1,
    seed: int | None = None,
    compat: Compat | None = None,
    **options: Any,
) -> Encoder:
    """A new encoder with random weights.

    Args:
        model: one of :func:`available_models`, or "timm:NAME" for any network of timm.
        dim: size of the embedding.
        head_layers: 1, a linear head as in the paper; or 2, with a hidden layer and ReLU before
            it, as in SimCLR (Chen et al. 2020, section 4.2).
        seed: of the weights; None takes torch's global generator as it stands.
        compat: the default of :meth:`Encoder.features`. It says how features are read and is no
            property of the weights: it is not saved with them.
        options: of the architecture (``resnet18_small``: width, blocks, stem_stride; torchvision's
            and timm's own).

    Returns:
        ``encoder(images [B, 3, H, W]) -> float32 unit rows [B, dim]``.

    Raises:
        UserError: no such model (the nearest is suggested) or option.
    """
    if head_layers not in (1, 2):
        raise UserError("TODO", f"head_layers is {head_layers}; a head has 1 or 2.")
    make = _backbone(model)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            backbone = make(**options)
        except TypeError as error:
            raise UserError(
                "TODO", f"Model {model} does not take these options: {error}."
            ) from None
        spec = {"model": model, "dim": dim, **options}
        if head_layers != 1:  # files of linear heads do not name it
            spec["head_layers"] = head_layers
        return Encoder(backbone, dim, spec, compat)


def _backbone(model: str) -> Callable[..., Backbone]:
    if model in _OURS:
        return _OURS[model]
    if model in torchvision_resnets():
        return lambda **options: TorchvisionResNet(model, **options)
    if model.startswith("timm:"):
        return lambda **options: TimmBackbone(model.removeprefix("timm:"), **options)
    known = available_models()
    raise UserError(
        "TODO",
        f"There is no model '{model}'; there are {', '.join(known)} and timm:NAME."
        f"{suggest(model, known)}",
    )


def available_models() -> list[str]:
    """Names that :func:`create_encoder` knows; it also takes "timm:NAME" for any name of timm."""
    return sorted([*_OURS, *torchvision_resnets()])


def spec_to_json(encoder: Encoder) -> str:
    """What :func:`encoder_from_json` needs to make an encoder of the same shape."""
    return json.dumps(encoder.spec)


def encoder_from_json(text: str) -> Encoder:
    """An encoder of the architecture that :func:`spec_to_json` described, with random weights."""
    spec = json.loads(text)
    return create_encoder(spec.pop("model"), spec.pop("dim"), **spec)
