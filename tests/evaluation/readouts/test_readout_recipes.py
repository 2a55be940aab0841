"""The reference's read-outs by name, end to end on small real trees: folders and a listing."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from localagg import cli
from localagg.checkpoint import save_weights
from localagg.models import create_encoder

# What each head reads at 224 pixels, from the reference's ending points: maps of over 200,000
# values are averaged by 2, over 800,000 by 4 (of VGG16 over width and channels), then flattened.
HEADS = {
    "alexnet": {
        "conv1": 54 * 54 * 64,
        "conv2": 26 * 26 * 192,
        "conv3": 12 * 12 * 384,
        "conv4": 12 * 12 * 384,
        "conv5": 12 * 12 * 256,
    },
    "vggnet": {
        "0": 224 * (224 // 4) * (64 // 4),
        "1": 112 * (112 // 4) * (128 // 4),
        "2": 56 * (56 // 4) * (256 // 4),
        "3": 28 * (28 // 2) * (512 // 2),
        "4": 14 * 14 * 512,
    },
    "res18": {
        "1": 28 * 28 * 64,
        "3": 28 * 28 * 64,
        "5": 28 * 28 * 128,
        "7": 14 * 14 * 256,
        "9": 7 * 7 * 512,
    },
    "res50": {
        "1": 28 * 28 * 64,
        "4": 14 * 14 * 256,
        "8": 14 * 14 * 512,
        "14": 7 * 7 * 1024,
        "17": 7 * 7 * 2048,
    },
}
SYNSETS = ("n03028079", "n11879895")
NETWORKS = {
    "alexnet": "alexnet_bn",
    "vggnet": "vgg16_bn_last",
    "res18": "preact_resnet18",
    "res50": "preact_resnet50",
}


@pytest.fixture(scope="module")
def imagenet(pictures, tmp_path_factory) -> Path:
    """train/ and val/ with a folder a class: photographs of several shapes, one of them gray."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, counts in (("train", (2, 2)), ("val", (2, 1))):
        for name, synset, count in zip(("temple", "flower"), SYNSETS, counts, strict=True):
            (root / split / synset).mkdir(parents=True)
            for i, path in enumerate(sorted((pictures / split / name).iterdir())[:count]):
                image = Image.open(path).convert("L" if i == 1 else "RGB")
                image.resize((260 + 40 * i, 300)).save(
                    root / split / synset / f"{synset}_{i}.JPEG", quality=95
                )
    return root


@pytest.fixture(scope="module")
def places(imagenet, tmp_path_factory) -> Path:
    """The same photographs as Places205 is distributed: listings, and paths without the folder."""
    root = tmp_path_factory.mktemp("places")
    long = root / "data" / "vision" / "torralba" / "deeplearning" / "images256"
    for split in ("train", "val"):
        with (root / f"{split}_places205.csv").open("w", newline="") as file:
            lines = csv.writer(file, delimiter=" ")
            for label, folder in zip((3, 20), sorted((imagenet / split).iterdir()), strict=True):
                for path in sorted(folder.iterdir()):
                    inside = Path(folder.name[0], folder.name, f"{split}_{path.stem}.jpg")
                    (long / inside).parent.mkdir(parents=True, exist_ok=True)
                    (long / inside).write_bytes(path.read_bytes())
                    lines.writerow([inside, label])
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "dataset"),
    [*((network, "imagenet") for network in HEADS), ("res18", "places")],
)
def test_a_recipe_runs_with_the_papers_heads(network, dataset, request, tmp_path):
    data, classes = request.getfixturevalue(dataset), {"imagenet": 2, "places": 21}[dataset]
    weights, out = tmp_path / "weights.safetensors", tmp_path / "heads"
    save_weights(weights, create_encoder(NETWORKS[network], seed=0))
    recipe = f"{'plc_' if dataset == 'places' else ''}trans_{network}_LA"
    words = ["transfer", str(weights), "--recipe", recipe, "--data", str(data), "--out", str(out)]
    short = ["--epochs", "1", "--batch-size", "2", "--device", "cpu", "--json"]
    assert cli.main([*words, *short, str(tmp_path / "out.json")]) == 0

    heads = load_file(out / "heads.safetensors")
    shapes = {name: tuple(value.shape) for name, value in heads.items()}
    sizes = sorted((classes, size) for size in HEADS[network].values())
    assert sorted(shape for shape in shapes.values() if len(shape) == 2) == sizes
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["layers"]) == set(HEADS[network])
    assert (found["images"], found["measured"], found["steps"]) == (4, 3, 2)
    for scores in found["layers"].values():
        assert set(scores) == {"top1", "top5", "ten_crop_top1", "ten_crop_top5"}
        assert all(share in (0, 1 / 3, 2 / 3, 1) for share in scores.values())  # all three count
