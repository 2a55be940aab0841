"""Near-duplicates: precision and recall on planted copies, beside perceptual hashes and a network.

    python benchmarks/duplicates.py RUN DATA [--images 3000] [--copies 560]

Plants copies of eight kinds (resaved, shrunk, cropped, flipped, brightened, gray, blurred,
captioned; the last at a random corner) among evenly spread training images of DATA, embeds all by
RUN, and finds them by ``localagg duplicates``. Pairs of one group are predicted; only a copy and
its original are right, so near-duplicates that the data hold already count as false. Hashes are
those of imagehash if it is installed, at the threshold of the best F1, which no user knows.
"""

import argparse
import io
import itertools
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from localagg.data.sources.open import open_images
from localagg.data.sources.source import encoded_bytes
from localagg.embeddings.duplicates import find_duplicates
from localagg.embeddings.tables.write_table import write_embeddings

Pairs = set[tuple[str, str]]


def altered(image: Image.Image, kind: str, draws: random.Random) -> Image.Image:
    """Return a copy of a kind."""
    width, height = image.size
    if kind == "shrunk":
        return image.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.BILINEAR)
    if kind == "cropped":
        box = (width * 0.06, height * 0.08, width * 0.94, height * 0.96)
        return image.crop(tuple(map(int, box)))
    if kind == "flipped":
        return ImageOps.mirror(image)
    if kind == "brightened":
        return ImageEnhance.Brightness(image).enhance(1.3)
    if kind == "gray":
        return ImageOps.grayscale(image).convert("RGB")
    if kind == "blurred":
        return image.filter(ImageFilter.GaussianBlur(max(width, height) / 100))
    if kind == "captioned":
        image, text = image.copy(), f"(c) photo {draws.randrange(10_000)}"
        left, top = draws.choice([(0, 0), (width // 2, 0), (0, height), (width // 2, height)])
        top = max(0, top - int(height * 0.15))
        box = (left, top, left + width // 2, top + int(height * 0.15))
        drawn = ImageDraw.Draw(image)
        drawn.rectangle(box, fill="white")
        drawn.text((left + 1, top), text, fill="black", font_size=max(6, height // 10))
    return image  # resaved: at low quality


KINDS = ["resaved", "shrunk", "cropped", "flipped", "brightened", "gray", "blurred", "captioned"]


def plant(data: str, folder: Path, images: int, copies: int) -> Pairs:
    """Write the images and copies of them; return the pairs of names."""
    source, draws, pairs = open_images(data), random.Random(0), set()
    chosen = np.linspace(0, len(source) - 1, min(images, len(source))).astype(int)
    copied = {
        place: KINDS[n % 8] for n, place in enumerate(draws.sample(range(len(chosen)), copies))
    }
    for place, index in enumerate(chosen):
        image = Image.open(io.BytesIO(encoded_bytes(source[int(index)].image))).convert("RGB")
        name = f"{place:05d}.jpg"
        image.save(folder / name, quality=95)
        if kind := copied.get(place):
            other = f"{place:05d}-{kind}.jpg"
            quality = 25 if kind == "resaved" else 90
            altered(image, kind, draws).save(folder / other, quality=quality)
            pairs.add((other, name))
    return pairs


def scores(found: Pairs, planted: Pairs) -> str:
    """Return precision, recall, and the kinds missed most."""
    right = found & planted
    missed = Counter(name.split("-")[1][:-4] for name, _ in planted - right)
    kinds = ", ".join(f"{kind} {count}" for kind, count in missed.most_common(4))
    precision = len(right) / max(1, len(found))
    return f"{precision:.3f} | {len(right) / len(planted):.3f} | {kinds}"


def by_localagg(folder: Path, run: str, work: Path) -> tuple[Pairs, float]:
    """Return the pairs of each group, and the threshold."""
    write_embeddings(run, folder, work / "e.parquet", workers=2)
    found = find_duplicates(work / "e.parquet", workers=2)
    names = [sorted(each["path"] for each in group) for group in found["groups"]]
    return {pair for group in names for pair in itertools.combinations(group, 2)}, found["above"]


def by_hash(folder: Path, planted: Pairs, kind: str) -> tuple[Pairs, int]:
    """Return the pairs within the Hamming distance of the best F1, and that distance."""
    import imagehash  # pyright: ignore[reportMissingImports]

    names = sorted(path.name for path in folder.iterdir())
    codes = [getattr(imagehash, kind)(Image.open(folder / name)).hash.ravel() for name in names]
    bits = np.stack(codes).astype(np.float32)
    apart = bits @ (1 - bits).T
    apart = np.rint(apart + apart.T).astype(int)
    best: tuple[float, Pairs, int] = (-1.0, set(), 0)
    for limit in range(0, 13, 2):
        rows = np.argwhere(np.triu(apart <= limit, 1))
        found = {(names[a], names[b]) for a, b in rows[:200_000]}
        right = len(found & planted)
        f1 = 2 * right / (len(rows) + len(planted))
        if f1 > best[0]:
            best = (f1, found, limit)
    return best[1], best[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--copies", type=int, default=560)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = work / "images"
        folder.mkdir()
        planted = plant(options.data, folder, options.images, options.copies)
        print(f"{len(list(folder.iterdir())):,} images, {len(planted)} copies of 8 kinds\n")
        print("method | precision | recall | missed\n--- | --- | --- | ---")
        start = time.perf_counter()
        found, above = by_localagg(folder, options.run, work)
        took = time.perf_counter() - start
        print(f"localagg, agreement {above:.3f} ({took:.0f} s) | {scores(found, planted)}")
        for kind in ("phash", "dhash", "average_hash", "whash"):
            try:
                found, limit = by_hash(folder, planted, kind)
            except ImportError:
                print(f"{kind} | imagehash is not installed | |")
                continue
            print(f"{kind}, distance {limit} | {scores(found, planted)}", flush=True)


if __name__ == "__main__":
    main()
