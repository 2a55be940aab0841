"""Quick read-outs: scikit-learn's accuracy, no look at held-out labels, budgets, invalid inputs."""

import json
import shutil

import numpy as np
import pytest
import torch
from damage import middle_lost
from expect import user_error
from readouts import count_extracted, digits, network, saved_dataset
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from localagg.checkpoint import save_weights
from localagg.config import TransferConfig, ViewConfig, override
from localagg.evaluation.readouts.logistic_regression import DEFAULT_L2, L2_GRID
from localagg.evaluation.readouts.quick_readout import cache_features, quick_readout
from localagg.evaluation.readouts.readout_inputs import open_labeled

QUICK = override(TransferConfig(), image_size=8, device="cpu", precision="32-true", workers=0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick") / "whole"
    return quick_readout(QUICK, network(), "digits", out, ten_crop=True), out


@pytest.mark.parametrize("layer", ["0", "2"])
def test_accuracy_is_scikit_learns_at_the_same_regularization(whole, layer):
    results, out = whole
    features, labels = {}, {}
    for split in ("train", "val"):
        images, labels[split] = digits(split)
        with torch.no_grad():
            features[split] = network().eval().features(images, [layer])[layer].numpy()
    scaler = StandardScaler().fit(features["train"])
    l2 = results["regularization"][layer]
    solver = LogisticRegression(C=1 / (1400 * l2), tol=1e-6, max_iter=2000)
    solver.fit(scaler.transform(features["train"]), labels["train"])
    expected = solver.score(scaler.transform(features["val"]), labels["val"])
    found = results["layers"][layer]
    assert found["top1"] == pytest.approx(expected, abs=0.003)
    # The accuracy is that of the head that was written, over all 397 held-out images.
    heads = load_file(out / "heads.safetensors")
    logits = features["val"] @ heads[f"{layer}.weight"].numpy().T + heads[f"{layer}.bias"].numpy()
    hit = np.argsort(-logits, axis=1) == labels["val"].numpy()[:, None]
    assert found["top1"] == pytest.approx(hit[:, 0].mean())
    assert found["top5"] == pytest.approx(hit[:, :5].any(axis=1).mean())


def test_results_are_written_and_complete(whole):
    results, out = whole
    assert json.loads((out / "results.json").read_text()) == results
    assert (results["images"], results["measured"], results["unreadable"]) == (1400, 397, 0)
    assert results["protocol"]["method"] == "quick logistic regression"
    assert results["protocol"]["ten_crop"] is True
    assert set(results["regularization"].values()) <= set(L2_GRID)
    assert results["regularization_chosen"] is True
    assert results["left_out"] == {}
    with user_error("exists", out):
        quick_readout(QUICK, network(), "digits", out)


def test_a_cache_among_the_images_is_refused(tmp_path, pictures):
    data = saved_dataset(tmp_path / "data", pictures, [0, 1, 2] * 8, [0, 1, 2])
    with user_error("option-conflict", "--cache", tmp_path / "data"):
        quick_readout(override(QUICK, cache=str(tmp_path / "data" / "cache")), network(), data)
    assert not (tmp_path / "data" / "cache").exists()


def test_ten_crops_are_scored_by_mean_softmax(whole):
    results, out = whole
    heads = load_file(out / "heads.safetensors")
    images, labels = digits("val")
    mean = 0
    for views in (images, images.flip(3)):  # whole 8 x 8 images: five times the same two views
        with torch.no_grad():
            x = network().eval().features(views, ["1"])["1"]
        mean = mean + (x @ heads["1.weight"].T + heads["1.bias"]).double().softmax(dim=1)
    right = (mean.argmax(dim=1) == labels).double().mean().item()
    assert results["layers"]["1"]["ten_crop_top1"] == pytest.approx(right)


def test_held_out_labels_do_not_touch_the_heads():
    splits = open_labeled("digits")
    heads = []
    for held_out_labels in (splits.held_out_labels, splits.held_out_labels.flip(0)):
        changed = splits._replace(held_out_labels=held_out_labels)
        frozen = cache_features(override(QUICK, layers=("2",)), network(), None, changed)
        heads.append(frozen.fit_heads(frozen.training.index, 0)["2"])
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert heads[0].l2 == heads[1].l2


def test_features_are_computed_once(tmp_path, monkeypatch):
    config = override(QUICK, cache=str(tmp_path / "cache"), layers=("1", "2"))
    first = quick_readout(config, network(), "digits")
    calls = count_extracted(monkeypatch)
    again = quick_readout(override(config, seed=1, layers=("2",)), network(), "digits")
    assert calls == [1]  # the blank image that determines the sizes
    assert again["layers"]["2"]["top1"] == pytest.approx(first["layers"]["2"]["top1"], abs=0.02)


def test_layers_that_do_not_fit_are_left_out_or_reported(tmp_path):
    wide = 1797 * 512 * 4 / 2**30  # of layers 0 and 1; 2 has 256 values
    config = override(QUICK, cache=str(tmp_path), cache_gb=2 * wide)
    results = quick_readout(config, network(), "digits")
    assert list(results["layers"]) == ["1", "2"]
    assert list(results["left_out"]) == ["0"]
    for change in ({"layers": ("0", "1"), "cache_gb": 1.1 * wide}, {"cache_gb": 1e-6}):
        with user_error("too-large", "0 (", "--cache-gb", "--layers"):
            quick_readout(override(config, **change), network(), "digits")


def test_weights_lend_their_views(tmp_path):
    save_weights(tmp_path / "w.safetensors", network(), ViewConfig(image_size=16, eval_crop=0.5))
    config = override(TransferConfig(), device="cpu", workers=0, layers=("2",))
    results = quick_readout(config, tmp_path / "w.safetensors", "digits")
    assert (results["protocol"]["eval_crop"], results["protocol"]["image_size"]) == (0.5, 16)
    assert results["run"] == str(tmp_path / "w.safetensors")


def test_unreadable_images_are_reported_or_counted(tmp_path, pictures, capsys):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    config = override(QUICK, image_size=16)
    held_out = data / "val" / "temple" / "01.jpg"
    whole = held_out.read_bytes()
    held_out.write_bytes(middle_lost(whole))
    with user_error("unreadable-images", "1 of", "temple/01.jpg"):
        quick_readout(config, network(), str(data))
    held_out.write_bytes(whole)
    header, tail = data / "train" / "flower" / "03.jpg", data / "train" / "temple" / "05.jpg"
    tail.write_bytes(middle_lost(tail.read_bytes()))
    with user_error("unreadable-images", "1 of", "temple/05.jpg"):
        quick_readout(config, network(), str(data))
    header.write_bytes(b"nothing")
    with user_error("unreadable-images", "1 of", "flower/03.jpg"):
        quick_readout(config, network(), str(data))
    held_out.write_bytes(middle_lost(held_out.read_bytes()))
    results = quick_readout(override(config, unreadable="skip"), network(), str(data))
    assert (results["images"], results["measured"], results["unreadable"]) == (46, 11, 3)
    said = capsys.readouterr().err
    assert [text in said for text in ("2 unreadable images", "1 unreadable image ")] == [True] * 2
    for file in (data / "train" / "flower").iterdir():
        file.write_bytes(b"nothing")
    with user_error("no-labels", data):
        quick_readout(override(config, unreadable="skip"), network(), str(data))


def test_two_images_and_more_classes_than_images(tmp_path, pictures):
    data = saved_dataset(tmp_path / "two", pictures, [0, 2], [2, 1])
    results = quick_readout(override(QUICK, image_size=16), network(), data)
    assert (results["images"], results["measured"], results["classes"]) == (2, 2, 3)
    assert results["regularization"] == dict.fromkeys(("0", "1", "2"), DEFAULT_L2)
    assert results["regularization_chosen"] is False
    assert results["layers"]["2"]["top5"] == 1.0
