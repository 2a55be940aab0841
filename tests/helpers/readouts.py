"""What the tests of read-outs share: a small network, the digits, a tiny labelled data set."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from localagg.config import TransferConfig, override
from localagg.data.sources.open import open_images
from localagg.evaluation.readouts.feature_cache import FeatureExtractor
from localagg.evaluation.readouts.linear import TransferRecorder, transfer
from localagg.io.metrics_log import read_metrics
from localagg.models import create_encoder


def network(seed=0):
    """A small encoder whose batch-norm statistics are not those of any batch."""
    encoder = create_encoder("resnet18_small", 16, seed=seed, width=8, blocks=(1, 1))
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.2, generator=generator)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
    return encoder


def digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels uint8 [N, 3, 8, 8] and labels of a split of the digits."""
    source = open_images("digits", split)
    return torch.stack([source[i].image for i in range(len(source))]), source.labels


def saved_dataset(path: Path, pictures: Path, train: list[int], val: list[int]) -> str:
    """A saved data set of classes x, y and z: one picture again and again, with these labels."""
    import datasets

    image = (pictures / "train" / "temple" / "01.jpg").read_bytes()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    )
    splits = {
        name: datasets.Dataset.from_dict(
            {"image": [{"bytes": image, "path": None}] * len(labels), "label": labels},
            features=features,
        )
        for name, labels in (("train", train), ("val", val))
    }
    datasets.DatasetDict(splits).save_to_disk(str(path))
    return str(path)


def count_extracted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of images of each call of a feature extractor."""
    calls, original = [], FeatureExtractor.__call__

    def call(self, images):
        calls.append(len(images))
        return original(self, images)

    monkeypatch.setattr(FeatureExtractor, "__call__", call)
    return calls


# A view that is the whole image, whatever is drawn: what the heads see is known.
STILL = override(
    TransferConfig(),
    image_size=8,
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    gray=0.0,
    jitter=(0.0, 0.0, 0.0, 0.0),
    flip=0.0,
    device="cpu",
    precision="32-true",
    ten_crop=False,
    eval_every=0,
)
MOVING = override(
    STILL, crop_area=(0.5, 1.0), flip=0.5, epochs=3, batch_size=200, eval_every=1, log_every=1,
    ten_crop=True, drops=(1.0,),
)  # fmt: skip


def heads(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "heads.safetensors")


class Killed(Exception):
    """Stands for the end of the process."""


def killed_after_ten_steps(monkeypatch: pytest.MonkeyPatch, config: TransferConfig, out: Path):
    """Read-outs of digits that die after their tenth step."""
    original, calls = TransferRecorder.after_step, []

    def die(self, *arguments):
        original(self, *arguments)
        calls.append(1)
        if len(calls) == 10:
            raise Killed

    monkeypatch.setattr(TransferRecorder, "after_step", die)
    with pytest.raises(Killed):
        transfer(config, network(), "digits", out)


def assert_same_end(one: Path, other: Path) -> None:
    first, second = heads(one), heads(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert read_metrics(one) == read_metrics(other)
    results = [json.loads((run / "results.json").read_text()) for run in (one, other)]
    assert results[0] | {"seconds": 0} == results[1] | {"seconds": 0}
