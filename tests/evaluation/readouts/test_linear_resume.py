"""Read-outs that are stopped anywhere and resumed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from expect import user_error
from readouts import MOVING, Killed, assert_same_end, killed_after_ten_steps, network
from safetensors.torch import load_file

from localagg.checkpoint import save_weights
from localagg.config import override
from localagg.errors import Interrupted
from localagg.evaluation.readouts.linear import TransferRecorder, resume_transfer, transfer
from localagg.io.metrics_log import read_metrics


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("transfer") / "whole"
    transfer(MOVING, network(), "digits", out)
    return out


@pytest.mark.parametrize("method", ["after_step", "measured", "end_of_epoch", "finish"])
def test_stopped_anywhere_and_resumed_ends_as_if_never_stopped(
    tmp_path, whole, monkeypatch, method
):
    """An epoch has 7 steps; the state is saved after each but an epoch's last."""
    original, calls, fatal = getattr(TransferRecorder, method), [], {2, 5, 9}

    def die(self, *arguments):
        calls.append(method)
        if len(calls) in fatal or (method == "finish" and len(calls) == 1):
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(TransferRecorder, method, die)
    broken, config = tmp_path / "broken", override(MOVING, checkpoint_seconds=0.0)
    with pytest.raises(Killed):
        transfer(config, network(), "digits", broken)
    deaths = 1
    while not (broken / "results.json").exists():
        try:
            resume_transfer(broken, weights=network())
        except Killed:
            deaths += 1
    assert deaths == {"after_step": 3, "measured": 1, "end_of_epoch": 1, "finish": 2}[method]
    assert_same_end(whole, broken)


def test_a_fine_tuning_resumes_with_its_network(tmp_path, monkeypatch):
    config = override(MOVING, finetune=True, checkpoint_seconds=0.0, ten_crop=False)
    transfer(config, network(), "digits", tmp_path / "whole")
    killed_after_ten_steps(monkeypatch, config, tmp_path / "broken")
    resume_transfer(tmp_path / "broken", weights=network())
    assert_same_end(tmp_path / "whole", tmp_path / "broken")
    one, other = (load_file(tmp_path / r / "encoder.safetensors") for r in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("step", [10, 14])
def test_ctrl_c_saves_and_names_the_folder_to_resume(tmp_path, whole, monkeypatch, step):
    save_weights(tmp_path / "weights.safetensors", network())
    original = TransferRecorder.after_step

    def press(self, *arguments):
        if self.probe.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, *arguments)

    monkeypatch.setattr(TransferRecorder, "after_step", press)
    with pytest.raises(Interrupted, match=rf"{step}.*--resume .*stopped"):
        transfer(MOVING, tmp_path / "weights.safetensors", "digits", tmp_path / "stopped")
    monkeypatch.setattr(TransferRecorder, "after_step", original)
    resume_transfer(tmp_path / "stopped", workers=1)
    expected = json.loads((whole / "results.json").read_text())
    found = json.loads((tmp_path / "stopped" / "results.json").read_text())
    assert found["layers"] == expected["layers"]
    assert read_metrics(tmp_path / "stopped") == read_metrics(whole)


def test_resuming_a_finished_transfer_gives_its_results(whole):
    expected = json.loads((whole / "results.json").read_text())
    assert resume_transfer(whole) == expected
    assert expected["steps"] == 3 * 7
    last = read_metrics(whole)[-1]
    assert last["top1_2"] == expected["layers"]["2"]["top1"]
    assert last["ten_crop_top1_2"] == expected["layers"]["2"]["ten_crop_top1"]


def test_other_weights_images_and_damage_are_reported(tmp_path, whole, pictures):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "results.json").unlink()
    with user_error("option-missing", run):
        resume_transfer(run)
    with user_error("mismatch", run):
        resume_transfer(run, weights=network(seed=1))
    with user_error("mismatch", "48 images", "1,400 images"):
        resume_transfer(run, weights=network(), data=str(pictures))
    state = bytearray((run / "state.pt").read_bytes())
    (run / "state.pt").write_bytes(state[: len(state) // 2])
    with user_error("damaged", run / "state.pt"):
        resume_transfer(run, weights=network())
    with user_error("not-found", pictures):
        resume_transfer(pictures)
    with user_error("not-found", tmp_path / "none"):
        resume_transfer(tmp_path / "none")
