"""Linear heads on the layers of an encoder: what they compute, how they start, how they are scored.

The reference's ``build_transfer_targets``. Shapes: B images, V views of an image, C classes, F
values of a layer.
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ViewConfig
from ..data.images.augment import evaluation_view, ten_crop_views
from ..data.loading.cropping import LoadedBatch, evaluation_batches
from ..data.sources.open import Source
from ..engine.counter_rng import bits
from ..errors import UserError
from ..models import Compat, Encoder

_EVALUATION_BATCH = 256  # views at a time


class LinearHeads(nn.Module):
    """An encoder with one linear head a layer; the heads share nothing but its features.

    Args:
        encoder: frozen here, in inference mode whatever :meth:`train` says; with ``finetune`` it
            learns too, and its batch-norm uses and tracks batch statistics in training mode (the
            reference has no fine-tuning).
        layers: names out of ``encoder.layers``.
        classes: C.
        image_size: side of the views, which fixes the heads' sizes.
        seed: of the heads' weights.
        finetune: whether the encoder learns.
        compat: of ``encoder.features``.

    Raises:
        UserError: a layer that the encoder does not have.
    """

    def __init__(
        self,
        encoder: Encoder,
        layers: Sequence[str],
        classes: int,
        image_size: int,
        *,
        seed: int = 0,
        finetune: bool = False,
        compat: Compat | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(finetune)
        self.layers, self.finetune = list(layers), finetune
        self.compat: Compat | None = compat
        probe = torch.zeros(1, 3, image_size, image_size, device=encoder.mean.device)
        with torch.no_grad():
            features = encoder.eval().features(probe, self.layers, compat=compat)
        sizes = {layer: features[layer].shape[1] for layer in self.layers}
        self.heads = nn.ModuleList(linear_head(sizes[la], classes, seed, la) for la in self.layers)

    def forward(self, images: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits by layer.

        Args:
            images: [B, 3, S, S], uint8 or floating in 0-1; or their features {layer: [B, F]}.

        Returns:
            {layer: [B, C]}.
        """
        if isinstance(images, dict):
            features = images
        else:
            with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
                features = self.encoder.features(images, self.layers, compat=self.compat)
        return {
            layer: head(features[layer])
            for layer, head in zip(self.layers, self.heads, strict=True)
        }

    def train(self, mode: bool = True) -> "LinearHeads":
        """Training or inference mode; a frozen encoder stays in inference mode."""
        super().train(mode)
        self.encoder.train(mode and self.finetune)
        return self

    def named_heads(self) -> dict[str, Tensor]:
        """The heads as "LAYER.weight" [C, F] and "LAYER.bias" [C]."""
        pairs = zip(self.layers, self.heads, strict=True)
        return {
            f"{layer}.{name}": tensor
            for layer, head in pairs
            for name, tensor in head.state_dict().items()
        }


def linear_head(size: int, classes: int, seed: int, layer: str) -> nn.Linear:
    """A head as the reference starts it: truncated normal weights of variance 2 / F, bias 0.

    The weights are a function of (seed, layer) alone, so a head starts alike in any company. The
    deviation is that of TensorFlow's contrib initializer, sqrt(1.3 * 2 / F) before the cut at two
    deviations, which cuts it back to sqrt(2 / F) within 0.3 %.
    """
    head = nn.Linear(size, classes)
    key = int(bits(seed, zlib.crc32(layer.encode()), count=1))
    generator = torch.Generator().manual_seed(key)
    std = math.sqrt(1.3 * 2 / size)
    with torch.no_grad():
        nn.init.trunc_normal_(head.weight, 0, std, -2 * std, 2 * std, generator=generator)
        head.bias.zero_()
    return head


