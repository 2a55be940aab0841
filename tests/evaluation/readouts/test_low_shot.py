"""Few labels: the draw, the heads learned from it, and the interval over seeds."""

import json
import shutil

import pytest
import torch
from expect import user_error
from readouts import digits, network
from scipy import stats

from localagg.config import TransferConfig, override
from localagg.data.sources.open import open_images
from localagg.evaluation.readouts.logistic_regression import fit_logistic_head
from localagg.evaluation.readouts.low_shot import (
    SourceSubset,
    draw_fraction,
    draw_per_class,
    half_width,
    low_shot_accuracy,
)

CONFIG = override(
    TransferConfig(), image_size=8, crop_area=(0.6, 1.0), gray=0.0, jitter=(0.0, 0.0, 0.0, 0.0),
    flip=0.0, device="cpu", precision="32-true", workers=0, learning_rate=0.05,
)  # fmt: skip
LABELS = torch.tensor([0] * 150 + [1] * 49 + [2] * 51 + [4] * 3)
INDEX = torch.arange(253) * 2


def shares(index: torch.Tensor) -> list[int]:
    return torch.bincount(LABELS[index // 2], minlength=5).tolist()


def test_a_subset_has_each_class_by_its_share_and_at_least_once():
    assert shares(draw_fraction(LABELS, INDEX, 0.1, 0)) == [15, 5, 5, 0, 1]
    assert shares(draw_fraction(LABELS, INDEX, 0.01, 0)) == [2, 1, 1, 0, 1]
    assert torch.equal(draw_fraction(LABELS, INDEX, 1.0, 0), INDEX)
    drawn = draw_per_class(LABELS, INDEX, 3, 0, ["a", "b", "c", "d", "e"])
    assert shares(drawn) == [3, 3, 3, 0, 3]
    with user_error("option-invalid", "--per-class is 4", "'e'", 3):
        draw_per_class(LABELS, INDEX, 4, 0, ["a", "b", "c", "d", "e"])


def test_a_subset_is_a_function_of_seed_and_share():
    part = draw_fraction(LABELS, INDEX, 0.1, 0)
    assert part.tolist() == sorted(set(part.tolist()))
    assert torch.equal(part, draw_fraction(LABELS, INDEX, 0.1, 0))
    mixed = torch.randperm(253, generator=torch.Generator().manual_seed(0))
    assert torch.equal(part, draw_fraction(LABELS[mixed], INDEX[mixed], 0.1, 0))
    assert not torch.equal(part, draw_fraction(LABELS, INDEX, 0.1, 1))
    # Another share is another draw, not a longer piece of the same one.
    smaller = set(draw_fraction(LABELS, INDEX, 0.05, 0).tolist())
    assert not smaller <= set(part.tolist())


def test_every_image_is_as_likely_as_others_of_its_class():
    times = torch.zeros(253)
    for seed in range(600):
        times[draw_fraction(LABELS, INDEX, 0.1, seed) // 2] += 1
    # Binomial, 600 draws at 0.1: deviation 7.3; the largest of 150 stays below 4.5 of them.
    assert (times[:150] - 60).abs().max() < 33


def test_a_subset_is_a_source():
    source = open_images("digits")
    subset = SourceSubset(source, torch.tensor([5, 700, 3]))
    assert len(subset) == 3
    for i, j in enumerate((5, 700, 3)):
        assert subset[i].index == i
        assert torch.equal(subset[i].image, source[j].image)
        assert subset[i].label == source[j].label == int(subset.labels[i])
        assert subset.name(i) == source.name(j)
    assert subset.fingerprint() != SourceSubset(source, torch.tensor([5, 700, 4])).fingerprint()


def test_the_interval_is_students():
    values = [0.51, 0.55, 0.48, 0.60, 0.52]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert half_width(values) == pytest.approx((high - low) / 2)
    assert half_width([0.5]) is None
    assert half_width([0.5, 0.5]) == 0.0


def test_digits_with_few_labels(tmp_path):
    encoder = network()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    results = low_shot_accuracy(
        override(CONFIG, layers=("1", "2"), seed=7), encoder, "digits", tmp_path / "out",
        few=(0.02, 0.3), per_class=(3,), seeds=2, finetune_epochs=5,
    )  # fmt: skip
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())
    assert results["seeds"] == [7, 8]
    small, large, three = results["subsets"]
    assert (small["few"], three["per_class"], three["images"]) == (0.02, 3, 30)
    assert set(large["linear"]) == {"1", "2"}
    assert set(large["finetuned"]) == {"2"}
    for how in ("linear", "finetuned"):
        few, many = (part[how]["2"]["top1"] for part in (small, large))
        assert len(few["values"]) == 2
        assert few["mean"] == pytest.approx(sum(few["values"]) / 2)
        assert few["interval"] == pytest.approx(half_width(few["values"]))
        assert many["mean"] > few["mean"] + 0.05
    assert large["finetuned"]["2"]["top1"]["mean"] > 0.85
    assert results["protocol"]["finetuned"]["finetune"] is True
    # The first linear head again, by hand: from these images alone.
    images, labels = digits("train")
    part = draw_fraction(labels, torch.arange(1400), 0.02, 7)
    assert small["images"] == len(part)
    with torch.no_grad():
        known = network().eval().features(images[part], ["2"])["2"]
        asked_images, asked = digits("val")
        queries = network().eval().features(asked_images, ["2"])["2"]
    head = fit_logistic_head(known, labels[part], part, 10, seed=7)
    right = (queries @ head.weight.T + head.bias).argmax(dim=1) == asked
    assert small["linear"]["2"]["top1"]["values"][0] == pytest.approx(
        right.double().mean().item(), abs=0.006
    )


def test_fine_tuning_learns_from_the_drawn_images_alone(tmp_path, pictures):
    """Damage of other images changes nothing."""
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    config = override(CONFIG, image_size=16, layers=("2",), memory="never", unreadable="skip")
    options = {"few": (), "per_class": (4,), "seeds": 1, "finetune_epochs": 1}
    first = low_shot_accuracy(config, network(), str(data), **options)
    source = open_images(data)
    used = draw_per_class(source.labels, torch.arange(48), 4, 0, source.classes)
    assert first["subsets"][0]["images"] == 8
    kept = [i for i in range(48) if i not in used.tolist()]
    for i in kept[:-2]:
        (data / "train" / source.name(i)).write_bytes(b"nothing")
    again = low_shot_accuracy(config, network(), str(data), **options, draw=lambda *_: used)
    assert again["unreadable"] == 38
    assert again["subsets"] == first["subsets"]
    assert first["subsets"][0]["finetuned"]["2"]["top1"]["interval"] is None


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ({"few": (0.0,)}, "option-invalid", "--few is 0"),
        ({"few": (1.5,)}, "option-invalid", "--few is 1.5"),
        ({"few": ()}, "option-missing", "--per-class"),
        ({"per_class": (0,)}, "option-invalid", "--per-class is 0"),
        ({"seeds": 0}, "option-invalid", "--seeds is 0"),
        ({"finetune_epochs": 0}, "option-invalid", "--epochs is 0"),
        ({"few": (), "per_class": (500,)}, "option-invalid", "--per-class is 500"),
    ],
)
def test_invalid_subsets_are_reported(options, code, named):
    with user_error(code, named):
        low_shot_accuracy(override(CONFIG, layers=("2",)), network(), "digits", **options)
