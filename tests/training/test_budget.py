"""Budgets: the first candidate that fits is chosen, on a device of a fixed speed."""

import pytest
from expect import user_error
from small_runs import QUICK

from localagg import checkpoint, pretrain, resume
from localagg.config import PretrainConfig, override
from localagg.data.sources.open import open_images
from localagg.recipes.derived_settings import resolve_defaults
from localagg.training import budget
from localagg.training.forecast import forecast

CPU = override(PretrainConfig(), device="cpu", workers=0)


@pytest.fixture
def device(monkeypatch):
    """A device whose step takes ``seconds`` an image, in proportion to width and pixels."""
    seconds = {"full": 1e-6}

    def training_seconds(learner, aggregating, *_):
        config = learner.config
        share = config.encoder.width / 64 * config.views.image_size**2 / 64**2
        return seconds["full"] * share * (2 if aggregating else 1)

    monkeypatch.setattr(budget, "training_seconds", training_seconds)
    monkeypatch.setattr(budget, "reading_seconds", lambda *_: 0.0)
    return seconds


def fit(config, pictures, **options):
    return budget.fit_budget(config, open_images(str(pictures)), **options)


def test_a_fast_device_runs_the_rule_and_a_slow_one_a_smaller_network(device, pictures):
    size = len(open_images(str(pictures)))
    rule = resolve_defaults(CPU, size, 48)
    fast = fit(CPU, pictures)
    assert (fast.encoder, fast.epochs) == (rule.encoder, rule.epochs)
    assert fast.views.image_size == rule.views.image_size == 48
    # 1.6 expects IR in two fifths of the epochs, 1.2 the rest of the run
    whole = size * rule.epochs * 1.2 * 1.6 * (48 / 64) ** 2 / 60  # minutes at a second an image
    device["full"] = 50 / whole
    slower = fit(CPU, pictures)
    assert (slower.encoder.width, slower.encoder.blocks) == (32, (1, 1, 1, 1))
    assert slower.epochs == rule.epochs
    assert fit(override(CPU, minutes=51), pictures).encoder == rule.encoder
    device["full"] = 5000 / whole
    slowest = fit(CPU, pictures)
    assert (slowest.encoder.width, slowest.views.image_size) == (16, 32)
    assert 1 <= slowest.epochs < rule.epochs


def test_a_network_that_is_far_too_slow_is_not_measured_further(device, pictures, monkeypatch):
    measured, measure = [], budget.training_seconds

    def training_seconds(learner, aggregating, *rest):
        measured.append((learner.config.encoder.width, aggregating))
        return measure(learner, aggregating, *rest)

    monkeypatch.setattr(budget, "training_seconds", training_seconds)
    device["full"] = 1e5
    fit(CPU, pictures)
    assert measured == [(64, False), (32, False), (16, False), (16, False), (16, True)]


def test_options_that_were_set_stay(device, pictures):
    device["full"] = 60.0
    for name, value in (("model", "resnet18"), ("width", 48), ("image_size", 40)):
        fitted = fit(override(CPU, **{name: value}), pictures)
        assert value in (getattr(fitted.encoder, name, None), getattr(fitted.views, name, None))
    assert fit(CPU, pictures, typed=["width"]).encoder.width == 64
    assert fit(override(CPU, ir_epochs=5), pictures).epochs == 5
    assert fit(override(CPU, epochs=7), pictures) == override(CPU, epochs=7)  # no budget
    assert fit(override(CPU, epochs=7, minutes=1.0), pictures).epochs == 7


def test_minutes_that_nothing_can_follow_are_refused(device, pictures):
    with user_error("option-conflict", "--minutes 5"):
        fit(override(QUICK, minutes=5.0), pictures)
    with user_error("option-invalid", "--minutes", "0"):
        override(CPU, minutes=0.0)


def test_a_dry_run_shows_the_run_and_a_resumed_run_measures_nothing(device, pictures, tmp_path):
    device["full"] = 0.4
    config = override(CPU, minutes=0.05, batch_size=24, eval_every=0)
    shown = forecast(config, str(pictures))
    out = pretrain(config, str(pictures), tmp_path / "run")
    assert (out["epochs"], out["steps"]) == (shown["config"]["epochs"], shown["steps"]["total"])
    stored = checkpoint.read_run(tmp_path / "run")[0]
    assert stored.encoder.width == 16
    device["full"] = float("nan")
    assert resume(tmp_path / "run") == out
