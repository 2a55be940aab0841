"""Any network of timm as a backbone: ``timm:NAME``. Needs the extra ``localagg[timm]``."""

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor

from ..errors import UserError, suggest
from .backbone import Backbone, Normalization, download_error


class TimmBackbone(Backbone):
    """A timm network without its classifier, random weights.

    Layers "0".. are the maps of timm's ``forward_intermediates``: a convolutional network's stages,
    or a transformer's blocks (as maps, without the class token). The head reads the input of timm's
    own classifier.

    ``options`` are arguments of ``timm.create_model``. UserError: timm is not installed or has no
    network of this name, the network has no named layers, or the options name weights.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError:
            raise UserError(
                "missing-extra", f"Model timm:{name} needs timm: pip install 'localagg[timm]'."
            ) from None
        if not timm.is_model(name):
            known = suggest(f"timm:{name}", [f"timm:{known}" for known in timm.list_models()])
            raise UserError(
                "option-unknown", f"timm {timm.__version__} has no model '{name}'.{known}"
            )
        # Options come from weights files, which may come from anywhere: timm would unpickle the
        # file of "checkpoint_path", and download those of the others.
        for option in sorted(options):
            if option in ("checkpoint_path", "cache_dir") or option.startswith("pretrained"):
                raise UserError(
                    "unsafe", f"timm:{name} starts from random weights; leave out '{option}'."
                )
        self.name, self.options = name, options
        # Any: the networks of timm have these attributes, but no common type that declares them.
        self.model: Any = timm.create_model(name, num_classes=0, **options)
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(
                "unsupported", f"timm:{name} does not return its inner maps; use another network."
            )
        self.normalization = _normalization(self.model.pretrained_cfg)
        self.channels = getattr(self.model, "head_hidden_size", self.model.num_features)
        modules = [info["module"] for info in self.model.feature_info]
        self.layer_modules = {str(n): f"model.{module}" for n, module in enumerate(modules)}

    def pooled(self, x: Tensor) -> Tensor:
        """Return [B, channels], pooled as for timm's own classifier."""
        return self._call(self.model, x)

    def maps(self, x: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the named maps [B, C, H, W] (default: all); stop after the last of them."""
        wanted = [n for n, name in enumerate(self.layers) if layers is None or name in layers]
        forward = self.model.forward_intermediates
        found = self._call(forward, x, indices=wanted, stop_early=True, intermediates_only=True)
        return {self.layers[n]: map_BCHW for n, map_BCHW in zip(wanted, found, strict=True)}

    def published_names(self, keys: Iterable[str]) -> list[dict[str, str]]:
        """Return timm's naming."""
        return [{key: key.removeprefix("model.") for key in keys}]

    def pretrained_weights(self) -> dict[str, Tensor]:
        """Return the weights of this name at timm, in its naming."""
        import timm

        try:
            with _cache_alone_if_offline():
                model = timm.create_model(self.name, pretrained=True, num_classes=0, **self.options)
        # No network, a proxy, no such weights, a damaged file: any error of timm, its hub, torch.
        except Exception as error:
            raise download_error(f"timm:{self.name}", error) from None
        return model.state_dict()

    def _call(self, function: Any, x: Tensor, **arguments: Any) -> Any:
        try:
            return function(x, **arguments)
        except AssertionError as error:  # transformers assert their image size
            raise UserError(
                "mismatch",
                f"This network of timm does not take images of {x.shape[2]}x{x.shape[3]}: {error}",
            ) from None


@contextlib.contextmanager
def _cache_alone_if_offline() -> Iterator[None]:
    """Stop the Hub's client from trying for a minute where there is no network."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # of whatever HTTP library the client uses
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _normalization(found: dict[str, Any]) -> Normalization:
    """Return the images of timm's ``pretrained_cfg``."""
    usual = Normalization()
    return Normalization(
        mean=tuple(found.get("mean", usual.mean)),
        std=tuple(found.get("std", usual.std)),
        interpolation=found.get("interpolation", usual.interpolation),
        image_size=found.get("input_size", (usual.image_size,))[-1],
    )
