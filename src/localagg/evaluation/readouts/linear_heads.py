"""Linear heads on the layers of an encoder: forward pass, first weights, optimizer, accuracy.

The reference's ``build_transfer_targets``. Shapes: B images, V views of an image, C classes, F
values of a layer.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...engine.counter_rng import bits
from ...errors import UserError
from ...models import Compat, Encoder


class LinearHeads(nn.Module):
    """An encoder with one linear head a layer; the heads share nothing but its features.

    Args:
        encoder: frozen, in inference mode whatever :meth:`train` sets; with ``finetune`` it learns
            too, and its batch-norm uses and tracks batch statistics in training mode (the reference
            has no fine-tuning).
        layers: names out of ``encoder.layers``.
        classes: C.
        image_size: side of the views, which fixes the heads' sizes.
        seed: random seed of the heads' weights.
        finetune: whether the encoder learns.
        compat: see ``encoder.features``.

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
        blank = torch.zeros(1, 3, image_size, image_size, device=encoder.mean.device)
        with torch.no_grad():
            features = encoder.eval().features(blank, self.layers, compat=compat)
        sizes = {layer: features[layer].shape[1] for layer in self.layers}
        self.heads = nn.ModuleList(linear_head(sizes[la], classes, seed, la) for la in self.layers)

    def forward(self, images: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        """Return logits {layer: [B, C]}.

        Args:
            images: [B, 3, S, S], uint8 or floating in 0-1; or their features {layer: [B, F]}.
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
        """Set training or inference mode; a frozen encoder stays in inference mode."""
        super().train(mode)
        self.encoder.train(mode and self.finetune)
        return self

    def load_heads(self, heads: dict[str, Tensor], place: str) -> None:
        """Replace the heads by given ones; see :func:`read_heads`.

        Raises:
            UserError: a layer without a head, or another size; ``place`` names their file.
        """
        for name, mine in self.named_heads().items():
            shape = tuple(heads[name].shape) if name in heads else None
            if shape != tuple(mine.shape):
                problem = "is missing" if shape is None else f"has the shape {shape}"
                raise UserError(
                    "mismatch",
                    f"'{place}': {name} {problem}, not {tuple(mine.shape)} (classes, features); use"
                    " the network, the layers, the image size and the classes of the heads.",
                )
            mine.copy_(heads[name])

    def named_heads(self) -> dict[str, Tensor]:
        """Return the heads as "LAYER.weight" [C, F] and "LAYER.bias" [C]."""
        return {
            f"{layer}.{name}": tensor
            for layer, head in zip(self.layers, self.heads, strict=True)
            for name, tensor in head.state_dict().items()
        }


def read_heads(path: Path) -> dict[str, Tensor]:
    """Read heads "LAYER.weight" [C, F] and "LAYER.bias" [C] from a safetensors file.

    Raises:
        UserError: no such file, a damaged one, or other tensors.
    """
    if not path.is_file():
        raise UserError("not-found", f"There is no file of heads '{path}'.")
    try:
        found = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError("damaged", f"'{path}' holds no heads ({error}).") from None
    layers = {name.rpartition(".")[0] for name in found}
    if found.keys() != {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}:
        raise UserError(
            "unsupported",
            f"'{path}' holds other tensors than LAYER.weight and LAYER.bias; name the"
            " heads.safetensors of a transfer, or a file of import-tf --heads.",
        )
    return found


def linear_head(size: int, classes: int, seed: int, layer: str) -> nn.Linear:
    """Return a head as the reference starts it: truncated normal weights of variance 2 / F, bias 0.

    The weights are a function of (seed, layer) alone, whichever other heads there are. The
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
    """Return the mean cross-entropy {layer: float32 scalar} of logits {layer: [B, C]}."""
    return {layer: F.cross_entropy(score.float(), labels) for layer, score in logits.items()}


def make_optimizer(
    network: LinearHeads, *, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """Return SGD as in the reference, with decay on the heads' weights and biases.

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
    """Return the mean probabilities over the views of each image: [B * V, C] -> [B, C]."""
    return logits.float().softmax(dim=1).unflatten(0, (-1, views)).mean(dim=1)


@torch.no_grad()
def accuracies(
    network: Callable[[Tensor | dict[str, Tensor]], dict[str, Tensor]],
    batches: Iterable[tuple[Tensor, Tensor | dict[str, Tensor]]],
    labels: Tensor,
) -> tuple[dict[str, dict[str, float]], int]:
    """Return top-1 and top-5 accuracy of every head over all images of ``batches``.

    Args:
        network: returns logits {layer: [B, C]}, as :class:`LinearHeads` in inference mode.
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
    hits: dict[str, Tensor] = {}
    counted = 0
    for index, images in batches:
        views = 1
        if isinstance(images, dict):
            images = {layer: values.to(labels.device) for layer, values in images.items()}
        else:
            images = images.to(labels.device)
            if images.ndim == 5:
                views, images = images.shape[1], images.flatten(0, 1)
        label_B = labels[index.to(labels.device)]
        for layer, score in network(images).items():
            score_BC = mean_softmax(score, views) if views > 1 else score.float()
            rank_B = _rank(score_BC, label_B)
            found = torch.stack([(rank_B < 1).sum(), (rank_B < 5).sum()])
            hits[layer] = hits[layer] + found if layer in hits else found
        counted += len(index)
    if not counted:
        raise UserError(
            "unreadable-images", "No held-out image can be decoded; see localagg inspect."
        )
    shares = {layer: (found.cpu().double() / counted).tolist() for layer, found in hits.items()}
    return {layer: {"top1": a, "top5": b} for layer, (a, b) in shares.items()}, counted


def _rank(score_BC: Tensor, label_B: Tensor) -> Tensor:
    """Return the number of classes that precede the label, int64 [B]; a NaN score comes last."""
    own_B1 = score_BC.gather(1, label_B.unsqueeze(1))
    classes_C = torch.arange(score_BC.shape[1], device=score_BC.device)
    later = (score_BC < own_B1) | ((score_BC == own_B1) & (classes_C >= label_B.unsqueeze(1)))
    rank_B = score_BC.shape[1] - later.sum(dim=1)
    return rank_B.masked_fill(own_B1.squeeze(1).isnan(), torch.iinfo(torch.int64).max)
