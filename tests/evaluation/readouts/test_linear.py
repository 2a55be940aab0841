"""Linear read-outs: heads against a float64 softmax regression, whole runs, invalid inputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import middle_lost
from expect import user_error
from readouts import (
    MOVING,
    STILL,
    assert_same_end,
    count_extracted,
    digits,
    heads,
    killed_after_ten_steps,
    network,
    saved_dataset,
)
from sklearn.linear_model import LogisticRegression

from localagg.checkpoint import load_encoder
from localagg.config import TransferConfig, override
from localagg.evaluation.readouts.linear import resume_transfer, transfer
from localagg.evaluation.readouts.linear_heads import linear_head
from localagg.models import create_encoder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("transfer") / "whole"
    transfer(MOVING, network(), "digits", out)
    return out


# --- Heads ------------------------------------------------------------------------------


def softmax_regression(features, labels, weight, bias, rates, momentum, decay):
    """Full-batch steps of SGD on the mean cross-entropy with L2, in float64 by hand."""
    x, w, b = (np.asarray(value, dtype=np.float64) for value in (features, weight, bias))
    speed_w, speed_b = np.zeros_like(w), np.zeros_like(b)
    target = np.eye(len(b))[labels]
    for rate in rates:
        logits = x @ w.T + b
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        speed_w = momentum * speed_w + (p - target).T @ x / len(x) + decay * w
        speed_b = momentum * speed_b + (p - target).mean(axis=0) + decay * b
        w, b = w - rate * speed_w, b - rate * speed_b
    return w, b


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_heads_take_the_steps_of_a_float64_softmax_regression(tmp_path, decay):
    config = override(
        STILL, epochs=4, batch_size=1400, drops=(2.0,), learning_rate=0.05, weight_decay=decay,
        layers=("0", "2"), seed=3,
    )  # fmt: skip
    encoder = network()
    transfer(config, encoder, "digits", tmp_path / "out")
    images, labels = digits("train")
    features = encoder.eval().features(images, ["0", "2"])
    found = heads(tmp_path / "out")
    for layer in ("0", "2"):
        x = features[layer].detach()
        start = linear_head(x.shape[1], 10, 3, layer)
        rates = (0.05, 0.05, 0.05, 0.005)  # the rate drops on the step after the boundary
        w, b = softmax_regression(
            x, labels, start.weight.detach(), start.bias.detach(), rates, 0.9, decay
        )
        assert np.abs(found[f"{layer}.weight"] - w).max() < 2e-6 * np.abs(w).max()
        assert np.abs(found[f"{layer}.bias"] - b).max() < 2e-6 * np.abs(b).max()


def test_heads_trained_together_equal_heads_trained_alone(tmp_path, whole):
    together = heads(whole)
    assert len(together) == 2 * 3
    for layer in ("0", "1", "2"):
        config = override(MOVING, layers=(layer,), ten_crop=False)
        transfer(config, network(), "digits", tmp_path / layer)
        for name, tensor in heads(tmp_path / layer).items():
            assert torch.equal(tensor, together[name])


@pytest.mark.slow
def test_five_layers_of_real_pictures_together_and_alone(tmp_path, pictures):
    encoder = create_encoder("resnet18_small", 16, seed=0, width=8, blocks=(1, 1, 1, 1))
    config = override(
        MOVING, epochs=2, batch_size=8, image_size=16, jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2,
        memory="never", workers=2, eval_every=0, ten_crop=False,
    )  # fmt: skip
    out = transfer(config, encoder, str(pictures), tmp_path / "all")
    assert list(out["layers"]) == ["0", "1", "2", "3", "4"]
    assert (out["images"], out["measured"], out["unreadable"]) == (48, 12, 0)
    for layer in out["layers"]:
        single = override(config, layers=(layer,), workers=0)
        transfer(single, encoder, str(pictures), tmp_path / layer)
        for name, tensor in heads(tmp_path / layer).items():
            assert torch.equal(tensor, heads(tmp_path / "all")[name])


def test_a_head_learns_what_logistic_regression_learns(tmp_path):
    encoder = network()
    config = override(STILL, epochs=20, batch_size=50, layers=("1",))
    out = transfer(config, encoder, "digits", tmp_path / "out")
    features, labels = {}, {}
    for split in ("train", "val"):
        images, known = digits(split)
        features[split] = encoder.eval().features(images, ["1"])["1"].detach().numpy()
        labels[split] = known.numpy()
    solver = LogisticRegression(C=1 / (1400 * 1e-4), max_iter=1000)
    expected = solver.fit(features["train"], labels["train"]).score(features["val"], labels["val"])
    assert out["layers"]["1"]["top1"] == pytest.approx(expected, abs=0.02)
    # The accuracy is that of the head that was written, over all 397 held-out images.
    head = heads(tmp_path / "out")
    logits = features["val"] @ head["1.weight"].numpy().T + head["1.bias"].numpy()
    order = np.argsort(-logits, axis=1)
    hit = order == labels["val"][:, None]
    assert out["measured"] == 397
    assert out["layers"]["1"]["top1"] == pytest.approx(hit[:, :1].any(axis=1).mean())
    assert out["layers"]["1"]["top5"] == pytest.approx(hit[:, :5].any(axis=1).mean())


def test_a_given_encoder_is_not_changed(tmp_path):
    encoder = network().train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for finetune in (False, True):
        transfer(override(MOVING, epochs=1, finetune=finetune), encoder, "digits")
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert all(torch.equal(before[name], t) for name, t in encoder.state_dict().items())


def test_fine_tuning_trains_the_network_and_its_batch_norm(tmp_path):
    encoder = network()
    config = override(MOVING, finetune=True, epochs=2)
    out = transfer(config, encoder, "digits", tmp_path / "out")
    tuned = load_encoder(tmp_path / "out" / "encoder.safetensors").state_dict()
    old = encoder.state_dict()
    for name in ("backbone.stem.weight", "backbone.stem_norm.running_mean"):
        assert not torch.equal(tuned[name], old[name])
    assert torch.equal(tuned["head.weight"], old["head.weight"])  # no read-out uses it
    assert out["protocol"]["finetune"] is True


# --- Cached features --------------------------------------------------------------


FIXED = override(
    STILL, crop="center", eval_crop=0.75, image_size=12, epochs=3, batch_size=200, drops=(2.0,),
    eval_every=1,
)  # fmt: skip


@pytest.mark.parametrize("memory", ["auto", "never"])
def test_heads_on_cached_features_equal_heads_on_views(tmp_path, monkeypatch, memory):
    calls = count_extracted(monkeypatch)
    config = override(FIXED, memory=memory, workers=0, cache=str(tmp_path / "cache"))
    results = {}
    for name, gb in (("kept", 1.0), ("anew", 0.0), ("again", 1.0)):
        before = sum(calls)
        chosen = override(config, cache_gb=gb)
        results[name] = transfer(chosen, network(), "digits", tmp_path / name)
        blank = 1 if gb else 0
        computed = 1400 + 397 if name == "kept" else 0
        assert sum(calls) - before == computed + blank
    kept, anew, again = (heads(tmp_path / name) for name in ("kept", "anew", "again"))
    for name, tensor in anew.items():
        start = linear_head(tensor.shape[1], 10, 0, name[0]).weight if "weight" in name else 0
        assert (tensor - start).abs().max() > 1e-3  # it has learned
        assert (kept[name] - tensor).abs().max() <= 1e-6
        assert torch.equal(kept[name], again[name])
    assert results["kept"]["layers"] == results["anew"]["layers"]


def test_random_views_and_fine_tuning_cache_no_training_features(tmp_path):
    for name, config, kept in (
        ("moving", override(MOVING, epochs=1), 1),
        ("tuned", override(FIXED, epochs=1, finetune=True), 0),
        ("fixed", override(FIXED, epochs=1), 2),
    ):
        cache = tmp_path / name
        transfer(override(config, layers=("2",), cache=str(cache)), network(), "digits")
        assert len(list(cache.glob("*/features.npy"))) == kept


def test_features_beyond_the_budget_are_computed_in_each_epoch(tmp_path, capsys):
    config = override(FIXED, epochs=1, layers=("2",), cache=str(tmp_path), cache_gb=1e-4)
    tight, wide = (
        transfer(override(config, cache_gb=gb), network(), "digits") for gb in (1e-4, 1.0)
    )
    assert tight["layers"] == wide["layers"]
    assert "--cache-gb 0.0001" in capsys.readouterr().err


def test_a_transfer_on_cached_features_resumes(tmp_path, monkeypatch):
    config = override(FIXED, checkpoint_seconds=0.0, cache=str(tmp_path / "cache"))
    transfer(config, network(), "digits", tmp_path / "whole")
    killed_after_ten_steps(monkeypatch, config, tmp_path / "broken")
    shutil.rmtree(tmp_path / "cache")
    resume_transfer(tmp_path / "broken", weights=network())
    assert_same_end(tmp_path / "whole", tmp_path / "broken")


def test_damage_found_while_features_are_computed_is_reported(tmp_path, pictures):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    file = data / "train" / "flower" / "03.jpg"
    file.write_bytes(middle_lost(file.read_bytes()))
    config = override(FIXED, epochs=1, batch_size=8, workers=0)
    with user_error("unreadable-images", "1 of", "flower/03.jpg"):
        transfer(config, network(), str(data))
    out = transfer(override(config, unreadable="skip"), network(), str(data))
    assert (out["images"], out["unreadable"]) == (47, 1)
    with user_error("option-invalid", "--batch-size", 48, 47):
        transfer(override(config, unreadable="skip", batch_size=48), network(), str(data))


# --- Scores -----------------------------------------------------------------------------


def test_ten_crops_are_scored_by_mean_softmax(whole):
    out = json.loads((whole / "results.json").read_text())
    assert set(out["layers"]["1"]) == {"top1", "top5", "ten_crop_top1", "ten_crop_top5"}
    head, encoder = heads(whole), network().eval()
    images, labels = digits("val")
    hits = 0
    for views in (images, images.flip(3)):  # whole 8 x 8 images: five times the same two views
        x = encoder.features(views, ["1"])["1"].detach()
        hits = hits + (x @ head["1.weight"].T + head["1.bias"]).double().softmax(dim=1)
    expected = (hits.argmax(dim=1) == labels).double().mean().item()
    assert out["layers"]["1"]["ten_crop_top1"] == pytest.approx(expected)


# --- Invalid inputs ------------------------------------------------------------------------------


def test_invalid_folders_and_options_are_reported(tmp_path, whole, pictures):
    with user_error("exists", whole, "--resume"):
        transfer(MOVING, network(), "digits", whole)
    with user_error("exists", pictures):
        transfer(MOVING, network(), "digits", pictures)
    with user_error("option-unknown", "'7'"):
        transfer(override(MOVING, layers=("7",)), network(), "digits", tmp_path / "a")
    for layers in (("1", "1"), ()):
        with user_error("option-invalid", "--layers"):
            override(MOVING, layers=layers)
    with user_error("option-invalid", "--batch-size", "1,400"):
        transfer(override(MOVING, batch_size=1401), network(), "digits", tmp_path / "a")
    with user_error("not-finite", "layer 0", "--learning-rate"):
        transfer(override(MOVING, learning_rate=1e30), network(), "digits", tmp_path / "b")
    assert not (tmp_path / "a").exists()


def test_unreadable_images_are_reported_or_counted(tmp_path, pictures):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "train" / "flower" / "03.jpg").write_bytes(b"nothing")
    whole_file = (data / "val" / "temple" / "01.jpg").read_bytes()
    config = override(MOVING, epochs=1, batch_size=8, image_size=16, workers=0, ten_crop=False)
    with user_error("unreadable-images", "1 of", "flower/03.jpg"):
        transfer(config, network(), str(data), tmp_path / "out")
    shutil.copy(pictures / "train" / "flower" / "03.jpg", data / "train" / "flower" / "03.jpg")
    (data / "val" / "temple" / "01.jpg").write_bytes(b"nothing")
    with user_error("unreadable-images", "1 of", "temple/01.jpg"):
        transfer(config, network(), str(data), tmp_path / "out")
    (data / "val" / "temple" / "01.jpg").write_bytes(middle_lost(whole_file))
    assert transfer(config, network(), str(data))["unreadable"] == 1  # found when decoded
    (data / "train" / "flower" / "03.jpg").write_bytes(b"nothing")
    out = transfer(override(config, unreadable="skip"), network(), str(data))
    assert (out["images"], out["measured"], out["unreadable"]) == (47, 11, 2)


def test_two_images_and_more_classes_than_images(tmp_path, pictures):
    data = saved_dataset(tmp_path / "two", pictures, [0, 2], [2, 1])
    config = override(MOVING, epochs=1, batch_size=None, image_size=16, workers=0)
    out = transfer(config, network(), data)
    assert (out["images"], out["measured"], out["classes"], out["steps"]) == (2, 2, 3, 1)


def test_one_readable_class_or_no_readable_held_out_image_is_reported(tmp_path, pictures):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    config = override(
        MOVING, epochs=1, batch_size=8, image_size=16, workers=0, memory="never",
        unreadable="skip", eval_every=0,
    )  # fmt: skip
    for file in (data / "val").rglob("*.*"):
        file.write_bytes(middle_lost(file.read_bytes()))
    for gb in (0.0, 1.0):
        with user_error("unreadable-images"):
            transfer(override(config, cache_gb=gb), network(), str(data))
    for file in (data / "train" / "flower").iterdir():
        file.write_bytes(b"nothing")
    with user_error("no-labels", data):
        transfer(override(config, cache_gb=0.0), network(), str(data))


def test_a_run_lends_its_views(tmp_path):
    from localagg.checkpoint import read_run
    from localagg.config import to_dict
    from localagg.recipes.builtin import recipe
    from localagg.training.runs import pretrain

    config = override(
        recipe("digits").config, epochs=1, ir_epochs=1, width=8, blocks=(1,), batch_size=350,
        eval_every=0, device="cpu",
    )  # fmt: skip
    run = tmp_path / "run"
    pretrain(config, "digits", run)
    short = TransferConfig(epochs=1, batch_size=700, ten_crop=False, device="cpu")
    transfer(short, run, "digits", tmp_path / "a")
    transfer(override(short, flip=0.25), run, "digits", tmp_path / "b")
    views = [
        json.loads((tmp_path / name / "transfer.json").read_text())["config"]["views"]
        for name in ("a", "b")
    ]
    lent = json.loads(json.dumps(to_dict(read_run(run)[0].views)))
    assert views[0] == lent
    assert views[0]["flip"] == 0.0
    assert (views[1]["flip"], views[1]["gray"]) == (0.25, 0.2)
    assert views[1]["image_size"] == lent["image_size"] == 16
