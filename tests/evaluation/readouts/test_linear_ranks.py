"""Read-outs in several processes, and their forecast."""

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from expect import user_error
from ranks import in_threads
from readouts import heads, network

from localagg.checkpoint import save_weights
from localagg.cli.main import main
from localagg.config import TransferConfig, ViewConfig, override
from localagg.distributed.collectives import World
from localagg.evaluation.readouts.linear import read_out
from localagg.evaluation.readouts.readout_inputs import open_labeled

OPTIONS = shlex.split("--epochs 8 --batch-size 175 --workers 0 --layers 0 2 --device cpu")
PATIENCE = 300  # seconds


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path, network(), ViewConfig(image_size=8))
    return str(path)


@pytest.mark.parametrize("fixed", [False, True])
def test_two_ranks_equal_one(fixed):
    """Random views through the network, and cached features of fixed views; unequal shares."""
    still = {"crop": "center", "flip": 0.0, "gray": 0.0, "jitter": (0.0,) * 4} if fixed else {}
    config = override(
        TransferConfig(), epochs=1, batch_size=33, image_size=8, eval_crop=1.0, layers=("0", "2"),
        workers=0, device="cpu", ten_crop=False, **still,
    )  # fmt: skip
    splits = open_labeled("digits")
    one = read_out(config, network(), None, splits)
    copies = [network(), network()]  # threads share torch's generator
    found = in_threads(2, lambda w: read_out(config, copies[w.rank], None, splits, world=w))
    for two in found:
        for key in ("layers", "steps", "images", "measured", "protocol"):
            assert two[key] == one[key]


@pytest.mark.slow
def test_stopped_processes_resume_to_the_end_of_one(weights, tmp_path):
    first, whole = tmp_path / "first", tmp_path / "whole"
    words = ["transfer", weights, "--data", "digits", *OPTIONS]
    command = [sys.executable, "-m", "localagg", *words, "--out", str(first), "--processes", "2"]
    command += ["--checkpoint-seconds", "0"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not (first / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    job.send_signal(signal.SIGINT)
    _, stderr = job.communicate(timeout=PATIENCE)
    assert job.returncode == 130
    assert f"localagg transfer --resume {first}" in " ".join(stderr.split())
    assert main(["transfer", "--resume", str(first), "--processes", "2"]) == 0
    assert main([*words, "--out", str(whole)]) == 0
    for name, values in heads(whole).items():
        torch.testing.assert_close(heads(first)[name], values, rtol=1e-3, atol=1e-5)
    results = [json.loads((run / "results.json").read_text()) for run in (first, whole)]
    assert results[0]["layers"] == results[1]["layers"]


def test_what_several_processes_cannot_do_is_refused():
    splits = open_labeled("digits")
    for changes, value in (({"finetune": True}, "--finetune"), ({"batch_size": 1}, "--batch-size")):
        with user_error("option-conflict", value):
            config = override(TransferConfig(), image_size=8, **changes)
            read_out(config, network(), None, splits, world=World(0, 2))


def test_dry_run_prints_steps_and_heads(weights, tmp_path, capsys):
    file = tmp_path / "r.json"
    words = ["transfer", weights, "--data", "digits", *OPTIONS, "--dry-run", "--json", str(file)]
    assert main(words) == 0
    found = json.loads(file.read_text())
    assert found["steps"]["epoch"] == found["images"] // 175
    assert found["steps"]["total"] == 8 * (found["images"] // 175)
    features = network().eval().features(torch.zeros(1, 3, 8, 8), layers=["0", "2"])
    due = {layer: 10 * (values.shape[1] + 1) for layer, values in features.items()}
    assert found["heads"] == due
    assert f"{due['0']:,}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"r.json"}
    assert main([*words, "--processes", "2"]) == 2
