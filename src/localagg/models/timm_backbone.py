"""Any network of timm as a backbone: ``timm:NAME``. Needs the extra ``localagg[timm]``."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from ..errors import UserError, suggest
from .backbone import Backbone


class TimmBackbone(Backbone):
    """A timm network without its classifier, random weights.

    Layers "0".. are what timm's ``forward_intermediates`` gives: a convolutional network's stages,
    a transformer's blocks (as maps, class token left out). The head reads what timm's own
    classifier would.

    Args:
        name: as in ``timm.list_models()``.
        options: of ``timm.create_model``.

    Raises:
        UserError: timm is not installed, or has no such network, or none with named layers; or the
            options name weights.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError:
            raise UserError(
                "TODO", f"Model timm:{name} needs timm: pip install 'localagg[timm]'."
            ) from None
        if not timm.is_model(name):
            known = suggest(f"timm:{name}", [f"timm:{known}" for known in timm.list_models()])
            raise UserError("TODO", f"timm {timm.__version__} has no model '{name}'.{known}")
        # A weights file says its network's options, and may come from anywhere: timm would unpickle
        # what "checkpoint_path" names, and fetch what the others name.
        for option in sorted(options):
            if option in ("checkpoint_path", "cache_dir") or option.startswith("pretrained"):
                raise UserError(
                    "TODO", f"timm:{name} starts from random weights; leave out '{option}'."
                )
        # Any: timm's networks share these names, but no type that says so.
        self.model: Any = timm.create_model(name, num_classes=0, **options)
        if not hasattr(self.model, "forward_intermediates"):
            raise UserError(
                "TODO", f"timm:{name} does not give its inner maps; take another network."
            )
        self.channels = getattr(self.model, "head_hidden_size", self.model.num_features)
        self.layers = [str(layer) for layer in range(len(self.model.feature_info))]

    def vector(self, x: Tensor) -> Tensor:
        """[B, channels], pooled as timm's own classifier would have it."""
        return self._checked(self.model, x)

    def maps(self, x: Tensor, layers: Collection[str] | None = None) -> dict[str, Tensor]:
        """Named maps [B, C, H, W], from first to last."""
        wanted = [n for n, name in enumerate(self.layers) if layers is None or name in layers]
        found = self._checked(
            self.model.forward_intermediates,
            x,
            indices=wanted,
            stop_early=True,
            intermediates_only=True,
        )
        return {self.layers[n]: map_BCHW for n, map_BCHW in zip(wanted, found, strict=True)}

    def _checked(self, function: Any, x: Tensor, **arguments: Any) -> Any:
        try:
            return function(x, **arguments)
        except AssertionError as error:  # transformers assert their image size
            raise UserError(
                "TODO", f"timm refuses images of {x.shape[2]}x{x.shape[3]}: {error}"
            ) from None
