"""Start from a pretrained backbone: which part of it learns, and the first state of its head."""

from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from ...bank import MemoryBank
from ...checkpoint import read_run
from ...config import AdaptConfig
from ...data.images.image_dataset import GIVEN
from ...distributed.collectives import World
from ...embeddings.open_table import write_run_table
from ...errors import UserError
from ...io.console import notify
from ...models import Encoder
from .frozen_features import FrozenFeatures

_ROWS = 4096  # features at a time


def freeze_untrained(encoder: Encoder, options: AdaptConfig) -> None:
    """Exclude the parameters that ``--train`` does not name from training.

    The backbone's batch-norm keeps its statistics, also where its weights learn.

    Raises:
        UserError: ``--train last:N`` with more stages than the backbone has.
    """
    encoder.freeze_statistics()
    if options.train == "all":
        return
    modules = dict(encoder.backbone.named_modules())
    names = list(modules)  # in the order of the network
    if options.last_stages:
        names = names[: _modules_before_last(encoder, options.last_stages, names)]
    for name in names:
        for parameter in modules[name].parameters(recurse=False):
            parameter.requires_grad_(False)


def _modules_before_last(encoder: Encoder, count: int, names: list[str]) -> int:
    """Return how many of the modules come before the last ``count`` stages."""
    stages = list(encoder.backbone.layer_modules.values())
    if count > len(stages):
        raise UserError(
            "option-invalid",
            f"--train last:{count} exceeds the {len(stages)} stages of {encoder.spec['model']};"
            f" use at most last:{len(stages)}, or all.",
        )
    if count == len(stages):
        return 0
    end = stages[-count - 1]
    return max(n for n, name in enumerate(names) if f"{name}.".startswith(f"{end}.")) + 1


@torch.no_grad()
def start_from_features(
    encoder: Encoder, bank: MemoryBank, features: FrozenFeatures, valid: Tensor, world: World
) -> None:
    """Set head and bank to the whitened principal components of the frozen features.

    Such a linear head is better than a random one (docs/method.md). With a hidden layer the head
    stays random.

    Args:
        encoder: its head is set.
        bank: this rank's rows are set to the embeddings of the measured views.
        features: of all images.
        valid: int64 [n], the readable images.
        world: the ranks, which all take rank 0's head.
    """
    head = encoder.head
    assert isinstance(head, nn.Linear)
    if isinstance(encoder.hidden, nn.Identity):
        weight, bias = whitening(features, valid, head.out_features)
        head.weight.copy_(world.stack(weight.to(head.weight))[0])
        head.bias.copy_(world.stack(bias.to(head.bias))[0])
    own = valid[(valid >= bank.part.start) & (valid < bank.part.stop)]
    rows = embed_features(encoder, features, own).to(bank.rows)
    bank.rows[(own - bank.part.start).to(bank.rows.device)] = rows


@torch.no_grad()
def embed_features(encoder: Encoder, features: FrozenFeatures, index: Tensor) -> Tensor:
    """Return the embeddings float32 [B, D] of images ``index`` under the measured view."""
    device = encoder.mean.device
    parts = [encoder(features.measured(part).to(device)) for part in index.split(_ROWS)]
    return torch.cat(parts) if parts else torch.empty(0, encoder.spec["dim"], device=device)


def write_final_embeddings(
    run: Path, encoder: Encoder, features: FrozenFeatures, valid: Tensor, fabric: Fabric
) -> None:
    """Write the table of a finished run from its features, so that no image is embedded again.

    Does nothing for images and backbones that were given in Python, which the folder cannot open.
    A failure is only reported: the table is written when it is needed.
    """
    facts = read_run(run)[1]
    if facts["data"] == GIVEN or "backbone" in facts:
        return
    training = encoder.training
    encoder.eval()
    rows = embed_features(encoder, features, valid)
    encoder.train(training)
    try:
        write_run_table(run, valid, rows.cpu(), fabric)
    except UserError as error:
        notify(f"The run is complete, without its table of embeddings: {error}")


def whitening(features: FrozenFeatures, valid: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return weight float64 [dim, C] and bias [dim] of whitened principal components.

    Each component of the measured views has mean 0 and variance 1; components without variance are
    zero. Outputs of a smaller scale would move too far in each step, as rows are scaled to unit
    length.
    """
    total, second = torch.zeros(()), torch.zeros(())
    for index in valid.split(_ROWS):
        x = features.measured(index).double()
        total, second = total + x.sum(dim=0), second + x.T @ x
    mean = total / len(valid)
    values, vectors = torch.linalg.eigh(second / len(valid) - torch.outer(mean, mean))
    values, vectors = values.flip(0)[:dim], vectors.flip(1)[:, :dim]
    kept = values > 1e-6 * values[0]
    scale = torch.where(kept, values.clamp(min=1e-12).rsqrt(), 0.0)
    weight = vectors.new_zeros(dim, len(mean))
    weight[: len(values)] = (vectors * scale).T
    return weight, -weight @ mean
