"""The state that changes while a run learns, on its device, and its checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..bank import MemoryBank
from ..clustering import cluster
from ..config import EncoderConfig, PretrainConfig, require_resolved
from ..data.sources.open import Source
from ..distributed.batch_norm import running_statistics, synchronize_batch_norm
from ..distributed.collectives import World
from ..engine.bank_shard import BankShard
from ..engine.device import make_fabric
from ..engine.kmeans import KMeans
from ..engine.search import store_by_row
from ..errors import UserError
from ..io.console import show_progress
from ..models import Encoder, create_encoder, encoder_of
from .frozen.trained_part import freeze_untrained
from .initial_bank import embed_bank


class Learner:
    """Weights, optimizer, bank, cluster labels and step of a run.

    Weights, running statistics of batch-norm and momenta are the same on every rank after each
    step. A rank holds its share of the rows of bank and labels.

    Args:
        config: resolved.
        size: N, rows of the bank.
        world: the ranks. Default: this process alone.
        backbone: a network given in Python, in place of that of the configuration.

    Raises:
        UserError: a device that is missing, or a batch-norm that cannot be shared.
    """

    def __init__(
        self,
        config: PretrainConfig,
        size: int,
        world: World | None = None,
        backbone: nn.Module | None = None,
    ) -> None:
        self.config, self.world = config, world or World()
        number = self.world.local_rank if self.world.size > 1 else None
        self.fabric = make_fabric(config.device, config.precision, number)
        if backbone is None:
            self.encoder = make_encoder(config.encoder, config.seed)
        else:
            self.encoder = encoder_of(
                backbone,
                config.encoder.dim,
                require_resolved(config.views.image_size),
                head_layers=config.encoder.head_layers,
                seed=config.seed,
            )
        if config.sync_batch_norm and self.world.size > 1:
            synchronize_batch_norm(self.encoder, self.world)
        if config.adapt.feature_views:
            # Not channels-last: torch 2.14 corrupts memory on a CPU in the backward pass of
            # batch-norm that keeps its statistics.
            freeze_untrained(self.encoder, config.adapt)
        else:
            self.encoder.to(memory_format=torch.channels_last)
        self.device = self.fabric.device
        if self.world.size > 1 and self.device.type == "mps":
            raise UserError(
                "unsupported", "Several processes cannot share --device mps; use --device cpu."
            )
        fused = self.device.type in ("cpu", "cuda")  # one pass over weights, gradients, momenta
        groups = parameter_groups(self.encoder, config)
        optimizer = torch.optim.SGD(groups, momentum=config.momentum, fused=fused)
        network = torch.compile(self.encoder) if config.compile else self.encoder
        self.network, self.optimizer = self.fabric.setup(network, optimizer)  # type: ignore[arg-type]
        if config.precision == "64-true":  # Fabric would round its result to torch's default
            self.network = network
        self.bank = MemoryBank(
            size,
            config.encoder.dim,
            seed=config.seed,
            device=self.device,
            dtype=getattr(torch, config.objective.bank_dtype),
            part=self.world.part(size),
        )
        self.labels: Tensor | None = None
        """Cluster labels, int32 [H, n], of this rank's rows; None before LA."""
        self.step = 0

    @property
    def shard(self) -> BankShard:
        """This rank's rows of the bank, ready to be searched."""
        return self.bank.shard(self.world)

    def embed_bank(self, source: Source, pixels: Tensor | None) -> None:
        """Write each image's embedding by the untrained network into its row of the bank.

        From random rows the network first learns their noise: on CIFAR-10 four epochs of IR reached
        a 200-NN of 40.4 % from embeddings and 25.5 % from random rows. Batch statistics are used,
        as batch-norm has no others yet. Deviation: the reference starts from random rows.
        """
        with show_progress("first bank") as show:
            embed_bank(
                self.encoder,
                self.bank,
                self.world,
                source,
                self.config.views,
                pixels=pixels,
                workers=self.config.workers,
                autocast=self.fabric.autocast,
                on_progress=show,
            )

    def share_gradients(self, gradient: Tensor) -> Tensor:
        """Sum the weights' gradients over the ranks, and average batch-norm's running statistics.

        One all-reduce of all weights. The loss is the mean over the whole batch on every rank, so
        its gradients are summed.

        Args:
            gradient: of the loss in this rank's embeddings.

        Returns:
            On one rank ``gradient``; else a scalar: 0, or NaN if any rank's gradient is not finite.
        """
        if self.world.size == 1:
            return gradient
        gradients = [p.grad for p in self.encoder.parameters() if p.grad is not None]
        running = running_statistics(self.encoder)
        finite = torch.where(gradient.isfinite().all(), 0.0, torch.nan).to(gradients[0])
        tensors = [*gradients, *running, finite]
        flat = self.world.sum(torch.cat([tensor.detach().flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        with torch.no_grad():
            for tensor, total in zip(tensors, parts, strict=True):
                tensor.copy_(total.view_as(tensor))
            for tensor in running:
                tensor.div_(self.world.size)
        return finite

    def recluster(self, on_progress: Callable[[int, KMeans], None] | None = None) -> None:
        """Compute new cluster labels from the bank, starting from the last ones if configured."""
        objective, last = self.config.objective, self.labels
        warm = last is not None and objective.warm_clusters
        labels = cluster(
            self.bank.rows,
            objective.clusters or (),
            iterations=objective.warm_iterations if warm else objective.kmeans_iterations,
            start=last if warm else None,
            tolerance=objective.warm_tolerance if warm else 0.0,
            engine=objective.kmeans,
            world=self.world,
            on_progress=on_progress,
        )
        self.labels = store_by_row(labels)

    def save(self, run: Path, progress: dict[str, Any]) -> None:
        """Write a checkpoint of this step."""
        checkpoint.save(
            run,
            self.step,
            encoder=self.encoder,
            optimizer=self.optimizer,  # type: ignore[arg-type]
            bank=self.bank,
            clusters={} if self.labels is None else {"labels": self.labels},
            progress=progress,
            views=self.config.views,
            world=self.world,
        )

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load a checkpoint; return the progress that was saved with it."""
        clusters, progress = checkpoint.restore(
            folder, encoder=self.encoder, optimizer=self.optimizer, bank=self.bank
        )
        if "labels" in clusters:
            self.labels = store_by_row(clusters["labels"].to(self.device))
        self.step = progress["step"]
        return progress


def make_encoder(config: EncoderConfig, seed: int) -> Encoder:
    """Return the network of a configuration, with the random weights of a seed."""
    options: dict[str, Any] = {"head_layers": config.head_layers}
    if config.model == "resnet18_small":
        options |= {k: getattr(config, k) for k in ("width", "blocks", "stem_stride")}
    return create_encoder(config.model or "resnet18", config.dim, seed=seed, **options)


def parameter_groups(encoder: Encoder, config: PretrainConfig) -> list[dict[str, Any]]:
    """Return parameters with weight decay, and those of batch-norm without.

    A pretrained backbone has groups of its own, whose ``rate_share`` of the learning rate is
    ``--network-rate``.
    """
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if config.compat == "reference" and encoder.spec["model"] == "alexnet_bn":
        norms = []  # their names escape the reference's filter
    of_norms = {id(parameter) for norm in norms for parameter in norm.parameters()}
    parts: list[tuple[list[nn.Module], float]] = [([encoder], 1.0)]
    if config.adapt.feature_views:
        head: list[nn.Module] = [encoder.hidden, encoder.head]
        parts = [(head, 1.0), ([encoder.backbone], config.adapt.network_rate)]
    groups: list[dict[str, Any]] = []
    for modules, share in parts:
        found = [p for module in modules for p in module.parameters() if p.requires_grad]
        shared = {"lr": config.learning_rate, "rate_share": share}
        decayed = [p for p in found if id(p) not in of_norms]
        rest = [p for p in found if id(p) in of_norms]
        groups.append({"params": decayed, "weight_decay": config.weight_decay, **shared})
        groups.append({"params": rest, "weight_decay": 0.0, **shared})
    return groups
