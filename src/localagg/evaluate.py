"""Measurements while a run learns: nearest neighbors of held-out images in the bank."""

from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from .config import PretrainConfig, UserError
from .data.loader import decoded
from .data.sources import Source, open_evaluation
from .embed import embed
from .knn import knn_accuracy
from .models import Encoder

_LEAVE_ONE_OUT = 5000  # bank rows asked about where nothing is held out


class OnlineNeighbors:
    """1-NN (the reference's online validation) and weighted 200-NN accuracy on the bank.

    Held-out images ask the bank; where the data have no held-out split, up to 5,000 rows of the
    bank ask the others (named ``loo_knn1``, ``loo_knn200``). Without labels nothing is measured.

    Args:
        config: resolved; its views decide what is embedded.
        data: data URI, asked for its split "val".
        source: what is learned from.
        valid: int64, the rows of the bank that are learned.
    """

    def __init__(self, config: PretrainConfig, data: str, source: Source, valid: Tensor) -> None:
        self.config, self.valid, self.labels = config, valid, source.labels
        self.held_out: Source | None = None
        self.pixels: Tensor | None = None
        if self.labels is None or not config.eval_every:
            return
        held_out = open_evaluation(data)
        if held_out is not None and held_out.labels is not None:
            self.held_out, self.names = held_out, translation(data, source, held_out)
            self.pixels = decoded(held_out, config)

    def __call__(self, encoder: Encoder, bank: Tensor, fabric: Fabric) -> dict[str, Any]:
        """Accuracies in 0-1 by name; empty without labels."""
        if self.labels is None:
            return {}
        valid = self.valid.to(bank.device)
        known, labels = bank[valid], self.labels.to(bank.device)[valid]
        if self.held_out is None:
            step = max(1, len(valid) // _LEAVE_ONE_OUT)
            asked = torch.arange(0, len(valid), step, device=bank.device)
            found = knn_accuracy(known[asked], labels[asked], known, labels, exclude=asked)
            return {f"loo_{name}": value for name, value in found.items()}
        queries = embed(
            encoder,
            self.held_out,
            self.config.views,
            pixels=self.pixels,
            workers=self.config.workers,
            autocast=fabric.autocast,
        )
        assert queries.labels is not None
        asked_labels = self.names[queries.labels]
        return knn_accuracy(queries.rows, asked_labels, known, labels)


def translation(data: str, source: Source, held_out: Source) -> Tensor:
    """Held-out labels to training labels, by class name: int64 [held-out classes].

    Raises:
        UserError: held-out classes that the training images do not have.
    """
    number = {name: label for label, name in enumerate(source.classes or ())}
    names = held_out.classes or []
    if unknown := [name for name in names if name not in number]:
        raise UserError(
            f"The held-out images of '{data}' have classes that the training images lack:"
            f" {', '.join(unknown[:5])}; rename them, or measure nothing with --eval-every 0."
        )
    return torch.tensor([number[name] for name in names])
