"""State of linear read-outs in training: images, network, optimizer, step, and their checkpoint."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config import TransferConfig, require_resolved
from ...data.images.augment import Augment
from ...data.images.levels import levels_of
from ...data.loading.loader import Feed, on_device
from ...data.loading.scan import ScannedImages, load_or_scan, require_readable
from ...distributed.collectives import World
from ...engine.device import make_fabric
from ...errors import UserError
from ...io.console import notify, show_progress
from ...io.files import atomic_write
from ...io.tensor_files import save_pickled
from ...models import Encoder
from ...recipes.schedule import Schedule
from ..results.protocols import is_fixed
from .feature_cache import CachedFeatures, FeatureCache, FeatureExtractor
from .linear_heads import LinearHeads, accuracies, make_optimizer
from .readout_inputs import LabeledSplits, check_classes, evaluation_views, general_options


class LinearProbe:
    """Everything that read-outs by SGD need: images, network, optimizer, schedule, and the step.

    Args:
        config: resolved.
        encoder: a copy, which fine-tuning changes.
        splits: the images.
        facts: "data" and "weights", for the results.
        world: the ranks, which share each batch. Default: this process alone.
    """

    def __init__(
        self,
        config: TransferConfig,
        encoder: Encoder,
        splits: LabeledSplits,
        facts: dict[str, Any],
        world: World | None = None,
    ) -> None:
        self.config, self.facts, self.splits = config, facts, splits
        self.world = world or World()
        number = self.world.local_rank if self.world.size > 1 else None
        self.fabric = make_fabric(config.device, config.precision, number)
        self.device = self.fabric.device
        self.readout = LinearHeads(
            encoder.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            config.layers or (),
            splits.classes,
            require_resolved(config.views.image_size),
            seed=config.seed,
            finetune=config.finetune,
            compat=config.compat,
        )
        optimizer = make_optimizer(
            self.readout,
            learning_rate=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.network, self.optimizer = self.fabric.setup(self.readout, optimizer)
        self.feed, held_out = self._read_images()
        self.pixels = held_out.complete_pixels
        self.features: CachedFeatures | None = None
        self.held_out_features: CachedFeatures | None = None
        if config.cache_gb and not config.finetune:
            self.world.rank_zero_first(self._cache_features)
        check_classes(splits, self.feed.valid)
        self.schedule = Schedule(general_options(config), len(self.feed.valid))
        self.labels = splits.labels.to(self.device)
        self.held_out_labels = splits.held_out_labels.to(self.device)
        self.augment = Augment(config.views, config.seed, cropped=self.feed.cropped)
        self.step = 0
        self.progress: dict[str, Any] = {"metrics_bytes": 0, "seconds": 0.0}

    def _read_images(self) -> tuple[Feed, ScannedImages]:
        """Return the training images, and a scan of the held-out images."""
        config, splits = self.config, self.splits
        with show_progress("reading images") as show:
            feed = Feed(
                splits.source,
                config.views,
                batch_size=require_resolved(config.batch_size),
                seed=config.seed,
                workers=config.workers,
                memory=config.memory,
                memory_gb=config.memory_gb,
                unreadable=config.unreadable,
                device=config.device,
                on_progress=show,
                world=self.world,
            )
            held_out = load_or_scan(
                splits.held_out,
                upright=config.views.exif_orientation,
                levels=levels_of(config.views),
                memory=config.memory,
                memory_gb=config.memory_gb,
                workers=config.workers,
                on_progress=show,
            )
        require_readable(splits.held_out, held_out.unreadable, config.unreadable)
        return feed, held_out

    def _cache_features(self) -> None:
        """Cache the features under fixed views, as far as they fit."""
        config, feed, splits = self.config, self.feed, self.splits
        cache = FeatureCache(config.cache, config.cache_gb, splits.source.uri)
        extractor = FeatureExtractor(
            self.readout.encoder,
            self.readout.layers,
            config.views,
            self.fabric,
            compat=config.compat,
            workers=config.workers,
        )
        if is_fixed(config.views):
            self.features = cache.get(
                extractor, splits.source, pixels=feed.pixels, index=feed.valid
            )
            if self.features is None:
                notify(
                    f"The features exceed --cache-gb {config.cache_gb:g} (or the free disk space);"
                    " they are computed again in each epoch."
                )
            else:  # damage behind a header is found by decoding
                lost = sorted(set(feed.valid.tolist()) - set(self.features.index.tolist()))
                feed.exclude(dict.fromkeys(lost, "damaged"))
        self.held_out_features = cache.get(extractor, splits.held_out, pixels=self.pixels)

    def batches(
        self, epoch: int, first: int
    ) -> Iterator[tuple[Tensor, Tensor | dict[str, Tensor]]]:
        """Yield this rank's share of the batches of an epoch from ``first`` on, on the device.

        Yields:
            (index int64 [B], views float32 [B, 3, S, S]); of cached features,
            (index, {layer: [B, F]}).
        """
        feed, device = self.feed, self.device
        if self.features is None:
            for index, images, uniforms in on_device(feed.batches(epoch, first), device):
                views = self.augment(images, epoch, index, uniforms)
                yield (
                    index.to(device, non_blocking=True),
                    views.contiguous(memory_format=torch.channels_last),
                )
            return
        order = feed.order(epoch)[: feed.steps * feed.batch]
        part = self.world.part(feed.batch)
        for index in order.view(-1, feed.batch)[first:, part.start : part.stop]:
            rows = {la: self.features.rows(la, index).to(device) for la in self.features.layers}
            yield index.to(device), rows

    def backward(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Set the gradients of the sum of mean losses {layer: scalar} over the whole batch.

        Returns:
            The mean losses over the batch. Several ranks: one all-reduce of gradients and losses.
        """
        total = torch.stack(list(losses.values()))
        if self.world.size == 1:
            self.fabric.backward(total.sum())
            return losses
        batch = self.feed.batch
        total = total * (len(self.world.part(batch)) / batch)
        self.fabric.backward(total.sum())
        gradients = [p.grad for p in self.readout.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients] + [total.detach()])
        *summed, means = self.world.sum(flat).split([*(g.numel() for g in gradients), len(total)])
        for gradient, value in zip(gradients, summed, strict=True):
            gradient.copy_(value.view_as(gradient))
        return dict(zip(losses, means, strict=True))

    def measure(self, *, ten_crop: bool) -> tuple[dict[str, dict[str, float]], int]:
        """Return the accuracies of the heads by layer, and the number of held-out images."""
        if self.held_out_features is not None and not ten_crop:
            batches = self.held_out_features.batches()
        else:
            batches = evaluation_views(
                self.splits.held_out,
                self.config.views,
                self.pixels,
                ten_crop=ten_crop,
                workers=self.config.workers,
                device=self.device,
            )
        self.network.eval()
        found = accuracies(self.network, batches, self.held_out_labels)
        self.network.train()
        return found

    def save(self, run: Path, progress: dict[str, Any]) -> None:
        """Write the state atomically, so that a kill leaves the last one whole."""
        state = {
            "step": self.step,
            "heads": self.readout.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "encoder": self.readout.encoder.state_dict() if self.config.finetune else {},
            "progress": progress,
        }
        with atomic_write(run / "state.pt") as beside:
            save_pickled(beside, state)

    def restore(self, run: Path) -> None:
        """Restore the state of a folder, if it has one.

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
            raise UserError(
                "damaged", f"The state '{path}' is damaged ({reason}); start a new --out."
            ) from None
