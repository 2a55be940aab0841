"""How long until an embedding is useful, and how good is it then, beside the plain ways?

From some images of CIFAR-10, without their labels: ``adapt`` (a head on a pretrained network),
``folder`` (from scratch), and raw pixels; beside them timm's features with scikit-learn's principal
components, and SimCLR from scratch in plain PyTorch for the same minutes. Accuracy: 20 neighbors
among these images vote (scikit-learn, cosine) on test images.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from efficientnet import MODEL, write_efficientnet

import report
from localagg import load, pretrain
from localagg.config import override
from localagg.data.images.decode import decode
from localagg.data.sources.open import open_images
from localagg.models import create_encoder
from localagg.recipes.builtin import recipe

NEIGHBORS, DIM = 20, 128
Found = tuple[np.ndarray, np.ndarray, str]
"""Embeddings of the images and of the test images, and the seconds by part."""


class Task:
    """Images uint8 [n, 3, 32, 32] of one split, and their classes."""

    def __init__(self, data: str, split: str, count: int, seed: int) -> None:
        source = open_images(data, split=split)
        index = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:count]
        assert source.labels is not None
        self.labels = source.labels[index].numpy()
        self.images = torch.stack([decode(source[i].image) for i in index.tolist()])
        self.arrays = self.images.permute(0, 2, 3, 1).numpy()


def ours(name: str, train: Task, test: Task, folder: Path, **options: Any) -> Found:
    """Run a recipe, and embed both by the run."""
    run = folder / "run"
    config = override(recipe(name).config, **options, eval_every=0)
    result = pretrain(config, train.arrays, run)
    start = time.perf_counter()
    model = load(run)
    rows = [np.asarray(model.embed(list(each.arrays))) for each in (train, test)]
    shares = {part: share * result["seconds"] for part, share in result["shares"].items()}
    shares |= {"embedding both": time.perf_counter() - start}
    parts = ", ".join(f"{part} {seconds:.0f}" for part, seconds in shares.items() if seconds > 0.5)
    return rows[0], rows[1], parts


def pixels(train: Task, test: Task) -> Found:
    first, second = (each.images.flatten(1).numpy() / 255.0 for each in (train, test))
    return first - first.mean(0), second - first.mean(0), ""


@torch.no_grad()
def timm_and_scikit_learn(train: Task, test: Task, weights: Path, side: int) -> Found:
    """Features in float32, then whitened principal components."""
    name = MODEL.removeprefix("timm:")
    model = timm.create_model(name, num_classes=0).eval()
    stored = load_file(weights).items()
    model.load_state_dict({k: v for k, v in stored if not k.startswith("classifier")})
    view = v2.Compose([v2.Resize(side), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize([0.5] * 3, [0.5] * 3)])  # fmt: skip
    start = time.perf_counter()
    found = [torch.cat([model(view(part)) for part in each.images.split(64)]).numpy()
             for each in (train, test)]  # fmt: skip
    read = time.perf_counter()
    pca = PCA(DIM, whiten=True).fit(found[0])
    rows = [pca.transform(each) for each in found]
    parts = f"features {read - start:.0f}, components {time.perf_counter() - read:.0f}"
    return rows[0], rows[1], parts


def simclr(train: Task, test: Task, minutes: float, seed: int) -> Found:
    """SimCLR (Chen et al. 2020): two views, NT-Xent at 0.5, a head of two layers, Adam."""
    torch.manual_seed(seed)
    network = create_encoder("resnet18_small", 512, seed=seed, width=32)
    head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, DIM))
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=1e-3)
    view = v2.Compose([v2.RandomResizedCrop(32), v2.RandomHorizontalFlip(),
                       v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomGrayscale(0.2)])  # fmt: skip
    start, epochs = time.perf_counter(), 0
    while time.perf_counter() - start < 60 * minutes:
        for index in torch.randperm(len(train.images)).split(128):
            views = [torch.stack([view(image) for image in train.images[index]]) for _ in range(2)]
            z = F.normalize(head(network.unnormalized(torch.cat(views))), dim=1)
            sim = z @ z.T / 0.5
            sim.fill_diagonal_(-torch.inf)
            F.cross_entropy(sim, torch.arange(len(z)).roll(len(index))).backward()
            optimizer.step()
            optimizer.zero_grad()
            if time.perf_counter() - start > 60 * minutes:
                break
        epochs += 1
    network.eval()
    with torch.no_grad():
        rows = [torch.cat([network.unnormalized(part) for part in each.images.split(256)])
                for each in (train, test)]  # fmt: skip
    parts = f"training {time.perf_counter() - start:.0f} ({epochs} epochs)"
    return rows[0].numpy(), rows[1].numpy(), parts


def accuracy(found: Found, train: Task, test: Task) -> float:
    voter = KNeighborsClassifier(NEIGHBORS, metric="cosine").fit(found[0], train.labels)
    return float(voter.score(found[1], test.labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="CIFAR-10 as Parquet")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2_000, 10_000])
    parser.add_argument("--minutes", type=float, default=2.0, help="of the ways from scratch")
    parser.add_argument("--side", type=int, default=64, help="of adapt's and timm's views")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tested", type=int, default=10_000, help="test images")
    parser.add_argument("--ways", nargs="+", help="names of ways, in place of all")
    parser.add_argument("--name", default="useful", help="of the table")
    options = parser.parse_args()
    times: dict[tuple[int, str], list[float]] = {}
    values: dict[tuple[int, str], list[float]] = {}
    parts: dict[tuple[int, str], str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        weights = write_efficientnet(Path(temporary))
        for size in options.sizes:
            for seed in range(options.seeds):
                run_ways(options, weights, size, seed, times, values, parts)
    rows = [
        [f"{size:,}", way, f"{statistics.median(found):.0f}", parts[size, way],
         report.percent(values[size, way])]
        for (size, way), found in times.items()
    ]  # fmt: skip
    report.write(
        options.name,
        "Time to a useful embedding of CIFAR-10",
        ["images", "way", "seconds", "seconds by part (last seed)", "20-NN, %"],
        rows,
        f"{options.tested:,} test images, {options.seeds} seeds, medians of seconds, means of"
        f" accuracies with 95 % intervals. Views of {options.side} pixels for pretrained"
        f" networks; {options.minutes:g} minutes of"
        " training from scratch. 250,000 images, and a GPU: not measured.",
    )


def run_ways(
    options: argparse.Namespace, weights: Path, size: int, seed: int, times: Any, values: Any,
    parts: Any,
) -> None:  # fmt: skip
    """Add what each way takes and reaches for one size and seed."""
    train = Task(options.data, "train", size, seed)
    test = Task(options.data, "test", options.tested, 0)
    with tempfile.TemporaryDirectory() as folder:
        adapt = {"model": MODEL, "weights": str(weights), "image_size": options.side, "seed": seed}
        adapt["cache"] = f"{folder}/cache"
        ways = {
            "raw pixels": lambda: pixels(train, test),
            "timm + scikit-learn": lambda: timm_and_scikit_learn(
                train, test, weights, options.side
            ),
            "adapt, head": lambda: ours("adapt", train, test, Path(folder, "a"), **adapt),
            "folder, from scratch": lambda: ours(
                "folder", train, test, Path(folder, "f"), minutes=options.minutes, seed=seed
            ),
            "SimCLR, from scratch": lambda: simclr(train, test, options.minutes, seed),
        }
        for name in options.ways or ways:
            way = ways[name]
            Path(folder, name[0]).mkdir(exist_ok=True)
            start = time.perf_counter()
            found = way()
            took = time.perf_counter() - start
            times.setdefault((size, name), []).append(took)
            values.setdefault((size, name), []).append(accuracy(found, train, test))
            parts[size, name] = found[2]
            print(size, seed, name, f"{took:.1f}", values[size, name][-1], found[2], flush=True)


if __name__ == "__main__":
    main()
