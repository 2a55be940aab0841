"""Any ``nn.Module`` as a backbone, given in Python."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line
from .backbone import Backbone
from .encoder import GIVEN, Encoder, head_options


class ModuleBackbone(Backbone):
    """A module that returns [B, C] or maps [B, C, H, W] of normalized images [B, 3, S, S].

    Maps are the layer "0". Pixels are normalized by ImageNet's mean and deviation, or by the
    module's ``normalization``, a :class:`.Normalization`.

    Raises UserError if its output for images of ``image_size`` has another form.
    """

    def __init__(self, module: nn.Module, image_size: int) -> None:
        super().__init__()
        self.module, self.image_size = module, image_size
        self.normalization = getattr(module, "normalization", self.normalization)
        example = next(module.parameters(), torch.empty(0))
        training, images = module.training, torch.zeros(2, 3, image_size, image_size).to(example)
        module.eval()
        try:
            with torch.no_grad():
                found = self._call(images)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise UserError(
                "mismatch",
                f"The backbone {type(module).__name__} fails for images {list(images.shape)}:"
                f" {first_line(error)}",
            ) from error
        finally:
            module.train(training)
        self.channels = found.shape[1]
        self.layer_modules = {"0": "module"} if found.ndim == 4 else {}

    def pooled(self, x: Tensor) -> Tensor:
        """Return the module's output [B, channels]; the mean over space of maps."""
        found = self._call(x)
        return found.mean(dim=(2, 3)) if found.ndim == 4 else found

    def maps(self, x: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the module's maps as layer "0", if it returns maps."""
        return {layer: self._call(x) for layer in self.layers if layers is None or layer in layers}

    def published_names(self, keys: Iterable[str]) -> list[dict[str, str]]:
        """Return the module's own names."""
        return [{key: key.removeprefix("module.") for key in keys}]

    def _call(self, x: Tensor) -> Tensor:
        found: Any = self.module(x)
        if not isinstance(found, Tensor) or found.ndim not in (2, 4) or len(found) != len(x):
            form = (
                f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            )
            raise UserError(
                "mismatch",
                f"The backbone {type(self.module).__name__} returns {form} for images"
                f" {list(x.shape)}; return [B, C] or [B, C, H, W].",
            )
        return found


def encoder_of(
    module: nn.Module, dim: int, image_size: int, *, head_layers: int = 1, seed: int | None = None
) -> Encoder:
    """Return an encoder of any module, which it shares, and a new head.

    Args:
        module: gives [B, C] or [B, C, H, W] for normalized images [B, 3, image_size, image_size].
        dim: size of the embedding.
        image_size: side of the images in pixels.
        head_layers, seed: see :func:`.create_encoder`; the module's weights stay.

    Raises:
        UserError: the module returns something else.
    """
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        spec = {"model": given_name(module), "dim": dim, **head_options(head_layers)}
        return Encoder(ModuleBackbone(module, image_size), dim, spec)


def given_name(module: nn.Module) -> str:
    """Return the name of a module as a model, which no file can create."""
    return f"{GIVEN}{type(module).__name__}"
