"""The encoder: a backbone, an embedding head, and normalization of pixels and embeddings."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import check_arguments, is_integer
from ..errors import UserError, first_line, suggest
from .alexnet import AlexNet
from .backbone import Backbone, Compat, Normalization
from .preact_resnet import preact_resnet18, preact_resnet50
from .small_resnet import SmallResNet
from .timm_backbone import TimmBackbone
from .torchvision_resnet import TorchvisionResNet, torchvision_resnets
from .vgg import VGG16
from .vvs_resnet import resnet18_vvs, resnet50_vvs

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "preact_resnet18": preact_resnet18,
    "preact_resnet50": preact_resnet50,
    "alexnet_bn": AlexNet,
    "vgg16_bn_last": VGG16,
    "resnet18_vvs": resnet18_vvs,
    "resnet50_vvs": resnet50_vvs,
    "resnet18_small": SmallResNet,
    **{name: partial(TorchvisionResNet, name) for name in torchvision_resnets()},
}

_ROUNDING = 1e-3  # that resized images may exceed 0-1 by

GIVEN = "module:"
"""Prefix of the name of a network that was given in Python as a module."""


class Encoder(nn.Module):
    """A backbone and an embedding head with bias, which maps images to unit rows.

    The encoder normalizes pixels itself, so that images are passed as they are and weights files
    are complete. Mean and deviation are ImageNet's, as in the reference; timm's networks have
    their own.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, dim: int, spec: dict[str, Any]) -> None:
        super().__init__()
        self._frozen_statistics = False
        self.spec = spec
        self.backbone = backbone
        self.hidden: nn.Module = nn.Identity()
        if spec.get("head_layers", 1) == 2:
            self.hidden = nn.Sequential(nn.Linear(backbone.channels, backbone.channels), nn.ReLU())
        self.head = nn.Linear(backbone.channels, dim)
        backbone.initialize_head(self.head)
        usual = backbone.normalization
        self.register_buffer("mean", torch.tensor(usual.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(usual.std).view(1, 3, 1, 1))

    @property
    def normalization(self) -> Normalization:
        """Mean and deviation of the pixels, and the images that the backbone was made for."""
        mean, std = (
            tuple(round(v, 6) for v in b.flatten().tolist()) for b in (self.mean, self.std)
        )
        return replace(self.backbone.normalization, mean=mean, std=std)

    def forward(self, images: Tensor) -> Tensor:
        """Return unit rows [B, dim], float32 (float64 from float64 weights).

        Args:
            images: [B, 3, H, W] RGB, uint8 in 0-255 or floating in 0-1. AlexNet and VGG raise
                UserError for sizes that they do not take; so do all in eval mode for other values.
        """
        return F.normalize(self.unnormalized(images), dim=1)

    def unnormalized(self, images: Tensor) -> Tensor:
        """Return the head's output float32 [B, dim], before it is scaled to unit length."""
        return _at_least_float32(self.head(self.hidden(self.pooled(images))))

    def pooled(self, images: Tensor) -> Tensor:
        """Return the backbone's pooled last map [B, channels], which the head reads.

        Rows [B, channels] are such features already, and are returned as they are.
        """
        if isinstance(images, Tensor) and images.ndim == 2:  # a tracer has images
            return images.to(self.mean.dtype)
        return self.backbone(self._normalize_pixels(images))

    def freeze_statistics(self) -> None:
        """Keep the backbone in inference mode also in training: batch-norm by its running
        statistics, no dropout."""
        self._frozen_statistics = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        """Set training or inference mode; see :meth:`freeze_statistics`."""
        super().train(mode)
        if self._frozen_statistics:
            self.backbone.eval()
        return self

    @property
    def layers(self) -> list[str]:
        """Names of the layers that :meth:`features` takes, from first to last."""
        return self.backbone.layers

    @property
    def layer_modules(self) -> dict[str, str]:
        """{layer: dotted name of the module whose output it is}, for forward hooks.

        Blocks of timm's transformers return tokens, of which :meth:`maps` makes maps.
        """
        return {la: f"backbone.{module}" for la, module in self.backbone.layer_modules.items()}

    def maps(self, images: Tensor, layers: Iterable[str | int] | None = None) -> dict[str, Tensor]:
        """Return the maps {name: [B, C, H, W]}, not pooled; default: of all layers.

        The network runs up to the last named layer, and only this part must accept the size of the
        images.

        Args:
            images: as in :meth:`forward`.
            layers: names out of :attr:`layers`; 3 means "3". Others raise UserError.
        """
        if layers is not None and (isinstance(layers, str) or not isinstance(layers, Iterable)):
            layers = [layers]
        names = self.layers if layers is None else [str(layer) for layer in layers]
        for name in names:
            if name not in self.layers:
                known = ", ".join(self.layers)
                raise UserError(
                    "option-unknown", f"{self.spec['model']} has no layer '{name}'; it has {known}."
                )
        maps = self.backbone.maps(self._normalize_pixels(images), names)
        return {name: maps[name] for name in names}

    def features(
        self, images: Tensor, layers: Iterable[str | int], *, compat: Compat | None = None
    ) -> dict[str, Tensor]:
        """Return read-out features {name: [B, values]}, pooled and flattened as in the reference.

        See :meth:`Backbone.flatten_map` of each network for the rule.

        Args:
            images, layers: as in :meth:`maps`.
            compat: "reference" also copies the reference's slip in VGG.
        """
        if compat not in (None, "reference"):
            raise UserError("option-invalid", f"compat is '{compat}'; use 'reference' or omit it.")
        maps = self.maps(images, layers)
        return {name: self.backbone.flatten_map(map_, compat) for name, map_ in maps.items()}

    def _normalize_pixels(self, images: Tensor) -> Tensor:
        return _normalize_pixels(images, self.mean, self.std, values=not self.training)


# torch.fx, and so torchvision's create_feature_extractor, cannot trace their conditions.
@torch.fx.wrap
def _normalize_pixels(images: Tensor, mean: Tensor, std: Tensor, *, values: bool) -> Tensor:
    check_pixels(images, values=values)
    if images.device != mean.device:
        raise UserError(
            "option-invalid",
            f"The images are on {images.device} and the network on {mean.device}; move one.",
        )
    if images.dtype == torch.uint8:
        images = images.to(mean.dtype) / 255
    elif images.dtype != mean.dtype:  # float64, say, would reach the convolutions
        images = images.to(mean.dtype)
    return (images - mean) / std


@torch.fx.wrap
def _at_least_float32(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32))


