"""Measure the floors of a run at its start and its end, on a sample of its images."""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import weights_digest
from ..config import PretrainConfig
from ..data.images.augment import Augment, evaluation_view
from ..data.loading.cropping import evaluation_crops, training_crops
from ..data.loading.loader import Feed
from ..data.loading.workers import map_in_workers
from ..data.sources.open import Source
from ..distributed.collectives import World
from ..engine.counter_rng import SAMPLE, permutation
from ..errors import UserError
from ..io.console import ProgressCallback
from ..models import Encoder
from .floors import (
    RAW_PIXELS,
    STARTING,
    TRAINED,
    Values,
    ViewPairs,
    floor_protocol,
    measure_floors,
    pixel_rows,
    verdict,
)
from .results.protocols import LEAVE_ONE_OUT, view_fields
from .results.results_file import append_result

_MOST = 2_000  # images measured
_BATCH = 256
_EPOCH = -1  # of the random views; training counts from 0


FeaturePairs = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Return features float32 [B, C] of the measured view and of a random view of images [B]."""


class RunFloors:
    """Measurements of raw pixels, the starting and the trained network on up to 2,000 images.

    The sample and its random views are functions of the seed. Ranks each embed some batches; all
    return the same values, and rank 0 writes them to ``RUN/results.json``. Collectives: one
    exchange of embeddings, one of values.

    Args:
        run: run folder.
        config: resolved.
        data: data URI, for the results.
        feed: the training images.
        world: the ranks.
    """

    def __init__(
        self, run: Path, config: PretrainConfig, data: str, feed: Feed, world: World | None = None
    ) -> None:
        self.run, self.config, self.data, self.source = run, config, data, feed.source
        self.pixels, self.world = feed.pixels, world or World()
        drawn = feed.valid[permutation(len(feed.valid), config.seed, SAMPLE)[:_MOST]]
        self.index = drawn.sort().values

    def measure_start(
        self,
        encoder: Encoder,
        autocast: Callable[[], AbstractContextManager],
        on_progress: ProgressCallback = lambda done, of: None,
        features: FeaturePairs | None = None,
    ) -> dict[str, Values]:
        """Return the values of raw pixels and of the starting network.

        With ``features`` of a frozen backbone, these are the starting network's embedding.
        """
        encoders = {RAW_PIXELS: None, STARTING: encoder}
        return self._measure(encoders, autocast, on_progress, features)

    def measure_end(
        self,
        encoder: Encoder,
        autocast: Callable[[], AbstractContextManager],
        known: dict[str, Values],
        features: FeaturePairs | None = None,
    ) -> dict[str, Values]:
        """Return the values of the trained network, and of raw pixels if they are not known.

        With ``features`` of a frozen backbone, only the head is run.
        """
        missing: dict[str, Encoder | None] = {} if RAW_PIXELS in known else {RAW_PIXELS: None}
        return self._measure({**missing, TRAINED: encoder}, autocast, features=features)

    def summary(self, found: dict[str, Values]) -> dict[str, Any] | None:
        """Return protocol, values and verdict of a finished run; None without values."""
        if not found:
            return None
        labels = None if self.source.labels is None else self.source.labels[self.index]
        protocol = floor_protocol(len(self.index), labels)._asdict()
        pretrained = self.config.encoder.weights is not None
        sentence = verdict(found, len(self.index), pretrained=pretrained)
        return {**protocol, "values": found, "verdict": sentence}

    @torch.no_grad()
    def _measure(
        self,
        encoders: dict[str, Encoder | None],
        autocast: Callable[[], AbstractContextManager],
        on_progress: ProgressCallback = lambda done, of: None,
        features: FeaturePairs | None = None,
    ) -> dict[str, Values]:
        chunks = self.index.split(_BATCH)
        own = self.world.part(len(chunks))
        found: dict[str, list[ViewPairs]] = {name: [] for name in encoders}
        done = 0
        for index, center, other in self._views(chunks[own.start : own.stop]):
            for name, encoder in encoders.items():
                pair = center, other
                if features is not None and encoder is not None:
                    pair = features(index)
                if features is not None and name == STARTING:
                    rows = (F.normalize(each, dim=1) for each in pair)
                else:
                    rows = (_embed(encoder, views, autocast) for views in pair)
                found[name].append(ViewPairs(index, *rows))
            done += len(index)
            on_progress(done, sum(map(len, chunks[own.start : own.stop])))
        shared = self.world.gather_objects(found)
        values = self._score(shared, encoders) if self.world.rank == 0 else None
        return self.world.gather_objects(values)[0]

    def _views(self, chunks: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (index, central views, random views float in 0-1) of the readable images."""
        config, seed = self.config.views, self.config.seed
        augment = Augment(config, seed, cropped=self.pixels is None)
        if self.pixels is not None:
            for index in chunks:
                images = self.pixels[index]
                yield index, evaluation_view(images, config), augment(images, _EPOCH, index)
            return
        crop = functools.partial(_crop_both, self.source, self.config)
        for index, center, images in map_in_workers(crop, chunks, self.config.workers):
            if len(index):
                yield index, center, augment(images, _EPOCH, index)

    def _score(
        self, shared: list[dict[str, list[ViewPairs]]], encoders: dict[str, Encoder | None]
    ) -> dict[str, Values]:
        values = {}
        for name, encoder in encoders.items():
            parts = [part for found in shared for part in found[name]]
            if not parts:
                raise UserError(
                    "unreadable-images",
                    f"None of the images of '{self.data}' can be read; list them with localagg"
                    " inspect --decode.",
                )
            pairs = ViewPairs(*(torch.cat(each) for each in zip(*parts, strict=True)))
            if encoder is None:  # pixels: without their mean image
                mean = pairs.center.mean(dim=0)
                rows = (F.normalize(each - mean, dim=1) for each in pairs[1:])
                pairs = ViewPairs(pairs.index, *rows)
            labels = None if self.source.labels is None else self.source.labels[pairs.index]
            values[name] = measure_floors(pairs, labels)
            self._record(name, values[name], encoder, floor_protocol(len(pairs.index), labels))
        return values

    def _record(self, name: str, values: Values, encoder: Encoder | None, protocol: Any) -> None:
        fields = {"clusters": protocol.clusters, **view_fields(self.config.views)}
        if protocol.neighbors:
            fields |= {"queries": LEAVE_ONE_OUT, "neighbors": protocol.neighbors}
        entry = {
            "measure": "floors",
            "row": name,
            "protocol": {"method": "floors", **fields},
            "values": values,
            "data": self.data,
            "fingerprint": self.source.fingerprint(),
            "images": len(self.source),
            "asked": protocol.images,
        }
        if encoder is not None:
            entry["weights_digest"] = weights_digest(encoder)
        append_result(self.run, entry)


def _crop_both(
    source: Source, config: PretrainConfig, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (index, central, random crops) of those images whose both crops can be decoded."""
    center, _ = evaluation_crops(source, config.views, False, index)
    other, _ = training_crops(source, config.views, config.seed, _EPOCH, index)
    kept = index[torch.isin(index, center.index) & torch.isin(index, other.index)]
    views = [each.images[torch.isin(each.index, kept)] for each in (center, other)]
    return kept, views[0], views[1]


def _embed(
    encoder: Encoder | None, views: Tensor, autocast: Callable[[], AbstractContextManager]
) -> Tensor:
    """Return the rows of views: float32 on the CPU, by inference; pixels without an encoder."""
    if encoder is None:
        return pixel_rows(views.float() / 255 if views.dtype == torch.uint8 else views)
    training = encoder.training
    encoder.eval()
    with autocast():
        rows = encoder(views.to(next(encoder.parameters()).device))
    encoder.train(training)
    return rows.float().cpu()
