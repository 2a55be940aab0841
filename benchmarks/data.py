"""Are views made faster than by the usual pipelines, from JPEG files and from memory?

Random resized crop, gray, color jitter, flip and normalization, the same semantics and sizes
everywhere, in one thread of one process: each way in turn makes the same batches, as float tensors
[B, 3, S, S]. The plain ways are those of most projects: torchvision's ImageFolder with transforms
on PIL images, and torchvision.io with transforms.v2 on tensors, image by image. Ours is what a
worker does (read, decode, crop, resize) and then what the device does (all the rest), one after the
other in the same thread.
"""

import argparse
import functools
import io
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
import torchvision
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

import report
from localagg.config import ViewConfig
from localagg.data import open_images
from localagg.data.images.augment import Augment, view_draws, view_uniforms
from localagg.data.images.crops import crop_boxes
from localagg.data.images.decode import decode, decode_crops, decoded_size
from localagg.data.loading.cropping import training_crops
from localagg.data.pack.pack_dataset import pack

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# --- The three ways ---


def plain_transform(size: int):
    """As the InstDisc, MoCo and CMC repositories write it."""
    old = torchvision.transforms
    return old.Compose(
        [
            old.RandomResizedCrop(size, scale=(0.2, 1.0)),
            old.RandomGrayscale(p=0.2),
            old.ColorJitter(0.4, 0.4, 0.4, 0.4),
            old.RandomHorizontalFlip(),
            old.ToTensor(),
            old.Normalize(MEAN, STD),
        ]
    )


def tensor_transform(size: int):
    """As torchvision's documentation of transforms.v2 recommends it: uint8 until the end."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomGrayscale(p=0.2),
            v2.ColorJitter(0.4, 0.4, 0.4, 0.4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def one_by_one(items, batch: int, transform, image_of=lambda item: item) -> None:
    """Batches of an iterable, each image transformed alone, then stacked."""
    views = []
    for item in items:
        views.append(transform(image_of(item)))
        if len(views) == batch:
            torch.stack(views)
            views = []


def normalized(views: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return views.sub_(mean).div_(std)


def ours_stored(source, views: ViewConfig, batch: int) -> None:
    """Batches from encoded images: what the worker does, then what the device does."""
    chunks = list(torch.arange(len(source)).split(batch))
    augment = Augment(views, 0, cropped=True)
    for step in range(len(source) // batch):
        batch, _ = training_crops(source, views, 0, 0, chunks[step])
        normalized(augment(batch.images, 0, batch.index, batch.uniforms))


def ours_in_worker(source, views: ViewConfig, batch: int) -> None:
    """The worker's part of it."""
    for index in torch.arange(len(source)).split(batch)[: len(source) // batch]:
        training_crops(source, views, 0, 0, index)


def ours_held(pixels: torch.Tensor, views: ViewConfig, batch: int) -> None:
    """Batches from images held in memory."""
    augment = Augment(views, 0)
    for index in torch.arange(len(pixels)).split(batch):
        normalized(augment(pixels.index_select(0, index), 0, index))


def jpeg_ways(folder: Path, batch: int) -> dict:
    """From JPEG files on disk (in the page cache), and packed; crops of 224."""
    source, views = open_images(folder), ViewConfig(image_size=224)
    packed = folder.with_name("packed")
    pack(str(folder), str(packed))
    packed_source = open_images(packed)
    plain = torchvision.datasets.ImageFolder(folder, transform=plain_transform(224))
    paths = [path for path, _ in plain.samples]

    def read(path: str) -> torch.Tensor:
        return decode_image(path, mode=ImageReadMode.RGB)

    tensors = functools.partial(one_by_one, paths, batch, tensor_transform(224), read)
    return {
        "ImageFolder, PIL transforms": lambda: one_by_one(
            plain, batch, lambda view: view, lambda item: item[0]
        ),
        "torchvision.io, v2 an image": tensors,
        "localagg": lambda: ours_stored(source, views, batch),
        "localagg, from the packed folder": lambda: ours_stored(packed_source, views, batch),
        "localagg, the worker's part": lambda: ours_in_worker(source, views, batch),
    }


def cifar_ways(table: Path, count: int, batch: int) -> dict[str, dict]:
    """From CIFAR-10, crops of 32: decoded pixels in memory, and the table's encoded bytes."""
    stored = parquet.read_table(table, columns=["image"]).slice(0, count)["image"].to_pylist()
    encoded = [image["bytes"] for image in stored]
    pixels = torch.stack([decode(data) for data in encoded])
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    buffers = [torch.from_numpy(np.frombuffer(data, np.uint8).copy()) for data in encoded]
    views = ViewConfig(image_size=32)
    source = [open_images(table)]
    plain, tensor = plain_transform(32), tensor_transform(32)

    def opened(data: bytes) -> Image.Image:
        return Image.open(io.BytesIO(data)).convert("RGB")

    def read(buffer: torch.Tensor) -> torch.Tensor:
        return decode_image(buffer, mode=ImageReadMode.RGB)

    class Few:
        """The first images of the table."""

        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int):
            return source[0][index]

    return {
        "memory": {
            "PIL images, PIL transforms": lambda: one_by_one(pictures, batch, plain),
            "tensors, v2 an image": lambda: one_by_one(pixels, batch, tensor),
            "localagg": lambda: ours_held(pixels, views, batch),
        },
        "Parquet bytes": {
            "Pillow, PIL transforms": lambda: one_by_one(encoded, batch, plain, opened),
            "torchvision.io, v2 an image": lambda: one_by_one(buffers, batch, tensor, read),
            "localagg": lambda: ours_stored(Few(), views, batch),
        },
    }


