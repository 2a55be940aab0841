"""Near-duplicates: precision and recall on planted copies, with thresholds of another data set.

    python benchmarks/duplicates.py RUN=DATA RUN=DATA [--images 3000] [--copies 560] [--seed 1]

Plants copies of eight kinds (resaved, shrunk, cropped, flipped, brightened, gray, blurred,
captioned; the last at a random corner) among evenly spread training images of each DATA, embeds
them by its RUN, and finds them as ``localagg duplicates`` does. Pairs of one group are predicted;
only a copy and its original are right, so near-duplicates that the data hold already count as
false. The threshold is that of the rule of ``localagg duplicates``, or, for it and for imagededup's
hashes and its CNN where that is installed, the one of the best F1 on the other DATA: held out. Its
CNN's own weights are a download; it gets EfficientNet-Lite0 of ImageNet.
"""

import argparse
import importlib.util
import io
import itertools
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from efficientnet import MODEL, write_efficientnet

import report
from localagg.data.sources.open import open_images
from localagg.data.sources.source import encoded_bytes
from localagg.embeddings import duplicates
from localagg.embeddings.open_table import open_table, open_table_images
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


HASHES = ("PHash", "DHash", "AHash", "WHash")
_FARTHEST = 12  # bits of 64
_LEAST_COSINE = 0.8
TRIED = {
    "localagg": np.arange(0.7, 0.99, 0.01),
    "CNN": np.arange(_LEAST_COSINE, 0.999, 0.005),
}
"""Thresholds of methods other than hashes."""
KINDS = ["resaved", "shrunk", "cropped", "flipped", "brightened", "gray", "blurred", "captioned"]


def plant(data: str, folder: Path, images: int, copies: int, seed: int) -> Pairs:
    """Write the images and copies of them; return the pairs of names."""
    source, draws, pairs = open_images(data), random.Random(seed), set()
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


def scores(found: Pairs, planted: Pairs) -> list[object]:
    """Return precision, recall, and the kinds missed most."""
    right = found & planted
    missed = Counter(name.split("-")[1][:-4] for name, _ in planted - right)
    kinds = ", ".join(f"{kind} {count}" for kind, count in missed.most_common(4))
    precision = len(right) / max(1, len(found))
    return [f"{precision:.3f}", f"{len(right) / len(planted):.3f}", kinds]


class Candidates(NamedTuple):
    """Pairs of a data set that a threshold accepts from a score on, and what is planted."""

    names: list[str]
    pairs: np.ndarray
    score: np.ndarray
    planted: Pairs

    def accept(self, threshold: float) -> Pairs:
        """Return the pairs of names within the groups that the accepted pairs make."""
        accepted = torch.from_numpy(self.pairs[self.score >= threshold])
        groups = duplicates._connected(len(self.names), accepted) if len(accepted) else []
        if max(map(len, groups), default=0) > 400:  # nearly all images alike
            return set()
        named = (sorted(self.names[row] for row in group) for group in groups)
        return {pair for group in named for pair in itertools.combinations(group, 2)}

    def best(self, thresholds: Sequence[float]) -> float:
        """Return the threshold of the best F1."""

        def f1(threshold: float) -> float:
            found = self.accept(threshold)
            return 2 * len(found & self.planted) / (len(found) + len(self.planted))

        return max(thresholds, key=f1)


def by_agreement(folder: Path, run: str, work: Path, planted: Pairs) -> tuple[Candidates, float]:
    """Return the candidates of ``localagg duplicates``, and the threshold of its rule."""
    out = work / "e.parquet"
    write_embeddings(run, folder, out, workers=0)
    table = open_table(out)
    source, index = open_table_images(table), torch.tensor(table.images["index"].to_pylist())
    thumbnails, readable = duplicates._read_thumbnails(source, index, table.levels, 0)
    rows = table.unit_embeddings()
    pairs, others = duplicates._candidates(rows, thumbnails, readable)
    agreement = duplicates._compare(thumbnails, pairs)
    sample = torch.linspace(0, len(index) - 1, duplicates._SAMPLE).long()
    views = duplicates._views_agreement(source, index[sample], table.levels, thumbnails[sample])
    rule = duplicates._threshold(agreement[others], views, len(index))[1]
    names = table.images["path"].to_pylist()
    return Candidates(names, pairs.numpy(), agreement.numpy(), planted), rule


