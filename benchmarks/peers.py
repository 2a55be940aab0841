"""SimCLR, MoCo and supervised training beside our recipes: one network, views, data and time.

    python benchmarks/peers.py sweeps/cifar10/IR-0 --data CIFAR10 --minutes 25 --out peers \\
        --runs "IR: sweeps/cifar10/IR-{seed}" "LA: sweeps/cifar10/LA-{seed}"

Network, views and batch are those of the run that is named first.

A peer trains for ``--minutes`` of its own processor time a thread, so that it does not matter what
else the machine does; its rate falls to zero as a cosine of the time spent. The losses of SimCLR
(Chen et al. 2020) and MoCo (He et al. 2020) are those of the package ``lightly``. ``--runs`` are
finished runs of ``localagg pretrain`` (of a sweep, say), which are measured likewise. Finished
peers are not trained again.

Measured: the weighted vote of the 200 nearest (and of the nearest) training images for each
test image, by the embedding that was trained and by the pooled features under its head, each as
unit rows of the central views.
"""

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from torch import Tensor, nn

import report
from localagg.checkpoint import latest, load_encoder, read_progress, read_run
from localagg.config import PretrainConfig, override, require_resolved
from localagg.data.images.augment import Augment, evaluation_view
from localagg.data.loading.loader import Feed
from localagg.data.sources.open import open_images
from localagg.engine.device import make_fabric
from localagg.evaluation.knn import knn_accuracy
from localagg.io.files import atomic_write
from localagg.models import Encoder
from localagg.training.learner import make_encoder

OTHER = 1 << 20  # added to the seed for the second view
QUEUE = 4096  # MoCo's: keys that are kept
CLASSES = 10


class Peer(nn.Module):
    """A network with the head of its method: a perceptron of two layers, or a linear classifier."""

    def __init__(self, encoder: Encoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def features(self, views: Tensor) -> Tensor:
        """[B, channels]: the last map, pooled."""
        return self.encoder.pooled(views)

    def forward(self, views: Tensor) -> Tensor:
        return self.head(self.features(views)).float()


def make_peer(method: str, config: PretrainConfig) -> Peer:
    encoder = make_encoder(config.encoder, config.seed)
    channels = encoder.backbone.channels
    if method == "supervised":
        return Peer(encoder, nn.Linear(channels, CLASSES))
    layers = nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, config.encoder.dim)
    return Peer(encoder, nn.Sequential(*layers))


def train(method: str, config: PretrainConfig, feed: Feed, seconds: float) -> tuple[Peer, int]:
    """The peer after so many seconds of processor time a thread, and its epochs."""
    fabric = make_fabric("auto", config.precision)
    peer = make_peer(method, config).to(memory_format=torch.channels_last)
    rate, decay = (0.1, 5e-4) if method == "supervised" else (0.06, 5e-4)
    optimizer = torch.optim.SGD(peer.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    network, optimizer = fabric.setup(peer, optimizer)
    assert feed.source.labels is not None
    loss_of = LOSSES[method](peer, feed.source.labels)
    views = [
        Augment(config.views, config.seed + shift, cropped=feed.cropped) for shift in (0, OTHER)
    ]
    begin, step = _spent(), 0
    for step, (index, images, epoch) in enumerate(_endless(feed)):
        done = (_spent() - begin) / seconds
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate / 2 * (1 + math.cos(math.pi * done))
        made = [_last(view(images, epoch, index)) for view in views[: VIEWS[method]]]
        loss = loss_of(network, made, index)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % feed.steps == 0:
            print(f"{method}, seed {config.seed}: epoch {epoch}, {done:.0%}", file=sys.stderr)
    return peer, step // feed.steps


def _spent() -> float:
    return time.process_time() / torch.get_num_threads()


def _endless(feed: Feed) -> Iterator[tuple[Tensor, Tensor, int]]:
    epoch = 0
    while True:
        for index, images, _ in feed.batches(epoch):
            yield index, images, epoch
        epoch += 1


# A step's loss: (network, views, index) -> scalar.
Loss = Callable[[nn.Module, list[Tensor], Tensor], Tensor]


def simclr(peer: Peer, labels: Tensor) -> Loss:
    """Two views of an image against the other images of the batch."""
    criterion = NTXentLoss(temperature=0.2)

    def loss(network: nn.Module, views: list[Tensor], index: Tensor) -> Tensor:
        one, two = network(_last(torch.cat(views))).chunk(2)
        return criterion(one, two)

    return loss


def moco(peer: Peer, labels: Tensor) -> Loss:
    """A view against the other's slowly moving key and a queue of earlier keys."""
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(QUEUE, peer.encoder.spec["dim"]))
    keys = copy.deepcopy(peer).requires_grad_(False)

    def loss(network: nn.Module, views: list[Tensor], index: Tensor) -> Tensor:
        query = network(views[0])
        with torch.no_grad():
            for slow, fast in zip(keys.parameters(), peer.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
            with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_autocast_enabled("cpu")):
                key = keys(views[1])
        return criterion(query, key)

    return loss


