"""Parts of a run that the user gives in Python: images, a backbone, and random views.

The run folder stores a digest of each, and a resumed run takes the same objects only.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..config import PretrainConfig
from ..data.loading.own_views import Transform, first_view
from ..data.sources.source import Source
from ..errors import UserError
from ..models import Encoder
from ..models.module_backbone import given_name
from .learner import Learner


@dataclass(frozen=True)
class OwnParts:
    """A backbone and a function that makes views, or None for those of the configuration."""

    backbone: nn.Module | None = None
    views: Transform | None = None

    def configure(self, config: PretrainConfig, source: Source) -> PretrainConfig:
        """Return the configuration with the backbone's name and the size of the views.

        Raises:
            UserError: ``model`` is set too, views that are no images, or cached features of views.
        """
        if self.backbone is not None:
            name = given_name(self.backbone)
            if config.encoder.model not in (None, name):
                raise UserError(
                    "option-conflict",
                    f"backbone= is a network, and so is --model {config.encoder.model}; set one.",
                )
            config = replace(config, encoder=replace(config.encoder, model=name))
        if self.views is not None:
            if config.adapt.feature_views:
                raise UserError(
                    "option-conflict",
                    f"--feature-views {config.adapt.feature_views} caches features of the options'"
                    " views; omit views=, or set feature_views=0.",
                )
            size = first_view(source, config.views, self.views).shape[1]
            config = replace(config, views=replace(config.views, image_size=size))
        return config

    def facts(self, source: Source, encoder: Encoder, config: PretrainConfig) -> dict[str, Any]:
        """Return the digests to store when a run begins."""
        facts: dict[str, Any] = {}
        if self.backbone is not None:
            facts["backbone"] = {"form": _digest(encoder, values=False)}
            facts["backbone"]["values"] = _digest(encoder, values=True)
        if self.views is not None:
            view = first_view(source, config.views, self.views)
            facts["views"] = hashlib.sha256(view.numpy().tobytes()).hexdigest()
        return facts

    def check_given(self, run: object, facts: dict[str, Any]) -> None:
        """Raise UserError unless the parts that a run began with are given again, and no others."""
        for name, part in (("backbone", self.backbone), ("views", self.views)):
            if (name in facts) != (part is not None):
                fix = "pass the same" if name in facts else "omit"
                raise UserError(
                    "option-missing" if name in facts else "option-conflict",
                    f"'{run}' began {'with' if name in facts else 'without'} {name}= in Python;"
                    f" {fix} {name}= to localagg.resume.",
                )

    def check_same(
        self, facts: dict[str, Any], source: Source, learner: Learner, *, values: bool
    ) -> None:
        """Raise UserError if the given parts differ from those that a run began with.

        Args:
            facts: stored when it began.
            source: the images.
            learner: with the given backbone, before a checkpoint is loaded.
            values: also compare the weights, where there is no checkpoint.
        """
        now = self.facts(source, learner.encoder, learner.config)
        kind = "values" if values else "form"
        same = {
            "backbone": now.get("backbone", {}).get(kind) == facts.get("backbone", {}).get(kind),
            "views": now.get("views") == facts.get("views"),
        }
        if different := next((name for name, equal in same.items() if not equal), None):
            raise UserError(
                "mismatch",
                f"{different}= differs from that at the start of the run; pass the same, or start a"
                " new run with another out.",
            )


def _digest(encoder: Encoder, *, values: bool) -> str:
    digest = hashlib.sha256()
    for name, tensor in encoder.backbone.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if values:
            digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()
