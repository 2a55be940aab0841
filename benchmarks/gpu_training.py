"""On a GPU: clusterings, training steps and features, each beside its own floor.

``clustering``: ten clusterings of drawn rows, cold and warm. ``step``: a step of ResNet-18 and LA
at 224 pixels with a large bank, and the share beside the network. ``features``: ``embed`` of JPEG
files beside the network alone. ``--device cpu`` with small numbers tries the script itself.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import report
from localagg.clustering import cluster
from localagg.config import PretrainConfig, ViewConfig, override
from localagg.data.images.augment import Augment, view_uniforms
from localagg.data.loading.cropping import TrainingBatch
from localagg.data.sources.open import open_images
from localagg.embeddings.embed import embed
from localagg.engine.search import store_by_row
from localagg.models import create_encoder
from localagg.training.learner import Learner
from localagg.training.step import take_step
from localagg.training.time_shares import TimeShares


def seconds(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def around_centers(size: int, dim: int, device: str) -> torch.Tensor:
    """Unit rows around centers, as a bank in training has them."""
    centers = torch.randn(1 + size // 40, dim, device=device)
    noise = torch.randn(size, dim, device=device)
    own = torch.randint(len(centers), (size,), device=device)
    return F.normalize(centers[own] + noise, dim=1)


def clustering(options: argparse.Namespace) -> None:
    rows, table = around_centers(options.images, 128, options.device), []
    clusters = [max(2, options.images * 30_000 // 1_281_167)] * 10
    moved = F.normalize(rows + 0.02 * torch.randn_like(rows), dim=1)
    labels = []
    cold = seconds(lambda: labels.append(cluster(rows, clusters)), options.device)
    table.append(["cold, 20 iterations", f"{cold:.1f}"])
    warm = seconds(lambda: cluster(moved, clusters, start=labels[0], iterations=5), options.device)
    table.append(["warm, at most 5 iterations, rows moved by 2 %", f"{warm:.1f}"])
    title = f"{len(clusters)} clusterings of {len(rows):,} x 128 rows into {clusters[0]:,}"
    report.write("gpu_clustering", title, ["", "seconds"], table)


def step(options: argparse.Namespace) -> None:
    size, side, batch = options.images, options.side, options.batch
    config = override(PretrainConfig(), model="resnet18", batch_size=batch, device=options.device)
    config = override(config, image_size=side, neighbors=min(4096, size // 4))
    learner = Learner(config, size)
    labels = torch.randint(max(2, size // 43), (10, size), dtype=torch.int32)
    learner.labels = store_by_row(labels.to(options.device))
    index = torch.arange(batch)
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8).to(options.device)
    batch_of = TrainingBatch(index, pixels, view_uniforms(0, 0, index))
    augment, timer = Augment(config.views, 0, cropped=True), TimeShares(learner.device)

    def take() -> None:
        take_step(
            learner, augment, batch_of, 0, aggregating=True, size=batch,
            learning_rate=0.03, timer=timer,
        )  # fmt: skip

    def network_alone() -> None:
        with learner.fabric.autocast():
            found = learner.network(augment(pixels, 0, index))
        learner.fabric.backward(found.sum())
        learner.optimizer.step()
        learner.optimizer.zero_grad()

    ways = {"network alone, with views": network_alone, "step of LA": take}
    timed = {
        name: lambda way=way: seconds(lambda: [way() for _ in range(5)], options.device) / 5
        for name, way in ways.items()
    }
    times: dict[str, list[float]] = {name: [] for name in timed}
    for run in range(options.runs + 2):
        for name, call in timed.items():
            took = call()
            if run >= 2:
                times[name].append(took)
    medians = {name: float(np.median(found)) for name, found in times.items()}
    rows = [[name, f"{1000 * each:.2f}", f"{batch / each:,.0f}"] for name, each in medians.items()]
    share = 1 - medians["network alone, with views"] / medians["step of LA"]
    rows.append(["share that is not the network", f"{share:.1%}", ""])
    title = f"A step of ResNet-18, {side} pixels, batch {batch}, bank of {size:,} rows"
    report.write("gpu_step", title, ["", "ms", "images/s"], rows)


def features(options: argparse.Namespace) -> None:
    side, count = options.side, min(options.images, 4096)
    draws = np.random.default_rng(0)
    encoder = create_encoder("resnet18").to(options.device, memory_format=torch.channels_last)
    views = ViewConfig(image_size=side, eval_crop=1.0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(256):  # smooth, so that their size is a photo's
            small = draws.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            photo = Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC)
            photo.save(Path(folder) / f"{number:03}.jpg", quality=90)
        for number in range(256, count):
            (Path(folder) / f"{number}.jpg").hardlink_to(Path(folder) / f"{number % 256:03}.jpg")
        source = open_images(folder)
        views_given = torch.randint(0, 256, (256, 3, side, side), dtype=torch.uint8)
        moved = views_given.to(options.device)

        def autocast() -> torch.autocast:
            return torch.autocast(options.device, torch.bfloat16)

        def network_alone() -> None:
            with torch.no_grad(), autocast():
                for _ in range(-(-count // 256)):
                    encoder.eval()(moved)

        def whole() -> None:
            embed(encoder, source, views, workers=options.workers, autocast=autocast)

        calls = {"network alone": network_alone, "embed from JPEG files": whole}
        rows = []
        for name, call in calls.items():
            call()
            took = min(seconds(call, options.device) for _ in range(2))
            rows.append([name, f"{count / took:,.0f}"])
    title = f"Features of {count:,} JPEG files, 400 x 300, ResNet-18 at {side} pixels"
    report.write("gpu_features", title, ["", "images/s"], rows, f"{options.workers} workers.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {"clustering": clustering, "step": step, "features": features}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--workers", type=int, default=12)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no GPU on this machine: nothing was measured.")
        sys.exit(2)
    parts[options.part](options)


if __name__ == "__main__":
    main()
