"""What does ``adapt`` need for a million images, once their features are computed?

Features are drawn around centers and written as ``adapt`` caches them; then its own parts run: the
first head and bank, steps of IR and of LA, one iteration of a clustering, and searches.
An epoch is the median step times its steps. Each part tells the largest memory
that is not a mapped file.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import report
from localagg.clustering import cluster
from localagg.config import PretrainConfig, override, require_resolved
from localagg.data.images.augment import Augment
from localagg.data.loading.cropping import TrainingBatch
from localagg.distributed.collectives import World
from localagg.engine.search import nearest
from localagg.recipes.builtin import recipe
from localagg.recipes.derived_settings import resolve_defaults
from localagg.training.frozen.frozen_features import FrozenFeatures
from localagg.training.frozen.trained_part import start_from_features
from localagg.training.learner import Learner
from localagg.training.step import take_step
from localagg.training.time_shares import TimeShares

SIDE = 32  # of images that nobody sees


class Watch:
    """Seconds and peak of anonymous memory of calls."""

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.05)

    @staticmethod
    def now() -> float:
        """Return the GiB of this process that no file holds."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20

    def __call__(self, call: Callable[[], object]) -> tuple[float, float]:
        """Return (seconds, peak GiB) of a call."""
        self.peak, start = self.now(), time.perf_counter()
        call()
        return time.perf_counter() - start, max(self.peak, self.now())


def draw_features(path: Path, shape: tuple[int, int, int]) -> None:
    """Write float16 features around one center for each 40 images."""
    values = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    draws = np.random.default_rng(0)
    centers = draws.standard_normal((1 + shape[0] // 40, shape[2]), dtype=np.float32)
    for first in range(0, shape[0], 20_000):
        own = centers[draws.integers(len(centers), size=len(values[first : first + 20_000]))]
        noise = draws.standard_normal((len(own), *shape[1:]), dtype=np.float32)
        values[first : first + 20_000] = own[:, None] + noise
    values.flush()


def steps(
    learner: Learner, features: FrozenFeatures, aggregating: bool, count: int, times: list[float]
) -> None:
    """Take training steps, and add the seconds of each."""
    config, timer = learner.config, TimeShares(learner.device)
    size = require_resolved(config.batch_size)
    augment = Augment(config.views, 0, cropped=True)
    for index in torch.randperm(len(learner.bank.rows))[: count * size].split(size):
        start = time.perf_counter()
        batch = TrainingBatch(index, features.random(0, index), torch.empty(size, 0))
        take_step(
            learner, augment, batch, 0, aggregating=aggregating, size=size,
            learning_rate=config.learning_rate, timer=timer,
        )  # fmt: skip
        times.append(time.perf_counter() - start)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--channels", type=int, default=384, help="384: ViT-S; 512: ResNet-18")
    parser.add_argument("--views", type=int, default=1, help="random views beside the measured one")
    parser.add_argument("--steps", type=int, default=12)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    size, shape = options.images, (options.images, 1 + options.views, options.channels)
    config: PretrainConfig = override(recipe("adapt").config, device="cpu", image_size=SIDE)
    config = resolve_defaults(override(config, feature_views=options.views), size, SIDE)
    objective = config.objective
    rows: list[list[str]] = []
    watch = Watch()

    def add(part: str, seconds: float, peak: float, note: str = "") -> None:
        rows.append([part, f"{seconds:.2f}", f"{peak:.1f}", note])
        print(rows[-1], flush=True)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "features.npy")
        draw_features(path, shape)
        features = FrozenFeatures(np.load(path, mmap_mode="r"), {}, 0)
        backbone = nn.Sequential(
            nn.Conv2d(3, options.channels, SIDE), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        made: list[Learner] = []
        add("network, bank", *watch(lambda: made.append(Learner(config, size, backbone=backbone))))
        learner, valid = made[0], torch.arange(size)
        begin = (learner.encoder, learner.bank, features, valid, World())
        add("first head and bank", *watch(lambda: start_from_features(*begin)))
        batch = require_resolved(config.batch_size)
        for name, aggregating in (("IR", False), ("LA", True)):
            if aggregating:
                clusters = require_resolved(objective.clusters)[:1]
                once = watch(partial(cluster, learner.bank.rows, clusters, iterations=1))
                text = f"of {len(objective.clusters or ())} x {objective.kmeans_iterations}"
                add(f"one iteration of one clustering, k = {clusters[0]:,}", *once, text)
                many = require_resolved(objective.clusters)
                labels = [torch.randint(k, (size,), dtype=torch.int32) for k in many]
                learner.labels = torch.stack(labels, dim=1).T
            found: list[float] = []
            take = partial(steps, learner, features, aggregating, options.steps, found)
            spent = watch(take)
            step = statistics.median(found[2:])
            epoch = step * size / batch / 60
            add(f"step of {name}, batch {batch}", step, spent[1], f"{epoch:.1f} min an epoch")
        bank = learner.bank.searchable
        for count in (1, 128):
            queries = learner.bank.rows[:count].clone()
            nearest(queries, bank, 20)
            add(f"search, {count} queries", *watch(partial(nearest, queries, bank, 20)))
        cache = path.stat().st_size / 2**30
    report.write(
        "million",
        f"adapt on {size:,} images of which only features are drawn",
        ["part", "seconds", "peak GiB", ""],
        rows,
        f"Features float16 {list(shape)}: {cache:.2f} GiB on disk, mapped."
        f" K = {objective.neighbors:,}; a checkpoint's bank takes {size * 512 / 2**30:.2f} GiB."
        f" By the same rule the recipe's 7 views of 1,280 channels take"
        f" {size * 7 * 1280 * 2 / 2**30:.1f} GiB.",
    )


if __name__ == "__main__":
    main()
