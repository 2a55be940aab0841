"""A linear read-out while it learns: labelled images, network, optimizer, step, how it is saved."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import TransferConfig, require_resolved
from ..data.images.augment import Augment
from ..data.loading.loader import Feed, on_device
from ..data.loading.scan import load_or_scan, require_readable
from ..engine.device import make_fabric
from ..errors import UserError
from ..io.console import notify, show_progress
from ..io.files import atomic_write
from ..models import Encoder
from ..recipes.schedule import Schedule
from .feature_cache import CachedFeatures, FeatureCache, FeatureExtractor, is_fixed
from .linear_heads import LinearHeads, accuracies, evaluation_views, make_optimizer
from .readout_inputs import LabeledSplits, check_classes, general_options

_ROWS = 256  # kept features at a time


class LinearProbe:
    """All that a transfer works on: images, network, optimizer, schedule, and the step.

    Args:
        config: resolved.
        encoder: its own copy.
        labelled: the images.
        facts: "data" and "weights", for the results.
    """

    def __init__(
        self,
        config: TransferConfig,
        encoder: Encoder,
        labelled: LabeledSplits,
        facts: dict[str, Any],
    ) -> None:
        self.config, self.facts, self.labelled = config, facts, labelled
        general = general_options(config)
        self.fabric = make_fabric(config.device, config.precision)
        self.device = self.fabric.device
        size = require_resolved(config.views.image_size)
        self.readout = LinearHeads(
            encoder.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            config.layers or (),
            labelled.classes,
            size,
            seed=config.seed,
            finetune=config.finetune,
            compat=config.compat,
        )
        self.network, self.optimizer = self.fabric.setup(
            self.readout,
            make_optimizer(
                self.readout,
                learning_rate=config.learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
            ),
        )
        with show_progress("reading images") as show:
            self.feed = Feed(
                labelled.source,
                config.views,
                batch_size=require_resolved(config.batch_size),
                seed=config.seed,
                workers=config.workers,
                memory=config.memory,
                memory_gb=config.memory_gb,
                unreadable=config.unreadable,
                device=config.device,
                on_progress=show,
            )
            held_out = load_or_scan(
                labelled.held_out,
                upright=config.views.exif_orientation,
                memory=config.memory,
                memory_gb=config.memory_gb,
                workers=config.workers,
                on_progress=show,
            )
        require_readable(labelled.held_out, held_out.unreadable, config.unreadable)
        self.pixels = held_out.complete_pixels
        self.kept: CachedFeatures | None = None
        self.kept_held_out: CachedFeatures | None = None
        if config.cache_gb and not config.finetune:
            self._keep_features()
        check_classes(labelled, self.feed.valid)
        self.schedule = Schedule(general, len(self.feed.valid))
        self.labels = labelled.labels.to(self.device)
        self.held_out_labels = labelled.held_out_labels.to(self.device)
        self.augment = Augment(config.views, config.seed, cropped=self.feed.cropped)
        self.step = 0
        self.progress: dict[str, Any] = {"metrics_bytes": 0, "seconds": 0.0}

    def _keep_features(self) -> None:
        """Features that will be asked for again, as far as they fit the cache."""
        config, feed = self.config, self.feed
        cache = FeatureCache(config.cache, config.cache_gb)
        extractor = FeatureExtractor(
            self.readout.encoder,
            self.readout.layers,
            config.views,
            self.fabric,
            compat=config.compat,
            workers=config.workers,
        )
        if is_fixed(config.views):
            source = self.labelled.source
            self.kept = cache.keep(extractor, source, pixels=feed.pixels, index=feed.valid)
            if self.kept is None:
                notify(
                    f"The features do not fit --cache-gb {config.cache_gb:g} (or the disk); they"
                    " are computed again in each epoch."
                )
            else:
                self._leave_out_undecodable(self.kept.index)
        self.kept_held_out = cache.keep(extractor, self.labelled.held_out, pixels=self.pixels)

    def _leave_out_undecodable(self, readable: Tensor) -> None:
        """Training images of which only the header could be read are refused, or never drawn."""
        feed = self.feed
        lost = sorted(set(feed.valid.tolist()) - set(readable.tolist()))
        feed.exclude(dict.fromkeys(lost, "damaged"))

    def batches(
        self, epoch: int, first: int
    ) -> Iterator[tuple[Tensor, Tensor | dict[str, Tensor]]]:
        """What the network reads in an epoch, from its batch ``first`` on, on the device.

        Returns:
            (index int64 [B], views float32 [B, 3, S, S]) a batch; where features are kept,
            (index, {layer: [B, F]}).
        """
        feed, device = self.feed, self.device
        if self.kept is None:
            for index, images, uniforms in on_device(feed.batches(epoch, first), device):
                views = self.augment(images, epoch, index, uniforms)
                yield (
                    index.to(device, non_blocking=True),
                    views.contiguous(memory_format=torch.channels_last),
                )
            return
        order = feed.order(epoch)[: feed.steps * feed.batch]
        for index in order.view(-1, feed.batch)[first:]:
            rows = {layer: self.kept.rows(layer, index).to(device) for layer in self.kept.layers}
            yield index.to(device), rows

    def measure(self, *, ten_crop: bool) -> tuple[dict[str, dict[str, float]], int]:
        """Accuracies of the heads by layer, and over how many held-out images."""
        if self.kept_held_out is not None and not ten_crop:
            batches = self.kept_held_out.batches(_ROWS)
            return accuracies(self.network, batches, self.held_out_labels)
        views = evaluation_views(
            self.labelled.held_out,
            self.config.views,
            self.pixels,
            ten_crop=ten_crop,
            workers=self.config.workers,
            device=self.device,
        )
        return accuracies(self.network, views, self.held_out_labels)

    def save(self, run: Path, progress: dict[str, Any]) -> None:
        """Write the state beside and rename, so that a kill leaves the last one whole."""
        state = {
            "step": self.step,
            "heads": self.readout.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "encoder": self.readout.encoder.state_dict() if self.config.finetune else {},
            "progress": progress,
        }
        with atomic_write(run / "state.pt") as beside:
            torch.save(state, beside)

    def restore(self, run: Path) -> None:
        """Take over the state of a folder; before the first there is nothing to take over.

        Raises:
            UserError: it is damaged.
        """
        path = run / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            self.readout.heads.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.config.finetune:
                self.readout.encoder.load_state_dict(state["encoder"])
            self.step, self.progress = state["step"], state["progress"]
        except Exception as error:  # torch.load raises whatever its unpickler meets
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError("TODO", f"The state '{path}' is damaged: {reason}") from None
