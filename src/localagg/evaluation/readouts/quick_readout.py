"""Quick read-outs: logistic regression on cached features of the center crop.

Training images are seen in the same view as held-out ones, so all features are computed once; each
layer's head is the solution that SGD would tend to. The numbers are not those of the paper's
protocol, whose heads see random views.
"""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...checkpoint import weights_digest, write_json
from ...config import TransferConfig, require_resolved
from ...data.loading.scan import require_readable
from ...data.sources.open import Source
from ...engine.device import describe_arithmetic, make_fabric
from ...errors import UserError, counted
from ...io.console import notify, show_progress
from ...io.files import atomic_write
from ...io.tensor_files import save_tensors
from ...models import Encoder
from ..results.protocols import logistic_protocol
from .feature_cache import CachedFeatures, FeatureCache, FeatureExtractor, hash_images
from .linear_heads import accuracies
from .logistic_regression import MOST_FITS, LogisticHead, fit_logistic_head
from .readout_inputs import (
    LabeledSplits,
    check_classes,
    evaluation_views,
    new_folder,
    open_labeled,
    resolve_transfer,
    take_encoder,
)

OPTIONS = frozenset(
    {
        *("layers", "compat", "image_size", "augmentation", "eval_crop", "ten_crop", "seed"),
        *("precision", "device", "workers", "cache", "cache_gb", "unreadable"),
    }
)
"""Names of the options of :class:`TransferConfig` and its views that affect a quick read-out."""


