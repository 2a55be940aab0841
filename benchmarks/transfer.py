"""What do five read-outs together cost, beside one, and beside the plain way?

Takes images of any labelled data out into a folder of classes, so that all read the same files.
The plain way: torchvision's ImageFolder and transforms on PIL images, a DataLoader with as many
workers, and one head at a time on the frozen network.
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import report
from localagg.checkpoint import load_encoder
from localagg.config import TransferConfig, override
from localagg.data.sources.open import open_images
from localagg.data.sources.source import encoded_bytes
from localagg.evaluation.readouts.linear import transfer
from localagg.io import console as logbook
from localagg.models import Encoder, create_encoder

BATCH = 128


def take_out(data: str, root: Path, images: int, held_out: int) -> None:
    """Images from all over both splits of ``data`` as files in class folders."""
    for split, count in (("train", images), ("val", held_out)):
        source = open_images(data, split)
        if source.labels is None or source.classes is None:
            raise SystemExit(f"'{data}' has no labels.")
        for i in range(0, len(source), max(1, len(source) // count))[:count]:
            folder = root / split / source.classes[source.labels[i]].replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            content = encoded_bytes(source[i].image)
            suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
            (folder / f"{i:06d}.{suffix}").write_bytes(content)


def plain(
    root: Path, encoder: Encoder, layers: list[str], config: TransferConfig, size: int
) -> None:
    """One head after the other, as a first script would train it."""
    views = config.views
    shown = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=views.crop_area, ratio=views.crop_aspect),
            transforms.RandomGrayscale(views.gray),
            transforms.ColorJitter(*views.jitter),
            transforms.RandomHorizontalFlip(views.flip),
            transforms.ToTensor(),
        ]
    )
    measured = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    )
    train, val = ImageFolder(root / "train", shown), ImageFolder(root / "val", measured)
    encoder.eval()
    for layer in layers:
        with torch.no_grad():
            width = encoder.features(torch.zeros(1, 3, size, size), [layer])[layer].shape[1]
        head = torch.nn.Linear(width, len(train.classes))
        optimizer = torch.optim.SGD(
            head.parameters(), config.learning_rate, momentum=0.9, weight_decay=1e-4
        )
        for _ in range(config.epochs):
            batches = DataLoader(
                train, BATCH, shuffle=True, drop_last=True, num_workers=config.workers
            )
            for images, labels in batches:
                with torch.no_grad():
                    features = encoder.features(images, [layer])[layer]
                loss = F.cross_entropy(head(features), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        hits = 0
        for images, labels in DataLoader(val, BATCH, num_workers=config.workers):
            with torch.no_grad():
                scores = head(encoder.features(images, [layer])[layer])
            hits += int((scores.argmax(dim=1) == labels).sum())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="labelled images with a held-out split")
    parser.add_argument("--weights", help="run or weights file; default: the cifar10 network, new")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--precision", default="32-true", choices=["32-true", "auto"])
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = _options()
    encoder = (
        load_encoder(Path(options.weights))
        if options.weights
        else create_encoder(
            "resnet18_small", 128, seed=0, width=32, blocks=(1, 1, 1, 1), stem_stride=2
        )
    )
    layers = encoder.layers
    config = override(
        TransferConfig(), epochs=options.epochs, batch_size=BATCH, workers=options.workers,
        image_size=options.size, eval_every=0, ten_crop=False, cache_gb=0.0, device="cpu",
        precision=options.precision,
    )  # fmt: skip
    logbook.console.file = io.StringIO()  # its notes would come between
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        root = Path(folder)
        take_out(options.data, root, options.images, options.held_out)

        def ours(chosen: list[str], memory: str) -> None:
            asked = override(config, layers=tuple(chosen), memory=memory)
            transfer(asked, encoder, folder)

        last = layers[-1:]
        times = report.interleaved(
            {
                "ours, all layers together": lambda: ours(layers, "auto"),
                "ours, the last layer alone": lambda: ours(last, "auto"),
                "ours by workers, all layers together": lambda: ours(layers, "never"),
                "ours by workers, the last layer alone": lambda: ours(last, "never"),
                "plain, the last layer alone": lambda: plain(
                    root, encoder, last, config, options.size
                ),
                "plain, all layers one at a time": lambda: plain(
                    root, encoder, layers, config, options.size
                ),
            },
            options.runs,
        )
    one = times["ours, the last layer alone"]
    rows = [[name, f"{seconds:.1f}", f"{seconds / one:.2f}"] for name, seconds in times.items()]
    shown = options.epochs * options.images + options.held_out
    report.write(
        "transfer",
        f"Read-outs of {len(layers)} layers: {options.images:,} images of {options.size} pixels,"
        f" epochs: {options.epochs}",
        ["", f"s (median of {options.runs}, interleaved)", "times ours, the last alone"],
        rows,
        f"{encoder.spec['model']}, {', '.join(layers)}; batch {BATCH}, {options.workers} workers,"
        f" precision {options.precision}; {shown:,} images go through the network each time,"
        " reading and the measurement at the end included. The images of the first two rows are"
        " decoded once and held in memory, those of the others are decoded by workers each time.",
    )


if __name__ == "__main__":
    main()