# --- The decoders ---


def decoder_rows(files: list[Path], runs: int) -> list[list[object]]:
    """Milliseconds an image of each decoder, and the largest difference of a level to Pillow's."""
    import simplejpeg

    encoded = [file.read_bytes() for file in files]
    views = ViewConfig(image_size=224)
    boxes = []
    for i, data in enumerate(encoded):
        height, width = (torch.tensor([side]) for side in decoded_size(data))
        box = crop_boxes(
            views, view_draws(views, view_uniforms(0, 0, torch.tensor([i]))).crop, height, width
        )
        top, left, tall, wide = (int(value) for value in box)
        boxes.append((left, top, left + wide, top + tall))

    def pillow(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def io_(data: bytes) -> np.ndarray:
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return decode_image(buffer, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()

    def fast(data: bytes) -> np.ndarray:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=True, fastupsample=True)

    decoders = {
        "Pillow": pillow,
        "torchvision.io": io_,
        "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True),
        "simplejpeg, its fast settings": fast,
    }
    calls = {name: lambda d=d: [d(data) for data in encoded] for name, d in decoders.items()}

    def pillow_crop() -> None:
        for data, box in zip(encoded, boxes, strict=True):
            picture = Image.open(io.BytesIO(data)).convert("RGB").crop(box)
            np.asarray(picture.resize((224, 224), Image.Resampling.BILINEAR))

    def our_crop() -> None:
        for data, box in zip(encoded, boxes, strict=True):
            decode_crops(data, [box], 224, resize="bilinear")

    calls |= {"Pillow, crop to 224": pillow_crop, "localagg, crop to 224": our_crop}
    seconds = report.interleaved(calls, runs)
    rows = []
    for name, took in seconds.items():
        base = "Pillow, crop to 224" if "crop" in name else "Pillow"
        differ = "" if "crop" in name else _most(decoders[name], pillow, encoded)
        each = 1000 * took / len(encoded)
        rows.append(["decode", name, f"{each:.2f} ms", f"{seconds[base] / took:.2f}", differ])
    return rows


def _most(decoder, other, encoded: list[bytes]) -> str:
    """The largest difference in levels of two decoders."""
    differences = (np.abs(decoder(d).astype(int) - other(d)).max() for d in encoded)
    return str(max(map(int, differences)))


def rate_rows(title: str, ways: dict, images: int, runs: int) -> list[list[object]]:
    """Images a second of each way, and how many times the first's."""
    seconds = report.interleaved(ways, runs)
    first = next(iter(seconds.values()))
    return [
        [title, name, f"{images / took:,.0f} /s", f"{first / took:.2f}", ""]
        for name, took in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jpegs", type=Path, default=Path("../shared/data/imagenet-samples"))
    parser.add_argument(
        "--cifar10", type=Path, default=Path("../shared/data/cifar10/train.parquet")
    )
    parser.add_argument("--count", type=int, default=256, help="JPEG files; of CIFAR-10 16 times")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(options.jpegs.glob("*.JPEG"))[: options.count]
    batch = min(32, len(files))
    files = files[: len(files) // batch * batch]  # no way may leave out what another does
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        for number, file in enumerate(files):  # ImageFolder asks for class folders
            target = folder / f"class{number % 10}"
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / file.name)
        rows = decoder_rows(files, options.runs)
        ways = jpeg_ways(folder, batch)
        rows += rate_rows("JPEG files, 224", ways, len(files), options.runs)
    small = 16 * options.count
    for title, ways in cifar_ways(options.cifar10, small, 128).items():
        rows += rate_rows(f"CIFAR-10, {title}, 32", ways, small, options.runs)
    report.write(
        "data",
        f"Views a second a core: {len(files)} ImageNet files, {small:,} CIFAR-10 images",
        ["what", "way", "one thread", "x the first", "levels off Pillow"],
        rows,
        f"Medians of {options.runs} interleaved runs, one thread. Batches of {batch} and 128, float"
        " and normalized. The device's part would run on a GPU where there is one; then a core's"
        " rate is that of the worker's part."
        f" Pillow {version('pillow')}, simplejpeg {version('simplejpeg')}.",
    )


if __name__ == "__main__":
    main()