class FrozenFeatures(NamedTuple):
    """Labeled images as features of a frozen encoder."""

    config: TransferConfig
    """Resolved; its layers are the cached ones."""
    splits: LabeledSplits
    extractor: FeatureExtractor
    training: CachedFeatures
    held_out: CachedFeatures
    left_out: dict[str, float]
    """Layers that do not fit the cache, and their sizes in GiB."""

    @property
    def unreadable(self) -> int:
        """Number of unreadable images of both splits."""
        total = len(self.splits.source) + len(self.splits.held_out)
        return total - len(self.training.index) - len(self.held_out.index)

    def fit_heads(self, index: Tensor, seed: int) -> dict[str, LogisticHead]:
        """Fit a head a layer to training images ``index``, int64 [n]."""
        labels, classes = self.splits.labels[index], self.splits.classes
        heads: dict[str, LogisticHead] = {}
        total = MOST_FITS * len(self.extractor.layers)
        with show_progress("fitting heads") as show:
            for layer in self.extractor.layers:
                rows = self.training.rows(layer, index)
                before = MOST_FITS * len(heads)
                heads[layer] = fit_logistic_head(
                    rows,
                    labels,
                    index,
                    classes,
                    seed=seed,
                    on_fit=lambda fits, before=before: show(before + fits, total),
                )
            show(total, total)
        return heads

    def measure(
        self, heads: dict[str, LogisticHead], *, ten_crop: bool = False
    ) -> dict[str, dict[str, float]]:
        """Return top-1 and top-5 by layer over all readable held-out images.

        Args:
            heads: one a layer.
            ten_crop: mean softmax over ten crops, computed now, instead of the center crop.
        """
        device = self.extractor.fabric.device
        linear = {la: (head.weight.to(device), head.bias.to(device)) for la, head in heads.items()}

        def score(images: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
            features = images if isinstance(images, dict) else self.extractor(images)
            return {
                layer: torch.addmm(bias, features[layer].float(), weight.T)
                for layer, (weight, bias) in linear.items()
            }

        batches = self.held_out.batches()
        if ten_crop:
            batches = evaluation_views(
                self.splits.held_out,
                self.config.views,
                None,
                ten_crop=True,
                workers=self.config.workers,
                device=device,
            )
        return accuracies(score, batches, self.splits.held_out_labels.to(device))[0]


def quick_readout(
    config: TransferConfig,
    weights: str | Path | Encoder,
    data: str | Path,
    out: str | Path | None = None,
    *,
    ten_crop: bool = False,
) -> dict[str, Any]:
    """Fit linear heads to an encoder's layers by logistic regression and measure them.

    See :func:`.logistic_regression.fit_logistic_head`; held-out labels are used once, at the end.

    Args:
        config, weights, data: as for :func:`.linear.transfer`; only :data:`OPTIONS` matter.
        out: folder to make, for heads.safetensors and results.json. Default: none.
        ten_crop: measure ten crops too.

    Returns:
        As :func:`.linear.transfer` without "epochs" and "steps", and "regularization": {layer:
        strength of L2}, "regularization_chosen": whether it was chosen by cross-validation,
        "left_out": {layer: GiB} of layers that do not fit the cache.

    Raises:
        UserError: as :func:`.linear.transfer` and :func:`cache_features`.
    """
    started = time.monotonic()
    run = new_folder(out)
    encoder, path = take_encoder(weights)
    digest = weights_digest(encoder)
    frozen = cache_features(config, encoder, path, open_labeled(os.fspath(data)))
    heads = frozen.fit_heads(frozen.training.index, config.seed)
    layers = frozen.measure(heads)
    if ten_crop:
        for layer, found in frozen.measure(heads, ten_crop=True).items():
            layers[layer] |= {f"ten_crop_{key}": value for key, value in found.items()}
    results = {
        "layers": layers,
        "data": os.fspath(data),
        "run": None if path is None else str(path),
        "weights_digest": digest,
        **describe_arithmetic(frozen.extractor.fabric),
        "protocol": logistic_protocol(frozen.config, ten_crop=ten_crop),
        "regularization": {layer: head.l2 for layer, head in heads.items()},
        "regularization_chosen": all(head.chosen for head in heads.values()),
        "seconds": round(time.monotonic() - started, 2),
        "images": len(frozen.training.index),
        "measured": len(frozen.held_out.index),
        "unreadable": frozen.unreadable,
        "classes": frozen.splits.classes,
        "left_out": frozen.left_out,
    }
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        _save_heads(run / "heads.safetensors", heads)
        write_json(run / "results.json", results)
    return results


def _save_heads(file: Path, heads: dict[str, LogisticHead]) -> None:
    tensors = {f"{layer}.weight": head.weight for layer, head in heads.items()}
    tensors |= {f"{layer}.bias": head.bias for layer, head in heads.items()}
    with atomic_write(file) as beside:
        save_tensors(beside, tensors)


def cache_features(
    config: TransferConfig, encoder: Encoder, path: Path | None, splits: LabeledSplits
) -> FrozenFeatures:
    """Return the features of both splits under the center crop, from the cache where possible.

    ``config`` holds the options as the user set them; ``encoder`` is a copy, found at ``path``.

    Raises:
        UserError: named layers, or all, do not fit ``cache_gb``; unreadable images, unless they are
            to be skipped; one class.
    """
    resolved = resolve_transfer(replace(config, batch_size=None), encoder, path, splits.source)
    fabric = make_fabric(config.device, config.precision)
    encoder.requires_grad_(False).to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def extractor_of(layers: tuple[str, ...]) -> FeatureExtractor:
        options: dict[str, Any] = {"compat": config.compat, "workers": resolved.workers}
        return FeatureExtractor(encoder, layers, resolved.views, fabric, **options)

    extractor = extractor_of(require_resolved(resolved.layers))
    cache = FeatureCache(config.cache, config.cache_gb, splits.source.uri)
    images = len(splits.source) + len(splits.held_out)
    fitting = cache.fitting_layers(extractor, images)
    left_out = {
        layer: float(f"{extractor.feature_bytes(layer, images) / 2**30:.3g}")
        for layer in extractor.layers
        if layer not in fitting
    }
    if left_out:
        sizes = ", ".join(f"{layer} ({size:g} GiB)" for layer, size in left_out.items())
        message = f"Features of these layers exceed --cache-gb {config.cache_gb:g}: {sizes}"
        if config.layers is not None or not fitting:
            raise UserError("too-large", f"{message}; raise it, or name other --layers.")
        notify(f"{message}; they are left out.")
        resolved = replace(resolved, layers=tuple(fitting))
        extractor = extractor_of(tuple(fitting))
    training = _cache_split(cache, extractor, splits.source, config.unreadable)
    check_classes(splits, training.index)
    held_out = _cache_split(cache, extractor, splits.held_out, config.unreadable)
    return FrozenFeatures(resolved, splits, extractor, training, held_out, left_out)


def _cache_split(
    cache: FeatureCache, extractor: FeatureExtractor, source: Source, policy: str
) -> CachedFeatures:
    """Return the features of a split; with the policy "skip" say how many images have none."""
    digest, failed = hash_images(source, extractor.views)
    require_readable(source, failed, policy)
    features = cache.get(extractor, source, digest=digest)
    if features is None:
        raise UserError(
            "too-large",
            f"The features of '{source.uri}' exceed half of the free disk space of"
            f" '{cache.folder}'; name another --cache.",
        )
    lost = set(range(len(source))) - set(features.index.tolist())
    require_readable(source, dict.fromkeys(lost, "damaged") | failed, policy)
    if lost:
        notify(f"Left out: {counted(len(lost), 'unreadable image')} of '{source.uri}'.")
    return features
