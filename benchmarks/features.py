"""Are features of photos computed faster than by a plain loop of timm in float32?

Photos from files to features of a frozen network: the plain loop (PIL and torchvision's transforms
in a DataLoader of two workers, timm's network in float32) beside ``embed`` and what ``adapt`` does.
Below them the network alone, on views at hand, with each change that ``adapt`` makes. All take
turns in one process.
"""

import argparse
import contextlib
import functools
import os
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from efficientnet import write_efficientnet

import report
from localagg.config import PretrainConfig, override
from localagg.data.sources.open import open_images
from localagg.embeddings.embed import embed
from localagg.models import create_encoder, load_weights
from localagg.models.inference import CPU_BATCH, inference_copy
from localagg.training.frozen.frozen_features import _CHUNK, _extract, _Extractor

NAME = "tf_efficientnet_lite0"
WORKERS = 2


class Files(Dataset):
    """Photos as PyTorch's tutorials read them."""

    def __init__(self, folder: Path, side: int, mean: list[float], std: list[float]) -> None:
        self.files = sorted(folder.iterdir())
        self.view = transforms.Compose(
            [
                transforms.Resize(side),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Tensor:
        return self.view(Image.open(self.files[number]).convert("RGB"))


def cpu_bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def count_cpu(call: Callable[[], object], spent: list[float]) -> None:
    """Add the CPU seconds of a call, in this process and in workers that ended with it."""
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN

    def now() -> float:
        return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))

    before = now()
    call()
    spent.append(now() - before)


@torch.no_grad()
def run_network(network: torch.nn.Module, views: Tensor, size: int, bfloat16: bool) -> None:
    """Put views through a network in batches."""
    with cpu_bfloat16() if bfloat16 else contextlib.nullcontext():
        for part in views.split(size):
            network(part)


@torch.no_grad()
def plain_loop(model: torch.nn.Module, files: Files) -> Tensor:
    loader = DataLoader(files, batch_size=64, num_workers=WORKERS)
    return torch.cat([model(images) for images in loader])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of photos")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of the network in this process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder, weights = Path(temporary, "photos"), Path(temporary)
        folder.mkdir()
        photos = sorted(path for path in options.data.rglob("*.jpg"))[: options.count]
        for number, photo in enumerate(photos):
            shutil.copy(photo, folder / f"{number:05}.jpg")
        measure(folder, write_efficientnet(weights), options)


def measure(folder: Path, weights: Path, options: argparse.Namespace) -> None:
    from safetensors.torch import load_file

    side, count = options.side, len(list(folder.iterdir()))
    model = timm.create_model(NAME, num_classes=0).eval()
    stored = {k: v for k, v in load_file(weights).items() if not k.startswith("classifier")}
    model.load_state_dict(stored)
    encoder = create_encoder(f"timm:{NAME}").eval()
    load_weights(encoder, weights)
    files = Files(folder, side, encoder.mean.flatten().tolist(), encoder.std.flatten().tolist())
    source = open_images(str(folder))
    config = override(PretrainConfig(), image_size=side, eval_crop=1.0, feature_views=0)
    example = torch.rand(2, 3, side, side)
    fast, chunks = inference_copy(encoder, example), list(torch.arange(count).split(_CHUNK))

    def adapt(dtype: torch.dtype) -> Tensor:
        extractor = _Extractor(fast, config, dtype)
        return torch.cat([each.features for each in _extract(extractor, source, chunks, WORKERS)])

    def embedded(**more) -> Tensor:
        return embed(encoder, source, config.views, workers=WORKERS, **more).rows

    whole = {
        "plain loop of timm, float32": lambda: plain_loop(model, files),
        "embed, float32": embedded,
        "embed, bfloat16": lambda: embedded(autocast=cpu_bfloat16),
        "adapt's features, float32": lambda: adapt(torch.float32),
        "adapt's features, bfloat16": lambda: adapt(torch.bfloat16),
    }
    last = torch.channels_last
    plain_views = torch.stack([files[i] for i in range(count)])
    views = plain_views.contiguous(memory_format=last)
    moved = timm.create_model(NAME, num_classes=0).eval().to(memory_format=last)
    networks = {
        "network, float32, batches of 64": (model, plain_views, 64, False),
        "+ batches of 16": (model, plain_views, CPU_BATCH, False),
        "+ channels last": (moved, views, CPU_BATCH, False),
        "+ folded batch-norm": (fast.backbone, views, CPU_BATCH, False),
        "+ bfloat16": (fast.backbone, views, CPU_BATCH, True),
    }
    calls = {name: functools.partial(run_network, *each) for name, each in networks.items()}
    spent: dict[str, list[float]] = {name: [] for name in (*whole, *calls)}
    timed = {name: functools.partial(count_cpu, call, spent[name])
             for name, call in {**whole, **calls}.items()}  # fmt: skip
    seconds = report.interleaved(timed, options.runs)
    cpu = {name: statistics.median(found[1:]) for name, found in spent.items()}
    rows = [*lines(whole, seconds, cpu, count), *lines(calls, seconds, cpu, count)]
    plain, ours = whole["plain loop of timm, float32"](), adapt(torch.bfloat16).squeeze(1).float()
    alike = torch.nn.functional.cosine_similarity(plain, ours).mean()
    report.write(
        "features",
        f"Features of {count:,} photos at {side} pixels by {NAME}",
        ["", "images/s", "x the first", "CPU ms an image", "x the first"],
        rows,
        f"Medians of {options.runs} turns; {WORKERS} workers,"
        f" {options.threads} threads of the main process; load of the machine at the end"
        f" {os.getloadavg()[0]:.0f}. Each + adds to the line above."
        f" Mean cosine between the features of the first and the fifth line: {alike:.3f} (they"
        " differ in the resampling of photos, too).",
    )


def lines(
    names: Iterable[str], seconds: dict[str, float], cpu: dict[str, float], count: int
) -> list[list[str]]:
    """Return the table's lines of a group, whose first is the plain way."""
    first, *_ = names
    return [
        [
            name,
            *(f"{count / seconds[name]:,.0f}", f"{seconds[first] / seconds[name]:.2f}"),
            *(f"{1000 * cpu[name] / count:.2f}", f"{cpu[first] / cpu[name]:.2f}"),
        ]
        for name in names
    ]


if __name__ == "__main__":
    main()