def cross_entropies(logits: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """Mean cross-entropy of each head.

    The heads' gradients do not meet in their sum, as no parameter serves two of them; a fine-tuned
    encoder learns from all.

    Args:
        logits: {layer: [B, C]}.
        labels: int64 [B].

    Returns:
        {layer: float32 scalar}.
    """
    return {layer: F.cross_entropy(score.float(), labels) for layer, score in logits.items()}


def make_optimizer(
    network: LinearHeads, *, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD as in the reference: decay on the heads' weights and biases.

    A fine-tuned encoder decays too, except for batch-norm's parameters, as in pretraining.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    free = {id(parameter) for norm in norms for parameter in norm.parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    decayed = [p for p in trained if id(p) not in free]
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    if rest := [p for p in trained if id(p) in free]:
        groups.append({"params": rest, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum)


def mean_softmax(logits: Tensor, views: int) -> Tensor:
    """Probabilities of images of which ``views`` views each were read: [B * V, C] -> [B, C]."""
    return logits.float().softmax(dim=1).unflatten(0, (-1, views)).mean(dim=1)


@torch.no_grad()
def accuracies(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor | dict[str, Tensor]]],
    labels: Tensor,
) -> tuple[dict[str, dict[str, float]], int]:
    """Top-1 and top-5 accuracy of every head over all images of ``batches``.

    Args:
        network: a :class:`LinearHeads`, perhaps wrapped by Fabric; its training mode is restored.
        batches: (index int64 [B], one view [B, 3, S, S] or V views [B, V, 3, S, S] of an image, or
            features {layer: [B, F]}).
        labels: int64 [N], on the network's device.

    Returns:
        ({layer: {"top1": 0-1, "top5": 0-1}}, images counted). Several views of an image are scored
        by their mean softmax. Equal scores rank by the lower class, as in the reference. With five
        classes or fewer top-5 is 1.

    Raises:
        UserError: no images at all.
    """
    training = network.training
    network.eval()
    hits: dict[str, Tensor] = {}
    counted = 0
    for index, shown in batches:
        views = 1
        if isinstance(shown, dict):
            shown = {layer: values.to(labels.device) for layer, values in shown.items()}
        elif shown.ndim == 5:
            views, shown = shown.shape[1], shown.flatten(0, 1).to(labels.device)
        else:
            shown = shown.to(labels.device)
        asked_B = labels[index.to(labels.device)]
        for layer, score in network(shown).items():
            score_BC = mean_softmax(score, views) if views > 1 else score.float()
            rank_B = _rank(score_BC, asked_B)
            found = torch.stack([(rank_B < 1).sum(), (rank_B < 5).sum()])
            hits[layer] = hits[layer] + found if layer in hits else found
        counted += len(index)
    network.train(training)
    if not counted:
        raise UserError(
            "TODO", "None of the held-out images can be decoded, so nothing can be measured."
        )
    of_all = {layer: (found.cpu().double() / counted).tolist() for layer, found in hits.items()}
    return {layer: {"top1": a, "top5": b} for layer, (a, b) in of_all.items()}, counted


def _rank(score_BC: Tensor, label_B: Tensor) -> Tensor:
    """How many classes come before the label: int64 [B]. A score that is no number comes last."""
    own_B1 = score_BC.gather(1, label_B.unsqueeze(1))
    classes_C = torch.arange(score_BC.shape[1], device=score_BC.device)
    later = (score_BC < own_B1) | ((score_BC == own_B1) & (classes_C >= label_B.unsqueeze(1)))
    rank_B = score_BC.shape[1] - later.sum(dim=1)
    return rank_B.masked_fill(own_B1.squeeze(1).isnan(), torch.iinfo(torch.int64).max)


def evaluation_views(
    source: Source,
    views: ViewConfig,
    pixels: Tensor | None,
    *,
    ten_crop: bool,
    workers: int,
    device: torch.device,
    index: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every readable image of a source once, the last partial batch too.

    Args:
        source: the images.
        views: size and crop of a view.
        pixels: the decoded images uint8 [N, 3, H, W], if they are in memory.
        ten_crop: ten views of an image instead of the central one.
        workers: processes that decode where they are not.
        device: where views are made of pixels in memory.
        index: int64 [n], which of the pixels to take; None: all.

    Returns:
        (index int64 [B], images [B, 3, S, S] or [B, 10, 3, S, S]) a batch.
    """
    batch = max(1, _EVALUATION_BATCH // (10 if ten_crop else 1))
    if pixels is None:
        found: Iterator[LoadedBatch] = evaluation_batches(
            source, views, batch=batch, workers=workers, ten_crop=ten_crop
        )
        yield from found
        return
    make = ten_crop_views if ten_crop else evaluation_view
    taken = torch.arange(len(pixels)) if index is None else index
    for part in taken.split(batch):
        yield part, make(pixels[part].to(device), views)
