"""Linear read-outs in seconds to minutes: logistic regression on features that are computed once.

Training images are seen in their central view, as the held-out ones are, so all features are
computed once and kept (``features``); each layer's head is the solution that SGD would tend to
(``logistic``). Its numbers are not those of the paper's protocol, whose heads see random views.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..checkpoint import check_new, weights_digest, write_json
from ..config import TransferConfig, require_resolved
from ..data.loading.scan import require_readable
from ..data.sources.open import Source
from ..engine.device import make_fabric
from ..errors import UserError
from ..io.console import notify, show_progress
from ..models import Encoder
from .feature_cache import CachedFeatures, FeatureCache, FeatureExtractor, read_all
from .linear_heads import accuracies, evaluation_views
from .logistic_regression import Head, Rows, quick_head
from .readout_inputs import (
    LabeledSplits,
    check_classes,
    open_labeled,
    resolve_transfer,
    take_encoder,
)

OPTIONS = frozenset(
    {
        *("layers", "compat", "image_size", "augmentation", "eval_crop", "ten_crop", "seed"),
        *("precision", "device", "workers", "memory_gb", "cache", "cache_gb", "unreadable"),
    }
)
"""Names of the options of :class:`TransferConfig` and its views that a quick read-out heeds."""
_ROWS = 256  # kept features at a time


class FrozenFeatures(NamedTuple):
    """LabeledSplits images as features of a frozen encoder."""

    config: TransferConfig
    """Resolved; its layers are those that are kept."""
    labelled: LabeledSplits
    extractor: FeatureExtractor
    train: CachedFeatures
    held_out: CachedFeatures
    left_out: dict[str, float]
    """Layers that did not fit the cache, and what they would take in GiB."""

    @property
    def unreadable(self) -> int:
        """Images of both splits that could not be read."""
        whole = len(self.labelled.source) + len(self.labelled.held_out)
        return whole - len(self.train.index) - len(self.held_out.index)

    def rows(self, layer: str, index: Tensor) -> Rows:
        """Training images ``index``, int64 [n], as rows of a layer."""
        return Rows(
            lambda part: self.train.rows(layer, part),
            index,
            self.labelled.labels[index],
            self.extractor.fabric.device,
            hold_gb=self.config.memory_gb,
        )

    def measure(self, heads: dict[str, Head]) -> dict[str, dict[str, float]]:
        """Top-1 and top-5 by layer over all readable held-out images, center crop."""
        labels = self.labelled.held_out_labels.to(self.extractor.fabric.device)
        scorer = Scorer(self.extractor, heads)
        return accuracies(scorer, self.held_out.batches(_ROWS), labels)[0]

    def measure_ten_crops(self, heads: dict[str, Head]) -> dict[str, dict[str, float]]:
        """The same by mean softmax over ten crops, which are computed now."""
        device = self.extractor.fabric.device
        views = evaluation_views(
            self.labelled.held_out,
            self.config.views,
            None,
            ten_crop=True,
            workers=self.config.workers,
            device=device,
        )
        labels = self.labelled.held_out_labels.to(device)
        return accuracies(Scorer(self.extractor, heads), views, labels)[0]


class Scorer(nn.Module):
    """Heads on a frozen encoder's layers, in float32: images or kept features to logits."""

    def __init__(self, extractor: FeatureExtractor, heads: dict[str, Head]) -> None:
        super().__init__()
        device = extractor.fabric.device
        self.extractor = extractor
        self.heads = {
            la: (head.weight.to(device), head.bias.to(device)) for la, head in heads.items()
        }

    def forward(self, images: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        """{layer: [B, C]} of images [B, 3, S, S] or features {layer: [B, F]}."""
        features = images if isinstance(images, dict) else self.extractor(images)
        return {
            layer: torch.addmm(bias, features[layer].float(), weight.T)
            for layer, (weight, bias) in self.heads.items()
        }


def quick_readout(
    config: TransferConfig,
    weights: str | Path | Encoder,
    data: str,
    out: str | Path | None = None,
    *,
    ten_crop: bool = False,
) -> dict[str, Any]:
    """Fit linear heads to an encoder's layers by logistic regression and measure them.

    The strength of the L2 penalty is chosen within the training images (see
    :func:`logistic.quick_head`); held-out labels are looked at once, at the end. Features are
    standardized by the training images, so that a strength means the same on every layer, and the
    heads are folded back to act on the features as they are.

    Args:
        config: of which :data:`OPTIONS` are heeded.
        weights: run folder, weights file or encoder, as for :func:`transfer.transfer`.
        data: data URI with labels, and a held-out split.
        out: folder to make, for heads.safetensors (as of :func:`transfer.transfer`) and
            results.json. None: nothing is written but kept features.
        ten_crop: measure ten crops too.

    Returns:
        As :func:`transfer.transfer` without "epochs" and "steps", and "regularization": {layer: the
        strength of L2}, "regularization_chosen": whether there was anything to choose it by,
        "left_out": {layer: GiB} that did not fit the cache. "protocol" begins with "quick".

    Raises:
        UserError: as :func:`transfer.transfer`; or layers that are named, or all, do not fit
            ``cache_gb``.
    """
    started = time.monotonic()
    run = None if out is None else Path(out)
    if run is not None:
        check_new(run)
    encoder, path = take_encoder(weights)
    digest = weights_digest(encoder)
    frozen = freeze(config, encoder, path, open_labeled(data))
    heads = fit_heads(frozen, frozen.train.index, config.seed)
    layers = frozen.measure(heads)
    if ten_crop:
        for layer, found in frozen.measure_ten_crops(heads).items():
            layers[layer] |= {f"ten_crop_{key}": value for key, value in found.items()}
    results = {
        "layers": layers,
        "data": data,
        "run": None if path is None else str(path),
        "weights_digest": digest,
        "protocol": quick_protocol(frozen.config, ten_crop=ten_crop),
        "regularization": {layer: head.l2 for layer, head in heads.items()},
        "regularization_chosen": all(head.chosen for head in heads.values()),
        "seconds": round(time.monotonic() - started, 2),
        "images": len(frozen.train.index),
        "measured": len(frozen.held_out.index),
        "unreadable": frozen.unreadable,
        "classes": frozen.labelled.classes,
        "left_out": frozen.left_out,
    }
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        _save_heads(run / "heads.safetensors", heads)
        write_json(run / "results.json", results)
    return results


def _save_heads(path: Path, heads: dict[str, Head]) -> None:
    tensors = {f"{layer}.weight": head.weight.contiguous() for layer, head in heads.items()}
    tensors |= {f"{layer}.bias": head.bias.contiguous() for layer, head in heads.items()}
    save_file(tensors, path)


def freeze(
    config: TransferConfig, encoder: Encoder, path: Path | None, labelled: LabeledSplits
) -> FrozenFeatures:
    """Features of both splits under the central view, from the cache as far as they are there.

    Args:
        config: as the user set it.
        encoder: its own copy.
        path: where it was found.
        labelled: the images.

    Raises:
        UserError: layers that are named do not fit ``cache_gb``, or none does; images that cannot
            be read, unless they are to be skipped; one class.
    """
    resolved = resolve_transfer(replace(config, batch_size=None), encoder, path, labelled.source)
    fabric = make_fabric(config.device, config.precision)
    encoder.requires_grad_(False).to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def extractor_of(layers: tuple[str, ...]) -> FeatureExtractor:
        views, workers = resolved.views, resolved.workers
        return FeatureExtractor(
            encoder, layers, views, fabric, compat=config.compat, workers=workers
        )

    extractor = extractor_of(require_resolved(resolved.layers))
    cache = FeatureCache(config.cache, config.cache_gb)
    left_out = _left_out(cache, extractor, len(labelled.source) + len(labelled.held_out))
    if left_out:
        sizes = ", ".join(f"{layer} ({size:g} GiB)" for layer, size in left_out.items())
        what = f"Features of these layers do not fit --cache-gb {config.cache_gb:g}: {sizes}"
        if config.layers is not None or len(left_out) == len(extractor.layers):
            raise UserError("TODO", f"{what}; raise it, or name other --layers.")
        notify(f"{what}; they are left out.")
        resolved = replace(
            resolved, layers=tuple(la for la in extractor.layers if la not in left_out)
        )
        extractor = extractor_of(require_resolved(resolved.layers))
    train = _kept(cache, extractor, labelled.source, config.unreadable, learned=True)
    check_classes(labelled, train.index)
    held_out = _kept(cache, extractor, labelled.held_out, config.unreadable, learned=False)
    return FrozenFeatures(resolved, labelled, extractor, train, held_out, left_out)


def _left_out(cache: FeatureCache, extractor: FeatureExtractor, images: int) -> dict[str, float]:
    """Layers that do not fit the cache with the others, and what they would take in GiB."""
    fitting = cache.fitting(extractor, images)
    sizes = {layer: extractor.bytes_of(layer, images) / 2**30 for layer in extractor.layers}
    return {layer: float(f"{size:.3g}") for layer, size in sizes.items() if layer not in fitting}


def _kept(
    cache: FeatureCache, extractor: FeatureExtractor, source: Source, policy: str, *, learned: bool
) -> CachedFeatures:
    """The features of a source. Held-out images whose damage only decoding shows are counted."""
    digest, failed = read_all(source)
    require_readable(source, failed, policy)
    kept = cache.keep(extractor, source, digest=digest)
    if kept is None:
        raise UserError(
            "TODO",
            f"The features of '{source.uri}' take more than half of what is free on the disk of"
            f" '{cache.folder}'; name another --cache.",
        )
    if learned:
        lost = set(range(len(source))) - set(kept.index.tolist()) - set(failed)
        require_readable(source, dict.fromkeys(lost, "damaged"), policy)
    return kept


def fit_heads(frozen: FrozenFeatures, index: Tensor, seed: int) -> dict[str, Head]:
    """A head a layer, learned from training images ``index``, int64 [n]."""
    heads: dict[str, Head] = {}
    with show_progress("fitting heads") as show:
        for layer in frozen.extractor.layers:
            rows = frozen.rows(layer, index)
            heads[layer] = quick_head(rows, frozen.labelled.classes, seed=seed)
            show(len(heads), len(frozen.extractor.layers))
    return heads


def quick_protocol(config: TransferConfig, *, ten_crop: bool) -> str:
    """One line that says how a quick read-out was measured.

    The chosen strengths are no part of it: as with an SGD that stops where it likes, they are
    results, and runs compare across them.
    """
    views = config.views
    crops = "center crop" + (" and ten crops by mean softmax" if ten_crop else "")
    slip = "; features pooled as in the reference" if config.compat else ""
    return (
        "quick: logistic regression (L-BFGS) on standardized features of the center crop, frozen,"
        f" L2 chosen within the training images; {crops} ({views.augmentation}) of"
        f" {views.eval_crop} at {views.image_size} pixels{slip}"
    )
