"""The read-outs of the reference's ResNet-18 checkpoint on original ImageNet files."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import v2

from localagg import cli
from localagg.checkpoint import load_encoder

pytestmark = pytest.mark.reference
LAYERS = ("1", "3", "5", "7", "9")


@pytest.fixture(scope="module")
def trees(fixtures, tmp_path_factory):
    """Class folders and a listing of the same eight images, for training and validation."""
    samples = fixtures.parent / "data" / "imagenet-samples"
    if not samples.is_dir():
        pytest.skip("the ImageNet samples are not on this machine")
    folders = tmp_path_factory.mktemp("imagenet")
    places = tmp_path_factory.mktemp("places")
    paths = sorted(samples.iterdir())[::31][:8]
    for split in ("train", "val"):
        for path in paths:
            folder = folders / split / path.name.split("_")[0]
            folder.mkdir(parents=True)
            (folder / path.name).write_bytes(path.read_bytes())
        lines = [f"/{split}/{p.name.split('_')[0]}/{p.name} {i}\n" for i, p in enumerate(paths)]
        (places / f"{split}_places205.csv").write_text("".join(lines))
    return folders, f"{places}:{folders}"


@pytest.fixture(scope="module")
def weights(fixtures, tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    prefix = fixtures / "networks" / "resnet18" / "checkpoint" / "model.ckpt-10"
    words = ["import-tf", str(prefix), "--model", "preact_resnet18", "--out", str(out)]
    assert cli.main(words) == 0
    return out


def ten_crop_top1(weights, heads, data):
    """By torchvision and a loop: the mean softmax of ten crops of each image, right or not."""
    encoder = load_encoder(weights).eval()
    crop = v2.Compose([v2.Resize(256), v2.TenCrop(224)])
    right = dict.fromkeys(LAYERS, 0)
    for label, path in enumerate(sorted((data / "val").rglob("*.JPEG"))):
        crops = torch.stack(
            [v2.functional.pil_to_tensor(c) for c in crop(Image.open(path).convert("RGB"))]
        )
        with torch.no_grad():
            features = encoder.features(crops, layers=list(LAYERS))
        for layer in LAYERS:
            logits = features[layer] @ heads[f"{layer}.weight"].T + heads[f"{layer}.bias"]
            right[layer] += int(logits.softmax(dim=1).mean(dim=0).argmax()) == label
    return {layer: count / (label + 1) for layer, count in right.items()}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["trans_res18_LA", "plc_trans_res18_LA"])
def test_read_outs_learn_the_samples(recipe, trees, weights, tmp_path):
    data = trees[recipe.startswith("plc")]
    words = ["transfer", str(weights), "--recipe", recipe, "--data", str(data), "--device", "cpu"]
    words += ["--epochs", "12", "--batch-size", "4", "--precision", "32-true"]
    words += ["--out", str(tmp_path / "out")]
    assert cli.main([*words, "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert tuple(found["layers"]) == LAYERS
    assert found["measured"] == 8
    heads = load_file(tmp_path / "out" / "heads.safetensors")
    by_hand = ten_crop_top1(weights, heads, trees[0])
    # The recipe resizes by area means as the reference does, torchvision by antialiased triangles:
    # an image between two classes may go to either.
    off = [abs(found["layers"][n]["ten_crop_top1"] - by_hand[n]) * 8 for n in LAYERS]
    assert max(off) <= 1
    assert sum(off) <= 2
    for scores in found["layers"].values():
        assert scores["top1"] >= 3 / 8  # chance: 1 / 8
