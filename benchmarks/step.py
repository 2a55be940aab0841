"""What does an epoch of the cifar10 recipe cost, and what would it cost the usual way?

Both train the same network from the same checkpoint of a run, a few steps at a time in turn. The
usual way, as in the PyTorch port of the reference: images as files, torchvision's transforms on PIL
images in a DataLoader's workers, float32 in contiguous memory, sampled NCE that gathers [B, K, D],
and LA that keeps the B x N product, its top-k and H gathers; k-means from scratch each epoch.
"""

import localagg  # noqa: F401 - before torch, whose threads wait as it says

# isort: split
import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import report
from localagg import checkpoint
from localagg.clustering import cluster
from localagg.config import PretrainConfig, require_resolved
from localagg.data.images.augment import Augment
from localagg.data.loading.cropping import TrainingBatch
from localagg.data.loading.loader import Feed
from localagg.data.sources.open import Source, open_images
from localagg.data.sources.source import encoded_bytes
from localagg.objectives import NCE_PARTITION_PER_IMAGE
from localagg.training.learner import Learner, make_encoder
from localagg.training.step import take_step
from localagg.training.time_shares import TimeShares

PNG = b"\x89PNG"
PHASES = {"IR": False, "LA": True}


# --- Ours: the loop of pretrain.py, each part timed -----------------------------------------------


class Ours:
    """The recipe as it runs."""

    def __init__(self, config: PretrainConfig, source: Source, run: Path) -> None:
        self.learner = Learner(config, len(source))
        self.learner.restore(checkpoint.latest(run))
        self.feed = Feed(
            source,
            config.views,
            batch_size=require_resolved(config.batch_size),
            seed=config.seed,
            workers=config.workers,
            memory=config.memory,
            memory_gb=config.memory_gb,
        )
        self.augment = Augment(config.views, config.seed, cropped=self.feed.cropped)
        self.clustering_seconds = _seconds(self.learner.recluster)
        self.warm_seconds = _seconds(self.learner.recluster)
        self.seconds: dict[bool, dict[str, list[float]]] = {False: {}, True: {}}
        self.batches = self._batches()

    def _batches(self) -> Iterator[TrainingBatch]:
        epoch = 0
        while True:
            yield from self.feed.batches(epoch)
            epoch += 1

    def step(self, aggregating: bool) -> None:
        timer = TimeShares(self.learner.device)
        with timer("data"):
            batch = next(self.batches)
        take_step(
            self.learner,
            self.augment,
            batch,
            0,
            aggregating=aggregating,
            size=len(batch.index),
            learning_rate=self.learner.config.learning_rate,
            timer=timer,
        )
        for part, seconds in timer.seconds.items():
            self.seconds[aggregating].setdefault(part, []).append(seconds)


# --- The usual way --------------------------------------------------------------------------------