def check_pixels(images: Tensor, *, values: bool = True) -> None:
    """Check shape, dtype and range of images.

    Args:
        images: to be [B, 3, H, W], uint8, or floating in 0-1.
        values: check the range too; on a GPU this waits for the device, so training omits it.

    Raises:
        UserError: they are something else, such as floats in 0-255 or normalized ones.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return
    if not isinstance(images, Tensor):
        raise UserError(
            "option-invalid",
            f"The images are of type {type(images).__name__}; pass a tensor [B, 3, H, W].",
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise UserError(
            "option-invalid",
            f"The images have the shape {list(images.shape)}; pass [B, 3, H, W].",
        )
    if images.dtype == torch.uint8 or images.is_meta:
        return
    if not images.is_floating_point():
        raise UserError(
            "option-invalid", f"The images are {images.dtype}; pass uint8, or floats in 0-1."
        )
    if values and images.numel():
        low, high = (float(value) for value in images.aminmax())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise UserError(
                "option-invalid",
                f"The images have values from {low:g} to {high:g}; pass uint8 in 0-255, or floats"
                " in 0-1 that are not normalized: the encoder normalizes them.",
            )


def create_encoder(
    model: str,
    dim: int = 128,
    *,
    head_layers: int = 1,
    seed: int | None = None,
    **options: Any,
) -> Encoder:
    """Create an encoder with random weights: images [B, 3, H, W] -> float32 unit rows [B, dim].

    Args:
        model: one of :func:`available_models`, or "timm:NAME" for any network of timm.
        dim: size of the embedding.
        head_layers: 1, a linear head as in the paper; or 2, with a hidden layer and ReLU before
            it, as in SimCLR (Chen et al. 2020, section 4.2).
        seed: random seed of the weights. Default: torch's global generator.
        options: of the architecture (``resnet18_small``: width, blocks, stem_stride; torchvision's
            and timm's own). Unknown models and options raise UserError.
    """
    if not isinstance(model, str):
        raise UserError("option-invalid", f"model is {model!r}; pass a name such as 'resnet18'.")
    check_arguments(dim=(dim, 1))
    if seed is not None:
        check_arguments(seed=(seed, 0))
    dim, _ = int(dim), head_options(head_layers)  # checks it
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            backbone = _create_backbone(model, options)
        except (TypeError, ValueError, RuntimeError) as error:
            if not options:
                raise
            raise UserError(
                "option-unknown",
                f"Model {model} does not take these options: {first_line(error)}.",
            ) from None
        spec = {"model": model, "dim": dim, **options, **head_options(head_layers)}
        return Encoder(backbone, dim, spec)


def head_options(head_layers: int) -> dict[str, int]:
    """Return the part of a spec for the head; specs of linear heads omit it."""
    if not is_integer(head_layers) or head_layers not in (1, 2):
        raise UserError("option-invalid", f"head_layers is {head_layers!r}; use 1 or 2.")
    return {} if head_layers == 1 else {"head_layers": head_layers}


def _create_backbone(model: str, options: dict[str, Any]) -> Backbone:
    if model in BACKBONES:
        return BACKBONES[model](**options)
    if model.startswith("timm:"):
        return TimmBackbone(model.removeprefix("timm:"), **options)
    if model.startswith(GIVEN):
        raise UserError(
            "option-missing",
            f"The network {model.removeprefix(GIVEN)} was given in Python; pass it again as"
            " backbone=MODULE, to localagg.load, load_encoder or resume.",
        )
    known = available_models()
    raise UserError(
        "option-unknown",
        f"There is no model '{model}'; there are {', '.join(known)} and timm:NAME."
        f"{suggest(model, known)}",
    )


def available_models() -> list[str]:
    """Return the names that :func:`create_encoder` takes, besides "timm:NAME"."""
    return sorted(BACKBONES)


def offers_weights(model: str) -> bool:
    """Return whether a library offers pretrained weights for a model (of timm: perhaps)."""
    return model.startswith("timm:") or model in torchvision_resnets()