def by_hash(folder: Path, planted: Pairs, kind: str) -> Candidates:
    """Return the pairs within a Hamming distance of 12; the score is minus the distance."""
    from imagededup import methods  # pyright: ignore[reportMissingImports]

    codes = getattr(methods, kind)(verbose=False).encode_images(image_dir=folder)
    names = sorted(codes)
    digits = [[int(digit, 16) for digit in codes[name]] for name in names]
    bits = (np.array(digits)[:, :, None] >> np.arange(4) & 1).reshape(len(names), -1)
    bits = bits.astype(np.float32)
    apart = bits @ (1 - bits).T
    apart = np.rint(apart + apart.T).astype(int)
    pairs = np.argwhere(np.triu(apart <= _FARTHEST, 1))
    return Candidates(names, pairs, -apart[tuple(pairs.T)], planted)


def by_cnn(folder: Path, planted: Pairs, weights: Path) -> Candidates:
    """Return the pairs whose features have a cosine of at least 0.8."""
    import timm
    from imagededup.methods import CNN  # pyright: ignore[reportMissingImports]
    from imagededup.utils import CustomModel  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    model = timm.create_model(MODEL.partition(":")[2], num_classes=0).eval()
    stored = load_file(weights)
    model.load_state_dict({k: v for k, v in stored.items() if not k.startswith("classifier")})
    data = timm.data.resolve_model_data_config(model)
    network = CustomModel("lite0", model, timm.data.create_transform(**data))
    encoded = CNN(verbose=False, model_config=network).encode_images(image_dir=folder)
    names = sorted(encoded)
    rows = np.stack([encoded[name].ravel() for name in names])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = rows @ rows.T
    pairs = np.argwhere(np.triu(cosine >= _LEAST_COSINE, 1))
    return Candidates(names, pairs, cosine[tuple(pairs.T)], planted)


def measure(
    run: str, data: str, options: argparse.Namespace
) -> tuple[dict[str, Candidates], float]:
    """Return the candidates of each method, and the threshold of the rule."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = work / "images"
        folder.mkdir()
        planted = plant(data, folder, options.images, options.copies, options.seed)
        found, rule = by_agreement(folder, run, work, planted)
        methods = {"localagg": found}
        if importlib.util.find_spec("imagededup"):
            methods |= {kind: by_hash(folder, planted, kind) for kind in HASHES}
            methods["CNN"] = by_cnn(folder, planted, write_efficientnet(work))
        return methods, rule


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs=2, metavar="RUN=DATA")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--copies", type=int, default=560)
    parser.add_argument("--seed", type=int, default=1, help="of the choice of copies")
    options = parser.parse_args()
    pairs = [each.split("=", 1) for each in options.sets]
    found = [measure(run, data, options) for run, data in pairs]
    rows = []
    for (_, data), (methods, rule), (others, _) in zip(pairs, found, found[::-1], strict=True):
        for name, candidates in methods.items():
            tried = TRIED.get(name, range(-_FARTHEST, 1))
            held_out = others[name].best([float(each) for each in tried])
            chosen = {"the other set": held_out}
            chosen = {"the rule": rule, **chosen} if name == "localagg" else chosen
            for by, threshold in chosen.items():
                result = scores(candidates.accept(threshold), candidates.planted)
                limit = f"{abs(threshold):.3g}"
                rows.append([Path(data).name, len(candidates.names), name, limit, by, *result])
                print(rows[-1], flush=True)
    each = options.copies // len(KINDS)
    report.write(
        "duplicates",
        f"Near-duplicates: {options.copies} planted copies of eight kinds",
        ["images", "N", "method", "threshold", "chosen by", "precision", "recall", "missed most"],
        rows,
        "Thresholds: agreement of localagg; Hamming distance of imagededup's hashes; cosine of its"
        " CNN, which has EfficientNet-Lite0's weights (ImageNet with labels). The rule sees"
        " no labels; its constants were set on both sets, with other copies. 'The other set': the"
        f" best F1 there. Missed most: of {each} copies of a kind. The runs had learned for eight"
        " epochs at 32 px.",
    )


if __name__ == "__main__":
    main()