class Indexed(ImageFolder):
    """Image and index."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(index)[0], index


class Usual:
    """The same training as a first script would have it."""

    def __init__(self, config: PretrainConfig, folder: Path, ours: Ours) -> None:
        self.config, views = config, config.views
        side = require_resolved(views.image_size)
        shown = transforms.Compose(
            [
                transforms.RandomResizedCrop(side, scale=views.crop_area, ratio=views.crop_aspect),
                transforms.RandomGrayscale(views.gray),
                transforms.ColorJitter(*views.jitter),
                transforms.RandomHorizontalFlip(views.flip),
                transforms.ToTensor(),
            ]
        )
        self.loader = DataLoader(
            Indexed(folder, shown),
            batch_size=require_resolved(config.batch_size),
            shuffle=True,
            drop_last=True,
            num_workers=config.workers,
        )
        self.encoder = make_encoder(config.encoder, config.seed)
        self.encoder.load_state_dict(ours.learner.encoder.state_dict())
        self.optimizer = torch.optim.SGD(
            self.encoder.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4
        )
        self.bank = ours.learner.bank.rows.float().clone()
        clusters = require_resolved(config.objective.clusters)
        self.clustering_seconds = _seconds(lambda: cluster(self.bank, clusters))
        self.labels = require_resolved(ours.learner.labels).long()
        self.batches = self._batches()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    def step(self, aggregating: bool) -> None:
        views, index = next(self.batches)
        embedding = self.encoder(views)
        loss = (self._aggregation if aggregating else self._instance)(embedding, index)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.bank[index] = F.normalize(0.5 * self.bank[index] + 0.5 * embedding, dim=1)

    def _instance(self, embedding: Tensor, index: Tensor) -> Tensor:
        t, N = self.config.objective.temperature, len(self.bank)
        K, Z = self.config.objective.noise, NCE_PARTITION_PER_IMAGE * len(self.bank)
        noise = torch.randint(N, (len(index), K))
        p = torch.exp((embedding * self.bank[index]).sum(1) / t) / Z
        q = torch.exp(torch.bmm(self.bank[noise], embedding.unsqueeze(2)).squeeze(2) / t) / Z
        data = torch.log(p / (p + K / N + 1e-7))
        return -(data + torch.log(K / N / (q + K / N + 1e-7)).sum(1)).mean()

    def _aggregation(self, embedding: Tensor, index: Tensor) -> Tensor:
        t, K = self.config.objective.temperature, require_resolved(self.config.objective.neighbors)
        weight = torch.exp(embedding @ self.bank.T / t)
        back, rows = weight.topk(K, dim=1, sorted=False)
        close = torch.zeros_like(rows, dtype=torch.bool)
        for labels in self.labels:
            close |= labels[rows] == labels[index].unsqueeze(1)
        return -torch.log((back * close).sum(1) / back.sum(1) + 1e-7).mean()


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_steps(way: Ours | Usual, aggregating: bool, steps: int) -> None:
    for _ in range(steps):
        way.step(aggregating)


def take_out(source: Source, folder: Path) -> None:
    """The images as files, named by their index."""
    for i in range(len(source)):
        content = encoded_bytes(source[i].image)
        where = folder / f"{i // 1000:03d}"
        where.mkdir(exist_ok=True)
        suffix = "png" if content.startswith(PNG) else "jpg"
        (where / f"{i:06d}.{suffix}").write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run of the cifar10 recipe, or IR alone")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=40, help="of each way in a turn")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    config, _ = checkpoint.read_run(options.run)
    source = open_images(options.data)
    steps = len(source) // require_resolved(config.batch_size)
    times: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        take_out(source, Path(folder))
        ours = Ours(config, source, options.run)
        usual = Usual(config, Path(folder), ours)
        for turn in range(options.turns + 1):
            for phase, aggregating in PHASES.items():
                for name, way in (("ours", ours), ("usual", usual)):
                    time.sleep(1)  # let the usual way's workers fill their queue: not our time
                    took = _seconds(partial(take_steps, way, aggregating, options.steps))
                    if turn:  # the first round warms up
                        times.setdefault((name, phase), []).append(took / options.steps)
                    else:
                        ours.seconds = {False: {}, True: {}}
    write(config, steps, times, ours, usual)


def write(config, steps, times, ours, usual) -> None:
    rows, recipe = [], {"ours": 0.0, "usual": 0.0}
    epochs = {
        "IR": require_resolved(config.ir_epochs),
        "LA": require_resolved(config.epochs) - require_resolved(config.ir_epochs),
    }
    for phase, aggregating in PHASES.items():
        median = {name: statistics.median(times[name, phase]) for name in ("ours", "usual")}
        clustering = {"ours": 0.0, "usual": 0.0}
        if aggregating:
            warm = config.objective.warm_clusters
            clustering["ours"] = ours.warm_seconds if warm else ours.clustering_seconds
            clustering["usual"] = usual.clustering_seconds
        whole = {name: steps * median[name] + clustering[name] for name in median}
        parts = {k: statistics.mean(found) for k, found in ours.seconds[aggregating].items()}
        objective = steps * parts["loss engine"] + clustering["ours"]
        for name in whole:
            recipe[name] += epochs[phase] * whole[name]
        rows.append(
            [
                f"{phase} epoch",
                *(f"{1000 * median[name]:.1f}" for name in ("ours", "usual")),
                *(f"{clustering[name]:.1f}" for name in ("ours", "usual")),
                *(f"{whole[name]:.1f}" for name in ("ours", "usual")),
                f"{whole['usual'] / whole['ours']:.1f}",
                f"{objective / (steps * sum(parts.values()) + clustering['ours']):.0%}",
                ", ".join(f"{k} {1000 * v:.1f}" for k, v in parts.items()),
            ]
        )
    mix = f"{epochs['IR']} + {epochs['LA']} epochs"
    both = [f"{recipe[name]:.0f}" for name in ("ours", "usual")]
    rows.append([mix, "", "", "", "", *both, f"{recipe['usual'] / recipe['ours']:.1f}", "", ""])
    report.write(
        "step",
        "An epoch of the cifar10 recipe, ours and the usual way",
        ["", "step, ms", "usual", "clustering, s", "usual", "epoch, s", "usual", "times faster",
         "objective and clustering", "our step by part, ms"],
        rows,
        f"{steps} steps of {config.batch_size} images; {config.workers} workers of the usual way;"
        f" K = {config.objective.neighbors}, clusters {config.objective.clusters}, precision"
        f" {config.precision}. Medians of turns of the same number of steps, without measuring and"
        " checkpoints.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