def supervised(peer: Peer, labels: Tensor) -> Loss:
    """The ceiling: labels, and one view."""

    def loss(network: nn.Module, views: list[Tensor], index: Tensor) -> Tensor:
        return F.cross_entropy(network(views[0]), labels[index])

    return loss


LOSSES = {"simclr": simclr, "moco": moco, "supervised": supervised}
VIEWS = {"simclr": 2, "moco": 2, "supervised": 1}


def _last(views: Tensor) -> Tensor:
    return views.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def measure(peer: Peer, config: PretrainConfig, data: str) -> dict[str, float]:
    """1-NN and 200-NN of the embedding (supervised: the logits) and of the pooled features."""
    peer.eval()
    rows: dict[str, list[Tensor]] = {}
    labels = []
    for split in ("train", "val"):
        source = open_images(data, split)
        feed = Feed(source, config.views, batch_size=1)
        assert feed.pixels is not None
        assert source.labels is not None
        found: dict[str, list[Tensor]] = {"embedding": [], "features": []}
        for pixels in feed.pixels.split(500):
            features = peer.features(evaluation_view(pixels, config.views))
            found["features"].append(F.normalize(features, dim=1))
            found["embedding"].append(F.normalize(peer.head(features), dim=1))
        for name, parts in found.items():
            rows.setdefault(name, []).append(torch.cat(parts))
        labels.append(source.labels)
    return {
        f"{name} {k}": value
        for name, (bank, queries) in rows.items()
        for k, value in knn_accuracy(queries, labels[1], bank, labels[0]).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("like", type=Path, help="a run of localagg pretrain")
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--methods", nargs="*", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=[], metavar="'NAME: RUN-{seed}'")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[dict[str, float]]] = {}
    for seed in options.seeds:
        for name, run in (text.split(": ", 1) for text in options.runs):
            path = Path(run.format(seed=seed))
            lines.setdefault(name, []).append(_once(options, name, seed, lambda p=path: _run(p)))
        for name in options.methods:
            result = _once(options, name, seed, lambda n=name, s=seed: _peer(options, n, s))
            lines.setdefault(name, []).append(result)
    _table(options, lines)


def _once(
    options: argparse.Namespace, name: str, seed: int, make: Callable[[], tuple[Peer, dict]]
) -> dict[str, float]:
    """What was measured before, or is now."""
    kept = options.out / f"{name}-{seed}.json".replace(" ", "-")
    if not kept.exists():
        peer, facts = make()
        config = _config(options, seed)
        facts |= measure(peer.cpu(), config, options.data)
        with atomic_write(kept) as path:
            path.write_text(json.dumps(facts))
    return json.loads(kept.read_text())


def _config(options: argparse.Namespace, seed: int) -> PretrainConfig:
    return override(read_run(options.like)[0], seed=seed)


def _peer(options: argparse.Namespace, name: str, seed: int) -> tuple[Peer, dict]:
    config = _config(options, seed)
    feed = Feed(
        open_images(options.data),
        config.views,
        batch_size=require_resolved(config.batch_size),
        seed=config.seed,
        workers=config.workers,
    )
    peer, epochs = train(name, config, feed, 60 * options.minutes)
    return peer, {"epochs": epochs, "minutes": options.minutes}


def _run(path: Path) -> tuple[Peer, dict]:
    summary, encoder = read_progress(latest(path))["summary"], load_encoder(path)
    facts = {"epochs": summary["epochs"], "minutes": report.minutes(path)}
    return Peer(encoder, nn.Sequential(encoder.hidden, encoder.head)), facts


def _table(options: argparse.Namespace, lines: dict[str, list[dict[str, float]]]) -> None:
    columns = [
        *("embedding knn1", "embedding knn200"),
        *("features knn1", "features knn200"),
    ]
    rows = []
    for name, found in lines.items():
        cells = [report.percent([line[column] for line in found]) for column in columns]
        mean = {key: statistics.mean(line[key] for line in found) for key in ("epochs", "minutes")}
        rows.append([name, f"{mean['epochs']:.0f}", f"{mean['minutes']:.1f}", len(found), *cells])
    report.write(
        f"peers-{options.out.name}",
        f"{options.out.name}: peers on the same network, views, data and time",
        ["", "epochs", "minutes", "seeds", *(f"{column}, %" for column in columns)],
        rows,
        "Mean and 95 % interval (Student's t) over seeds. A peer's minutes are processor time a"
        " thread.",
    )


if __name__ == "__main__":
    main()
