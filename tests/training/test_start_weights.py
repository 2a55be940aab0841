"""Runs that start from weights: a file, another run, and what a network's name promises."""

import json

import torch
from compare_runs import assert_same_run
from expect import user_error
from safetensors.torch import save_file
from small_runs import QUICK, state

from localagg import checkpoint, pretrain, resume
from localagg.cli.main import main
from localagg.config import override
from localagg.training.forecast import forecast
from localagg.training.recorder import Recorder

SHORT = override(QUICK, epochs=1, ir_epochs=1, eval_every=0, batch_size=700)
STILL = override(SHORT, learning_rate=1e-30)


def test_a_run_starts_from_the_weights_of_another(tmp_path, capsys, monkeypatch):
    pretrain(SHORT, "digits", tmp_path / "first")
    learned = state(tmp_path / "first")
    weights = str(tmp_path / "first")
    capsys.readouterr()
    pretrain(override(STILL, weights=weights), "digits", tmp_path / "run")
    assert f"{len(checkpoint.load_encoder(weights).state_dict())}" in capsys.readouterr().err
    found = state(tmp_path / "run")
    for name in learned:
        if name.startswith("model/") and "running" not in name and "tracked" not in name:
            assert torch.equal(found[name], learned[name]), name
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert stored["encoder"]["weights"] == weights

    def die(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "__enter__", die)  # before the first checkpoint
    try:
        pretrain(override(STILL, weights=weights), "digits", tmp_path / "killed")
    except KeyboardInterrupt:
        monkeypatch.undo()
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "run", tmp_path / "killed")


def test_weights_that_cannot_be_loaded_end_the_run_before_it_begins(tmp_path, capsys):
    run = tmp_path / "run"
    other = tmp_path / "other.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, other)
    for weights, code in ((str(other), "mismatch"), (str(tmp_path / "none.pth"), "not-found")):
        with user_error(code, weights):
            pretrain(override(SHORT, weights=weights), "digits", run)
        with user_error(code, weights):
            forecast(override(SHORT, weights=weights), "digits")
    with user_error("option-conflict", "--weights", "--start"):
        pretrain(override(SHORT, weights=str(other)), "digits", run, start=tmp_path)
    assert not run.exists()
    words = ["pretrain", "digits", "--data", "digits", "--out", str(run), "--weights", str(other)]
    assert main(words) == 2
    assert "conv1.weight" in capsys.readouterr().err
    assert not run.exists()


def test_a_name_of_timm_with_weights_never_starts_at_random(tmp_path):
    config = override(SHORT, model="timm:resnet18.a1_in1k")
    for start in (
        lambda: pretrain(config, "digits", tmp_path / "run"),
        lambda: forecast(config, "digits"),
    ):
        with user_error("option-missing", "'a1_in1k'", "--weights", "timm:resnet18"):
            start()
    assert not (tmp_path / "run").exists()
